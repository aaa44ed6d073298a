"""The report, and that general code asks for no model family by name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch

import gatedprune
from gatedprune import find_sites
from gatedprune.errors import ConfigError, ModelError
from gatedprune.sites import SiteReport


@pytest.fixture(scope="module")
def report() -> SiteReport:
    return find_sites(timm.create_model("test_resnet"), torch.zeros(2, 3, 64, 64), stream=True)


def test_it_is_a_collection(report: SiteReport) -> None:
    names = [site.name for site in report]
    assert len(report) == len(names) == len(set(names))
    assert report[names[-1]] is report.sites[-1]
    with pytest.raises(KeyError, match=r"No site 'layer9'. Sites: conv1.0"):
        report["layer9"]


def test_its_text_names_every_site_and_every_reason(report: SiteReport) -> None:
    text = str(report)
    lines = text.splitlines()
    assert re.match(rf"ResNet: {len(report)} sites; \d+\.\d% of [\d,]+ MMACs lie in layers that they narrow", lines[0])
    assert lines[1].split() == ["site", "kind", "channels", "gate", "sees", "MAC", "share", "narrows"]
    for site in report:
        line = next(line for line in lines if line.startswith(site.name + " "))
        assert site.kind in line
        assert f"{site.share:.1%}" in line
        assert str(site.channels) in line
    after = lines[lines.index("not gated:") + 1 :]
    assert len(after) == len(report.skipped)
    assert any(line.startswith("fc ") and "leave the model as an output" in line for line in after)


def test_every_layer_is_in_a_site_or_has_a_reason(report: SiteReport) -> None:
    model = timm.create_model("test_resnet")
    layers = {name for name, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))}
    assert layers <= {edge.path for site in report for edge in site.producers} | set(report.skipped)


def test_shares_add_up() -> None:
    report = find_sites(timm.create_model("test_resnet"), torch.zeros(2, 3, 64, 64))
    assert 0 < report.macs_in_sites <= report.macs
    assert all(site.share == site.macs / report.macs for site in report)


def test_the_default_device_does_not_matter(report: SiteReport) -> None:
    with torch.device("meta"):
        found = find_sites(timm.create_model("test_resnet"), torch.zeros(2, 3, 64, 64), stream=True)
    assert str(found) == str(report)


def test_stream_sites_come_on_demand(report: SiteReport) -> None:
    inner = find_sites(timm.create_model("test_resnet"), torch.zeros(2, 3, 64, 64))
    assert {s.kind for s in inner} == {"inner"}
    assert {s.name for s in inner} < {s.name for s in report}


def test_default_inputs_are_those_of_the_timm_configuration() -> None:
    at_160 = find_sites(timm.create_model("test_resnet"), torch.zeros(2, 3, 160, 160))
    assert find_sites(timm.create_model("test_resnet")).macs == at_160.macs


def test_bad_inputs_are_named() -> None:
    model = timm.create_model("test_resnet")
    with pytest.raises(ConfigError, match="`example_inputs` must be a floating-point tensor.*torch.int64"):
        find_sites(model, torch.zeros(2, 3, 64, 64, dtype=torch.int64))
    with pytest.raises(ModelError, match=r"ResNet could not be traced .*\[\(2, 1, 64, 64\)\]"):
        find_sites(model, torch.zeros(2, 1, 64, 64))


# What is special about a family would be a row of data, with its reason, in one of these.
TABLES: set[str] = set()


def literals(source: str) -> Iterator[tuple[int, str]]:
    """Names and strings of a module that are code: no comments, no docstrings."""
    tree = ast.parse(source)
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr


def family_names(source: str) -> list[tuple[int, str]]:
    # Modules of timm, without those whose name is an ordinary word or the start of one here.
    families = sorted(set(timm.list_modules()) - {"registry", "helpers", "features", "factory", "hub"})
    pattern = re.compile(rf"(?<![a-z])({'|'.join(map(re.escape, families))})(?![a-z])", re.IGNORECASE)
    return [(line, hit.group(0)) for line, text in literals(source) if (hit := pattern.search(text))]


@pytest.mark.parametrize("folder", sorted(p.name for p in Path(gatedprune.__file__).parent.iterdir()))
def test_general_code_names_no_family(folder: str) -> None:
    place = Path(gatedprune.__file__).parent / folder
    files = place.rglob("*.py") if place.is_dir() else [place] if place.suffix == ".py" else []
    for file in files:
        if file.name not in TABLES:
            assert family_names(file.read_text(encoding="utf-8")) == [], file


def test_a_family_by_name_is_caught() -> None:
    assert family_names('if "resnet" in name:\n    pass\n') == [(1, "resnet")]
    assert family_names("from timm.models import swin_transformer\nx = swin_transformer.Block\n")
    assert family_names('"""Works for resnet."""\nevaluating = "evaluate"\n') == []
