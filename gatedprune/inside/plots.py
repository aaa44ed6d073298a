"""Pictures of the gates, with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError
from ..files import atomic_write

if TYPE_CHECKING:
    from .counts import Usage
    from .overlap import Choices

__all__ = ["plot_choices", "plot_classes", "plot_usage"]

_BINS = 20
# Told apart by lightness too: none, the first, the second, both (colours of Okabe and Ito, 2008).
_COLOURS = ("#e8e8e8", "#e69f00", "#56b4e9", "#12355b")
_CLASS_ROW, _LEAST, _MOST = 0.16, 1.0, 6.0  # inches


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("A plot needs matplotlib: pip install 'gatedprune[bench]'.") from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: str | Path) -> None:
    kinds = figure.canvas.get_supported_filetypes()
    if Path(path).suffix.lstrip(".").lower() not in kinds:
        raise ConfigError(f"A picture cannot be written as {Path(path).name!r}: end it in .png, .svg or .pdf.")
    atomic_write(path, lambda name: figure.savefig(name, dpi=120))


def plot_usage(found: Usage, path: str | Path) -> None:
    """For each site a histogram: how many channels (upright) win for what share of the inputs (along)."""
    names = list(found.sites)
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = _figure(3.2 * columns, 2.1 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        site = found[name]
        axes.hist(site.share, bins=_BINS, range=(0, 1), color=_COLOURS[3])
        never, always = len(site.dead()), len(site.always)
        axes.set_title(f"{name}\nnever {never}, always {always} of {site.channels}", fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("share of inputs for which a channel wins", fontsize=9)
    figure.supylabel("channels", fontsize=9)
    figure.suptitle(f"{found.model}: {found.samples} inputs", fontsize=10)
    _save(figure, path)


def plot_classes(found: Usage, path: str | Path, sites: Sequence[str] | None = None) -> None:
    """For each site classes (down) × channels (along, by falling usage), coloured by the share of inputs won."""
    names = list(found.sites) if sites is None else list(sites)
    shares = [found[name].class_share for name in names]
    height = min(max(_CLASS_ROW * len(found.classes or ()), _LEAST), _MOST)
    figure = _figure(8, (height + 0.5) * len(names) + 0.6)
    grid = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    image = None
    for axes, name, share in zip(grid, names, shares, strict=True):
        order = np.argsort(-found[name].counts, kind="stable")
        image = axes.imshow(share[:, order], aspect="auto", interpolation="nearest", vmin=0, vmax=1, cmap="viridis")
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        if found.classes is not None and _CLASS_ROW * len(found.classes) <= _MOST:
            axes.set_yticks(range(len(found.classes)), found.classes, fontsize=7)
        else:
            axes.set_ylabel("class", fontsize=8)
    grid[-1].set_xlabel("channels, the most used first", fontsize=8)
    figure.colorbar(image, ax=list(grid), label="share of the class's inputs", shrink=min(1.0, 4 / len(names)))
    _save(figure, path)


def plot_choices(found: Choices, path: str | Path, pictures: Sequence[Any] | None = None) -> None:
    """For each site a strip of its channels, coloured by which input uses them; the inputs themselves on top."""
    count = len(found.names)
    if pictures is not None and len(pictures) != count:
        raise ConfigError(f"plot() was given {len(pictures)} pictures for {count} inputs.")
    strip = 0.34 if count == 2 else 0.14 * count + 0.12
    top = 1.9 if pictures is not None else 0.0
    figure = _figure(9, top + strip * len(found.sites) + 0.8)
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    above, below = figure.subfigures(2, 1, height_ratios=[max(top, 0.01), strip * len(found.sites) + 0.8])
    if pictures is not None:
        for axes, picture, name in zip(above.subplots(1, count, squeeze=False)[0], pictures, found.names, strict=True):
            axes.imshow(picture)
            axes.set_title(name, fontsize=8)
            axes.set_axis_off()
    colours = ListedColormap(_COLOURS)
    for axes, (name, site) in zip(below.subplots(len(found.sites), 1, squeeze=False)[:, 0], found.sites.items(),
                                  strict=True):  # fmt: skip
        cells = site.mask[:1] + 2 * site.mask[1:] if count == 2 else 3 * site.mask.astype(int)
        axes.imshow(cells, aspect="auto", interpolation="nearest", cmap=colours, vmin=0, vmax=3)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
        axes.text(1.01, 0.5, f"{site.shared} of {max(site.active)}", transform=axes.transAxes, va="center", fontsize=7)
    names = ("none", *(f"only {name}" for name in found.names), "both") if count == 2 else ("not used", "", "", "used")
    patches = [Patch(color=colour, label=name) for colour, name in zip(_COLOURS, names, strict=True) if name]
    below.legend(handles=patches, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    rows = "" if count == 2 else f"; rows from the top: {', '.join(found.names)}"
    below.suptitle(f"channels of each site{rows}; on the right: shared by all, of those that an input uses", fontsize=8)
    _save(figure, path)
