"""What a user may ask of gating: one frozen, validated configuration."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any

from .errors import ConfigError

__all__ = ["GateConfig", "check_ratio", "matches"]


def check_ratio(value: Any, where: str = "wrap()") -> float:
    """Return ``value`` as a float, or raise `ConfigError` unless it is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= float(value) < 1.0:
        raise ConfigError(f"The `ratio` of {where} must be a float in [0, 1). Got {value!r}.")
    return float(value)


def matches(name: str, pattern: str) -> bool:
    """Whether a site name fits a shell pattern; a pattern without wildcards also takes everything below it."""
    return fnmatchcase(name, pattern) or name.startswith(pattern + ".")


def _check_share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 < float(value) <= 1.0:
        raise ConfigError(f"The `macs` of wrap() must be a share of the dense model's MACs, in (0, 1]. Got {value!r}.")
    return float(value)


def _check_gain(value: Any) -> float:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 1.0 <= float(value) < math.inf:
        raise ConfigError(f"The `max_gain` of wrap() must be a finite number of at least 1, or None. Got {value!r}.")
    return float(value)


def _patterns(value: Any, name: str) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    try:
        out = tuple(value)
    except TypeError:
        out = (None,)  # falls through to the error below
    if not all(isinstance(p, str) and p for p in out):
        raise ConfigError(f"`{name}` must be a name pattern or a sequence of them (strings). Got {value!r}.")
    return out


def predictor_size(channels: int, in_channels: int, rank: int | None) -> int:
    """How many weights a predictor has, and MACs for each sample: whole, or at most of that rank."""
    whole = channels * in_channels
    return whole if rank is None else min(whole, rank * (channels + in_channels))


@dataclass(frozen=True)
class GateConfig:
    """Options of `gatedprune.wrap`.

    Args:
        ratio: Share of each site's channels that is suppressed, in [0, 1): a number, or a mapping from site name
            patterns to numbers (the first pattern that fits wins; sites that no pattern fits stay ungated).
        macs: Instead of ``ratio``: the share of the dense model's MACs that may be left, in (0, 1]. `wrap` finds the
            smallest uniform ratio that leaves no more, and keeps it as ``ratio``.
        include: Gate only the sites whose name fits one of these shell patterns (empty: all).
        exclude: Never gate the sites whose name fits one of these.
        round_to: The number of active channels is rounded up to a multiple of this.
        min_channels: Sites with fewer channels stay ungated, and no gate keeps fewer than this many.
        stream: Also gate the producers of the residual stream; their winners are added back into the full stream.
        boost: Multiply winners by their gain (True), or gate with 0/1 only (False).
        signed: Gates look at the mean of what enters a site (True), or at the mean of its absolute value (False, as in
            the paper). Behind a layer without an activation the mean tells more: a convolution is linear in it.
        max_gain: No gain is larger, however far training moves it: at least 1, or None for no bound.
        straight_through: In training, the saliencies of suppressed channels get a gradient as well: that of the gain
            they would have as winners. What the model computes does not change.

        gate: "topk": every input has exactly k winners. "threshold": the channels whose saliency exceeds the site's T
            win, k of them on average over the data that T was fitted to (`gated.fit_thresholds`; `calibrate` does it
            too), so that easy inputs cost less. Before that exactly k win.
        rank: Predictors are products of two matrices, (C, rank)·(rank, C_in), wherever that takes fewer numbers than
            one of (C, C_in): each input reads them all from memory, and they grow with the square of a network's
            width. None: whole matrices, as in the paper.

    Raises:
        ConfigError: An option is out of its domain.
    """

    ratio: float | Mapping[str, float] | None = None
    macs: float | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    round_to: int = 1
    min_channels: int = 1
    stream: bool = False
    boost: bool = True
    signed: bool = False
    max_gain: float | None = 4.0
    straight_through: bool = False
    gate: str = "topk"
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.macs is not None:
            if self.ratio is not None:
                raise ConfigError("Give wrap() either `ratio` or `macs`, not both: `macs` looks for the ratio.")
            object.__setattr__(self, "macs", _check_share(self.macs))
            checked: Any = None
        elif self.ratio is None:
            checked = 0.5
        elif isinstance(self.ratio, Mapping):
            if not self.ratio:
                raise ConfigError("The `ratio` mapping of wrap() is empty: give at least one pattern and its ratio.")
            _patterns(self.ratio.keys(), "ratio")
            checked = {p: check_ratio(v, f"wrap(), pattern {p!r},") for p, v in self.ratio.items()}
        else:
            checked = check_ratio(self.ratio)
        object.__setattr__(self, "ratio", checked)
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _patterns(getattr(self, name), name))
        for name in ("round_to", "min_channels", "rank"):
            value = getattr(self, name)
            if name == "rank" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ConfigError(f"`{name}` must be an integer of at least 1. Got {value!r}.")
        if self.max_gain is not None:
            object.__setattr__(self, "max_gain", _check_gain(self.max_gain))
        if self.gate not in ("topk", "threshold"):
            raise ConfigError(f"The `gate` of wrap() must be 'topk' or 'threshold'. Got {self.gate!r}.")
        for name in ("stream", "boost", "signed", "straight_through"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"`{name}` must be True or False. Got {getattr(self, name)!r}.")

    def ratio_for(self, site: str) -> float | None:
        """The ratio asked for the site of that name; None where no pattern of a mapping fits.

        0 where `macs` is given: `wrap` has yet to find the ratio.
        """
        if isinstance(self.ratio, Mapping):
            return next((r for p, r in self.ratio.items() if matches(site, p)), None)
        return 0.0 if self.ratio is None else self.ratio

    def active_count(self, channels: int, ratio: float) -> int:
        """k: how many of ``channels`` stay active at ``ratio`` (DESIGN: ceil((1 − ratio)·C), rounded up)."""
        # Counting the suppressed keeps k exact where (1 − ratio)·C lands a hair above an integer in binary.
        k = channels - math.floor(ratio * channels + 1e-9)
        k = max(k, self.min_channels, 1)
        return min(channels, -(-k // self.round_to) * self.round_to)

    def predictor_rank(self, channels: int, in_channels: int) -> int | None:
        """The rank of a gate's predictor from C_in to C channels; None: a whole matrix."""
        return self.rank if predictor_size(channels, in_channels, self.rank) < channels * in_channels else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` takes it back."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["include"], out["exclude"] = list(self.include), list(self.exclude)
        out["ratio"] = dict(self.ratio) if isinstance(self.ratio, Mapping) else self.ratio
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GateConfig:
        """The configuration that `to_dict` described; unknown keys raise `ConfigError`."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ConfigError(
                f"Unknown options for GateConfig: {', '.join(unknown)}. Known: {', '.join(sorted(known))}."
            )
        return cls(**data)

    def to_json(self) -> str:
        """`to_dict` as a JSON string."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> GateConfig:
        """The configuration that `to_json` described."""
        return cls.from_dict(json.loads(text))
