"""Static magnitude importance: the ranking from which an untrained gate starts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..sites import Edge, Site

__all__ = ["magnitude_importance"]


def _per_channel(module: nn.Module, edge: Edge) -> Tensor | None:
    """Squared L2 norm of the weights of each channel along the edge's dimension, (n,)."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    w = weight.detach().float() if weight.dtype in (torch.float16, torch.bfloat16) else weight.detach()
    if edge.op == "batch_norm":
        norms = w.square()
    elif w.dim() < 2:
        return None
    else:
        dim = edge.dim if not getattr(module, "transposed", False) else 1 - edge.dim
        norms = w.transpose(0, dim).flatten(1).square().sum(1)
    return norms if len(norms) == len(edge.units) else None


def magnitude_importance(model: nn.Module, site: Site) -> Tensor:
    """Group magnitude importance of each channel of a site, (C,), mean 1.

    The sum of the squared weights that write, scale and read the channel: the ranking of torch-pruning's
    ``GroupMagnitudeImportance(p=2)``, so that an untouched gate chooses what static pruning would. Depthwise weights do
    not count, as there.
    """
    total: Tensor | None = None
    norms = [e for e in site.carriers if e.op == "batch_norm"]
    for edge in (*site.producers, *norms, *site.consumers):
        values = _per_channel(model.get_submodule(edge.path), edge)
        if values is None:
            continue
        if total is None:
            total = values.new_zeros(site.channels + 1)
        # Channels of other sites have unit −1, which the spare last place takes.
        units = edge.units.to(values.device) % (site.channels + 1)
        total.index_add_(0, units, values.to(total))
    if total is None:
        return torch.ones(site.channels)
    total = total[:-1]
    mean = total.mean()
    if not torch.isfinite(mean) or mean <= 0:
        return torch.ones_like(total)
    # Saliency passes through a relu: the start must be positive for every channel to be able to win.
    return (total / mean).clamp_min(1e-6)
