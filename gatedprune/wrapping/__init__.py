"""Surgery: `wrap` puts gates into a model, `unwrap` takes them out. No mathematics here.

`wrap` plans and checks first (`plan`), and mutates last (`model`); `hooks` run the gates inside the model's own forward
pass; `importance` gives the ranking from which a gate starts.
"""

from .containers import GATES
from .importance import magnitude_importance
from .model import GatedModel, is_gated, unwrap, wrap

__all__ = ["GATES", "GatedModel", "is_gated", "magnitude_importance", "unwrap", "wrap"]
