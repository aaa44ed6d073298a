"""setup.cfg says what is on the disk, and the wheel holds the library only."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import gatedprune

# Where setup.cfg's package_dir takes each top folder of the checkout.
TOP_FOLDERS = {
    "gatedprune": "gatedprune",
    "adapters": "gatedprune.adapters",
    "examples": "gatedprune.examples",
}


@pytest.fixture(scope="module")
def config(root: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(root / "setup.cfg", encoding="utf-8")
    return parser


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def packages_on_disk(root: Path) -> set[str]:
    found = set()
    for folder, package in TOP_FOLDERS.items():
        for init in (root / folder).rglob("__init__.py"):
            inside = init.parent.relative_to(root / folder).parts
            found.add(".".join((package, *inside)))
    return found


def test_listed_packages_are_those_on_the_disk(root: Path, config: configparser.ConfigParser) -> None:
    listed = lines(config["options"]["packages"])
    assert listed == sorted(set(listed)), "keep the list in setup.cfg sorted and without repeats"
    assert set(listed) == packages_on_disk(root)


def test_every_folder_with_python_files_is_a_package(root: Path) -> None:
    for folder in TOP_FOLDERS:
        for file in (root / folder).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), f"{file.parent.relative_to(root)} has no __init__.py"


def test_package_dir_maps_the_top_folders(config: configparser.ConfigParser) -> None:
    mapped = dict(re.split(r"\s*=\s*", line) for line in lines(config["options"]["package_dir"]))
    assert mapped == {package: folder for folder, package in TOP_FOLDERS.items()}


def test_version_is_one_number_everywhere(config: configparser.ConfigParser) -> None:
    assert config["metadata"]["version"] == "attr: gatedprune._version.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", gatedprune.__version__)
    assert importlib.metadata.version("gatedprune") == gatedprune.__version__, "install the package again"


def test_changelog_speaks_of_this_version(root: Path) -> None:
    headings = re.findall(r"^## (.+)$", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert any(heading.split()[0] in (gatedprune.__version__, "Unreleased") for heading in headings)


def test_wheel_holds_the_library_and_no_tests(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setuptools = pytest.importorskip("setuptools", reason="needs setuptools to read its own view of setup.cfg")
    monkeypatch.chdir(root)
    distribution = setuptools.dist.Distribution({"script_name": "setup.py"})
    distribution.parse_config_files(["setup.cfg"])
    build = distribution.get_command_obj("build_py")
    build.build_lib = "out"
    build.ensure_finalized()
    outputs = {Path(name).relative_to("out").as_posix() for name in build.get_outputs(include_bytecode=False)}
    assert {"gatedprune/__init__.py", "gatedprune/py.typed", "gatedprune/adapters/__init__.py"} <= outputs
    assert all(name.startswith("gatedprune/") for name in outputs), "nothing may land outside gatedprune"
    assert not [name for name in outputs if "test_" in name or "conftest" in name]
    assert {Path(name).suffix for name in outputs} == {".py", ".typed", ".cpp", ".h", ".inl"}


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the checkout, unpacked: what pip would install."""
    # Older ones need the package wheel beside them.
    pytest.importorskip("setuptools", minversion="70.1", reason="needs setuptools 70.1 to build a wheel")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", ".*", "build", "dist", "*.egg-info", "runs", "kitti_demo")
    shutil.copytree(root, source, ignore=ignored, dirs_exist_ok=True)
    command = f"from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))"
    built = subprocess.run([sys.executable, "-c", command], cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = out.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(out / "site")
    return out / "site"


def test_the_wheel_has_one_top_level_name_and_no_tests_or_data(wheel: Path) -> None:
    info = f"gatedprune-{gatedprune.__version__}.dist-info"
    assert {entry.name for entry in wheel.iterdir()} == {"gatedprune", info}
    assert (wheel / info / "top_level.txt").read_text().split() == ["gatedprune"]
    files = [file.relative_to(wheel) for file in (wheel / "gatedprune").rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".py", ".typed", ".cpp", ".h", ".inl"}
    assert not [file for file in files if file.name.startswith(("test_", "conftest"))]
    assert sum((wheel / file).stat().st_size for file in files) < 3_000_000
    assert "gatedprune = gatedprune.cli:main" in (wheel / info / "entry_points.txt").read_text()


def test_every_module_of_the_wheel_can_be_imported_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """All of them in one new interpreter; the libraries that they need are those of the tests."""
    code = """
import importlib, pkgutil, gatedprune
for module in pkgutil.walk_packages(gatedprune.__path__, "gatedprune."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        print(module.name)
print(gatedprune.__file__)
"""
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *modules, file = done.stdout.split()
    assert Path(file).is_relative_to(wheel)
    assert {"gatedprune.adapters.depth.model", "gatedprune.examples.kitti.demo", "gatedprune.cli"} <= set(modules)


def test_extras_are_what_the_docs_promise(config: configparser.ConfigParser) -> None:
    extras = {name: lines(text) for name, text in config["options.extras_require"].items()}
    assert set(extras) == {"compare", "bench", "export", "train", "kitti", "docs", "test", "dev"}
    assert "gatedprune[compare]" in extras["kitti"]
    assert {"gatedprune[kitti]", "gatedprune[train]"} <= set(extras["test"])
    assert "gatedprune[test]" in extras["dev"]


def test_constraints_cover_every_direct_dependency(root: Path, config: configparser.ConfigParser) -> None:
    required = lines(config["options"]["install_requires"])
    for text in config["options.extras_require"].values():
        required += lines(text)
    names = {re.split(r"[\[<>=;~! ]", line)[0] for line in required} - {"gatedprune", "setuptools"}
    text = (root / "constraints.txt").read_text(encoding="utf-8")
    pinned = set(re.findall(r"^([a-z_-]+)==", text, re.MULTILINE))
    assert names <= pinned
    assert "nvidia" not in " ".join(pinned)


def test_the_oldest_versions_are_those_that_setup_cfg_allows(root: Path, config: configparser.ConfigParser) -> None:
    """`make tests-oldest` tests what setup.cfg promises."""
    pinned = dict(re.findall(r"^(\w+)==(\S+)$", (root / "constraints-oldest.txt").read_text("utf-8"), re.MULTILINE))
    required = lines(config["options"]["install_requires"])
    allowed = dict(line.split(">=") for line in required if line.startswith(("torch>=", "timm>=")))
    assert {name: tuple(map(int, version.split("."))) for name, version in pinned.items() if name in allowed} == {
        name: tuple(map(int, (version + ".0.0").split(".")[:3])) for name, version in allowed.items()
    }
    assert set(pinned) == {"torch", "torchvision", "timm"}
