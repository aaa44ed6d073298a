"""The three folder layouts in which KITTI is published, as lists of frames, and the split files that choose
from them.

- raw: `DATE/DRIVE_sync/image_02/data/N.png`, `DATE/DRIVE_sync/velodyne_points/data/N.bin`,
  `DATE/calib_*.txt`; ground truth from the scans, or official annotated maps
  (`[train|val]/DRIVE_sync/proj_depth/groundtruth/image_02/N.png`).
- object: `image_2/N.png`, `velodyne/N.bin`, `calib/N.txt` (in `training/`).
- annotated: pairs of images and depth PNGs: `rgb/N.png` and `depth/N.png`, or KITTI's `depth_selection`
  folders (`image/...`, `groundtruth_depth/...`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gatedprune.errors import ConfigError, DataError

from .calibration import object_projection, raw_projection
from .images import read_depth, read_image
from .velodyne import project_scan, read_scan

__all__ = ["LAYOUTS", "Frame", "find_frames", "ground_truth_source", "load_frame", "read_split"]

LAYOUTS = ("raw", "object", "annotated")
SIDES = {"l": 2, "r": 3}
ANNOTATED_PAIRS = (("rgb", "depth"), ("image", "groundtruth_depth"))


@dataclass(frozen=True)
class Frame:
    """One image and where its ground truth comes from: a depth PNG, or a scan with its calibration."""

    name: str
    image: Path
    depth: Path | None = None
    scan: Path | None = None
    calibration: Path | None = None
    """The date's folder (raw) or the frame's file (object)."""
    camera: int = 2

    def missing(self) -> list[Path]:
        """Return the files of this frame that do not exist (the calibration is checked when it is read)."""
        return [path for path in (self.image, self.depth, self.scan) if path is not None and not path.is_file()]


def load_frame(frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """Return the image, RGB uint8 (H, W, 3), and its ground truth in metres, float32 (H, W), 0 where there is
    none.

    Raises:
        DataError: a file is missing or damaged, or image and ground truth differ in size.
    """
    image = read_image(frame.image)
    if frame.depth is not None:
        depth = read_depth(frame.depth)
        if depth.shape != image.shape[:2]:
            raise DataError(
                f"{frame.depth} is {depth.shape[1]}x{depth.shape[0]} pixels, its image {frame.image} "
                f"{image.shape[1]}x{image.shape[0]}. They must belong together."
            )
        return image, depth
    assert frame.scan is not None and frame.calibration is not None  # the layouts below set either both or `depth`
    of_object = frame.calibration.suffix == ".txt"
    projection = (object_projection if of_object else raw_projection)(frame.calibration, frame.camera)
    return image, project_scan(read_scan(frame.scan), projection, image.shape[:2])


def ground_truth_source(frames: Iterable[Frame]) -> str:
    """Name where the ground truth of `frames` comes from, for the protocol line of an evaluation."""
    annotated = {frame.depth is not None for frame in frames}
    return {frozenset({True}): "annotated depth maps", frozenset({False}): "projected Velodyne points"}.get(
        frozenset(annotated), "mixed"
    )


def find_frames(
    root: str | os.PathLike[str],
    *,
    layout: str = "auto",
    split: str | os.PathLike[str] | None = None,
    annotated: str | os.PathLike[str] | None = None,
    skip_missing: bool = False,
) -> list[Frame]:
    """List the frames under `root`, or those of them that a split file names, in order.

    Args:
        root: the folder of one layout.
        layout: "raw", "object", "annotated", or "auto": told from the folders in `root`.
        split: a file with `folder frame side` on each line (side l or r), as the Eigen split is published;
            for the object and annotated layouts the frame's name alone.
        annotated: for the raw layout, the folder of the official annotated depth maps: take those as ground
            truth.
        skip_missing: leave out frames whose files are missing, instead of raising.

    Raises:
        ConfigError: no such layout. DataError: no frames, or frames with missing files.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"The data folder {root} does not exist. Give the folder that holds a KITTI layout.")
    if layout == "auto":
        layout = _detect_layout(root)
    if layout not in LAYOUTS:
        raise ConfigError(f"The layout must be one of {', '.join(LAYOUTS)} or auto. Got {layout!r}.")
    if annotated is not None and layout != "raw":
        raise ConfigError(f"A folder of annotated maps goes with the raw layout. This one is {layout!r}.")
    names = None if split is None else read_split(split)
    annotated = None if annotated is None else Path(annotated)
    if layout == "raw":
        frames = _raw_frames(root, names, annotated)
    else:
        frames = _object_frames(root, names) if layout == "object" else _annotated_frames(root, names)
    return _check_files(frames, root, layout, split, skip_missing)


def _detect_layout(root: Path) -> str:
    if (root / "image_2").is_dir() or (root / "training" / "image_2").is_dir():
        return "object"
    if any((root / image).is_dir() and (root / depth).is_dir() for image, depth in ANNOTATED_PAIRS):
        return "annotated"
    if next(root.glob("*/*_sync/image_0[23]"), None):
        return "raw"
    raise DataError(
        f"{root} holds none of KITTI's layouts. Expected DATE/DRIVE_sync/image_02 (raw), image_2 or "
        "training/image_2 "
        "(object), or rgb and depth (annotated) in it: give the folder that contains these."
    )


def read_split(path: str | os.PathLike[str]) -> list[tuple[str, str, str]]:
    """Read a split file: (folder, frame, side) for each line. A line with one word is a frame's name.

    Raises:
        DataError: the file is missing or empty, or a line is neither of the two forms.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The split file {path} cannot be read. Check the path.") from error
    entries = []
    for number, words in enumerate(map(str.split, lines), 1):
        if len(words) == 1:
            entries.append(("", words[0], "l"))
        elif len(words) == 3 and words[2] in SIDES:
            entries.append((words[0], words[1], words[2]))
        elif words:
            raise DataError(
                f"Line {number} of the split {path} must be `folder frame side`, side l or r, or one frame "
                "name. "
                f"Got {' '.join(words)!r}."
            )
    if not entries:
        raise DataError(f"The split file {path} names no frames.")
    return entries


def _raw_frames(root: Path, names: list[tuple[str, str, str]] | None, annotated: Path | None) -> list[Frame]:
    if names is None:
        images = sorted(root.glob("*/*_sync/image_02/data/*.png"))
        names = [(image.parents[2].relative_to(root).as_posix(), image.stem, "l") for image in images]
    frames = []
    for folder, number, side in names:
        drive, stem, camera = root / folder, number.zfill(10), SIDES[side]
        image = drive / f"image_{camera:02d}" / "data" / f"{stem}.png"
        label = f"{folder}/{stem} {side}"
        if annotated is not None:
            frames.append(Frame(label, image, depth=_annotated_map(annotated, drive.name, camera, stem)))
        else:
            scan = drive / "velodyne_points" / "data" / f"{stem}.bin"
            frames.append(Frame(label, image, scan=scan, calibration=drive.parent, camera=camera))
    return frames


def _annotated_map(root: Path, drive: str, camera: int, stem: str) -> Path:
    inside = Path(drive, "proj_depth", "groundtruth", f"image_{camera:02d}", f"{stem}.png")
    places = [root / part / inside for part in ("", "train", "val")]
    return next((place for place in places if place.is_file()), places[0])


def _object_frames(root: Path, names: list[tuple[str, str, str]] | None) -> list[Frame]:
    root = root / "training" if (root / "training" / "image_2").is_dir() else root
    stems = [f.stem for f in sorted((root / "image_2").glob("*.png"))] if names is None else [n[1] for n in names]
    return [
        Frame(
            s,
            root / "image_2" / f"{s}.png",
            None,
            root / "velodyne" / f"{s}.bin",
            root / "calib" / f"{s}.txt",
        )
        for s in stems
    ]


def _annotated_frames(root: Path, names: list[tuple[str, str, str]] | None) -> list[Frame]:
    images, depths = next(((root / i, root / d) for i, d in ANNOTATED_PAIRS if (root / i).is_dir()))
    stems = [f.stem for f in sorted(images.glob("*.png"))] if names is None else [n[1] for n in names]
    # KITTI's depth_selection calls the pair ..._sync_image_... and ..._sync_groundtruth_depth_...
    return [
        Frame(s, images / f"{s}.png", depths / f"{s.replace('_sync_image_', '_sync_groundtruth_depth_')}.png")
        for s in stems
    ]


def _check_files(
    frames: list[Frame], root: Path, layout: str, split: str | os.PathLike[str] | None, skip_missing: bool
) -> list[Frame]:
    incomplete = [(frame, missing) for frame in frames if (missing := frame.missing())]
    whole = [frame for frame in frames if not frame.missing()]
    source = f"The {layout} data under {root}" if split is None else f"The split {split}"
    if not frames or (skip_missing and not whole):
        raise DataError(f"{source} gives no frame whose files are all under {root}. Check both paths.")
    if incomplete and not skip_missing:
        listed = "; ".join(f"{frame.name} ({missing[0]})" for frame, missing in incomplete[:3])
        raise DataError(
            f"{source} names {len(frames)} frames, and {len(incomplete)} of them are not under {root}. The "
            "first: "
            f"{listed}. Fetch them, or leave them out with skip_missing=True (--skip-missing)."
        )
    return whole
