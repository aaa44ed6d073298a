"""What a site is, on networks small enough to know the answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedprune import Site, SiteReport, find_sites

IMAGES = torch.zeros(2, 3, 16, 16)


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
    return find_sites(Net(forward, **layers).eval(), IMAGES, stream=stream)


def paths(edges: tuple) -> list[str]:
    return [edge.path for edge in edges]


def units(site: Site, path: str) -> list[int]:
    return next(e for e in site.edges if e.path == path).units.tolist()


def test_a_chain() -> None:
    report = sites(
        lambda m, x: m.last(m.norm(m.first(x)).relu()),
        first=conv(3, 16), norm=nn.BatchNorm2d(16), last=conv(16, 4),
    )  # fmt: skip
    (site,) = report
    assert (site.name, site.kind, site.channels, site.in_channels) == ("first", "inner", 16, 3)
    assert (paths(site.producers), paths(site.carriers), paths(site.consumers)) == (["first"], ["norm"], ["last"])
    assert [edge.dim for edge in site.edges] == [0, 0, 1]
    assert site.gate_at.path == "first"
    assert [at.path for at in site.gain_at] == ["norm"]
    assert site.macs == 16 * 16 * 9 * (3 * 16 + 16 * 4)
    assert report.macs == report.macs_in_sites == site.macs
    assert site.share == 1.0
    assert "leave the model as an output" in report.skipped["last"]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_residual_addition(stream: bool, inplace: bool) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.two(m.one(x).relu_() if inplace else m.one(x).relu())
        if inplace:
            y += x
        else:
            y = y + x
        return m.last(y)

    report = sites(forward, stream, stem=conv(3, 8), one=conv(8, 16), two=conv(16, 8), last=conv(8, 4))
    kinds = {site.name: site.kind for site in report}
    assert kinds["one"] == "inner"
    assert paths(report["one"].consumers) == ["two"]
    if stream:
        assert kinds == {"stem": "stream", "one": "inner", "two": "stream"}
    else:
        assert set(kinds) == {"one"}
        assert "residual stream (stream=True gates them)" in report.skipped["two"]


def test_concatenation() -> None:
    report = sites(
        lambda m, x: m.last(torch.cat([m.left(x), m.right(x)], 1).relu()),
        left=conv(3, 16), right=conv(3, 8), last=conv(24, 4),
    )  # fmt: skip
    assert [s.name for s in report] == ["left", "right"]
    assert units(report["left"], "last") == [*range(16), *[-1] * 8]
    assert units(report["right"], "last") == [*[-1] * 16, *range(8)]


def test_chunks_multiplied_are_removed_together() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        a, b = m.first(x).chunk(2, 1)
        return m.last(a * b.sigmoid())

    report = sites(forward, first=conv(3, 32), last=conv(16, 4))
    assert report["first"].channels == 16
    assert units(report["first"], "first") == [*range(16), *range(16)]


def test_chunks_apart_stay_apart() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        a, b = m.first(x).chunk(2, 1)
        return m.last(a.relu()) + m.other(b.relu())

    report = sites(forward, first=conv(3, 32), last=conv(16, 4), other=conv(16, 4))
    assert [(s.name, s.channels) for s in report] == [("first", 16), ("first:1", 16)]
    assert units(report["first"], "first") == [*range(16), *[-1] * 16]
    assert units(report["first:1"], "first") == [*[-1] * 16, *range(16)]
    assert paths(report["first"].consumers) == ["last"]
    assert paths(report["first:1"].consumers) == ["other"]


def test_squeeze_and_excite() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.first(x).relu()
        gate = m.up(m.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return m.last(x * gate)

    report = sites(forward, first=conv(3, 16), down=conv(16, 8, 1), up=conv(8, 16, 1), last=conv(16, 4))
    site = report["first"]
    assert site.channels == 16
    assert set(paths(site.consumers)) == {"down", "last"}
    assert "up" in paths(site.producers)
    assert units(site, "up") == list(range(16))
    assert "up" not in [s.name for s in report]


def test_grouped_convolution_loses_whole_groups() -> None:
    report = sites(
        lambda m, x: m.last(m.mid(m.first(x).relu()).relu()),
        first=conv(3, 16), mid=conv(16, 32, groups=4), last=conv(32, 4),
    )  # fmt: skip
    site = report["first"]
    assert site.channels == 4
    assert units(site, "first") == [c // 4 for c in range(16)]
    assert units(site, "mid") == [c // 8 for c in range(32)]
    assert units(site, "last") == [c // 8 for c in range(32)]


def test_depthwise_convolution_carries() -> None:
    report = sites(
        lambda m, x: m.last(m.norm(m.depth(m.first(x).relu())).relu()),
        first=conv(3, 16, 1), depth=conv(16, 32, groups=16), norm=nn.BatchNorm2d(32), last=conv(32, 4, 1),
    )  # fmt: skip
    site = report["first"]
    assert site.channels == 16
    assert paths(site.carriers) == ["depth", "norm"]
    assert units(site, "depth") == units(site, "last") == [c // 2 for c in range(32)]
    # The bias of the depthwise layer wakes suppressed channels: what reads them must be masked, ahead of its rectifier.
    assert [mask.path for mask in site.masks] == ["norm"]


def test_channel_shuffle() -> None:
    report = sites(lambda m, x: m.last(F.channel_shuffle(m.first(x).relu(), 2)), first=conv(3, 8), last=conv(8, 4))
    assert units(report["first"], "last") == [0, 4, 1, 5, 2, 6, 3, 7]


def test_shuffle_by_views() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.first(x).relu()
        b, c, h, w = x.shape
        return m.last(x.view(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, c, h, w))

    report = sites(forward, first=conv(3, 8), last=conv(8, 4))
    assert units(report["first"], "last") == [0, 2, 4, 6, 1, 3, 5, 7]


def test_a_map_that_is_broadcast_is_pinned() -> None:
    report = sites(
        lambda m, x: m.last(m.first(x).relu() * m.attend(x).sigmoid()),
        first=conv(3, 16), attend=conv(3, 1), last=conv(16, 4),
    )  # fmt: skip
    assert [s.name for s in report] == ["first"]
    assert report["first"].channels == 16
    assert "broadcast over the channels" in report.skipped["attend"]


def test_flattened_maps_give_a_channel_its_places() -> None:
    report = sites(
        lambda m, x: m.head(m.first(x).relu().amax(3).flatten(1)), first=conv(3, 8), head=nn.Linear(8 * 16, 5)
    )
    assert units(report["first"], "head") == [j // 16 for j in range(128)]


def test_tokens_and_linear_layers() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        tokens = m.stem(x).flatten(2).transpose(1, 2)
        return m.last(tokens + m.two(F.gelu(m.one(tokens)))).mean(1)

    report = sites(forward, stem=conv(3, 8), one=nn.Linear(8, 32), two=nn.Linear(32, 8), last=nn.Linear(8, 4))
    (site,) = report
    assert (site.name, site.channels, site.in_channels, site.gate_at.channel_dim) == ("one", 32, 8, 2)


def test_unknown_operators_pin() -> None:
    report = sites(
        lambda m, x: m.last(torch.cdist(m.first(x).flatten(2), m.first(x).flatten(2)).unsqueeze(1)),
        first=conv(3, 8), last=conv(1, 4),
    )  # fmt: skip
    assert [s.name for s in report if s.name == "first"] == []
    assert "passes through `" in report.skipped["first"]
    assert "which mixes or re-arranges channels" in report.skipped["first"]


def test_fixed_order_operators_pin() -> None:
    report = sites(lambda m, x: m.last(m.first(x).softmax(1)), first=conv(3, 8), last=conv(8, 4))
    assert [s.name for s in report] == []
    assert "softmax" in report.skipped["first"]


def test_activations_that_wake_channels_are_masked() -> None:
    for act, woken in ((F.relu, False), (torch.sigmoid, True), (torch.cos, True), (F.silu, False)):
        report = sites(lambda m, x, act=act: m.last(act(m.first(x))), first=conv(3, 8), last=conv(8, 4))
        assert bool(report["first"].masks) == woken, act


class _Functional(nn.Module):
    """A layer without a module of its own: its gate looks at what enters here, before the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act, self.weight = nn.BatchNorm2d(8), nn.ReLU(), nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.act(self.norm(x)), self.weight)


def test_where_channels_are_silenced_only_where_they_are_read() -> None:
    layers = {"first": conv(3, 8), "norm": nn.BatchNorm2d(8), "last": conv(8, 4)}
    woken = sites(lambda m, x: m.last(m.norm(m.first(x).relu()).relu()), **layers)["first"]
    assert woken.masks and woken.silenced
    zero = sites(lambda m, x: m.last(m.norm(m.first(x)).relu()), **layers)["first"]
    assert not zero.masks and not zero.silenced
    # One reader behind the norm, and one before it, which sees zeros.
    both = sites(
        lambda m, x: m.last(m.norm(m.first(x).relu()).relu()) + m.other(m.first(x).relu()), other=conv(8, 4), **layers
    )
    assert not any(site.silenced for site in both)
    looked = sites(
        lambda m, x: m.last(m.block(m.first(x).relu())), first=conv(3, 8), block=_Functional(), last=conv(8, 4)
    )
    assert looked["first"].masks and looked["block"].gate_at.path == "block"
    assert not looked["first"].silenced, "a gate would see suppressed channels"


def test_a_shared_layer_is_not_gated_by_halves() -> None:
    report = sites(
        lambda m, x: m.last(m.twice(m.twice(m.first(x)).relu()).relu()),
        first=conv(3, 8), twice=conv(8, 8), last=conv(8, 4),
    )  # fmt: skip
    assert "twice" not in [s.name for s in report]
    assert "runs once" in report.skipped["twice"]


def test_one_unit_is_no_site() -> None:
    report = sites(
        lambda m, x: m.last(m.mid(m.first(x)).relu()),
        first=conv(3, 2), mid=conv(2, 8, groups=1), last=conv(8, 4),
    )  # fmt: skip
    assert report["mid"].channels == 8
    single = sites(lambda m, x: m.last(m.first(x)), first=conv(3, 1), last=conv(1, 4))
    assert len(single) == 0
    assert "only be removed together" in single.skipped["first"]


def test_outputs_and_unread_layers_stay() -> None:
    report = sites(lambda m, x: m.first(x), first=conv(3, 8), unused=conv(8, 8))
    assert len(report) == 0
    assert "output" in report.skipped["first"]
    assert "unused" not in report.skipped


def test_a_gate_that_costs_what_it_saves_is_left_out() -> None:
    report = sites(lambda m, x: m.last(m.first(x.mean((2, 3))).relu()), first=nn.Linear(3, 8), last=nn.Linear(8, 2))
    assert len(report) == 0
    assert "cost at least what halving it saves" in report.skipped["first"]


def test_finding_changes_nothing() -> None:
    model = Net(
        lambda m, x: m.last(m.norm(m.first(x)).relu()), first=conv(3, 8), norm=nn.BatchNorm2d(8), last=conv(8, 4)
    )
    model.train()
    model.norm.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    find_sites(model, torch.randn(2, 3, 16, 16))
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_norm_behind_a_reshape_takes_the_gain() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.fc1(x.flatten(2).transpose(1, 2))
        return net.fc2(net.norm(y.flatten(0, 1)).reshape_as(y).relu())

    (site,) = sites(forward, fc1=nn.Linear(3, 12), norm=nn.BatchNorm1d(12), fc2=nn.Linear(12, 4))
    assert [(at.path, at.side) for at in site.gain_at] == [("norm", "output")]


def test_heads_take_the_gain_where_they_are_read() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        q, k, v = net.qkv(x).reshape(len(x), -1, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), -1, 32)
        return net.proj(net.act(y))

    (site,) = sites(forward, qkv=nn.Linear(3, 96), act=nn.ReLU(), proj=nn.Linear(32, 8))
    assert (site.channels, [(at.path, at.side) for at in site.gain_at]) == (4, [("proj", "input")])


def test_a_gate_sees_what_a_layer_pads_itself() -> None:
    class Same(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (1, 1, 1, 1)))

    (site,) = sites(lambda m, x: m.last(m.first(x).relu()), first=Same(3, 16, 3), last=conv(16, 4))
    assert (site.name, site.gate_at.path, site.gate_at.channel_dim, site.in_channels) == ("first", "first", 1, 3)


def test_layers_over_places_cost_less_with_fewer_channels() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        u, v = net.first(x.flatten(2).transpose(1, 2)).mul(0.5).tanh().chunk(2, -1)
        v = net.places(net.norm(v).transpose(1, 2))
        return net.last(u * v.transpose(1, 2))

    first, norm = nn.Linear(3, 32), nn.LayerNorm(16)
    report = sites(forward, first=first, norm=norm, places=nn.Linear(256, 256), last=nn.Linear(16, 4))
    (site,) = report
    assert (site.channels, units(site, "first")) == (16, [*range(16), *range(16)])
    assert [norm.kind for norm in site.norms] == ["layer"]
    (places,) = (layer for layer in report.layers if layer.path == "places")
    assert (places.writes, places.reads, places.macs) == ({"first": 1.0}, {}, 16 * 256 * 256)
    assert report.macs_in_sites == report.macs == site.macs


def test_of_single_head_attention_the_values_product_shrinks() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        return net.last(F.scaled_dot_product_attention(net.q(x), net.k(x), net.v(x)))

    report = sites(forward, q=nn.Linear(3, 8), k=nn.Linear(3, 8), v=nn.Linear(3, 24), last=nn.Linear(24, 4))
    assert [site.name for site in report] == ["v"]
    (product,) = (layer for layer in report.layers if layer.op == "scaled_dot_product_attention")
    assert product.writes == {"v": 0.75}


@pytest.mark.parametrize(
    ("act", "others", "place"),
    [
        (F.relu, False, ("norm", "output")),  # ahead of it: it keeps what it gives for the backward pass
        (F.relu, True, ("last", "input")),
        (F.gelu, False, ("last", "input")),
    ],
)
def test_a_mask_is_put_ahead_of_a_rectifier(act: Callable, others: bool, place: tuple[str, str]) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = act(net.norm(torch.cat([x, net.first(x)], 1)))
        z = net.last(y).mean((2, 3))
        return z + net.other(y).mean((2, 3)) if others else z

    layers = {"first": conv(3, 8), "norm": nn.BatchNorm2d(11), "last": conv(11, 4), "other": conv(11, 4)}
    site = sites(forward, **layers)["first"]
    assert [(at.path, at.side) for at in site.masks] == [place] + [("other", "input")] * others and site.silenced


def test_a_gate_behind_a_mask_that_is_ahead_of_a_rectifier_sees_silence() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.second(net.norm(torch.cat([x, net.first(x)], 1)).relu())
        return net.last(y.relu()).mean((2, 3))

    layers = {"first": conv(3, 8), "norm": nn.BatchNorm2d(11), "second": conv(11, 8), "last": conv(8, 4)}
    found = sites(forward, **layers)
    assert [at.path for at in found["first"].masks] == ["norm"] and found["second"].gate_at.path == "second"
    assert found["first"].silenced
