"""`wrap` and `unwrap`, and what a gated model can do beside what it could before."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import GateConfig, check_ratio, matches
from ..errors import ConfigError, ModelError
from ..gates import Gate
from ..sites import GATING_STATE, Site, SiteReport, find_sites, normalise_inputs
from .budget import fit_ratio
from .containers import GATES as _GATES
from .containers import hiding
from .hooks import GatingState, attach
from .importance import magnitude_importance
from .matching import GateModules, attach_matches, is_match

__all__ = ["GatedModel", "is_gated", "unwrap", "wrap"]

_CLASSES: dict[type, type] = {}


class GatedModel(nn.Module):
    """Mixed into the class of a wrapped model: the model stays what it was, and can do the following as well."""

    _gatedprune_base: type
    _gatedprune_config: GateConfig
    _gatedprune_report: SiteReport
    _gatedprune_sites: tuple[str, ...]
    _gatedprune_inputs: tuple[Any, ...]  # what it was wrapped for, as tensors without values
    # Site → channels before `prune_dead`, and which of them are left.
    _gatedprune_pruned: Mapping[str, tuple[int, tuple[int, ...]]]

    @property
    def gates(self) -> dict[str, Gate]:
        """Site name → gate, in the order in which the model runs them."""
        return {site: getattr(self.gate_modules, _key(site)) for site in self._gatedprune_sites}

    @property
    def gate_modules(self) -> GateModules:
        """The submodule that holds the gates, and what batch norms were matched by (see `calibrate`)."""
        modules = self._modules[_GATES]
        assert isinstance(modules, GateModules)
        return modules

    @property
    def gate_config(self) -> GateConfig:
        """The configuration that the model was wrapped with."""
        return self._gatedprune_config

    @property
    def site_report(self) -> SiteReport:
        """What `find_sites` said of the model when it was wrapped."""
        return self._gatedprune_report

    @property
    def gated_sites(self) -> tuple[Site, ...]:
        """The sites that carry a gate."""
        return tuple(self._gatedprune_report[name] for name in self._gatedprune_sites)

    def penalty(self, strength: float = 1e-8) -> Tensor:
        """FBS's L1 term on the saliencies of the last forward pass, a scalar: λ·Σ g, averaged over the batch.

        Args:
            strength: λ (arXiv 1810.05331, section 3: 1e-8).

        Raises:
            ModelError: No forward pass has been made since wrapping.
        """
        by_rows: dict[int, list[Tensor]] = {}  # added up together: on a GPU each gate's sum is a launch
        for gate in self.gates.values():
            if gate.last_saliency is not None:
                by_rows.setdefault(len(gate.last_saliency), []).append(gate.last_saliency.flatten())
        if not by_rows:
            raise ModelError(
                "penalty() needs a forward pass first: call the gated model, then add penalty() to the loss."
            )
        terms = [torch.cat(found).sum() / max(rows, 1) for rows, found in by_rows.items()]
        return strength * torch.stack(terms).sum()

    def set_ratio(self, ratio: float | Mapping[str, float]) -> None:
        """Change the share of suppressed channels: of every gate, or of those that a mapping's patterns name.

        Batch norms that calibration matched to the old ratios see their input as it is again: calibrate anew.

        Raises:
            ConfigError: A ratio outside [0, 1), or a pattern that fits no site. Nothing changes then.
        """
        wanted = dict(ratio) if isinstance(ratio, Mapping) else {"*": check_ratio(ratio, "set_ratio()")}
        counts: dict[Gate, int] = {}
        for pattern, value in wanted.items():
            hits = {s: g for s, g in self.gates.items() if matches(s, pattern)}
            _must_hit(pattern, hits, list(self.gates), "set_ratio()")
            value = check_ratio(value, f"set_ratio(), pattern {pattern!r},")
            for gate in hits.values():
                counts.setdefault(gate, self.gate_config.active_count(gate.channels, value))
        if any(gate.active_count != count for gate, count in counts.items()):
            self.gate_modules.clear_matches()  # they belong to the ratios that they were measured at
        for gate, count in counts.items():
            gate.active_count = count

    def reset_gates(self) -> None:
        """Put every gate back to its start: φ = 0, ρ = the magnitude importance of the weights as they are now."""
        self.gate_modules.clear_matches()
        for site in self.gated_sites:
            gate = self.gates[site.name]
            with torch.no_grad():
                gate.reset_predictor()
                gate.bias.copy_(magnitude_importance(self, site))
                gate.start.copy_(gate.bias)
                gate.strength.fill_(1)
                gate.forget_threshold()

    def calibrate(self, batches: Iterable[Any], **options: Any) -> Any:
        """Fit every gate's predictor in closed form, without labels or training: `gatedprune.calibrate`.

        Args:
            batches: A few hundred samples: tensors (B, …), or tuples that begin with one.
            **options: Those of `gatedprune.calibrate`.
        """
        # Later in the order of imports: looked up when first asked for.
        return importlib.import_module("gatedprune.training").calibrate(self, batches, **options)

    def fit_thresholds(self, batches: Iterable[Any], **options: Any) -> Any:
        """Set the T of every gate (``gate="threshold"``), so that k channels win on average over the data.

        Args:
            batches: As for `calibrate`, which does this too; call it again after training or `set_ratio`.
            **options: Those of `gatedprune.training.fit_thresholds`.
        """
        return importlib.import_module("gatedprune.training").fit_thresholds(self, batches, **options)

    def usage(self, batches: Iterable[Any], **options: Any) -> Any:
        """Count for how many inputs each channel wins, and with labels for which classes: `gatedprune.inside.usage`.

        Args:
            batches: Tensors (B, …), or tuples (images, labels).
            **options: Those of `gatedprune.inside.usage`.
        """
        return importlib.import_module("gatedprune.inside").usage(self, batches, **options)

    def prune_dead(self, batches: Iterable[Any] | None = None, **options: Any) -> Any:
        """A smaller gated model without the channels that never win, in its result's ``model``; this one stays.

        Args:
            batches: As for `usage`.
            **options: Those of `gatedprune.inside.prune_dead`.
        """
        return importlib.import_module("gatedprune.inside").prune_dead(self, batches, **options)

    def backbone_state_dict(self) -> dict[str, Tensor]:
        """The state dict without the gates: the keys of the model before wrapping."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith(_GATES + ".")}

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The gated class is made at run time: copies and pickles name the class that it was made from.
        return _rebuild, (self._gatedprune_base,), self.__dict__.copy()


def _key(site: str) -> str:
    return site.replace(".", "/")  # dots are not allowed in module names


def _gated_class(base: type) -> type:
    if base not in _CLASSES:
        names = {"_gatedprune_base": base, "__module__": base.__module__, "__doc__": base.__doc__}
        _CLASSES[base] = type(f"Gated{base.__name__}", (GatedModel, *hiding(base), base), names)
    return _CLASSES[base]


def _rebuild(base: type) -> nn.Module:
    cls: Any = _gated_class(base)
    return cls.__new__(cls)


def is_gated(model: nn.Module) -> bool:
    """Whether `wrap` has put gates into this model."""
    return isinstance(model, GatedModel)


def wrap(model: nn.Module, ratio: float | Mapping[str, float] | None = None, *, example_inputs: Any = None,
         config: GateConfig | None = None, **options: Any) -> Any:  # fmt: skip
    """Put a saliency predictor and a winner-takes-all gate in front of a model's channels.

    Every input then decides which channels are computed. The model is changed in place and returned: its class becomes
    a subclass (``isinstance`` checks still hold), every attribute, method and state-dict key stays, and `GatedModel`'s
    methods are added. It masks, for training; `gatedprune.compact` makes the model that skips the work. Before any
    training or calibration the gated model equals a statically pruned one.

    Args:
        model: A timm model, or any module built around one, that `torch.export` can trace.
        ratio: Share of each site's channels to suppress, in [0, 1): a number (default 0.5), or a mapping from site name
            patterns to numbers.
        example_inputs: A tensor (B, C, H, W), or a tuple of the model's arguments; default: by the timm configuration.
        config: All options at once, instead of ``ratio`` and ``options``.
        **options: The other fields of `GateConfig`: ``macs`` (instead of ``ratio``: the share of the dense MACs that
            may be left), ``include``, ``exclude``, ``round_to``, ``min_channels``, ``stream``, ``boost``, ``signed``,
            ``max_gain``, ``straight_through``, ``gate``, ``rank``.

    Returns:
        The same object, gated.

    Raises:
        ConfigError: An option out of its domain, or a pattern that fits no site.
        ModelError: Nothing can be gated, the model is gated already, or it cannot be traced. It is then untouched.

    Sources: Gao et al., arXiv 1810.05331; doi 10.18280/mmep.090221, equations 4–7.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"wrap() takes a torch.nn.Module. Got {type(model).__name__}.")
    if any(isinstance(m, GatedModel) for m in model.modules()):
        raise ModelError(
            f"{type(model).__name__} is already gated, or holds a gated model: change its ratio with set_ratio(), "
            "or unwrap() it first."
        )
    if hasattr(model, _GATES):
        raise ModelError(
            f"{type(model).__name__} has an attribute `{_GATES}` of its own, the name under which gates are kept."
        )
    config = _configuration(config, ratio, options)
    report = find_sites(model, example_inputs, stream=config.stream)
    chosen = _choose(report, config)
    if config.macs is not None:
        config = fit_ratio(report, config, [site for site, _ in chosen])
        chosen = [(site, config.ratio) for site, _ in chosen]  # type: ignore[misc]
    gates = {site.name: _make_gate(model, site, ratio, config) for site, ratio in chosen}
    inputs = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in normalise_inputs(model, example_inputs))
    _mutate(model, [site for site, _ in chosen], gates, config, report)
    model.__dict__.update(_gatedprune_inputs=inputs, _gatedprune_pruned={})
    return model


def _configuration(config: GateConfig | None, ratio: Any, options: dict[str, Any]) -> GateConfig:
    if config is not None:
        if ratio is not None or options:
            raise ConfigError("Give wrap() either `config` or single options, not both.")
        if not isinstance(config, GateConfig):
            raise ConfigError(f"`config` must be a GateConfig. Got {type(config).__name__}.")
        return config
    if ratio is not None:
        options = {"ratio": ratio, **options}
    return GateConfig.from_dict(options)


def _must_hit(pattern: str, hits: Any, names: list[str], where: str) -> None:
    if not hits:
        shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        raise ConfigError(f"The pattern {pattern!r} of {where} fits no site. Sites: {shown or 'none'}.")


def _choose(report: SiteReport, config: GateConfig) -> list[tuple[Site, float]]:
    """The sites to gate, each with its ratio; raises where there is none."""
    names = [s.name for s in report]
    if not names:
        raise ModelError(
            f"Nothing in {report.model} can be gated:\n" + "\n".join(f"  {p}: {r}" for p, r in report.skipped.items())
        )
    for pattern in (*config.include, *(config.ratio if isinstance(config.ratio, Mapping) else ())):
        _must_hit(pattern, any(matches(n, pattern) for n in names), names, "wrap()")
    for pattern in config.exclude:
        if not any(matches(n, pattern) for n in names):
            warnings.warn(f"The `exclude` pattern {pattern!r} fits no site of {report.model}.", stacklevel=3)
    chosen = []
    for site in report:
        ratio = config.ratio_for(site.name)
        taken = not config.include or any(matches(site.name, p) for p in config.include)
        left = any(matches(site.name, p) for p in config.exclude) or site.channels < config.min_channels
        if taken and not left and ratio is not None:
            chosen.append((site, ratio))
    if not chosen:
        raise ModelError(
            f"`include`, `exclude`, `ratio` and `min_channels` leave none of the {len(names)} sites of {report.model}."
        )
    return chosen


def _make_gate(model: nn.Module, site: Site, ratio: float, config: GateConfig) -> Gate:
    weight = next(model.get_submodule(site.producers[0].path).parameters())
    return Gate(site.channels, site.in_channels, config.active_count(site.channels, ratio), boost=config.boost,
                importance=magnitude_importance(model, site), channel_dim=site.gate_at.channel_dim,
                signed=config.signed, max_gain=config.max_gain, straight_through=config.straight_through,
                kind=config.gate, rank=config.predictor_rank(site.channels, site.in_channels), device=weight.device,
                dtype=weight.dtype)  # fmt: skip


def _mutate(
    model: nn.Module, sites: list[Site], gates: dict[str, Gate], config: GateConfig, report: SiteReport
) -> None:
    """The last step of `wrap`: everything was checked; should it fail all the same, nothing stays behind."""
    base, state = type(model), GatingState()
    try:
        for site in sites:
            attach(model, site, gates[site.name], state)
        container = GateModules()
        for name, gate in gates.items():
            container.add_module(_key(name), gate)
        attach_matches(model, container, state)
        container.train(model.training)
        model.add_module(_GATES, container)
        model.__dict__[GATING_STATE] = state
        model.__dict__.update(_gatedprune_config=config, _gatedprune_report=report, _gatedprune_sites=tuple(gates))
        state.handles.append(model.register_load_state_dict_post_hook(_tolerate_backbone_checkpoint))
        model.__class__ = _gated_class(base)
    except BaseException:
        _strip(model, state, base)
        raise


def _strip(model: nn.Module, state: GatingState, base: type) -> None:
    state.remove()
    model._modules.pop(_GATES, None)
    for name in (GATING_STATE, *(f"_gatedprune_{what}" for what in ("config", "report", "sites", "inputs", "pruned"))):
        model.__dict__.pop(name, None)
    model.__class__ = base


def unwrap(model: nn.Module) -> Any:
    """Take the gates out: the model is again what it was before `wrap`, bit for bit. In place; returns it.

    Raises:
        ModelError: The model is not gated.
    """
    if not isinstance(model, GatedModel):
        raise ModelError(f"unwrap() takes a model that wrap() returned. {type(model).__name__} is not gated.")
    _strip(model, model.__dict__[GATING_STATE], model._gatedprune_base)
    return model


def _tolerate_backbone_checkpoint(model: nn.Module, incompatible: Any) -> None:
    """After load_state_dict: a checkpoint of the backbone alone is no error; untouched gates are ranked anew."""
    assert isinstance(model, GatedModel)
    own = [f"{_GATES}.{k}" for k in model.gate_modules.state_dict() if not is_match(k)]
    missing = [k for k in incompatible.missing_keys if any(k == o or k.endswith("." + o) for o in own)]
    if len(missing) != len(own):
        return
    for key in missing:
        incompatible.missing_keys.remove(key)
    if all(not g.weight.any() and torch.equal(g.bias, g.start) for g in model.gates.values()):
        model.reset_gates()
