"""torch-pruning's graph, driven site by site, and the check that it did what was asked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..sites import Site, evaluating

__all__ = ["Importance", "Surgeon", "import_torch_pruning"]

Importance = Callable[[Any], "Tensor | None"]  # a torch_pruning Group → one score a channel, or None


def import_torch_pruning() -> ModuleType:
    """The torch_pruning package; an ImportError that says how to get it where it is missing."""
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError(
            "Static pruning needs torch-pruning, which is not installed: pip install 'gatedprune[compare]'"
        ) from error
    return torch_pruning


class Surgeon:
    """Removes channels of sites from a model, in place, through torch-pruning's dependency graph.

    Use as a context manager: parameters require gradients inside (torch-pruning traces with autograd, and
        sees no layer
    whose parameters are frozen) and are as before outside.

    Args:
        model: Pruned in place.
        arguments: Positional arguments to trace it with.
    """

    def __init__(self, model: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.model = model
        # Tensors made in inference mode cannot enter autograd; their clones can.
        self.arguments = tuple(value.clone() if isinstance(value, Tensor) else value for value in arguments)
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def __enter__(self) -> Surgeon:
        self._open = _tracing(self.model)
        self._open.__enter__()
        try:
            self.graph = import_torch_pruning().DependencyGraph()
            self.graph.build_dependency(self.model, self.arguments, verbose=False)
        except Exception as error:
            self._open.__exit__(None, None, None)
            raise ModelError(
                f"torch-pruning cannot trace {type(self.model).__name__}: {type(error).__name__}: {error}. "
                "Static pruning is not to be had for this model; gating does not need it."
            ) from error
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def rank(self, site: Site, importance: Importance | None) -> Tensor:
        """One score a channel (unit) of the site, (C,), float64; the larger the more important."""
        scorer = importance or import_torch_pruning().importance.MagnitudeImportance()
        producer = site.producers[0]
        with _naming(site, "rank the channels of"):
            scores = scorer(self._group(site, list(range(len(producer.units)))))
        if scores is None or tuple(scores.shape) != (len(producer.units),):
            got = "None" if scores is None else f"shape {tuple(scores.shape)}"
            raise ModelError(
                f"The `importance` of prune_static() must give {len(producer.units)} scores, one a "
                f"channel, for the site {site.name}. Got {got}."
            )
        scores = scores.detach().double().cpu()
        own = producer.units >= 0
        return torch.zeros(site.channels, dtype=torch.float64).index_add(
            0, producer.units[own].cpu(), scores[own.cpu()]
        )

    def remove(self, site: Site, kept: Tensor) -> None:
        """Remove all units of the site but those in `kept`, (k,)."""
        stays = torch.zeros(site.channels, dtype=torch.bool)
        stays[kept] = True
        units = site.producers[0].units.cpu()
        losers = [channel for channel, unit in enumerate(units.tolist()) if unit >= 0 and not stays[unit]]
        if not losers:
            return
        with _naming(site, "prune"):
            group = self._group(site, losers)
            if not self.graph.check_pruning_group(group):
                raise RuntimeError("a layer would lose all of its channels")
            group.prune()

    def _group(self, site: Site, channels: list[int]) -> Any:
        module = self.model.get_submodule(site.producers[0].path)
        pruner = self.graph.get_pruner_of_module(module)
        if pruner is None:
            raise TypeError(f"torch-pruning knows no way to prune a {type(module).__name__}")
        return self.graph.get_pruning_group(module, pruner.prune_out_channels, channels)

    def check(self, sites: Mapping[str, Site], kept: Mapping[str, Tensor]) -> None:
        """Raise `ModelError` unless just the layers of the sites are narrower, by just what was removed."""
        gone = _removed(sites, kept)
        modules = dict(self.model.named_modules())
        for name, parameter in self.model.named_parameters():
            path = name.rpartition(".")[0]
            shape, now = self.shapes[name], tuple(parameter.shape)
            for dim, size in enumerate(shape):
                lost, owner = gone.get((path, dim), (0, None))
                if dim == 1 and getattr(modules[path], "groups", 1) > 1:
                    continue  # counted within a group; the other dimension tells
                if len(now) != len(shape) or now[dim] != size - lost:
                    reason = f"asked by the site {owner}" if owner else "part of no site that was pruned"
                    raise ModelError(
                        f"torch-pruning left {name} with shape {now}; it was {shape}, and dimension "
                        f"{dim} should now be {size - lost} ({reason}). "
                        "Exclude the site, or report this with the model's name."
                    )

        self._check_channels(sites, kept)

    def _check_channels(self, sites: Mapping[str, Site], kept: Mapping[str, Tensor]) -> None:
        """The right number of channels may be the wrong ones: torch-pruning loses track in some views."""
        stay: dict[tuple[str, int], Tensor] = {}
        for name, site in sites.items():
            alive = torch.zeros(site.channels + 1, dtype=torch.bool)
            alive[kept[name]] = True
            alive[-1] = True  # index −1: channels that are not of this site
            for edge in site.edges:
                mask = alive[edge.units.cpu()]
                stay[edge.path, edge.dim] = stay.get((edge.path, edge.dim), torch.ones_like(mask)) & mask
        for path in {path for path, _ in stay}:
            module, before = self.model.get_submodule(path), self.weights.get(f"{path}.weight")
            if before is None or getattr(module, "transposed", False):
                continue
            grouped = int(getattr(module, "groups", 1)) > 1  # counted within a group in the other dimension
            for dim in range(1 if grouped else min(before.dim(), 2)):
                mask = stay.get((path, dim), torch.ones(before.shape[dim], dtype=torch.bool))
                if len(mask) == before.shape[dim]:
                    before = before.index_select(dim, mask.nonzero()[:, 0].to(before.device))
            now = module.get_parameter("weight").detach()
            if before.shape == now.shape and not torch.equal(before, now):
                raise ModelError(
                    f"torch-pruning removed other channels of {path} than those that were asked for. "
                    "Exclude the site, or report this with the model's name."
                )

    def check_runs(self) -> None:
        """Raise `ModelError` unless the pruned model's forward pass works."""
        try:
            with evaluating(self.model), torch.no_grad():
                self.model(*self.arguments)
        except Exception as error:
            raise ModelError(
                f"{type(self.model).__name__} no longer runs after torch-pruning narrowed it: "
                f"{type(error).__name__}: {error}. Its forward() holds a channel count "
                "as a constant; exclude the sites around it."
            ) from error


def _removed(sites: Mapping[str, Site], kept: Mapping[str, Tensor]) -> dict[tuple[str, int], tuple[int, str]]:
    """(module path, dimension of its weight) → how many channels go, and the first site that takes some."""
    gone: dict[tuple[str, int], tuple[int, str]] = {}
    for name, site in sites.items():
        stays = torch.zeros(site.channels + 1, dtype=torch.bool)
        stays[kept[name]] = True
        stays[-1] = True  # index −1: channels that are not of this site
        edges = {(edge.path, edge.dim): edge for edge in site.edges}
        for key, edge in edges.items():
            lost = int((~stays[edge.units.cpu()]).sum())
            before, first = gone.get(key, (0, name))
            gone[key] = (before + lost, first)
    return gone


@contextmanager
def _naming(site: Site, what: str) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"torch-pruning cannot {what} the site {site.name}: {type(error).__name__}: {error}. "
            "Leave the site out (`exclude` of wrap(), or `counts` without it)."
        ) from error


@contextmanager
def _tracing(model: nn.Module) -> Iterator[None]:
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    with evaluating(model), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of each parameter that torch-pruning was not asked to touch
        model.requires_grad_(True)
        try:
            yield
        finally:
            # By name: pruning replaces parameters.
            parameters = dict(model.named_parameters())
            for name in frozen:
                parameters[name].requires_grad_(False)
