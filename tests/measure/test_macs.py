"""MACs: exact on layers counted by hand, equal to PyTorch's own counter, and no trace left in the model."""

from __future__ import annotations

import copy
import sys

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gatedprune
from gatedprune.errors import DataError
from gatedprune.measure import count_macs, count_parameters, flop_counter_macs
from gatedprune.measure.macs import format_macs


def test_layers_counted_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=True),  # 8·16·16·3·9 on 32×32
        nn.BatchNorm2d(8),
        nn.LeakyReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),  # depthwise: 8·16·16·9
        nn.Conv2d(8, 16, 1, groups=2),  # 16·16·16·4
        nn.ConvTranspose2d(16, 4, 2, stride=2),  # 16·16·16 inputs · 4·2·2
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),  # 20
    )
    macs = count_macs(model, torch.randn(3, 3, 32, 32))
    assert macs.layers == {
        "0": 8 * 256 * 27,
        "3": 8 * 256 * 9,
        "4": 16 * 256 * 4,
        "5": 16 * 256 * 16,
        "8": 20,
    }
    assert macs.total == sum(macs.layers.values()) == macs.operators
    assert macs.predictors == macs.functional == 0
    assert macs.notes == ()


def test_batch_size_does_not_matter() -> None:
    model = timm.create_model("test_resnet.r160_in1k")
    counts = [count_macs(model, torch.randn(batch, 3, 64, 64)).total for batch in (1, 3)]
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("family", ["resnet", "efficientnet", "nfnet"])
def test_agrees_with_the_flop_counter_on_convolutional_models(family: str) -> None:
    # nfnet has timm's own convolution subclasses, which thop by itself does not see.
    model = timm.create_model(f"test_{family}.r160_in1k")
    images = torch.randn(2, 3, 96, 96)
    macs = count_macs(model, images)
    assert macs.total == macs.operators == flop_counter_macs(model, images)
    assert macs.notes == ()


def test_the_convolutions_of_bit_are_seen() -> None:
    # thop 0.1.1 finds 2 MMACs in this model of 4.1 GMACs: its convolutions are a subclass.
    model = timm.create_model("resnetv2_50x1_bit")
    macs = count_macs(model, torch.zeros(1, 3, 224, 224))
    assert round(macs.total / 1e6) == 4089


def test_attention_is_counted_and_noted() -> None:
    model = timm.create_model("test_vit.r160_in1k")
    images = torch.randn(2, 3, 160, 160)
    macs = count_macs(model, images)
    block = model.blocks[0].attn
    tokens = model.pos_embed.shape[1]
    attention = len(model.blocks) * 2 * tokens * tokens * block.head_dim * block.num_heads
    assert macs.functional == attention
    assert macs.total == sum(macs.layers.values()) + attention == macs.operators
    assert any("attention" in note for note in macs.notes)


class Odd(nn.Linear):
    """A linear layer that works twice: no rule by shape can know."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(x, self.weight)


def test_disagreement_is_noted_by_name() -> None:
    macs = count_macs(nn.Sequential(nn.Linear(4, 4), Odd(4, 4)), torch.randn(2, 4))
    assert macs.layers == {"0": 16, "1": 16}
    assert macs.operators == 48
    assert [note for note in macs.notes if note.startswith("1:")] == [
        "1: 16 MACs by the layer's rule, 32 by torch.utils.flop_counter."
    ]


def test_a_layer_used_in_two_places_counts_each_call_once() -> None:
    shared = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared))
    macs = count_macs(model, torch.randn(1, 4))
    assert macs.total == macs.operators == 32


class PassesItsParameter(nn.Module):
    """Calls a layer with a view of a parameter as the argument, as attention pooling does."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 4))
        self.project = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.query.view(1, 4))


def test_a_parameter_may_be_the_argument_of_a_layer() -> None:
    # PyTorch's flop counter hooks arguments that require gradients, and fails where there is no graph.
    model = PassesItsParameter()
    assert count_macs(model, torch.randn(1, 4)).total == flop_counter_macs(model, torch.randn(1, 4)) == 16
    assert model.query.requires_grad


def test_model_and_state_dict_stay_as_they_are() -> None:
    model = timm.create_model("test_resnet.r160_in1k").train()
    model.bn1.eval()
    before = copy.deepcopy(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    count_macs(model, torch.randn(2, 3, 64, 64))
    flop_counter_macs(model, torch.randn(2, 3, 64, 64))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_masked_model_counts_everything_and_its_predictors() -> None:
    model = timm.create_model("test_resnet.r160_in1k")
    images = torch.randn(2, 3, 160, 160)
    dense = count_macs(model, images)
    gated = gatedprune.wrap(model, ratio=0.5, example_inputs=images)
    masked = count_macs(gated, images)
    predictors = sum(gate.channels * gate.in_channels for gate in gated.gates.values())
    assert masked.predictors == predictors > 0
    assert masked.total == dense.total + predictors == masked.operators
    assert masked.layers == dense.layers


def test_parameters_count_shared_tensors_once() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    assert count_parameters(nn.Sequential(first, second)) == 9 + 3 + 3


@pytest.mark.parametrize("inputs", ["image.png", None, (1, 2), torch.tensor(1.0), torch.zeros(0, 3, 8, 8)])
def test_inputs_must_be_a_batch(inputs: object) -> None:
    with pytest.raises(DataError, match=r"The inputs of count_macs\(\) must"):
        count_macs(nn.Conv2d(3, 3, 1), inputs)  # type: ignore[arg-type]


def test_missing_thop_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "thop", None)
    with pytest.raises(ImportError, match=r"pip install 'gatedprune\[compare\]'"):
        count_macs(nn.Linear(2, 2), torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("macs", "text"), [(12, "12 MACs"), (4.089e9, "4.09 GMACs"), (2e6, "2 MMACs"), (1500, "1.5 kMACs")]
)
def test_units(macs: float, text: str) -> None:
    assert format_macs(macs) == text
