"""Dense, static and dynamic, trained alike on CIFAR-10: accuracy over MACs and over measured milliseconds.

`python -m gatedprune.examples.cifar10 --help`; the page is docs/compare.md.
"""
