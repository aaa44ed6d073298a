"""Surgery: `wrap` puts gates into a model, `unwrap` takes them out. No mathematics here.

`wrap` plans and checks first (`plan`), and mutates last (`model`); `hooks` run the gates inside the model's own forward
pass; `budget` counts MACs; `importance` gives the ranking from which a gate starts; `matching` keeps what calibration
does to batch norms.
"""

from .budget import macs_left
from .containers import GATES
from .importance import magnitude_importance
from .matching import GateModules, apply_match, bake, baked, is_match
from .model import GatedModel, is_gated, unwrap, wrap

__all__ = [
    "GATES", "GateModules", "GatedModel", "apply_match", "bake", "baked", "is_gated", "is_match", "macs_left",
    "magnitude_importance", "unwrap", "wrap",
]  # fmt: skip
