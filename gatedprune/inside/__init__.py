"""Looking inside a gated model: which channels win for which inputs, and removing those that never do.

`counts` counts wins over a data set, `overlap` lays the choices for single images side by side, `plots` draws both,
`images` reads images as timm would for the model. `dead` removes channels for good, which `cutting` cuts out.
"""

from .counts import SiteUsage, Usage, usage
from .cutting import cut_again, cut_sites
from .dead import DeadPruning, prune_dead
from .images import image_set, load_images
from .overlap import Choices, SiteChoices, choices

__all__ = [
    "Choices",
    "DeadPruning",
    "SiteChoices",
    "SiteUsage",
    "Usage",
    "choices",
    "cut_again",
    "cut_sites",
    "image_set",
    "load_images",
    "prune_dead",
    "usage",
]
