"""Static pruning (torch-pruning) against dynamic gating: same sites, same k, one table."""

import sys
import types
from typing import Any

from .comparison import compare, compare_models
from .rankings import RANKINGS
from .result import Comparison, Row
from .static import StaticResult, prune_static

__all__ = ["RANKINGS", "Comparison", "Row", "StaticResult", "compare", "compare_models", "prune_static"]


class _Callable(types.ModuleType):
    """Importing this package binds its name in `gatedprune` over the function's: calling either is the same."""

    def __call__(self, *args: Any, **kwargs: Any) -> Comparison:
        return compare(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
