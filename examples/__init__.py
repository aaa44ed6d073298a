"""Complete programs built on gatedprune; installed as `gatedprune.examples` and run with `python -m`."""
