"""Sites: what can be gated, found on the operator graph.

`capture` records the operators, `labels` and `rules` follow channels through them (`flow`), `boundary` finds module
borders to attach to, `discovery` puts sites together and `site` describes them.
"""

from .capture import GATING_STATE, capture, evaluating, normalise_inputs, suspended, two_samples
from .discovery import Analysis, SiteNodes, analyse, find_sites
from .site import Attach, Edge, Layer, Site, SiteReport

__all__ = [
    "GATING_STATE",
    "Analysis",
    "Attach",
    "Edge",
    "Layer",
    "Site",
    "SiteNodes",
    "SiteReport",
    "analyse",
    "capture",
    "evaluating",
    "find_sites",
    "normalise_inputs",
    "suspended",
    "two_samples",
]
