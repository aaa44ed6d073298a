"""The documentation site builds without a warning, holds every page and docstring, and fetches nothing."""

from __future__ import annotations

import html
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gatedprune
import gatedprune.adapters.depth
import gatedprune.testing

# What a browser loads by itself; a link is followed only when it is clicked on.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|link)\b[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)"""
)
STYLE_LOADS = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""")


def run_mkdocs(config: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", out]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=config.parent, check=False)


@pytest.fixture(scope="module")
def site(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("mkdocs", "material", "mkdocstrings_handlers"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install -e '.[docs]' brings what builds the site")
    out = tmp_path_factory.mktemp("site")
    built = run_mkdocs(root / "mkdocs.yml", out)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def text_of(page: Path) -> str:
    """What a reader sees, with single spaces."""
    source = re.sub(r"<(script|style)\b.*?</\1>", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", source)))


def test_every_page_is_there(root: Path, site: Path) -> None:
    pages = {file.stem for file in (root / "docs").glob("*.md")} | {"contributing", "changelog"}
    assert {file.stem for file in site.glob("*.html")} == pages | {"404"}
    assert "What a change looks like" in text_of(site / "contributing.html")
    assert not (site / "data").exists() and not list(site.rglob("*.py")), "tables and hooks are no pages"


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    loaded = {url for page in site.rglob("*.html") for url in LOADED.findall(page.read_text(encoding="utf-8"))}
    loaded |= {url for file in site.rglob("*.css") for url in STYLE_LOADS.findall(file.read_text(encoding="utf-8"))}
    assert loaded == set()


def test_what_is_fetched_from_elsewhere_is_seen() -> None:
    seen = [
        '<script async src="https://unpkg.com/x.js">',
        '<link rel="stylesheet" href=//fonts.example/css>',
        "<img alt='' src='http://a.b/c.png'>",
    ]
    assert all(LOADED.search(tag) for tag in seen)
    assert not LOADED.search('<a href="https://arxiv.org">') and not LOADED.search('<script src="assets/x.js">')
    assert STYLE_LOADS.search("@import 'https://a.b/c.css'") and STYLE_LOADS.search("src:url(//a.b/c.woff2)")
    assert not STYLE_LOADS.search("url(data:image/svg+xml;charset=utf-8,<svg>)")


def first_line(value: Any) -> str:
    doc = inspect.getdoc(value)
    assert doc
    return re.sub(r"\s+", " ", doc.split("\n\n")[0]).replace("`", "")


def test_public_names_carry_their_docstrings(site: Path) -> None:
    text = text_of(site / "api.html")
    names = [getattr(gatedprune, name) for name in gatedprune.__all__ if name != "__version__"]
    names = [getattr(value, value.__name__.split(".")[-1]) if inspect.ismodule(value) else value for value in names]
    for module in (gatedprune.testing, gatedprune.adapters.depth):
        names += [value for name in module.__all__ if inspect.isroutine(value := getattr(module, name))]
    for value in names:
        assert first_line(value) in text, f"{value.__name__}: its docstring is not on the page"


def test_links_of_github_lead_to_pages(site: Path) -> None:
    assert 'href="contributing.html"' in (site / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'href="([^"#:]+\.md)', "".join(p.read_text(encoding="utf-8") for p in site.glob("*.html")))
    assert links == []


def test_a_warning_ends_the_build(root: Path, site: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[gone](gone.md)\n")
    config = (root / "mkdocs.yml").read_text(encoding="utf-8")
    config = re.sub(r"^(nav|hooks|plugins):.*?(?=^\S|\Z)", "", config, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "mkdocs.yml").write_text(config)
    built = run_mkdocs(tmp_path / "mkdocs.yml", tmp_path / "out")
    assert built.returncode != 0
    assert "gone.md" in built.stderr
