"""Calibration without training, measured: dense, static and dynamic top-1 on ImageNet images, at the same k.

`python -m gatedprune.examples.imagenet_calibration --help`; the guide is docs/calibration.md.
"""
