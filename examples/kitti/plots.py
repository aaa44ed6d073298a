"""Pictures of depth: warm colours near, cold colours far, as in the paper's Figure 5."""

from __future__ import annotations

import os
from collections.abc import Sequence

import cv2
import numpy as np

from .images import write_image
from .velodyne import resize_sparse

__all__ = ["color_depth", "save_picture"]

TILE_WIDTH = 420
LABEL_HEIGHT, BAR_HEIGHT, GAP = 26, 44, 4
FONT = cv2.FONT_HERSHEY_SIMPLEX


def color_depth(depth: np.ndarray, near: float = 3.0, far: float = 80.0) -> np.ndarray:
    """Colour a depth map (H, W) in metres as RGB uint8 (H, W, 3): red near, blue far, black where it is 0.

    Colours follow the logarithm of depth, so that equal steps of colour are equal factors of distance.
    """
    valid = depth > 0
    share = np.log(np.where(valid, depth, far) / near) / np.log(far / near)
    warmth = (255 * (1 - np.clip(share, 0, 1))).astype(np.uint8)
    colored = cv2.cvtColor(cv2.applyColorMap(warmth, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)
    colored[~valid] = 0
    return colored


def save_picture(
    path: str | os.PathLike[str],
    rows: Sequence[tuple[np.ndarray, np.ndarray, Sequence[np.ndarray]]],
    names: Sequence[str],
    *,
    near: float = 3.0,
    far: float = 80.0,
) -> None:
    """Write a picture with a row for each frame: image, ground truth, and the predictions side by side.

    Args:
        path: a .png or .jpg.
        rows: for each frame the image, RGB uint8 (H, W, 3), its ground truth (H, W) in metres, 0 where there
            is none, and the predictions (H, W).
        names: of the predictions, for their columns' headings.
        near, far: metres of the ends of the colour scale.
    """
    labels = ["image", "ground truth", *names]
    lines = [_spread([_heading(label) for label in labels])]
    for image, truth, predictions in rows:
        tiles = [_shrink(image), color_depth(_thicken(_nearest_of_cells(truth)), near, far)]
        unseen = int(np.argmax(tiles[1].any(axis=(1, 2))))  # rows above the laser's highest beam
        tiles += [_veil(color_depth(_shrink(prediction), near, far), unseen) for prediction in predictions]
        lines.append(_spread(tiles))
    lines.append(_color_bar(lines[0].shape[1], near, far))
    width = lines[0].shape[1]
    gap = np.full((GAP, width, 3), 255, np.uint8)
    write_image(path, np.concatenate([part for line in lines for part in (line, gap)]))


def _shrink(image: np.ndarray) -> np.ndarray:
    height = round(image.shape[0] * TILE_WIDTH / image.shape[1])
    return cv2.resize(image, (TILE_WIDTH, height), interpolation=cv2.INTER_AREA)


def _nearest_of_cells(truth: np.ndarray) -> np.ndarray:
    return resize_sparse(truth, (round(truth.shape[0] * TILE_WIDTH / truth.shape[1]), TILE_WIDTH))


def _thicken(truth: np.ndarray) -> np.ndarray:
    """Spread each value over its neighbours, the nearest first, so that single points can be seen."""
    far = np.where(truth > 0, truth, np.float32(np.inf))
    spread = cv2.erode(far, np.ones((3, 3), np.uint8))  # erosion takes the minimum
    return np.where(np.isfinite(spread) & (spread < 1e6), spread, 0).astype(np.float32)


def _veil(colored: np.ndarray, rows: int) -> np.ndarray:
    """Pale the first rows: no ground truth ever reached them, so what a model says there means nothing."""
    colored[:rows] = 190 + colored[:rows] // 4
    return colored


def _heading(text: str) -> np.ndarray:
    tile = np.full((LABEL_HEIGHT, TILE_WIDTH, 3), 255, np.uint8)
    cv2.putText(tile, text, (6, LABEL_HEIGHT - 8), FONT, 0.5, (20, 20, 20), 1, cv2.LINE_AA)
    return tile


def _spread(tiles: Sequence[np.ndarray]) -> np.ndarray:
    height = max(tile.shape[0] for tile in tiles)
    columns: list[np.ndarray] = []
    for tile in tiles:
        padded = np.full((height, tile.shape[1] + GAP, 3), 255, np.uint8)
        padded[: tile.shape[0], : tile.shape[1]] = tile
        columns.append(padded)
    return np.concatenate(columns, axis=1)


def _color_bar(width: int, near: float, far: float) -> np.ndarray:
    bar = np.full((BAR_HEIGHT, width, 3), 255, np.uint8)
    left, right = width // 4, width * 3 // 4
    metres = near * (far / near) ** np.linspace(0, 1, right - left)
    bar[6:20, left:right] = color_depth(metres[None].astype(np.float32), near, far)
    for mark in (3, 5, 10, 20, 40, 80):
        if near <= mark <= far:
            x = left + round((right - left - 1) * np.log(mark / near) / np.log(far / near))
            cv2.putText(bar, f"{mark} m", (x - 14, 36), FONT, 0.42, (20, 20, 20), 1, cv2.LINE_AA)
    note = "pale: above the laser's view, never trained"
    cv2.putText(bar, note, (right + 24, 20), FONT, 0.42, (20, 20, 20), 1, cv2.LINE_AA)
    return bar
