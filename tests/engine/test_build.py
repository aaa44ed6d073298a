"""How the native engine is built, kept and loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gatedprune.engine import native
from gatedprune.engine.native import build

needs_native = pytest.mark.skipif(not native.load(), reason=f"no native engine here: {native.build_error()}")


@pytest.mark.parametrize("environment", [{"CXX": "no-such-compiler"}, {"GATEDPRUNE_NATIVE": "0"}])
def test_a_build_that_fails_says_why_once(environment: dict[str, str], tmp_path: Path) -> None:
    code = "from gatedprune.engine import native; print(native.load(), native.build_error())"
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), **environment}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("False ")
    assert next(iter(environment.values())) in ran.stdout or "GATEDPRUNE_NATIVE" in ran.stdout
    assert "plain PyTorch is used" in ran.stderr and "Traceback" not in ran.stderr


@needs_native
def test_what_is_built_is_loaded_without_a_compiler() -> None:
    """Also by another installation, whose sources lie elsewhere: ninja would build it anew."""
    compiler = build._compiler()[-1]
    missing = Path("no-such-folder", Path(shutil.which(compiler) or compiler).resolve().name)
    code = "from gatedprune.engine import native; assert native.load(), native.build_error()"
    environment = dict(os.environ, CXX=str(missing))
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP is linked on Linux alone")
@pytest.mark.parametrize(("name", "threads"), [("g++-14", True), ("clang-19", False), ("clang++", False)])
@pytest.mark.parametrize("launcher", ["", "env "])
def test_openmp_is_torchs_own_or_none(name: str, threads: bool, launcher: str, tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """GCC's is the one that Linux' wheels bring along; clang would bring a second, whose threads do not know of it."""
    compiler = tmp_path / name
    compiler.touch(mode=0o755)
    (tmp_path / "c++").symlink_to(compiler)
    monkeypatch.setenv("CXX", f"{launcher}{tmp_path}/c++")
    compiled, linked = build._threads()
    assert compiled == (["-fopenmp"] if threads else [])
    assert len(linked) == len(compiled)
    if threads:
        loaded = Path("/proc/self/maps").read_text()
        assert linked[0] in loaded if linked[0].startswith("/") else "libgomp" not in loaded
