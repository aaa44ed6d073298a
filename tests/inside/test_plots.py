"""Pictures show what the results hold, and are written whole or not at all."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from gatedprune.errors import ConfigError, DataError
from gatedprune.inside import Choices, SiteChoices, SiteUsage, Usage
from gatedprune.inside import plots as module

SITE = SiteUsage(np.array([4, 0, 2]), 4, np.array([[2, 0, 0], [2, 0, 2]]), np.array([2, 2]))
FOUND = Usage("Net", 4, {"one": SITE, "two.conv": SITE}, ("cat", "dog"))
TWO = Choices(("a", "b"), {"one": SiteChoices(np.array([[1, 1, 0, 0], [1, 0, 1, 0]], dtype=bool))})


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    """Figures, caught before they are written."""
    pytest.importorskip("matplotlib", reason="needs the extra bench")
    figures: list = []
    monkeypatch.setattr(module, "_save", lambda figure, path: figures.append(figure))
    return figures


def test_histograms(drawn: list) -> None:
    FOUND.plot("x.png")
    heights = [patch.get_height() for patch in drawn[0].axes[0].patches]
    assert sum(heights) == 3 and [heights[0], heights[10], heights[-1]] == [1, 1, 1]
    assert drawn[0].axes[1].get_title() == "two.conv\nnever 1, always 1 of 3"


def test_heat_map_orders_channels_by_usage(drawn: list) -> None:
    FOUND.plot_classes("x.png", ["two.conv"])
    (image,) = drawn[0].axes[0].images
    assert image.get_array().tolist() == [[1, 0, 0], [1, 1, 0]]
    assert [t.get_text() for t in drawn[0].axes[0].get_yticklabels()] == ["cat", "dog"]
    with pytest.raises(DataError, match="need labels"):
        Usage("Net", 4, {"one": SiteUsage(SITE.counts, 4)}).plot_classes("x.png")


def test_strips(drawn: list) -> None:
    TWO.plot("x.png", [np.zeros((4, 4, 3)), np.ones((4, 4, 3))])
    strip = drawn[0].subfigs[1].axes[0]
    assert strip.images[0].get_array().tolist() == [[3, 1, 2, 0]] and strip.get_ylabel() == "one"
    assert [t.get_text() for t in strip.texts] == ["1 of 2"] and len(drawn[0].subfigs[0].axes) == 2
    legend = [t.get_text() for t in drawn[0].subfigs[1].legends[0].get_texts()]
    assert legend == ["none", "only a", "only b", "both"]
    three = Choices(("a", "b", "c"), {"one": SiteChoices(np.eye(3, dtype=bool))})
    three.plot("x.png")
    assert drawn[1].subfigs[1].axes[0].images[0].get_array().tolist() == [[3, 0, 0], [0, 3, 0], [0, 0, 3]]
    with pytest.raises(ConfigError, match="1 pictures for 2 inputs"):
        TWO.plot("x.png", [np.zeros((4, 4, 3))])


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra bench")
    TWO.plot(tmp_path / "c.svg")
    FOUND.plot(tmp_path / "u.png")
    assert "<svg" in (tmp_path / "c.svg").read_text() and (tmp_path / "u.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"end it in .png, .svg or .pdf"):
        FOUND.plot(tmp_path / "u.xyz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.svg", "u.png"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (FOUND.plot, FOUND.plot_classes, TWO.plot):
        with pytest.raises(ImportError, match=r"gatedprune\[bench\]"):
            draw(tmp_path / "x.png")
