"""`python -m gatedprune.examples.kitti`."""

import sys


def _run() -> int:
    try:
        from .cli import main
    except ModuleNotFoundError as error:
        if error.name not in ("cv2", "tqdm"):
            raise
        print(f"error: the KITTI example needs {error.name}: pip install 'gatedprune[kitti]'", file=sys.stderr)
        return 2
    return main()


if __name__ == "__main__":
    sys.exit(_run())
