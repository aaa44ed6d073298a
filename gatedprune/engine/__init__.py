"""The engine: a model that computes only active channels.

`compact` keeps one lowered graph per image size; `lowering` makes it out of the captured graph, with `layout` (which
channels a narrow tensor holds) and `constants` (folding), `fusion` lets layers take in what follows them;
`narrow` holds the operators, in plain PyTorch, and `native` the same ones in C++, where `program` also runs a whole
graph once it has been recorded. `frozen` cuts a model for active sets that never change.
"""

from .compact import CompactModel, compact
from .frozen import FrozenModel, freeze
from .narrow import NarrowConv2d, NarrowLinear
from .selection import Selector

__all__ = ["CompactModel", "FrozenModel", "NarrowConv2d", "NarrowLinear", "Selector", "compact", "freeze"]
