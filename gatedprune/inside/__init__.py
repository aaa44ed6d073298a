"""Looking inside a gated model: which channels win for which inputs, and removing those that never do.

`usage` counts wins over a data set, `overlap` lays the choices for single images side by side, `plots` draws both,
`images` reads images as timm would for the model.
"""

from .counts import SiteUsage, Usage, usage
from .images import image_set, load_images
from .overlap import Choices, SiteChoices, choices

__all__ = [
    "Choices",
    "SiteChoices",
    "SiteUsage",
    "Usage",
    "choices",
    "image_set",
    "load_images",
    "usage",
]
