"""A decoder of bilinear up-sampling stages with skip connections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BilinearDecoder", "UpStage"]


class UpStage(nn.Module):
    """Up-sample bilinearly to a given size, append the skip, then twice conv 3x3, batch norm, ReLU.

    The six layers are modules of their own, so that each convolution with its norm is a site that can be
    gated.
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels + skip_channels, out_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor, size: Sequence[int], skip: Tensor | None = None) -> Tensor:
        """Map x (B, C_in, h, w) and skip (B, C_skip, H, W) or None to (B, C_out, H, W), where (H, W) =
        `size`.
        """
        x = F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        x = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(x)))


class BilinearDecoder(nn.Module):
    """One stage for each skip, then stages without one until the input's size is reached.

    A ResNet gives maps at strides 2, 4, 8, 16 and 32: four stages with a skip and one without, the five of
        the paper.

    Args:
        feature_channels: channels of the encoder's maps, finest first.
        widths: output channels of each stage, coarsest first: one for each skip, then one for each plain
            stage.
    """

    def __init__(self, feature_channels: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        skips = [*reversed(feature_channels[:-1])]
        skips += [0] * (len(widths) - len(skips))
        inputs = [feature_channels[-1], *widths[:-1]]
        self.plain_stages = len(widths) - (len(feature_channels) - 1)
        self.stages = nn.ModuleList(map(UpStage, inputs, skips, widths))

    def forward(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Fuse feature maps (B, C_i, H_i, W_i), finest first, into (B, widths[-1], H, W), where (H, W) =
        `size`.
        """
        x = features[-1]
        skips: list[Tensor | None] = [*reversed(features[:-1])]
        sizes = [skip.shape[-2:] for skip in reversed(features[:-1])]
        for left in reversed(range(self.plain_stages)):
            skips.append(None)
            sizes.append(torch.Size(-(-length // 2**left) for length in size))  # halves, rounded up
        for stage, target, skip in zip(self.stages, sizes, skips, strict=True):
            x = stage(x, target, skip)
        return x
