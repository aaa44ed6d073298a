"""Reading and writing images and depth maps, with OpenCV, refusing damaged files."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np

from gatedprune.errors import DataError

__all__ = ["DEPTH_SCALE", "read_depth", "read_image", "write_depth", "write_image"]

DEPTH_SCALE = 256.0
"""KITTI's depth PNGs: metres = uint16 value / 256; 0 means no value."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image file as RGB uint8, (H, W, 3).

    Raises:
        DataError: the file is missing, truncated, damaged, or no image.
    """
    image = cv2.imdecode(_read_bytes(path), cv2.IMREAD_COLOR)
    if image is None:
        raise DataError(f"{path} is not an image that OpenCV can read. Fetch the file again.")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_depth(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a KITTI depth PNG (uint16, metres times 256) as float32 metres, (H, W); 0 means no value.

    Raises:
        DataError: the file is missing, damaged, or not a 16-bit image of one channel.
    """
    depth = cv2.imdecode(_read_bytes(path), cv2.IMREAD_UNCHANGED)
    if depth is None or depth.dtype != np.uint16 or depth.ndim != 2:
        found = "nothing readable" if depth is None else f"{depth.dtype} of shape {depth.shape}"
        raise DataError(
            f"{path} is not a KITTI depth map, which is a 16-bit PNG of one channel (metres times 256). Found {found}."
        )
    return depth.astype(np.float32) / np.float32(DEPTH_SCALE)


def write_image(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Write an RGB uint8 image (H, W, 3) as the format that the file name asks for."""
    _write(path, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))


def write_depth(path: str | os.PathLike[str], depth: np.ndarray) -> None:
    """Write depth in metres (H, W) as a KITTI depth PNG. Values beyond 255.99 m are clipped."""
    _write(path, np.clip(np.rint(depth * DEPTH_SCALE), 0, np.iinfo(np.uint16).max).astype(np.uint16))


def _write(path: str | os.PathLike[str], image: np.ndarray) -> None:
    # The least compression: the demo's images are written once and read a few times.
    done, data = cv2.imencode(Path(path).suffix, image, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not done:
        raise DataError(f"OpenCV cannot write {path}. Use a name that ends in .png or .jpg.")
    Path(path).write_bytes(data.tobytes())


def _read_bytes(path: str | os.PathLike[str]) -> np.ndarray:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Check the path.") from error
    if Path(path).suffix.lower() == ".png":
        problem = _png_problem(data)
        if problem:
            raise DataError(f"{path} is a damaged PNG file: {problem}. Fetch the file again.")
    elif not data:
        raise DataError(f"{path} is empty. Fetch the file again.")
    return np.frombuffer(data, np.uint8)


def _png_problem(data: bytes) -> str | None:
    """Walk a PNG's chunks: OpenCV decodes what is left of a truncated file, and leaves the rest black."""
    if not data.startswith(PNG_SIGNATURE):
        return "it does not start as a PNG does"
    start = len(PNG_SIGNATURE)
    while start + 8 <= len(data):
        (length,) = struct.unpack(">I", data[start : start + 4])
        end = start + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(data[start + 4 : end]) != struct.unpack(">I", data[end : end + 4])[0]:
            return f"the checksum of its chunk at byte {start} is wrong"
        if data[start + 4 : start + 8] == b"IEND":
            return None
        start = end + 4
    return f"it is truncated after {len(data)} bytes"
