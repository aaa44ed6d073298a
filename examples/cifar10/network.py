"""The networks that are trained, for small images: timm's ResNet with a small stem, and inverted residuals."""

from __future__ import annotations

from typing import Any

from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

__all__ = ["large", "mobile", "small"]

CLASSES, PIXELS = 10, 32


def small() -> nn.Module:
    """One block a stage, 32 channels wide, on 16×16 maps: 16 million MACs, for two CPU cores."""
    return _resnet(channels=32, blocks=1, stride=2)


def large() -> nn.Module:
    """Two blocks a stage, 64 channels wide, on 32×32 maps: 0.56 billion MACs, for a GPU."""
    return _resnet(channels=64, blocks=2, stride=1)


def mobile() -> nn.Module:
    """Three stages of two inverted residuals, as in MobileNetV2, 8 to 32 channels wide: 1 million MACs."""
    stages = decode_arch_def([["ir_r2_k3_s1_e4_c8"], ["ir_r2_k3_s2_e4_c16"], ["ir_r2_k3_s2_e4_c32"]])
    return _described(EfficientNet(stages, num_classes=CLASSES, num_features=88, stem_size=8, act_layer=nn.ReLU))


def _resnet(channels: int, blocks: int, stride: int) -> nn.Module:
    """Four stages of basic blocks, `channels` wide and twice as wide in each; the stem is one 3×3 convolution."""
    widths = tuple(channels * 2**stage for stage in range(4))
    model = ResNet(BasicBlock, [blocks] * 4, num_classes=CLASSES, channels=widths, stem_type="deep",
                   stem_width=channels // 2)  # fmt: skip
    # timm's plain stem is 64 channels wide whatever the stages are; a deep one is as wide as they are.
    model.conv1 = nn.Conv2d(3, channels, 3, stride, 1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return _described(model)


def _described(model: Any) -> nn.Module:
    """With timm's description of its data."""
    model.pretrained_cfg = {"input_size": (3, PIXELS, PIXELS), "mean": (0.4914, 0.4822, 0.4465),
                            "std": (0.2470, 0.2435, 0.2616), "crop_pct": 1.0, "interpolation": "bilinear",
                            "num_classes": CLASSES}  # fmt: skip
    return model
