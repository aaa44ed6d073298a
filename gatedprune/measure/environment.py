"""The machine and the versions that a number was measured with."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Environment", "checkout_commit", "environment"]

PACKAGES = ("gatedprune", "torch", "timm", "numpy", "torch-pruning", "thop")


@dataclass(frozen=True)
class Environment:
    """Where a measurement was made.

    Args:
        python: Version of the interpreter.
        packages: Version of each package that matters here; None where it is not installed.
        system: Operating system and architecture.
        processor: The CPU's model name.
        cores: CPU cores this process may use.
        threads: Threads PyTorch uses for one operator.
        accelerator: Name of the GPU, or None.
        commit: Commit of the gatedprune checkout the code runs from, with "+" after it where tracked files
            were changed; None outside a checkout.
    """

    python: str
    packages: dict[str, str | None]
    system: str
    processor: str
    cores: int
    threads: int
    accelerator: str | None
    commit: str | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return dataclasses.asdict(self)


def environment() -> Environment:
    """Describe the running process's machine, versions and commit."""
    return Environment(
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        system=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        cores=_cores(),
        threads=torch.get_num_threads(),
        accelerator=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        commit=checkout_commit(),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def checkout_commit(within: str = ":/") -> str | None:
    """The commit of the gatedprune checkout that the code runs from; None outside a checkout.

    Args:
        within: A path, or git's pathspec: with tracked files changed in there, "+" stands behind the commit.
    """
    # Only of a checkout that tracks this very file: site-packages may lie inside somebody else's repository.
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    head = _git(here.parent, "rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("+" if _git(here.parent, "status", "--porcelain", "--untracked-files=no", "--", within) else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
