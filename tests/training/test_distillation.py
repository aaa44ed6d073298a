"""Distillation: the losses' values, what gets a gradient, and what is refused."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

import gatedprune
from gatedprune.errors import ConfigError, ModelError
from gatedprune.training import Distillation, feature_loss, logit_loss, map_loss

IMAGES = torch.zeros(1, 3, 32, 32)


@pytest.fixture
def gated() -> gatedprune.wrapping.GatedModel:
    # Residual blocks that start as nothing would let nothing through to their gates.
    model = timm.create_model("test_resnet", num_classes=5, zero_init_last=False)
    return gatedprune.wrap(model, 0.5, example_inputs=IMAGES).train()


def test_logits_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 0.0], [3.0, 1.0]]), torch.tensor([[2.0, 0.0], [3.0, 1.0]])
    p = torch.tensor([2.0, 0.0]).div(2).softmax(0)
    wanted = 4 * float((p * (p.log() - 0.5 * torch.ones(2).log() - torch.tensor(0.5).log())).sum()) / 2
    assert float(logit_loss(student, teacher, 2.0)) == pytest.approx(wanted)
    assert float(logit_loss(teacher, teacher)) == 0
    assert float(logit_loss(student + 7, teacher, 2.0)) == pytest.approx(wanted)  # a softmax sees differences only


def test_the_gradient_hardly_depends_on_the_temperature() -> None:
    torch.manual_seed(1)
    teacher = torch.randn(8, 10) / 10
    slopes = []
    for temperature in (1.0, 8.0):
        student = torch.zeros(8, 10, requires_grad=True)
        logit_loss(student, teacher, temperature).backward()
        assert student.grad is not None
        slopes.append(float(student.grad.norm()))
    assert slopes[1] == pytest.approx(slopes[0], rel=0.1)


def test_maps_are_relative_and_masked() -> None:
    teacher = torch.tensor([10.0, 20.0, 30.0, 40.0]).view(1, 1, 2, 2)
    student = teacher + torch.tensor([1.0, -2.0, 3.0, 100.0]).view(1, 1, 2, 2)
    mask = torch.tensor([True, True, True, False]).view(1, 1, 2, 2)
    assert float(map_loss(student, teacher, mask)) == pytest.approx(2 / 20)
    assert float(map_loss(1e3 * student, 1e3 * teacher)) == pytest.approx(float(map_loss(student, teacher)))
    nothing = student.requires_grad_()
    loss = map_loss(nothing, teacher, torch.zeros_like(mask))
    loss.backward()
    assert float(loss.detach()) == 0 and nothing.grad is not None and not bool(nothing.grad.any())


def test_features_of_any_size_count_alike() -> None:
    a, b = torch.randn(2, 3, 8, 8), torch.randn(2, 6, 4, 4)
    assert float(feature_loss([1.1 * a, 1e3 * b], [a, 1e3 * b])) == pytest.approx(0.005, rel=1e-3)
    assert float(feature_loss([a, 1.1e3 * b], [a, 1e3 * b])) == pytest.approx(0.005, rel=1e-3)


def test_a_gated_model_learns_from_a_dense_copy_of_itself(gated: gatedprune.wrapping.GatedModel) -> None:
    x = torch.randn(4, 3, 32, 32)
    distillation = Distillation(gated, layers=("layer2", "layer4"))
    assert not gatedprune.is_gated(distillation.teacher) and gatedprune.is_gated(gated)
    assert not distillation.teacher.training and gated.training
    before = copy.deepcopy(distillation.teacher.state_dict())
    gated.eval()
    with torch.no_grad():
        wanted = gated(x)
        apart = logit_loss(wanted, distillation.teacher(x), 2.0)
    output, loss = distillation(gated, x)
    assert torch.equal(output, wanted)
    assert float(loss.detach()) > float(apart) > 0  # features come on top
    loss.backward()
    assert all(g.bias.grad is not None and bool(g.bias.grad.any()) for g in gated.gates.values())
    assert all(p.grad is None for p in distillation.teacher.parameters())
    assert not any(m._forward_hooks for m in distillation.teacher.modules())
    for name, value in distillation.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    gated.set_ratio(0)
    assert float(distillation(gated, x)[1].detach()) < 1e-6


class Depth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).relu())


def test_dense_prediction() -> None:
    gated = gatedprune.wrap(Depth(), 0.5, example_inputs=IMAGES)
    x = torch.randn(2, 3, 8, 8)
    distillation = Distillation(gated, kind="map")
    output, loss = distillation(gated, x)
    torch.testing.assert_close(loss, map_loss(output, distillation.teacher(x)))
    mask = torch.rand(2, 1, 8, 8) > 0.5
    torch.testing.assert_close(distillation(gated, x, mask=mask)[1], map_loss(output, distillation.teacher(x), mask))


def test_what_it_refuses(gated: gatedprune.wrapping.GatedModel) -> None:
    with pytest.raises(ConfigError, match=r"`teacher` of Distillation\(\) must be a torch.nn.Module. Got NoneType"):
        Distillation(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"`kind` of Distillation\(\) must be one of logits, map. Got 'depth'"):
        Distillation(gated, kind="depth")
    for name in ("temperature", "feature_weight"):
        with pytest.raises(ConfigError, match=rf"`{name}` of Distillation\(\) must be a positive number. Got 0"):
            Distillation(gated, **{name: 0})
    with pytest.raises(ModelError, match="ResNet has no layer 'layer9' to compare. Its children: conv1, bn1"):
        Distillation(gated, layers="layer9")
    other = Distillation(timm.create_model("test_resnet", num_classes=7))
    with pytest.raises(ModelError, match=r"output has shape \(1, 5\), the teacher's \(1, 7\)"):
        other(gated.eval(), IMAGES)
