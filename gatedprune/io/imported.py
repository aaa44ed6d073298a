"""``module:callable``: how a model of one's own is named on the command line."""

from __future__ import annotations

import importlib
import sys
from typing import Any

__all__ = ["find_imported"]


def find_imported(value: str) -> Any:
    """What ``package.module:name`` names; modules in the current folder count, as under ``python -m``.

    Raises:
        ImportError, AttributeError, ValueError: There is no such module, or nothing of that name in it.
    """
    module, _, name = value.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    target: Any = importlib.import_module(module)
    for part in name.split("."):
        target = getattr(target, part)
    return target
