"""Sites: what can be gated, found on the operator graph.

`capture` records the operators, `labels` and `rules` follow channels through them (`flow`), `boundary` finds module
borders to attach to, `discovery` puts sites together and `site` describes them.
"""

from .capture import GATING_STATE, capture, evaluating, normalise_inputs, suspended, two_samples
from .discovery import Analysis, SiteNodes, analyse, find_sites
from .norms import norm_options
from .site import Attach, Edge, Layer, NormAt, Site, SiteReport
from .turns import TURNS

__all__ = [
    "GATING_STATE",
    "TURNS",
    "Analysis",
    "Attach",
    "Edge",
    "NormAt",
    "Layer",
    "Site",
    "SiteNodes",
    "SiteReport",
    "analyse",
    "capture",
    "evaluating",
    "find_sites",
    "norm_options",
    "normalise_inputs",
    "suspended",
    "two_samples",
]
