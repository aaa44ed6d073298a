"""Training: it learns, it stops and resumes exactly, it trains gates, and it refuses what cannot go well."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gatedprune
from gatedprune.errors import CheckpointError, ConfigError, DataError
from gatedprune.examples.kitti.augment import AUGMENTATIONS
from gatedprune.examples.kitti.checkpoint import ModelSpec
from gatedprune.examples.kitti.datasets import DepthDataset
from gatedprune.examples.kitti.layouts import find_frames
from gatedprune.examples.kitti.synthetic import SyntheticSample
from gatedprune.examples.kitti.train import TrainConfig, Trainer, TrainingDivergedError

CONFIG = TrainConfig(epochs=3, batch_size=2, lr=1e-3, schedule="cosine")


@pytest.fixture
def dataset(sample: SyntheticSample, spec: ModelSpec) -> DepthDataset:
    frames = find_frames(sample.root, split=sample.train)
    return DepthDataset(
        frames,
        image_size=spec.image_size,
        input_size=spec.input_size,
        augmentation=AUGMENTATIONS["paper"],
        cache=True,
    )


def make(dataset: DepthDataset, spec: ModelSpec, config: TrainConfig = CONFIG, state: Path | None = None) -> Trainer:
    torch.manual_seed(0)
    return Trainer(spec.build(), dataset, config, spec=spec, state_file=state)


def test_the_papers_settings_are_the_default() -> None:
    config = TrainConfig()
    assert (config.epochs, config.batch_size, config.lr, config.optimizer) == (30, 8, 1e-4, "sgd")
    assert config.schedule == "constant"


def test_it_learns(dataset: DepthDataset, spec: ModelSpec) -> None:
    dataset.augmentation = None
    trainer = make(dataset, spec, TrainConfig(epochs=12, batch_size=4, lr=3e-3, optimizer="adamw"))
    assert trainer.fit(progress=False) and trainer.finished
    assert len(trainer.losses) == 12
    assert trainer.losses[-1] < 0.7 * trainer.losses[0]
    assert not trainer.model.training


@pytest.mark.parametrize(("optimizer", "steps"), [("sgd", 1), ("sgd", 2), ("adamw", 3)])
def test_an_interrupted_training_ends_exactly_as_an_uninterrupted_one(
    dataset: DepthDataset, spec: ModelSpec, tmp_path: Path, optimizer: str, steps: int
) -> None:
    config = replace(CONFIG, optimizer=optimizer)
    whole = make(dataset, spec, config)
    assert whole.fit(progress=False)

    first = make(dataset, spec, config, tmp_path / "state.pt")
    countdown = iter([False] * (steps - 1) + [True] * 99)
    asked: dict[int, bool] = {}
    stop = lambda: asked.setdefault(first.steps_done, next(countdown))  # noqa: E731
    assert not first.fit(progress=False, stop=stop)
    assert first.steps_done == steps

    second = make(dataset, spec, config, tmp_path / "state.pt")
    torch.manual_seed(99)
    torch.nn.init.ones_(second.model.head.weight)
    assert second.resume() and second.steps_done == steps
    assert second.fit(progress=False)
    assert second.losses == whole.losses
    for key, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[key], value), key


def test_worker_processes_change_nothing(dataset: DepthDataset, spec: ModelSpec) -> None:
    config = replace(CONFIG, epochs=1)
    trainers = [make(dataset, spec, replace(config, workers=workers)) for workers in (0, 2)]
    for trainer in trainers:
        trainer.fit(progress=False)
    assert trainers[0].losses == trainers[1].losses


def test_gates_are_trained_and_their_penalty_counts(dataset: DepthDataset, spec: ModelSpec) -> None:
    gated_spec = replace(spec, gates=gatedprune.GateConfig(ratio=0.5).to_dict())
    losses = []
    for penalty in (0.0, 1.0):
        trainer = make(dataset, gated_spec, TrainConfig(epochs=1, batch_size=4, lr=1e-3, penalty=penalty))
        before = {name: gate.weight.clone() for name, gate in trainer.model.gates.items()}
        trainer.fit(progress=False)
        losses.append(trainer.losses[0])
        assert any(not torch.equal(gate.weight, before[n]) for n, gate in trainer.model.gates.items())
    assert losses[1] > losses[0]


def test_a_loss_that_is_not_finite_stops_training(dataset: DepthDataset, spec: ModelSpec, tmp_path: Path) -> None:
    trainer = make(dataset, spec, state=tmp_path / "state.pt")
    trainer.save()
    saved = (tmp_path / "state.pt").read_bytes()
    torch.nn.init.constant_(trainer.model.head.bias, float("nan"))
    with pytest.raises(TrainingDivergedError, match=r"became nan in epoch 1, step 1\. Lower the learning rate"):
        trainer.fit(progress=False)
    assert (tmp_path / "state.pt").read_bytes() == saved


def test_steps_and_seconds_can_end_training(dataset: DepthDataset, spec: ModelSpec) -> None:
    few = make(dataset, spec, replace(CONFIG, epochs=50, max_steps=3))
    assert few.fit(progress=False) and few.steps_done == 3
    short = make(dataset, spec, replace(CONFIG, epochs=100_000, max_seconds=0.5))
    assert short.fit(progress=False) and 0 < short.steps_done < 2000
    assert short.optimizer.param_groups[0]["lr"] < 0.7 * CONFIG.lr  # the schedule ran out with the time


def test_the_cosine_schedule(dataset: DepthDataset, spec: ModelSpec) -> None:
    trainer = make(dataset, spec, replace(CONFIG, epochs=20))
    rates = []
    trainer.optimizer.register_step_pre_hook(lambda o, a, k: rates.append(o.param_groups[0]["lr"]))
    trainer.fit(progress=False)
    assert rates[0] < 0.6 * CONFIG.lr and max(rates) == pytest.approx(CONFIG.lr, rel=0.02)
    assert rates[-1] < 0.02 * CONFIG.lr and rates[5:] == sorted(rates[5:], reverse=True)


def test_states_of_other_runs_are_refused(dataset: DepthDataset, spec: ModelSpec, tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    make(dataset, spec, state=state).save()
    assert not make(dataset, spec, state=tmp_path / "none.pt").resume()
    other = replace(spec, backbone="test_resnet", decoder_channels=24)
    with pytest.raises(CheckpointError, match=r"another model \(decoder_channels: 16, not 24\)"):
        make(dataset, other, state=state).resume()
    with pytest.raises(ConfigError, match=r"other options \(lr: 0.001, now 0.5\)"):
        make(dataset, spec, replace(CONFIG, lr=0.5), state).resume()
    fewer = DepthDataset(dataset.frames[:3], image_size=spec.image_size, input_size=spec.input_size)
    with pytest.raises(ConfigError, match="started on 4 frames, now there are 3"):
        make(fewer, spec, state=state).resume()
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        make(dataset, spec, state=state).resume()


def test_configuration_errors(spec: ModelSpec) -> None:
    for wrong in ({"lr": 0}, {"lr": float("nan")}, {"epochs": 0}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match="at least one epoch, one image a batch and a positive learning"):
            TrainConfig(**wrong)
    with pytest.raises(ConfigError, match=r"`optimizer` must be one of sgd, adamw\. Got 'adam'"):
        TrainConfig(optimizer="adam")
    with pytest.raises(DataError, match="no frames to train on"):
        make(DepthDataset([]), spec)
