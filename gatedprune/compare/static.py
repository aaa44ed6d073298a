"""Static pruning on the same sites and with the same k as the gates: by torch-pruning, or where that fails by cutting
the same sites ourselves."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import GateConfig, check_ratio
from ..engine import freeze
from ..errors import ConfigError, ModelError
from ..sites import Site, find_sites, normalise_inputs
from ..wrapping import GatedModel, is_gated, unwrap, wrap
from .surgery import Importance, Surgeon, import_torch_pruning

__all__ = ["StaticResult", "dense_copy", "prune_static"]


@dataclass(frozen=True)
class StaticResult:
    """What `prune_static` returns.

    Args:
        model: The pruned copy; an ordinary module with narrower layers, its modes those of the original.
        kept: Site name → the channels (units) that stayed, ascending, int64, (k,).
        by: What did the pruning: "torch-pruning", or "gatedprune": then the model is for inference only, its batch
            norms folded.
        why: Why torch-pruning did not do it; empty where it did.
    """

    model: nn.Module
    kept: dict[str, Tensor]
    by: str = "torch-pruning"
    why: str = ""


def prune_static(
    model: nn.Module,
    sites: nn.Module | Iterable[Site] | None = None,
    *,
    ratio: float | None = None,
    counts: Mapping[str, int] | None = None,
    keep: Mapping[str, Tensor | Iterable[int]] | None = None,
    importance: Importance | None = None,
    example_inputs: Any = None,
    by: str = "auto",
) -> StaticResult:
    """Remove channels once and for all inputs: the static counterpart of gating, for comparing the two.

    Works on a copy; the model stays as it is. From a gated model the gates are taken off first, and it tells
    sites and
    counts: `prune_static(gated)` leaves every site as many channels as its gate keeps active.

    Args:
        model: The dense model, or a gated one.
        sites: The sites to prune, from `find_sites`, or a gated model whose gated sites these are. Default:
            those of the gates when `model` is gated, else all inner sites.
        ratio: Share of each site's channels to remove, in [0, 1).
        counts: Site name → k, how many channels stay. Sites that are not named stay whole.
        keep: Site name → indices of the channels that stay, whatever their importance. Sites not named stay
            whole.
        importance: A torch-pruning importance: takes a pruning group, returns a score a channel. Default:
            `torch_pruning.importance.MagnitudeImportance()`. Every site is ranked before any is pruned; ties
            keep the lower index. Gradients of the model's parameters are there for importances that need
            them.
        example_inputs: A tensor or tuple of arguments to trace the model with; default as in `wrap`.
        by: "torch-pruning"; "gatedprune": the engine cuts the weights of the same sites, ranked as gates are before
            training, for inference; "auto": torch-pruning, and where it fails the engine, unless `importance` or
            `sites` is given.

    Raises:
        ConfigError: Not exactly one of ratio, counts and keep says how much is to stay (a gated model may say
            it instead), one of them is out of its domain, or a site is unknown.
        ModelError: There is no site, or torch-pruning cannot prune the one that is named.
        ImportError: torch-pruning is not installed (`pip install gatedprune[compare]`).
    """
    if by not in ("auto", "torch-pruning", "gatedprune"):
        raise ConfigError(f"`by` must be 'auto', 'torch-pruning' or 'gatedprune'. Got {by!r}.")
    if by == "gatedprune" and importance is not None:
        raise ConfigError("`importance` belongs to torch-pruning: leave it out, or pass by='torch-pruning'.")
    if by != "gatedprune":
        import_torch_pruning()
    chosen, gate_counts = _sites_and_counts(model, sites, example_inputs)
    plan = _plan(chosen, gate_counts, ratio, counts, keep)
    wanted = {site.name: site for site in chosen if site.name in plan}
    if by == "gatedprune":
        return _cut(model, plan, example_inputs, "")
    try:
        return _by_torch_pruning(model, plan, wanted, importance, example_inputs)
    except ModelError as error:
        if by != "auto" or importance is not None or sites is not None:
            raise
        return _cut(model, plan, example_inputs, str(error))


def _by_torch_pruning(
    model: nn.Module, plan: dict[str, int | Tensor], wanted: dict[str, Site], importance: Importance | None,
    example_inputs: Any,
) -> StaticResult:  # fmt: skip
    with torch.inference_mode(False):  # a copy made in inference mode could not be traced by autograd
        pruned = dense_copy(model)
        with Surgeon(pruned, normalise_inputs(pruned, example_inputs)) as surgeon:
            kept = {name: _kept(surgeon, site, plan[name], importance) for name, site in wanted.items()}
            for name, site in wanted.items():
                surgeon.remove(site, kept[name])
            surgeon.check(wanted, kept)
            surgeon.check_runs()
    pruned.zero_grad(set_to_none=True)
    return StaticResult(pruned, kept)


def _cut(model: nn.Module, plan: dict[str, int | Tensor], example_inputs: Any, why: str) -> StaticResult:
    """The same sites, cut by the engine."""
    inputs = normalise_inputs(model, example_inputs)
    gated = model if isinstance(model, GatedModel) else wrap(copy.deepcopy(model).eval(), example_inputs=inputs)
    kept: dict[str, Tensor] = {}
    for name, stays in plan.items():
        if isinstance(stays, Tensor):
            kept[name] = stays
        else:
            order = torch.sort(gated.gates[name].start.detach(), descending=True, stable=True).indices
            kept[name] = order[:stays].sort().values.cpu()
    return StaticResult(freeze(gated, kept, inputs), kept, "gatedprune", why)


def dense_copy(model: nn.Module) -> nn.Module:
    """A copy of the model without gates, gradients included (importances may read them)."""
    copied = copy.deepcopy(model)
    for source, target in zip(model.parameters(), copied.parameters(), strict=True):
        target.grad = None if source.grad is None else source.grad.clone()
    return unwrap(copied) if is_gated(copied) else copied


def _sites_and_counts(model: nn.Module, sites: Any, example_inputs: Any) -> tuple[list[Site], dict[str, int] | None]:
    """The sites to prune, and what their gates keep where a gated model told the sites."""
    teller = sites if isinstance(sites, nn.Module) else model if sites is None else None
    counts = None
    if isinstance(teller, GatedModel):
        found = [site for site in teller.gated_sites if site.kind == "inner"]
        counts = {site.name: teller.gates[site.name].active_count for site in found}
    elif isinstance(sites, nn.Module):
        raise ConfigError(
            "`sites` of prune_static() is a model without gates: pass find_sites(model), or wrap it first."
        )
    else:
        found = list(find_sites(dense_copy(model), example_inputs) if sites is None else sites)
    for site in found:
        if site.kind != "inner":
            raise ModelError(
                f"The site {site.name} is on the residual stream, where torch-pruning can only remove a "
                "channel from all producers at once: it has no static counterpart. Pass the inner sites."
            )
    if not found:
        raise ModelError(f"{type(model).__name__} has no inner site to prune: print find_sites(model) to see why.")
    return found, counts


def _plan(
    sites: list[Site],
    gate_counts: dict[str, int] | None,
    ratio: float | None,
    counts: Mapping[str, int] | None,
    keep: Mapping[str, Any] | None,
) -> dict[str, int | Tensor]:
    """Site name → how many channels stay, or which."""
    given = [name for name, value in (("ratio", ratio), ("counts", counts), ("keep", keep)) if value is not None]
    if len(given) > 1 or not (given or gate_counts):
        raise ConfigError(
            "prune_static() needs one of `ratio`, `counts` and `keep` to tell how much stays (a gated model "
            f"tells it by itself). Got {' and '.join(given) or 'none'}."
        )
    channels = {site.name: site.channels for site in sites}
    if ratio is not None:
        share = check_ratio(ratio, "prune_static()")
        return {name: GateConfig().active_count(count, share) for name, count in channels.items()}
    asked: Mapping[str, Any] = keep if keep is not None else counts if counts is not None else gate_counts or {}
    unknown = sorted(set(asked) - set(channels))
    if unknown:
        raise ConfigError(
            f"prune_static() was given unknown sites: {', '.join(unknown)}. Known: {', '.join(channels)}."
        )
    check = _checked_count if keep is None else _checked_indices
    return {name: check(name, asked[name], channels[name]) for name in channels if name in asked}


def _checked_count(name: str, count: Any, channels: int) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= channels:
        raise ConfigError(f"`counts` of prune_static() must be in [1, {channels}] for the site {name}. Got {count!r}.")
    return count


def _checked_indices(name: str, indices: Any, channels: int) -> Tensor:
    kept = torch.as_tensor(indices if isinstance(indices, Tensor) else list(indices)).detach().cpu()
    is_whole = not (kept.is_floating_point() or kept.is_complex() or kept.dtype == torch.bool)
    if kept.dim() != 1 or not len(kept) or not is_whole or kept.min() < 0 or kept.max() >= channels:
        raise ConfigError(
            f"`keep` of prune_static() must hold channel indices in [0, {channels}) for the site {name}. "
            f"Got {indices!r}."
        )
    kept = kept.long().sort().values
    if (kept.diff() == 0).any():
        raise ConfigError(f"`keep` of prune_static() names a channel of the site {name} twice. Got {indices!r}.")
    return kept


def _kept(surgeon: Surgeon, site: Site, stays: int | Tensor, importance: Importance | None) -> Tensor:
    if isinstance(stays, Tensor):
        return stays
    order = torch.sort(surgeon.rank(site, importance), descending=True, stable=True).indices
    return order[:stays].sort().values
