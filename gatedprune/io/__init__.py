"""`save` and `load`: a gated model as a folder of one safetensors file and one JSON file; `hub`: the same on the hub.

The folder names a timm architecture and its arguments (`architecture`), so that `load` can build the model again
without network; a model of any other kind is built by the user and given to `load`, or named as module:callable
(`imported`). Nothing is unpickled.
"""

from .hub import from_pretrained, push_to_hub
from .imported import find_imported
from .loading import is_saved, load
from .saving import save
from .weights import load_weights, pretrained

__all__ = ["find_imported", "from_pretrained", "is_saved", "load", "load_weights", "pretrained", "push_to_hub", "save"]
