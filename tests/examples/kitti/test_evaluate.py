"""Evaluation: crops, cap and sizes as the protocol says, and the protocol said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gatedprune.errors import ConfigError, DataError
from gatedprune.examples.kitti.evaluate import Protocol, evaluate, predict_depth
from gatedprune.examples.kitti.images import read_image, write_depth, write_image
from gatedprune.examples.kitti.layouts import find_frames, load_frame
from gatedprune.examples.kitti.plots import color_depth, save_picture
from gatedprune.examples.kitti.synthetic import SyntheticSample


class Constant(nn.Module):
    """Predicts the same depth everywhere."""

    def __init__(self, depth: float) -> None:
        super().__init__()
        self.depth = nn.Parameter(torch.tensor(depth))

    def forward(self, image: Tensor) -> Tensor:
        return self.depth.expand(image.shape[0], 1, *image.shape[-2:])


SIZES = {"image_size": (32, 96), "input_size": (32, 96), "progress": False}


def test_metrics_are_taken_per_image_and_averaged(sample: SyntheticSample) -> None:
    frames = find_frames(sample.root, split=sample.test)
    result = evaluate(Constant(12.0), frames, **SIZES)
    expected = []
    for frame in frames:
        truth = load_frame(frame)[1]
        height, width = truth.shape
        rows = slice(int(0.40810811 * height), int(0.99189189 * height))
        inside = truth[rows, int(0.03594771 * width) : int(0.96405229 * width)]
        valid = inside[(inside > 1e-3) & (inside <= 80)]
        expected.append(np.sqrt(np.mean((valid.astype(np.float64) - 12) ** 2)))
    assert result.images == 2
    assert result.metrics["rms"] == pytest.approx(np.mean(expected), rel=1e-6)
    text = str(result)
    for words in ("projected Velodyne points", "crop: garg", "cap: 80 m", "1242x375", "no median scaling", "2 images"):
        assert words in text


def test_crops_and_cap_decide_what_counts() -> None:
    depth = np.full((375, 1242), 50.0)
    shares = {crop: Protocol(crop).mask(depth).mean() for crop in ("garg", "eigen", "none")}
    assert shares["none"] == 1
    assert shares["garg"] == pytest.approx(0.584 * 0.928, abs=0.005)
    assert shares["eigen"] == pytest.approx(0.581 * 0.928, abs=0.005)
    assert Protocol("eigen").mask(depth)[130, 600] and not Protocol("garg").mask(depth)[130, 600]
    depth[:, 600:] = 81
    depth[200:] = 0
    assert not Protocol("none").mask(depth)[:, 600:].any() and not Protocol("none").mask(depth)[200:].any()
    assert Protocol("none", cap=90).mask(depth)[:200, 600:].all()


def test_predictions_are_limited_to_the_cap_and_resized_to_the_image(sample: SyntheticSample) -> None:
    frames = find_frames(sample.root, split=sample.test)
    assert predict_depth(Constant(3.0), np.zeros((50, 70, 3), np.uint8), (32, 96), (32, 96)).shape == (50, 70)
    near, far = (evaluate(Constant(depth), frames, **SIZES).metrics["rms"] for depth in (80.0, 500.0))
    assert far == pytest.approx(near)


def test_images_without_ground_truth_are_left_out_and_counted(tmp_path) -> None:
    for folder in ("rgb", "depth"):
        (tmp_path / folder).mkdir()
    for name, depth in (("a", 10.0), ("b", 0.0)):
        write_image(tmp_path / "rgb" / f"{name}.png", np.zeros((40, 60, 3), np.uint8))
        write_depth(tmp_path / "depth" / f"{name}.png", np.full((40, 60), depth))
    frames = find_frames(tmp_path)
    result = evaluate(Constant(10.0), frames, **SIZES)
    assert (result.images, result.without_ground_truth) == (1, 1)
    assert "1 more left out" in result.describe() and "annotated depth maps" in result.describe()
    with pytest.raises(DataError, match="no image to average"):
        evaluate(Constant(10.0), frames[1:], **SIZES)


def test_protocol_errors() -> None:
    with pytest.raises(ConfigError, match="must be one of garg, eigen, none"):
        Protocol("center")
    with pytest.raises(ConfigError, match="cap must be more than"):
        Protocol(cap=float("nan"))


def test_near_is_warm_and_far_is_cold() -> None:
    near, middle, far, none = color_depth(np.array([[4.0, 15.0, 70.0, 0.0]]))[0].astype(int)
    assert near[0] > near[2] + 80  # red over blue
    assert far[2] > far[0]
    assert middle[1] > max(middle[0], middle[2])  # green between
    assert (none == 0).all()


def test_the_picture_has_a_row_for_each_frame_and_a_column_for_each_map(tmp_path) -> None:
    truth = np.zeros((100, 300), np.float32)
    truth[50:, ::4] = 20
    row = (np.full((100, 300, 3), 90, np.uint8), truth, [np.full((100, 300), depth) for depth in (5.0, 60.0)])
    save_picture(tmp_path / "one.png", [row], ["before", "after"])
    save_picture(tmp_path / "two.png", [row, row], ["before", "after"])
    one, two = read_image(tmp_path / "one.png"), read_image(tmp_path / "two.png")
    assert one.shape[1] == two.shape[1] > 4 * 400
    assert two.shape[0] - one.shape[0] > 130
    tile = one.shape[1] // 4
    before, after = (one[90, int(tile * (i + 0.5))].astype(int) for i in (2, 3))
    assert before[0] > before[2] and after[2] > after[0]
