"""A model to check: made afresh, with nothing left silent that a fault could hide behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..engine import CompactModel, compact
from ..errors import ConfigError
from ..functional import subsample
from ..gates import Gate
from ..sites import evaluating, normalise_inputs
from ..wrapping import GatedModel, wrap
from .snapshot import Snapshot

__all__ = ["Case", "enliven", "excite", "outputs"]

SAMPLES = 3
SWING = 0.4  # how far excited gates move a gain from 1: deep random networks overflow when gains multiply up
MARGIN = (
    0.25  # of the saliencies of channels that always win over the k-th, and of the k-th over those that always lose
)


class Case:
    """One model and how it is to be gated. What the checks share is made once and handed out as copies.

    Args:
        make: Returns a fresh dense model at every call: ``lambda: timm.create_model("resnet18")``.
        inputs: A tensor (B, …) with B ≥ 2, or a tuple of the model's arguments. Default: three random images
            of the
            size that the timm configuration names.
        ratio: As in `gatedprune.wrap`.
        stream: As in `gatedprune.wrap`.
        size: Height and width of the default images, in pixels.
        name: What to call it in messages and test ids.
        lean: Hold one compact model at a time, for models that would not fit into memory otherwise.
        oracle: The reference of contract 2: "torch-pruning", "columns" (the suppressed channels' columns are
            zeroed in
            the layers that read them) or "auto" (the first, and the second where it fails or is slow).
        **options: Further fields of `gatedprune.GateConfig`.

    Raises:
        ConfigError: Fewer than two samples, or an oracle that is not known.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        inputs: Any = None,
        *,
        ratio: float | Mapping[str, float] = 0.5,
        stream: bool = False,
        size: int | None = None,
        name: str = "",
        lean: bool = False,
        oracle: str = "auto",
        **options: Any,
    ) -> None:
        if oracle not in ("auto", "torch-pruning", "columns"):
            raise ConfigError(f"`oracle` must be 'auto', 'torch-pruning' or 'columns'. Got {oracle!r}.")
        self.make, self.ratio, self.stream, self.oracle, self.options = make, ratio, stream, oracle, options
        self._inputs, self._name, self._size, self._lean = inputs, name, size, lean
        if inputs is not None:
            self._require_samples(normalise_inputs(nn.Module(), inputs))

    @staticmethod
    def _require_samples(args: tuple[Any, ...]) -> None:
        if next(a for a in args if isinstance(a, Tensor)).shape[0] < 2:
            raise ConfigError("`inputs` of a Case needs at least two samples: channels are chosen for each anew.")

    @cached_property
    def _base(self) -> nn.Module:
        return enliven(self.make(), seed=1).eval()

    @property
    def label(self) -> str:
        """The name given, or "model"; makes no model. With ``stream`` where stream sites are gated too."""
        return (self._name or "model") + ("-stream" if self.stream else "")

    @property
    def name(self) -> str:
        """The name given, else the model's class."""
        return self.label if self._name else type(self._base).__name__

    def __repr__(self) -> str:
        return f"Case({self._name or self.make!r}, ratio={self.ratio}, stream={self.stream})"

    @cached_property
    def _args(self) -> tuple[Any, ...]:
        if self._inputs is not None:
            return normalise_inputs(self._base, self._inputs)
        (image,) = normalise_inputs(self._base, None)
        generator = torch.Generator().manual_seed(2)
        shape = (SAMPLES, image.shape[1], *[1] * (image.dim() - 2))
        # Samples of one distribution have all but the same means, which is what gates look at: shift and
        # scale each.
        places = [self._size or places for places in image.shape[2:]]
        noise = torch.randn(SAMPLES, image.shape[1], *places, generator=generator)
        noise = noise * (0.3 + torch.rand(shape, generator=generator)) + torch.randn(shape, generator=generator)
        return (noise.to(image),)

    def inputs(self, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
        """The model's arguments; floating-point tensors in ``dtype``."""
        return tuple(
            a.to(dtype) if dtype and isinstance(a, Tensor) and a.is_floating_point() else a for a in self._args
        )

    def dense(self) -> nn.Module:
        """A copy of the dense model, in eval mode."""
        return copy.deepcopy(self._base)

    def another(self) -> nn.Module:
        """A fresh dense model with other parameters."""
        return enliven(self.make(), seed=3).eval()

    @cached_property
    def _wrapped(self) -> tuple[Snapshot, GatedModel]:
        model = self.dense()
        outputs(model, self._args)  # what a model caches in its first forward pass is none of the gates' doing
        before = Snapshot(model)
        zero = dict.fromkeys(self.ratio, 0.0) if isinstance(self.ratio, Mapping) else 0.0
        gated = wrap(model, zero, example_inputs=self._args, stream=self.stream, **self.options)
        return before, gated

    def untouched(self) -> GatedModel:
        """A copy of the model as `wrap` at ratio 0 left it."""
        return copy.deepcopy(self._wrapped[1])

    def original(self) -> tuple[Snapshot, GatedModel]:
        """The wrapped object itself, no copy, and what it was before wrapping. Whoever asks may unwrap it."""
        before, gated = self._wrapped
        del self.__dict__["_wrapped"]
        return before, gated

    @cached_property
    def _excited(self) -> GatedModel:
        gated = self._wrapped[1]
        # With the parameters of the backbone in common: nobody changes either, and a large model has many.
        backbone = {id(p): p for name, p in gated.named_parameters() if not name.startswith("gatedprune.")}
        gated = copy.deepcopy(gated, backbone)
        gated.set_ratio(self.ratio)
        return excite(gated, self._args)

    def gated(self, dtype: torch.dtype | None = None) -> GatedModel:
        """A copy of the gated model at the case's ratio, in eval mode, its gates excited (see `excite`)."""
        gated = copy.deepcopy(self._excited)
        return gated if dtype is None else gated.to(dtype)

    @cached_property
    def compacted(self) -> CompactModel:
        """The compact model of `gated`. Shared: do not change it."""
        if self._lean:
            self.__dict__.pop("compacted64", None)
        return compact(self.gated(), self._args)

    @cached_property
    def compacted64(self) -> CompactModel:
        """The same in float64."""
        if self._lean and "compacted" in self.__dict__:
            return self.__dict__.pop("compacted").double()
        return compact(self.gated(torch.float64), self.inputs(torch.float64))


def outputs(model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    """Every floating-point tensor that the model returns in eval mode, in order; detached copies."""
    with evaluating(model), torch.no_grad():
        found = [v.clone() for v in tree_flatten(model(*args))[0] if isinstance(v, Tensor) and v.is_floating_point()]
    if not found:
        raise ConfigError(f"{type(model).__name__} returns no floating-point tensor that could be checked.")
    return found


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a freshly initialised model values as training would leave them. In place; returns it.

    Zero-initialised last norms, skip gains and layer scales of 1e-6 silence whole branches, biases of zero
    and running statistics of (0, 1) make whole operations trivial: every fault in there would pass.
    Parameters that hold one single value are therefore varied, and batch-norm statistics mildly.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(like.shape, generator=generator)).to(like)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.is_floating_point() or not p.numel() or p.max() != p.min():
                continue
            if p.abs().max() >= 0.1:
                p.mul_(uniform(p, 0.8, 1.2))
            elif name.endswith("bias"):
                p.add_(uniform(p, -0.2, 0.2))
            else:
                p.copy_(uniform(p, 0.4, 0.8))
        for module in model.modules():
            mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if isinstance(mean, Tensor) and isinstance(var, Tensor):
                mean.add_(uniform(mean, -0.2, 0.2) * var.sqrt())
                var.mul_(uniform(var, 0.8, 1.25))
    return model


def excite(gated: GatedModel, args: tuple[Any, ...], seed: int = 0) -> GatedModel:
    """Set every gate so that samples choose different channels and gains differ from 1. In place; returns the
    model.

    In one forward pass, each gate in its turn. Saliencies of winners and losers are kept apart, so that rounding in
    float32 does not decide who wins, in however many channels; no gain leaves about [0.5, 1.5].
    """
    generator = torch.Generator().manual_seed(seed)
    hooks = [
        g.register_forward_pre_hook(lambda gate, x: _excite_one(gate, x[0], generator)) for g in gated.gates.values()
    ]
    try:
        outputs(gated, args)
    finally:
        for hook in hooks:
            hook.remove()
    return gated


def _excite_one(gate: Gate, x: Tensor, generator: torch.Generator) -> None:
    """Saliency = level + φ·(s − mean s). Some channels about the k-th rank are contested: half of them win where the
    samples' inputs lie on one side of a hyperplane, the other half on the other. All others always win or lose.
    """

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        s = subsample(x.detach(), gate.channel_dim, gate.signed).double().cpu()
        apart = s - s.mean(0)
        # No steeper than this: else rounding errors in s would be blown up to the size of the gain.
        floor = max(1e-2 * float(s.square().mean().sqrt()), 1e-12)
        start, k = gate.start.double().cpu(), gate.active_count
        jitter = 0.1 * noise(gate.channels).clamp(-1, 1)
        swing = noise(gate.channels, gate.in_channels)
        swing /= (apart @ swing.T).abs().amax(0).clamp_min(floor)[:, None]  # at most 1 for every sample
        if k == gate.channels:
            level, phi = start + jitter, SWING * swing
        else:
            order = start.argsort(descending=True, stable=True)
            # Below the k-th of the start: some gains are to fall, and saliencies stay positive.
            middle = max(float(start[order[k - 1 : k + 1]].mean()) - 0.8 * MARGIN, MARGIN + 0.1)
            level, room = start + jitter, torch.full((gate.channels,), SWING, dtype=torch.float64)
            for side, sign in ((order[:k], 1.0), (order[k:], -1.0)):
                level[side] = middle + sign * (sign * (level[side] - middle)).clamp_min(1.2 * MARGIN)
                room[side] = (sign * (level[side] - middle) - MARGIN).clamp(0.2 * MARGIN, SWING)
            phi = room[:, None] * swing
            direction, offset = _hyperplane(apart, floor, noise)
            near = ((start - middle).abs() <= 1.2 * MARGIN)[order]
            # Not all of them: some never win.
            most = max(1, min(k, gate.channels - k) // 2)
            count = max(1, min(int(near[:k].sum()), int(near[k:].sum()), most))
            if gate.varies:
                gate.threshold.fill_(middle)  # type: ignore[union-attr]
                contested = order[_uneven(apart, direction, offset, k, gate.channels)]
                level[contested] = middle - 0.8 * MARGIN * offset + 0.2 * jitter[contested]
                if direction is not None:
                    phi[contested] = 0.8 * MARGIN * direction + 0.02 * swing[contested]
            elif direction is not None:
                contested = order[k - count : k + count]
                contested = contested[torch.randperm(2 * count, generator=generator)]
                side = torch.ones(2 * count, dtype=torch.float64)
                side[count:] = -1
                level[contested] = middle - 0.8 * MARGIN * side * offset + 0.2 * jitter[contested]
                phi[contested] = 0.8 * MARGIN * side[:, None] * direction + 0.02 * swing[contested]
        gate.set_predictor(phi, apart.T)  # exact for these samples from as many ranks as there are samples
        gate.bias.copy_(level - gate.predictor.double().cpu() @ s.mean(0))


def _uneven(apart: Tensor, direction: Tensor | None, offset: float, k: int, channels: int) -> slice:
    """Ranks of channels that win for the samples on one side only, so many that k win on average all the same.

    With B samples, n of them on that side, and B contested channels, k − n win always: (k − n) + n·B/B = k.
    """
    if direction is None:
        return slice(0)
    samples, winning = len(apart), int((apart @ direction > offset).sum())
    always = k - winning
    if always < 1 or always + samples > channels or not 0 < winning < samples:
        return slice(0)
    return slice(always, always + samples)


def _hyperplane(apart: Tensor, floor: float, noise: Callable[..., Tensor]) -> tuple[Tensor | None, float]:
    """(direction, offset) for which direction·s − offset lies in [−1, 1] and far from 0 for every sample; or None."""
    best: tuple[float, Tensor | None, float] = 0.25, None, 0.0
    for _ in range(24):
        direction = noise(apart.shape[1])
        places = (apart @ direction).sort().values
        at = int(places.diff().argmax())
        offset = float(places[at : at + 2].mean())
        size = max(float((places - offset).abs().max()), floor)
        margin = float((places - offset).abs().min()) / size
        if margin > best[0]:
            best = margin, direction / size, offset / size
    return best[1], best[2]
