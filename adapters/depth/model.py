"""The depth model: any timm backbone, a bilinear decoder, and a head that gives metres."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedprune.errors import ConfigError, DataError

from .backbone import build_backbone, feature_layout, is_channels_last
from .decoder import BilinearDecoder

__all__ = ["DepthModel"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NARROWEST_STAGE = 16


class DepthModel(nn.Module):
    """Encoder-decoder for monocular depth: RGB in [0, 1] in, metres in [min_depth, max_depth] out, the same
    size.

    The encoder is any timm backbone that gives feature maps; pool and classifier are dropped. The images are
    normalised inside, with the mean and standard deviation of the backbone's own pretraining.

    Args:
        backbone: a timm model name, or a module with timm's `feature_info` (`features_only=True`).
        pretrained: fetch the backbone's weights from the hub (only with a name).
        weights: a local checkpoint of the timm classification model instead (only with a name).
        decoder_channels: output channels of the decoder's stages, coarsest first; or one number: the first
            stage's width, which then halves at each stage down to 16. Five stages for a backbone whose maps
            have strides 2, 4, 8, 16 and 32.
        min_depth: lower bound of the output in metres.
        max_depth: upper bound. The head is a sigmoid on the logarithm of depth between the two, so an untrained
            model starts at their geometric mean.
        backbone_options: further keywords of `timm.create_model`, e.g. `{"img_size": (224, 320)}`.

    Raises:
        ConfigError: bounds or widths out of range. ModelError, CheckpointError: see `build_backbone`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: str | nn.Module = "resnet50",
        *,
        pretrained: bool = False,
        weights: str | os.PathLike[str] | None = None,
        decoder_channels: int | Sequence[int] = 256,
        min_depth: float = 1.0,
        max_depth: float = 80.0,
        backbone_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not 0 < min_depth < max_depth < math.inf:
            raise ConfigError(
                f"DepthModel needs 0 < min_depth < max_depth, both in metres. Got {min_depth} and {max_depth}."
            )
        if isinstance(backbone, nn.Module):
            if pretrained or weights is not None or backbone_options:
                raise ConfigError(
                    "`pretrained`, `weights` and `backbone_options` only apply when `backbone` is a timm "
                    "name. "
                    "Load the weights into the module before giving it to DepthModel."
                )
            self.backbone = backbone
        else:
            self.backbone = build_backbone(backbone, pretrained=pretrained, weights=weights, options=backbone_options)
        self.min_depth, self.max_depth = float(min_depth), float(max_depth)
        channels, reductions = feature_layout(self.backbone)
        self.channels_last = is_channels_last(self.backbone)
        # Strides that remain above the finest map are undone by stages without a skip.
        plain = math.ceil(math.log2(reductions[0]))
        widths = _stage_widths(decoder_channels, len(reductions) - 1 + plain)
        self.decoder = BilinearDecoder(channels, widths)
        self.head = nn.Conv2d(widths[-1], 1, 3, padding=1)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)
        config = getattr(self.backbone, "pretrained_cfg", None) or {}
        for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            value = torch.tensor(config.get(name) or default, dtype=torch.float32)
            self.register_buffer(name, value.view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Map images (B, 3, H, W), RGB in [0, 1], to depth in metres (B, 1, H, W).

        Raises:
            DataError: the input is not a batch of floating-point RGB images.
        """
        _check_image(image)
        size = image.shape[-2:]
        maps = self.backbone((image - self.mean) / self.std)
        features = [m.permute(0, 3, 1, 2).contiguous() for m in maps] if self.channels_last else maps
        logit = self.head(self.decoder(features, size))
        if logit.shape[-2:] != size:  # a backbone with a full-size map that is cropped or padded
            logit = F.interpolate(logit, size=tuple(size), mode="bilinear", align_corners=False)
        span = math.log(self.max_depth / self.min_depth)
        # The clamp only undoes the rounding of exp(), which could step over a bound by one unit in the last
        # place.
        return (self.min_depth * torch.exp(span * torch.sigmoid(logit))).clamp(self.min_depth, self.max_depth)


def _stage_widths(channels: int | Sequence[int], stages: int) -> list[int]:
    if isinstance(channels, int):
        widths = [max(NARROWEST_STAGE, channels >> i) if channels > 0 else 0 for i in range(stages)]
    else:
        widths = list(channels)
    if len(widths) != stages or any(not isinstance(w, int) or w < 1 for w in widths):
        raise ConfigError(
            f"The `decoder_channels` of this DepthModel must be a positive int or {stages} of them, one for "
            "each "
            f"up-sampling stage, coarsest first. Got {channels!r}."
        )
    return widths


def _check_image(image: Tensor) -> None:
    if not isinstance(image, Tensor):
        raise DataError(
            f"DepthModel takes a float tensor of images (B, 3, H, W), RGB in [0, 1]. Got {type(image).__name__}."
        )
    if image.ndim != 4 or image.shape[1] != 3:
        raise DataError(
            f"DepthModel takes images as (B, 3, H, W), RGB in [0, 1]. Got the shape {tuple(image.shape)}: "
            "add the batch dimension, put the channels first, and drop an alpha channel."
        )
    if not image.is_floating_point():
        raise DataError(
            f"DepthModel takes floating-point images in [0, 1]. Got {image.dtype}: for 8-bit images, "
            "use image.float() / 255."
        )
