"""Static pruning (torch-pruning) against dynamic gating: same sites, same k, one table."""

from .comparison import Comparison, Row, compare, compare_models
from .static import StaticResult, prune_static

__all__ = ["Comparison", "Row", "StaticResult", "compare", "compare_models", "prune_static"]
