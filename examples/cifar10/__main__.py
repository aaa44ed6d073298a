"""`python -m gatedprune.examples.cifar10`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
