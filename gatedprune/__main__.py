"""`python -m gatedprune`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="gatedprune")
