"""Files that are there whole or not at all, and tensors in safetensors: nothing is ever unpickled."""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError

__all__ = ["atomic_folder", "atomic_write", "read_metadata", "read_tensors", "write_json", "write_tensors"]

_EXCHANGE = 2  # RENAME_EXCHANGE of Linux's renameat2
_HERE = -100  # AT_FDCWD


def atomic_write(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Call ``write`` with a temporary name beside ``path``, then put the file in place: whole, or not at all.

    Raises:
        OSError: The target cannot be written. What stood there before still does.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are for their owner alone.
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}{target.suffix}"
    try:
        write(str(temporary))
        _sync(temporary)  # the name must not change before the content is on the disk
        os.replace(temporary, target)
        _sync(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(value: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write JSON by `atomic_write`.

    Raises:
        OSError: The target cannot be written. What stood there before still does.
    """

    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=2)
            stream.write("\n")

    atomic_write(path, write)


def atomic_folder(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Call ``write`` with a new folder beside ``path``, then put it in place; other files of an old folder stay in it.

    Raises:
        OSError: The folder cannot be written or replaced. What stood there before still does.
    """
    target = Path(os.path.abspath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    fresh.mkdir()
    try:
        write(fresh)
        _keep(target, fresh)
        for file in sorted(fresh.rglob("*"), reverse=True):
            if not file.is_symlink():
                _sync(file)
        _sync(fresh)
        _put(fresh, target)
        _sync(target.parent)
    finally:  # after an exchange this is the old folder
        shutil.rmtree(fresh, ignore_errors=True)


def _keep(old: Path, new: Path) -> None:
    """Link what only the old folder has (notes, logs that are being written) into the new one."""

    def link(source: str, to: str) -> None:
        try:
            os.link(source, to, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, to, follow_symlinks=False)

    for entry in old.iterdir() if old.is_dir() else ():
        if os.path.lexists(new / entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=link)
        else:
            link(str(entry), str(new / entry.name))


def _put(fresh: Path, target: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    if target.is_symlink():
        target = target.resolve()
    if not target.is_dir():
        raise NotADirectoryError(20, "It is a file", str(target))
    if _exchange(fresh, target):
        return
    aside = target.parent / f"{fresh.name}.old"  # two steps where the system cannot exchange two names in one
    target.rename(aside)
    try:
        fresh.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    done: int = rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)
    return done == 0


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as one safetensors file, atomically; tensors that share memory are stored each.

    Raises:
        OSError: The file cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}

    def write(temporary: str) -> None:
        try:
            save_file(plain, temporary, dict(metadata) if metadata else None)
        except SafetensorError as error:  # a full disk, say
            raise OSError(str(error)) from error

    atomic_write(path, write)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors.

    Raises:
        CheckpointError: The file is missing, truncated or no safetensors file.
    """
    try:
        with safe_open(os.fspath(path), "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: The file is missing, truncated or no safetensors file.
    """
    try:
        with safe_open(os.fspath(path), "pt") as file, torch.device("cpu"):
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{os.fspath(path)} cannot be read ({error}): it is missing, cut off, or no safetensors file. "
        "Copy or save it again."
    )
