"""Exact ray casting of simple solids, in numpy: what the synthetic streets are made of.

Coordinates are those of KITTI's rectified camera: x right, y down, z forward, in metres.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Box", "Cylinder", "Ellipsoid", "Ground", "Hits", "Solid", "cast"]


@dataclass(frozen=True)
class Solid:
    """Something a ray can hit. `look` names its texture, `color` is RGB in [0, 1], `seed` varies it."""

    look: str
    color: tuple[float, float, float]
    seed: int

    def intersect(self, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
        """Return the distance along each ray (..., 3), in units of its length, or inf; the result is
        (...).
        """
        raise NotImplementedError

    def normal(self, points: np.ndarray) -> np.ndarray:
        """Return the outward unit normal at surface points, (N, 3) -> (N, 3)."""
        raise NotImplementedError

    def corners(self) -> np.ndarray | None:
        """Return points (N, 3) whose convex hull contains the solid, or None where it is unbounded."""
        return None


@dataclass(frozen=True)
class Ground(Solid):
    """The plane y = `height` (the camera is that much above the road)."""

    height: float = 1.65

    def intersect(self, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
        distance = np.full(rays.shape[:-1], np.inf, np.float32)
        down = rays[..., 1] > 1e-6
        distance[down] = (self.height - origin[1]) / rays[..., 1][down]
        return distance

    def normal(self, points: np.ndarray) -> np.ndarray:
        return np.broadcast_to(np.array([0, -1, 0], np.float32), points.shape)


@dataclass(frozen=True)
class Box(Solid):
    """A box with its sides along the axes, from corner `low` to corner `high`."""

    low: tuple[float, float, float] = (0, 0, 0)
    high: tuple[float, float, float] = (1, 1, 1)

    def intersect(self, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
        enter = np.zeros(rays.shape[:-1], np.float32)
        leave = np.full(rays.shape[:-1], np.inf, np.float32)
        for axis in range(3):
            with np.errstate(divide="ignore"):
                inverse = 1 / rays[..., axis]
            first = (np.float32(self.low[axis]) - origin[axis]) * inverse
            second = (np.float32(self.high[axis]) - origin[axis]) * inverse
            np.maximum(enter, np.minimum(first, second), out=enter)
            np.minimum(leave, np.maximum(first, second), out=leave)
        return np.where((enter <= leave) & (enter > 0), enter, np.float32(np.inf))

    def normal(self, points: np.ndarray) -> np.ndarray:
        low, high = np.array(self.low, np.float32), np.array(self.high, np.float32)
        offset = (points - (low + high) / 2) / ((high - low) / 2)  # the face is where this is nearest to +-1
        axis = np.abs(offset).argmax(axis=1)
        normal = np.zeros_like(points)
        rows = np.arange(len(points))
        normal[rows, axis] = np.sign(offset[rows, axis])
        return normal

    def corners(self) -> np.ndarray:
        return np.array(np.meshgrid(*zip(self.low, self.high, strict=True))).reshape(3, -1).T


@dataclass(frozen=True)
class Cylinder(Solid):
    """An upright cylinder without caps, around (x, z) = `center`, from `top` down to `bottom` (y grows
    downwards).
    """

    center: tuple[float, float] = (0, 0)
    radius: float = 0.1
    top: float = -4
    bottom: float = 1.65

    def intersect(self, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
        x, z = origin[0] - self.center[0], origin[2] - self.center[1]
        dx, dz = rays[..., 0], rays[..., 2]
        distance = _quadratic(dx * dx + dz * dz, x * dx + z * dz, x * x + z * z - self.radius**2)
        with np.errstate(invalid="ignore"):
            y = origin[1] + distance * rays[..., 1]
        return np.where((y >= self.top) & (y <= self.bottom), distance, np.float32(np.inf))

    def normal(self, points: np.ndarray) -> np.ndarray:
        normal = np.zeros_like(points)
        normal[:, 0] = (points[:, 0] - self.center[0]) / self.radius
        normal[:, 2] = (points[:, 2] - self.center[1]) / self.radius
        return normal

    def corners(self) -> np.ndarray:
        (x, z), r = self.center, self.radius
        return Box("", (0, 0, 0), 0, (x - r, self.top, z - r), (x + r, self.bottom, z + r)).corners()


@dataclass(frozen=True)
class Ellipsoid(Solid):
    """An ellipsoid with its axes along the coordinates' (a tree's crown)."""

    center: tuple[float, float, float] = (0, 0, 0)
    radii: tuple[float, float, float] = (1, 1, 1)

    def intersect(self, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
        radii = np.array(self.radii, np.float32)
        start = (np.asarray(origin, np.float32) - np.array(self.center, np.float32)) / radii
        scaled = rays / radii
        # Not `scaled @ start`: BLAS rounds by the shape of the array, and a window must see what the whole image sees.
        return _quadratic((scaled * scaled).sum(-1), (scaled * start).sum(-1), np.float32(start @ start - 1))

    def normal(self, points: np.ndarray) -> np.ndarray:
        normal = (points - np.array(self.center, np.float32)) / np.array(self.radii, np.float32) ** 2
        return normal / np.linalg.norm(normal, axis=1, keepdims=True)

    def corners(self) -> np.ndarray:
        center, radii = np.array(self.center), np.array(self.radii)
        return Box("", (0, 0, 0), 0, tuple(center - radii), tuple(center + radii)).corners()


def _quadratic(a: np.ndarray, half_b: np.ndarray, c: float | np.ndarray) -> np.ndarray:
    """Smaller root of a·t² + 2·half_b·t + c = 0 where it is real and positive, else inf."""
    with np.errstate(invalid="ignore", divide="ignore"):
        root = (-half_b - np.sqrt(half_b * half_b - a * c)) / a
    return np.where(root > 0, root, np.float32(np.inf)).astype(np.float32)


@dataclass
class Hits:
    """What a grid of rays (H, W) hits: distance in ray lengths (inf: the sky) and the solid's index (-1: the
    sky).
    """

    distance: np.ndarray
    solid: np.ndarray


def cast(solids: list[Solid], origin: np.ndarray, rays: np.ndarray, camera: np.ndarray | None = None) -> Hits:
    """Find the nearest hit of each ray.

    Args:
        solids: the scene.
        origin: where the rays start, (3,).
        rays: directions, float32 (H, W, 3).
        camera: for the rays of a camera, its 3x3 matrix: a solid is then only tried where its corners can
            appear.
    """
    shape = rays.shape[:2]
    hits = Hits(np.full(shape, np.inf, np.float32), np.full(shape, -1, np.int32))
    for index, solid in enumerate(solids):
        window = _window(solid, origin, camera, shape)
        if window is None:
            continue
        distance = solid.intersect(np.asarray(origin, np.float32), rays[window])
        nearest = hits.distance[window]  # a view: the update below lands in hits
        nearer = distance < nearest
        nearest[nearer] = distance[nearer]
        hits.solid[window][nearer] = index
    return hits


def _window(
    solid: Solid, origin: np.ndarray, camera: np.ndarray | None, shape: tuple[int, ...]
) -> tuple[slice, slice] | None:
    """Return the rows and columns of the image in which the solid may appear; None: it cannot."""
    everything = (slice(0, shape[0]), slice(0, shape[1]))
    corners = solid.corners()
    if camera is None or corners is None:
        return everything
    seen = corners - origin
    if (seen[:, 2] <= 0.1).all():
        return None
    if (seen[:, 2] <= 0.1).any():
        return everything
    u, v = (seen @ camera.T)[:, :2].T / seen[:, 2]
    first_u, last_u = max(int(u.min()), 0), min(int(u.max()) + 2, shape[1])
    first_v, last_v = max(int(v.min()), 0), min(int(v.max()) + 2, shape[0])
    if first_u >= last_u or first_v >= last_v:
        return None
    return slice(first_v, last_v), slice(first_u, last_u)
