"""Random street scenes: what stands where, and what it looks like."""

from __future__ import annotations

import numpy as np

from .raycast import Box, Cylinder, Ellipsoid, Ground, Hits, Solid

__all__ = ["CAMERA_HEIGHT", "build_street", "shade"]

CAMERA_HEIGHT = 1.65
"""Metres of KITTI's cameras above the road."""
STREET_LENGTH = 130.0
SUN = np.array([0.45, -0.75, -0.5], np.float32) / np.float32(np.linalg.norm([0.45, -0.75, -0.5]))
SKY_LOW, SKY_HIGH = np.array([0.86, 0.90, 0.95], np.float32), np.array([0.42, 0.62, 0.88], np.float32)
CAR_PAINT = ((0.75, 0.1, 0.1), (0.85, 0.85, 0.87), (0.12, 0.13, 0.15), (0.15, 0.25, 0.6), (0.5, 0.52, 0.55))
WALLS = ((0.72, 0.6, 0.48), (0.62, 0.38, 0.3), (0.8, 0.78, 0.72), (0.55, 0.57, 0.6), (0.75, 0.7, 0.55))


def build_street(random: np.random.Generator) -> list[Solid]:
    """Return the solids of one straight street along z, 130 m long; the camera drives near x = 0."""
    half_road = random.uniform(3.5, 6.0)
    solids: list[Solid] = [Ground("ground", (half_road, random.uniform(1.5, 3.0), 0), _seed(random))]
    for side in (-1, 1):
        solids += _buildings(random, side, half_road)
        solids += _roadside(random, side, half_road)
        solids += _parked_cars(random, side, half_road)
    for z in np.cumsum(random.uniform(9, 30, 6)) + 5:
        lane = random.choice((-1, 1)) * half_road * 0.5
        solids += _car(random, lane, float(z))
    solids.append(Box("wall", _pick(random, WALLS), _seed(random), *_street_end(random)))
    return solids


def _seed(random: np.random.Generator) -> int:
    return int(random.integers(1 << 16))


def _pick(random: np.random.Generator, colors: tuple[tuple[float, float, float], ...]) -> tuple[float, float, float]:
    shift = random.uniform(-0.06, 0.06, 3)
    red, green, blue = np.clip(np.array(colors[random.integers(len(colors))]) + shift, 0.02, 1)
    return float(red), float(green), float(blue)


def _street_end(random: np.random.Generator) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    top = CAMERA_HEIGHT - random.uniform(5, 14)
    return (-60.0, top, STREET_LENGTH), (60.0, CAMERA_HEIGHT, STREET_LENGTH + 10)


def _buildings(random: np.random.Generator, side: int, half_road: float) -> list[Solid]:
    solids: list[Solid] = []
    z = random.uniform(-15, 0)
    while z < STREET_LENGTH:
        length, depth = random.uniform(7, 18), random.uniform(6, 14)
        front = half_road + random.uniform(3.5, 9.0)
        top = CAMERA_HEIGHT - random.uniform(3.5, 13)
        low, high = sorted((side * front, side * (front + depth)))
        if random.random() < 0.8:
            color = _pick(random, WALLS)
            solids.append(Box("wall", color, _seed(random), (low, top, z), (high, CAMERA_HEIGHT, z + length)))
        z += length + random.choice((0.0, random.uniform(1.5, 8)))
    return solids


def _roadside(random: np.random.Generator, side: int, half_road: float) -> list[Solid]:
    solids: list[Solid] = []
    z = random.uniform(4, 12)
    while z < 100:
        x = side * (half_road + random.uniform(0.8, 2.0))
        if random.random() < 0.5:
            top = CAMERA_HEIGHT - random.uniform(3.0, 7.0)
            solids.append(Cylinder("metal", (0.42, 0.43, 0.44), 0, (x, z), random.uniform(0.06, 0.12), top))
        else:
            trunk, crown = random.uniform(1.6, 2.6), random.uniform(1.2, 2.2)
            solids.append(Cylinder("bark", (0.33, 0.25, 0.18), _seed(random), (x, z), 0.16, CAMERA_HEIGHT - trunk - 1))
            green = _pick(random, ((0.22, 0.4, 0.14), (0.3, 0.45, 0.16)))
            center = (x, CAMERA_HEIGHT - trunk - crown, z)
            solids.append(Ellipsoid("leaves", green, _seed(random), center, (crown * 0.8, crown, crown * 0.8)))
        z += random.uniform(6, 20)
    return solids


def _parked_cars(random: np.random.Generator, side: int, half_road: float) -> list[Solid]:
    solids: list[Solid] = []
    z = random.uniform(5, 20)
    while z < 90:
        if random.random() < 0.55:
            solids += _car(random, side * (half_road - 1.0), z)
        z += random.uniform(5.5, 14)
    return solids


def _car(random: np.random.Generator, x: float, z: float) -> list[Solid]:
    """A car as body, cabin and four wheels; its rear is at z."""
    length, width, height = random.uniform(3.7, 4.7), random.uniform(1.65, 1.85), random.uniform(1.4, 1.75)
    paint, seed = _pick(random, CAR_PAINT), _seed(random)
    bonnet = CAMERA_HEIGHT - height * 0.58
    left, right = x - width / 2, x + width / 2
    solids: list[Solid] = [
        Box("paint", paint, seed, (left, bonnet, z), (right, CAMERA_HEIGHT - 0.28, z + length)),
        Box(
            "cabin",
            paint,
            seed,
            (left + 0.12, CAMERA_HEIGHT - height, z + length * 0.08),
            (right - 0.12, bonnet, z + length * 0.68),
        ),
    ]
    for wheel_z in (z + length * 0.18, z + length * 0.8):
        for wheel_x in (left + 0.1, right - 0.1):
            low = (wheel_x - 0.11, CAMERA_HEIGHT - 0.62, wheel_z - 0.31)
            high = (wheel_x + 0.11, CAMERA_HEIGHT, wheel_z + 0.31)
            solids.append(Box("tyre", (0.06, 0.06, 0.06), seed, low, high))
    solids.append(
        Box(
            "shadow",
            (0.1, 0.1, 0.1),
            seed,
            (left - 0.15, CAMERA_HEIGHT - 0.02, z - 0.3),
            (right + 0.15, 1.66, z + length),
        )
    )
    return solids


def shade(solids: list[Solid], hits: Hits, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """Colour every ray, float32 (H, W, 3) in [0, 1]: texture, sun, sky light, and haze with distance."""
    up = np.clip(-rays[..., 1:2] * 2.5, 0, 1)
    image = SKY_LOW + (SKY_HIGH - SKY_LOW) * up
    order = np.argsort(hits.solid, axis=None, kind="stable")
    labels = hits.solid.ravel()[order]
    starts = np.searchsorted(labels, np.arange(len(solids) + 1))
    flat, directions, distance = image.reshape(-1, 3), rays.reshape(-1, 3), hits.distance.ravel()
    for index, solid in enumerate(solids):
        pixels = order[starts[index] : starts[index + 1]]
        if len(pixels) == 0:
            continue
        points = origin.astype(np.float32) + directions[pixels] * distance[pixels, None]
        normals = solid.normal(points)
        light = 0.45 + 0.15 * -normals[:, 1:2] + 0.55 * np.clip(normals @ SUN, 0, None)[:, None]
        color = TEXTURES[solid.look](solid, points, normals) * light
        haze = 1 - np.exp(-distance[pixels, None] / 220)
        flat[pixels] = color + (SKY_LOW - color) * haze
    return np.clip(image, 0, 1)


def _noise(a: np.ndarray, b: np.ndarray, seed: int) -> np.ndarray:
    """Smooth random values in [0, 1] over the plane, one lattice point a unit."""
    table = np.random.default_rng(seed).random((64, 64), np.float32)
    cell_a, cell_b = np.floor(a), np.floor(b)
    s, t = a - cell_a, b - cell_b
    i, j = cell_a.astype(np.int32) & 63, cell_b.astype(np.int32) & 63
    i1, j1 = (i + 1) & 63, (j + 1) & 63
    upper = table[i, j] * (1 - t) + table[i, j1] * t
    lower = table[i1, j] * (1 - t) + table[i1, j1] * t
    return upper * (1 - s) + lower * s


def _ground(solid: Solid, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    half_road, pavement, _ = solid.color
    x, z = points[:, 0], points[:, 2]
    side = np.abs(x)
    grain = 0.6 * _noise(x * 9, z * 9, solid.seed) + 0.4 * _noise(x * 1.1, z * 0.7, solid.seed + 1)
    road = 0.27 + 0.1 * grain
    dashes = (side < 0.07) & (z % 9 < 4)
    edges = np.abs(side - half_road + 0.2) < 0.06
    gray = np.where(dashes | edges, np.float32(0.82), road)
    slabs = ((z % 1.5) < 0.05) | ((side - half_road) % 1.5 < 0.05)
    gray = np.where(side > half_road, 0.5 + 0.1 * grain - 0.1 * slabs, gray)
    color = np.repeat(gray[:, None], 3, axis=1)
    grass = side > half_road + pavement
    color[grass] = (0.55 + 0.7 * grain[grass, None]) * np.array([0.3, 0.42, 0.17], np.float32)
    return color.astype(np.float32)


def _wall(solid: Solid, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    facing_road = np.abs(normals[:, 0]) > 0.5
    along = np.where(facing_road, points[:, 2], points[:, 0])
    height = CAMERA_HEIGHT - points[:, 1]
    stain = 0.85 + 0.3 * _noise(along * 0.8, height * 0.8, solid.seed)
    bricks = 0.94 + 0.12 * _noise(along * 7, height * 12, solid.seed + 1)
    color = np.array(solid.color, np.float32) * (stain * bricks)[:, None]
    storey, bay = 2.7 + solid.seed % 7 / 10, 2.2 + solid.seed % 11 / 8
    window = ((height % storey > 0.9) & (height % storey < 2.2)) & ((along % bay > 0.6) & (along % bay < 1.6))
    window &= np.abs(normals[:, 1]) < 0.5
    color[window] = np.array([0.16, 0.2, 0.25], np.float32) * (0.7 + 0.8 * stain[window, None])
    return color


def _cabin(solid: Solid, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    assert isinstance(solid, Box)
    color = np.broadcast_to(np.array(solid.color, np.float32), points.shape).copy()
    glass = (points[:, 1] > solid.low[1] + 0.07) & (np.abs(normals[:, 1]) < 0.5)
    color[glass] = (0.12, 0.14, 0.17)
    return color


def _paint(solid: Solid, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    assert isinstance(solid, Box)
    color = np.broadcast_to(np.array(solid.color, np.float32), points.shape).copy()
    end = np.abs(normals[:, 2]) > 0.5
    across = np.abs(points[:, 0] - (solid.low[0] + solid.high[0]) / 2) / (solid.high[0] - solid.low[0])
    down = (points[:, 1] - solid.low[1]) / (solid.high[1] - solid.low[1])
    color[end & (across > 0.34) & (down > 0.1) & (down < 0.4)] = (0.7, 0.08, 0.06)  # lamps
    color[end & (across < 0.14) & (down > 0.5) & (down < 0.72)] = (0.9, 0.9, 0.86)  # number plate
    color[down > 0.88] *= 0.35
    return color


def _rough(solid: Solid, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    grain = _noise(points[:, 0] * 6 + points[:, 2] * 5, points[:, 1] * 6, solid.seed)
    return np.array(solid.color, np.float32) * (0.6 + 0.8 * grain)[:, None]


def _plain(solid: Solid, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.array(solid.color, np.float32), points.shape)


TEXTURES = {
    "ground": _ground,
    "wall": _wall,
    "cabin": _cabin,
    "paint": _paint,
    "leaves": _rough,
    "bark": _rough,
    "metal": _plain,
    "tyre": _plain,
    "shadow": _plain,
}
"""Look -> function of (solid, points (N, 3), normals (N, 3)) that returns colours (N, 3)."""
