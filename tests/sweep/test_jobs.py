"""What the sweeps write of a model, and which models they take."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
from click.testing import CliRunner

from gatedprune.sweep import Entry, Table, architecture_job, catalogue, family_job, jobs, smallest
from gatedprune.sweep.__main__ import main
from gatedprune.sweep.catalogue import build, sized
from gatedprune.testing import CHECKS, Case


def builds_without_memory() -> bool:
    """timm 1.0.13 reads values of a tensor while it builds vision transformers, which the meta device has not."""
    try:
        build("test_vit")
    except RuntimeError:
        return False
    return True


every_model_on_meta = pytest.mark.skipif(
    not builds_without_memory(), reason="this timm cannot build all of its models on the meta device"
)


def facts_of(job, entry: Entry) -> dict:
    row: dict = {}
    job(entry, row.update)
    return row


@every_model_on_meta
def test_every_family_and_architecture_is_in_the_catalogue(root: Path) -> None:
    entries = catalogue(root / "docs" / "data" / "timm.json")
    if timm.__version__ == "1.0.31":
        assert len(entries) == 1371 and len(smallest(entries)) == 98
    assert sorted(e.model for e in entries) == sorted(timm.list_models())
    assert {e.family for e in smallest(entries)} == {m for m in timm.list_modules() if timm.list_models(module=m)}
    for entry in entries[:40]:
        assert entry.parameters == sum(p.numel() for p in build(entry.model).parameters())
        assert entry.model in timm.list_models(module=entry.family)


def test_a_catalogue_of_another_timm_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "list_modules", lambda: ["resnet", "vgg"])
    monkeypatch.setattr(timm, "list_models", lambda module: {"resnet": ["test_resnet", "resnet18"], "vgg": []}[module])
    cache = tmp_path / "timm.json"
    cache.write_text('{"timm": "0.1", "models": {"gone": ["resnet", 1]}}')
    made = catalogue(cache)
    assert [(e.model, e.family) for e in made] == [("test_resnet", "resnet"), ("resnet18", "resnet")]
    assert made == catalogue(cache) and [e.model for e in smallest(made)] == ["test_resnet"]


@every_model_on_meta
@pytest.mark.parametrize(
    ("model", "options", "shape"),
    [
        ("test_vit", {}, (3, 160, 160)),  # small enough as it is
        ("inception_v3", {}, (3, 256, 256)),  # takes any size
        ("vit_tiny_patch16_384", {"img_size": 256}, (3, 256, 256)),  # has to be told
    ],
)
def test_images_are_small_where_the_model_allows(model: str, options: dict, shape: tuple[int, ...]) -> None:
    found = sized(model)
    assert (found.options, found.shape) == (options, shape)
    assert {p.device.type for p in found.model.parameters()} == {"meta"}


def test_an_architecture_is_looked_at_without_weights() -> None:
    row = facts_of(architecture_job, Entry("test_resnet", "resnet", 0))
    assert row["device"] == "meta" and row["sites"] == 10 and row["input"] == 160
    assert 0 < row["left"] < row["share"] <= 1 and row["convolutions"] > 0.9


def test_each_check_of_a_family_has_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(case: Case) -> str:
        raise AssertionError("wrong by 3")

    monkeypatch.setattr(jobs, "CHECKS", {"identity": CHECKS["identity"], "gradients": fails, "training_steps": fails})
    monkeypatch.setattr(jobs, "LARGE_MACS", 1_000)
    row = facts_of(family_job, Entry("test_resnet", "resnet", 0))
    assert {name: check["outcome"] for name, check in row["checks"].items()} == {
        "identity": "pass", "gradients": "fail", "training_steps": "left out",
    }  # fmt: skip
    assert row["checks"]["gradients"]["note"] == "wrong by 3"


@every_model_on_meta
def test_a_model_that_does_not_fit_is_checked_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(case: Case) -> str:
        seen.append(len(case.dense().blocks))
        return ""

    monkeypatch.setattr(jobs, "CHECKS", {"identity": look})
    monkeypatch.setattr(jobs, "SHORTENED", {"depth": 2})
    row = facts_of(family_job, Entry("test_vit", "vision_transformer", jobs.MOST_PARAMETERS + 1))
    assert row["checked_with"] == {"depth": 2} and seen == [2]
    assert row["sites"] == 12, "the table is of the whole model"
    assert row["checks"]["identity"]["outcome"] == "pass"


def test_the_order_of_checks_names_checks_that_exist() -> None:
    assert set(jobs._ORDER) | set(jobs.LEFT_OUT) <= set(CHECKS)


@every_model_on_meta
def test_the_command_takes_shards_and_patterns(root: Path, tmp_path: Path) -> None:
    (tmp_path / "timm.json").write_text((root / "docs" / "data" / "timm.json").read_text())
    runner = CliRunner()
    done = runner.invoke(main, ["architectures", "--data", str(tmp_path), "--only", "test_resnet"])
    assert done.exit_code == 0 and "1 run" in done.output, done.output
    assert re.match(r"1/1, 0:00:00 left  resnet +test_resnet +10 sites +\d+\.\d s\n", done.output)
    assert list(Table(tmp_path / "architectures.jsonl").rows()) == ["test_resnet"]
    done = runner.invoke(main, ["architectures", "--data", str(tmp_path), "--only", "test_resnet"])
    assert "0 run, 1 of 1 were done before" in done.output
    done = runner.invoke(main, ["architectures", "--shard", "4/4"])
    assert done.exit_code == 2 and "no shard" in done.output
