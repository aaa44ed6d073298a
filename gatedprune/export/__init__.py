"""Export: the compact model, with its per-input selection inside the graph, as a file for another runtime.

`exporter` lowers, writes whole or not at all, and checks; `batched` holds the operators that leave the loop over
samples out of the graph; `formats` writes and reads.
"""

import sys
import types
from typing import Any

from .exporter import Exported, export

__all__ = ["Exported", "export"]


class _Callable(types.ModuleType):
    """Importing this package binds its name in `gatedprune` over the function's: calling either is the same."""

    def __call__(self, *args: Any, **kwargs: Any) -> Exported:
        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
