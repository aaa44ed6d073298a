"""Dynamic channel pruning for the timm model zoo: every input decides which channels are computed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .config import GateConfig
from .errors import GatedPruneError
from .sites import Site, SiteReport, find_sites
from .wrapping import is_gated, unwrap, wrap

if TYPE_CHECKING:
    from .compare import compare, prune_static
    from .engine import compact
    from .export import export
    from .io import from_pretrained, load, push_to_hub, save
    from .measure import count_macs, measure_latency
    from .training import calibrate

__all__ = [
    "GateConfig",
    "GatedPruneError",
    "Site",
    "SiteReport",
    "__version__",
    "calibrate",
    "compact",
    "compare",
    "count_macs",
    "export",
    "find_sites",
    "from_pretrained",
    "is_gated",
    "load",
    "measure_latency",
    "prune_static",
    "push_to_hub",
    "save",
    "unwrap",
    "wrap",
]

# Loaded when first asked for: torch-pruning and thop, which these need, are optional.
_LAZY = {
    "calibrate": "training",
    "compact": "engine",
    "compare": "compare",
    "count_macs": "measure",
    "export": "export",
    "from_pretrained": "io",
    "load": "io",
    "measure_latency": "measure",
    "prune_static": "compare",
    "push_to_hub": "io",
    "save": "io",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value  # also where a subpackage of the same name (compare) was bound by its import
    return value
