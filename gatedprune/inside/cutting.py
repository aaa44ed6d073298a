"""Cutting channels out of a model's own layers, site by site: what stays is an ordinary, narrower, trainable model.

torch-pruning does the same where its graph can follow the model (`gatedprune.prune_static`); here the layers and their
channels are known already, from the site, so that only parameters have to be cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..sites import Edge, Site, find_sites

__all__ = ["cut_again", "cut_sites"]

_NORMS = ("batch_norm", "group_norm", "layer_norm", "rms_norm")


@dataclass
class _Cut:
    """What stays of one dimension of a layer."""

    edge: Edge
    carried: bool
    stays: Tensor  # (n,), bool


def cut_sites(model: nn.Module, sites: Iterable[Site], kept: Mapping[str, Tensor]) -> None:
    """Leave each site named in ``kept`` those channels only, in place; all layers are checked before any is cut.

    Args:
        model: A model without gates, of which the sites were found.
        sites: Its sites.
        kept: Site name → (k,) the channels (units) that stay, int64, ascending.

    Raises:
        ModelError: A layer of a site holds its parameters in another way than PyTorch's own layers do. Nothing is cut.
    """
    cuts: dict[tuple[str, int], _Cut] = {}
    for site in sites:
        if site.name not in kept:
            continue
        alive = torch.zeros(site.channels + 1, dtype=torch.bool)
        alive[kept[site.name].cpu()] = True
        alive[-1] = True  # index −1: channels that are not of this site
        for edges, carried in ((site.producers, False), (site.carriers, True), (site.consumers, False)):
            for edge in edges:
                cut = cuts.setdefault(
                    (edge.path, edge.dim), _Cut(edge, carried, torch.ones(len(edge.units), dtype=torch.bool))
                )
                cut.stays &= alive[edge.units.cpu()]
    work = [(model.get_submodule(path), cut) for (path, _), cut in cuts.items() if not bool(cut.stays.all())]
    for module, cut in work:
        _check(module, cut)
    for module, cut in work:
        _cut(module, cut)


def cut_again(model: nn.Module, pruned: Mapping[str, tuple[int, Sequence[int]]], example_inputs: Any,
              stream: bool = False) -> None:  # fmt: skip
    """Make of an unpruned model what `prune_dead` had left of another one of its kind, in place.

    Args:
        model: Without gates.
        pruned: Site name → how many channels the site has, and the indices of those that stay.
        example_inputs, stream: As in `gatedprune.find_sites`, as the other model was wrapped.

    Raises:
        ModelError: The model has other sites. It is then as it was.
    """
    report = find_sites(model, example_inputs, stream=stream)
    channels = {site.name: site.channels for site in report}
    for name, (count, stays) in pruned.items():
        if channels.get(name) != count or not all(0 <= i < count for i in stays):
            raise ModelError(
                f"The site {name} had {count} channels when it was pruned; here "
                + (f"it has {channels[name]}." if name in channels else "there is none of that name.")
            )
    cut_sites(model, report, {name: torch.tensor(stays) for name, (_, stays) in pruned.items()})


def _is_layer(edge: Edge) -> bool:
    return edge.op.startswith("conv") or edge.op == "linear"


def _dim_of(module: nn.Module, edge: Edge) -> int:
    """The dimension of the weight tensor that an edge means."""
    return 1 - edge.dim if getattr(module, "transposed", False) else edge.dim


def _check(module: nn.Module, cut: _Cut) -> None:
    edge, weight = cut.edge, module._parameters.get("weight")
    reason = ""
    if _is_layer(edge):
        if weight is None:
            reason = "has no parameter `weight` of its own"
        elif weight.shape[_dim_of(module, edge)] != len(cut.stays):
            reason = f"has a weight of shape {tuple(weight.shape)}, not {len(cut.stays)} in dimension {edge.dim}"
        elif getattr(module, "transposed", False) and int(getattr(module, "groups", 1)) > 1:
            reason = "is a transposed convolution in groups"
    elif not _vectors(module, len(cut.stays)) and (edge.op not in _NORMS or any(True for _ in module.parameters())):
        reason = f"has no parameter of {len(cut.stays)} values"
    if reason:
        raise ModelError(f"The layer {edge.path} ({type(module).__name__}) cannot be cut: it {reason}.")


def _vectors(module: nn.Module, length: int) -> list[str]:
    """Names of the module's own parameters and buffers with one value a channel."""
    own = {**module._parameters, **module._buffers}
    return [name for name, value in own.items() if value is not None and tuple(value.shape) == (length,)]


def _cut(module: nn.Module, cut: _Cut) -> None:
    edge, length, left = cut.edge, len(cut.stays), int(cut.stays.sum())
    if not _is_layer(edge):
        for name in _vectors(module, length):
            _select(module, name, 0, cut.stays)
        _set(module, num_features=left, num_channels=left, normalized_shape=(left,))
        if edge.op == "group_norm":
            _set(module, num_groups=max(1, int(getattr(module, "num_groups", 1)) * left // length))
        return
    groups = int(getattr(module, "groups", 1))
    if edge.dim == 1:
        _select(module, "weight", _dim_of(module, edge), cut.stays)
        _set(module, in_channels=left * groups, in_features=left)
        return
    _select(module, "weight", _dim_of(module, edge), cut.stays)
    for name in ("bias", *(n for n, v in module._parameters.items() if v is not None and v.dim() > 1)):
        value = module._parameters.get(name)  # beside the weight, a standardised convolution's gain, say
        if name != "weight" and value is not None and value.shape[0] == length:
            _select(module, name, 0, cut.stays)
    _set(module, out_channels=left, out_features=left)
    if cut.carried and groups > 1:  # depthwise, or groups that are cut whole
        groups = groups * left // length
        _set(module, groups=groups, in_channels=module.get_parameter("weight").shape[1] * groups)


def _select(module: nn.Module, name: str, dim: int, stays: Tensor) -> None:
    old = module._parameters.get(name)
    value = old if old is not None else module._buffers[name]
    assert value is not None
    cut = value.detach().index_select(dim, stays.nonzero()[:, 0].to(value.device)).clone()
    if old is None:
        module._buffers[name] = cut
    else:
        module._parameters[name] = nn.Parameter(cut, requires_grad=old.requires_grad)


def _set(module: nn.Module, **attributes: object) -> None:
    """Set the attributes that the module has."""
    for name, value in attributes.items():
        if hasattr(module, name):
            setattr(module, name, value)
