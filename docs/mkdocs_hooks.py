"""MkDocs hooks: the pages at the top of the repository, links as GitHub has them, docstrings below the public names.

Every page is written for GitHub, where it is read as it stands; here it becomes a page of the site.
"""

from __future__ import annotations

import importlib
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent

# What lives beside docs/, and the page of the site that it is.
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
ELSEWHERE = {**PAGES, "README.md": "index.md"}

LINK = re.compile(r"(?<=\]\()(?P<path>[^)#:\s]+)(?=[#)])")
NAME = re.compile(r"^#{2,3} `(?P<name>[\w.]+)`$")
UNDOCUMENTED = {"__version__"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from the top of the repository."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between the repository's files become links between pages; the public names get their docstrings."""
    home = {page_: source for source, page_ in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    markdown = LINK.sub(lambda link: relocated(link["path"], home), markdown)
    return with_docstrings(markdown) if page.file.src_uri == "api.md" else markdown


def relocated(link: str, home: str) -> str:
    """A relative link in the file ``home`` of the repository, as a link in the site's one folder of pages."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(home), link))
    return ELSEWHERE.get(target, target.removeprefix("docs/"))


def with_docstrings(markdown: str) -> str:
    """Below the text of each heading that is one name of the library, that name's docstring."""
    out: list[str] = []
    pending: str | None = None
    in_code = False
    for line in [*markdown.split("\n"), "# end"]:
        in_code ^= line.startswith("```")
        if line.startswith("#") and not in_code and pending is not None:
            out += [f"::: {pending}", ""]
            pending = None
        out.append(line)
        if heading := NAME.match(line):
            pending = None if heading["name"] in UNDOCUMENTED else address(heading["name"])
    return "\n".join(out[:-1])


def address(name: str) -> str:
    """Where the source of a name stands, for mkdocstrings, which reads sources and runs nothing."""
    if name.startswith("gatedprune."):
        return name.replace("gatedprune.adapters", "adapters")  # the folder in the repository: setup.cfg, package_dir
    value = getattr(importlib.import_module("gatedprune"), name)
    value = getattr(value, name, value)  # `gatedprune.compare` is a function and a package, and the function is meant
    return f"{value.__module__}.{value.__qualname__}"
