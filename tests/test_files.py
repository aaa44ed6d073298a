"""Files and folders: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from gatedprune import files
from gatedprune.errors import CheckpointError


def fail(path: str | Path) -> None:
    path = Path(path)
    (path / "half" if path.is_dir() else path).write_bytes(b"half of the new")
    raise KeyboardInterrupt


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        files.atomic_write(target, fail)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
    files.atomic_write(target, lambda path: Path(path).write_bytes(b"new"))
    assert target.read_bytes() == b"new"


def test_files_have_the_rights_of_ordinary_ones(tmp_path: Path) -> None:
    files.atomic_write(tmp_path / "ours", lambda path: Path(path).write_bytes(b""))
    files.atomic_folder(tmp_path / "folder", lambda path: (path / "inside").write_bytes(b""))
    (tmp_path / "theirs").write_bytes(b"")
    (tmp_path / "their_folder").mkdir()
    modes = {p.name: p.stat().st_mode for p in (*tmp_path.iterdir(), tmp_path / "folder" / "inside")}
    assert modes["ours"] == modes["inside"] == modes["theirs"]
    assert modes["folder"] == modes["their_folder"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    target = tmp_path / "runs" / "model"
    files.atomic_folder(target, lambda path: (path / "a").write_text("1"))
    (target / "notes").mkdir()
    (target / "notes" / "mine.txt").write_text("kept")
    with open(target / "log", "a") as log:  # a file that is being written
        files.atomic_folder(target, lambda path: (path / "a").write_text("2"))
        log.write("still here")
    with pytest.raises(KeyboardInterrupt):
        files.atomic_folder(target, fail)
    assert (target / "a").read_text() == "2"
    assert (target / "notes" / "mine.txt").read_text() == "kept"
    assert (target / "log").read_text() == "still here"
    assert sorted(os.listdir(target)) == ["a", "log", "notes"]
    assert os.listdir(tmp_path / "runs") == ["model"]


def test_where_two_names_cannot_be_exchanged_the_old_folder_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    files.atomic_folder(target, lambda path: (path / "a").write_text("1"))
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    rename, calls = Path.rename, []

    def second_fails(self: Path, to: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OSError, match="No space"):
        files.atomic_folder(target, lambda path: (path / "a").write_text("2"))
    assert (target / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["model"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(NotADirectoryError):
        files.atomic_folder(tmp_path / "model", lambda path: None)
    assert (tmp_path / "model").read_text() == "mine"


def test_tensors_come_back_and_shared_ones_are_stored_each(tmp_path: Path) -> None:
    one = torch.randn(3, 4, dtype=torch.float64)
    tensors = {"a": one, "tied": one, "turned": one.t(), "half": one.half(), "empty": torch.empty(0)}
    files.write_tensors(tmp_path / "t.safetensors", tensors, {"what": "x"})
    again = files.read_tensors(tmp_path / "t.safetensors")
    assert files.read_metadata(tmp_path / "t.safetensors") == {"what": "x"}
    assert set(again) == set(tensors)
    assert all(torch.equal(again[k], v) and again[k].dtype == v.dtype for k, v in tensors.items())


def test_what_is_no_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "note.safetensors").write_text("no tensors")
    for name in ("note.safetensors", "missing.safetensors"):
        for read in (files.read_tensors, files.read_metadata):
            with pytest.raises(CheckpointError, match=rf"{name} cannot be read .*Copy or save it again"):
                read(tmp_path / name)
