"""setup.cfg says what is on the disk, and the wheel holds the library only."""

from __future__ import annotations

import configparser
import importlib.metadata
import re
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


def test_extras_are_what_the_docs_promise(config: configparser.ConfigParser) -> None:
    extras = {name: lines(text) for name, text in config["options.extras_require"].items()}
    assert set(extras) == {"compare", "bench", "export", "kitti", "docs", "test", "dev"}
    assert "gatedprune[compare]" in extras["kitti"]
    assert "gatedprune[kitti]" in extras["test"]
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
