"""Monocular depth on any timm backbone: encoder, bilinear decoder, BerHu loss and the usual depth metrics."""

from .losses import berhu
from .metrics import METRICS, MetricAverage, depth_metrics
from .model import DepthModel

__all__ = ["METRICS", "DepthModel", "MetricAverage", "berhu", "depth_metrics"]
