"""Additions: branches side by side are merged into one site; x + f(x) is the residual stream."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gatedprune import Site, SiteReport, find_sites


class Net(nn.Module):
    """A network whose forward pass is a function of its layers."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(c_in: int, c_out: int, kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, **options)  # type: ignore[arg-type]


def sites(forward: Callable[..., Tensor], stream: bool = False, **layers: nn.Module) -> SiteReport:
    return find_sites(Net(forward, **layers).eval(), torch.zeros(2, 3, 16, 16), stream=stream)


def paths(edges: tuple) -> list[str]:
    return [edge.path for edge in edges]


def units(site: Site, path: str) -> list[int]:
    return next(e for e in site.edges if e.path == path).units.tolist()


LAYERS = {"a": (3, 8), "b": (3, 8), "c": (3, 8), "inside": (8, 8), "last": (8, 4)}


def layers(*names: str) -> dict[str, nn.Module]:
    return {name: conv(*LAYERS[name]) for name in names}


@pytest.mark.parametrize("stream", [False, True])
def test_a_sum_of_two_branches_is_one_site(stream: bool) -> None:
    report = sites(
        lambda m, x: m.last((m.norm_a(m.a(x)) + m.norm_b(m.b(x))).relu()), stream,
        norm_a=nn.BatchNorm2d(8), norm_b=nn.BatchNorm2d(8), **layers("a", "b", "last"),
    )  # fmt: skip
    (site,) = report
    assert (site.name, site.kind, site.channels, site.in_channels) == ("a", "inner", 8, 3)
    assert paths(site.producers) == ["a", "b"]
    assert site.branches == ("a", "b")
    assert paths(site.carriers) == ["norm_a", "norm_b"]
    assert paths(site.consumers) == ["last"]
    assert [(at.path, at.side) for at in site.gain_at] == [("norm_a", "output"), ("norm_b", "output")]
    assert site.gate_at.path == "a"
    assert site.masks == ()


def test_nothing_added_is_one_branch() -> None:
    (site,) = sites(lambda m, x: m.last(m.a(x).relu()), **layers("a", "last"))
    assert site.branches == ("a",)


def test_sums_of_sums() -> None:
    report = sites(lambda m, x: m.last(m.a(x) + m.b(x).relu() + m.c(x)), **layers("a", "b", "c", "last"))
    (site,) = report
    assert site.branches == ("a", "b", "c")
    assert [at.path for at in site.gain_at] == ["a", "b", "c"]


def test_a_difference_merges_and_a_choice_does_not() -> None:
    assert len(sites(lambda m, x: m.last(m.a(x) - m.b(x)), **layers("a", "b", "last"))) == 1
    assert not sites(lambda m, x: m.last(torch.lerp(m.a(x), m.b(x), 0.3)), **layers("a", "b", "last"))


RESIDUAL: dict[str, Callable[..., Tensor]] = {
    "x + f(x)": lambda m, x: m.last((y := m.a(x)) + m.inside(y)),
    "pooled": lambda m, x: m.last(nn.functional.avg_pool2d(y := m.a(x), 3, 1, 1) + m.inside(y.relu())),
    "on from a sum": lambda m, x: m.last((y := m.a(x) + m.b(x)) + m.inside(y)),
    "from one part of a sum": lambda m, x: m.last(m.a(x) + (y := m.b(x)) + m.inside(y)),
    "from far away": lambda m, x: m.last((y := m.a(x)) + m.inside(m.c(m.last(y)[:, :3]))),
    "elsewhere": lambda m, x: m.last((y := m.a(x)) + m.b(x)) + m.last(y + m.inside(y)),
}


@pytest.mark.parametrize("case", RESIDUAL)
def test_what_is_computed_from_the_other_operand_is_residual(case: str) -> None:
    report = sites(RESIDUAL[case], **layers("a", "b", "c", "inside", "last"))
    assert not {"a", "b", "inside"} & {site.name for site in report}
    assert "residual stream (stream=True gates them)" in report.skipped["a"]
    assert "residual stream (stream=True gates them)" in report.skipped["inside"]


def test_stages_of_one_block_merge_and_longer_ones_do_not() -> None:
    """A shortcut with a layer of its own is a branch, until something is added to the sum again."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.a(x).relu()
        x = (m.inside(x) + m.short(x)).relu()
        x = (m.two(x) + m.short2(x)).relu()
        return m.last(x + m.three(x))

    more = {name: conv(8, 8) for name in ("short", "two", "short2", "three")}
    report = sites(forward, **layers("a", "inside", "last"), **more)
    assert {site.name: site.branches for site in report} == {"a": ("a",), "inside": ("inside", "short")}
    assert {"two", "short2", "three"} <= set(report.skipped)


def squeeze(m: nn.Module, x: Tensor) -> Tensor:
    return x * m.up(m.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


@pytest.mark.parametrize("of", ["branch", "sum"])
def test_squeeze_and_excite_is_no_branch(of: str) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        if of == "branch":
            return m.last(squeeze(m, m.a(x)) + m.b(x))
        return m.last(squeeze(m, m.a(x) + m.b(x)) + m.c(x))

    report = sites(forward, down=conv(8, 4, 1), up=conv(4, 8, 1), **layers("a", "b", "c", "last"))
    site = report["a"]
    assert site.branches == (("a", "b") if of == "branch" else ("a", "b", "c"))
    assert {"a", "b", "up"} <= set(paths(site.producers))
    assert "up" not in {at.path for at in site.gain_at}


def test_parts_of_a_layer_that_are_added_one_after_the_other() -> None:
    """Each part of a split is added to what the layer before it made of the part before."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        first, second, third = m.first(x).relu().split(8, 1)
        one = m.inside(first)
        two = m.next(one + second)
        return m.wide(torch.cat([one, two, third], 1))

    report = sites(forward, first=conv(3, 24), next=conv(8, 8), wide=conv(24, 4), **layers("inside"))
    added = next(site for site in report if len(site.branches) == 2)
    assert set(added.branches) == {"first", "inside"}
    assert units(added, "first") == [*[-1] * 8, *range(8), *[-1] * 8]
    assert units(added, "wide") == [*range(8), *[-1] * 16]
    assert paths(added.consumers) == ["next", "wide"]


def test_groups_that_are_added_are_one_site() -> None:
    """Narrow groups carry: the parts of the split, and what the layer makes of them, go together."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        first, second = m.first(x).relu().split(8, 1)
        return m.last(m.grouped(first).relu() + second)

    (site,) = sites(forward, first=conv(3, 16), grouped=conv(8, 8, groups=4), **layers("last"))
    assert site.channels == 4
    assert units(site, "first") == [c // 2 for c in range(8)] * 2
    assert site.branches == ("first",)


def test_a_branch_that_wakes_its_channels_is_masked() -> None:
    (site,) = sites(lambda m, x: m.last(m.a(x).sigmoid() + m.b(x)), **layers("a", "b", "last"))
    assert [(at.path, at.side) for at in site.masks] == [("last", "input")]


def test_a_sum_that_must_stay_whole_is_a_stream_as_before() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.a(x) + m.b(x)

    assert not sites(forward, **layers("a", "b"))
    report = sites(forward, stream=True, **layers("a", "b"))
    assert {site.name: site.kind for site in report} == {"a": "stream", "b": "stream"}
