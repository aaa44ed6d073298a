"""Batch norms' statistics taken anew: those of what each norm reads, everything else as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatedprune
from gatedprune.errors import DataError, ModelError
from gatedprune.training import reestimate_norms
from gatedprune.training.matching import moments_of
from tests.tiny import create


def pruned() -> nn.Module:
    torch.manual_seed(0)
    model = create("test_resnet").double()
    return gatedprune.prune_static(model, ratio=0.5, example_inputs=images(1)).model


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(count)).double() + 0.5


def read(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Path of each batch norm → mean and variance of what it reads."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [module.register_forward_pre_hook(lambda m, args, path=path: seen.update({path: moments_of(args[0])}))
               for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]  # fmt: skip
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


def test_every_norm_has_the_moments_of_what_it_reads() -> None:
    """In one batch exactly: the later norms read what the earlier ones give with their new statistics."""
    model, x = pruned(), images(6)
    paths = reestimate_norms(model, [x])
    found = read(model, x)
    assert set(paths) == set(found)
    assert len(paths) > 5
    for path, (mean, var) in found.items():
        norm: Any = model.get_submodule(path)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-9, atol=1e-12)


def test_batches_add_up() -> None:
    model, x = pruned(), images(6)
    first, wanted = next(iter(read(model, x).items()))  # no norm before it, which would depend on the batch
    reestimate_norms(model, [(x[:4], torch.zeros(4)), (x[4:], torch.zeros(2))])
    norm: Any = model.get_submodule(first)
    torch.testing.assert_close((norm.running_mean, norm.running_var), wanted, rtol=1e-9, atol=1e-12)


def test_nothing_else_changes() -> None:
    model = pruned().train()
    before = copy.deepcopy(model.state_dict())
    reestimate_norms(model, [images(4)])
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if key.endswith(("running_mean", "running_var"))}
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("batches", "error"), [([], DataError), ([images(2) * float("nan")], DataError),
                                                ([images(2), images(2)[:, :1]], RuntimeError)])  # fmt: skip
def test_what_fails_leaves_the_statistics(batches: list[Tensor], error: type[Exception]) -> None:
    model = pruned()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error):
        reestimate_norms(model, batches)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_gated_models_are_refused_and_models_without_norms_left_alone() -> None:
    with pytest.raises(ModelError, match="calibrate"):
        reestimate_norms(gatedprune.wrap(create("test_resnet"), 0.5, example_inputs=torch.zeros(1, 3, 64, 64)), [])
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert reestimate_norms(plain, [torch.randn(2, 3, 8, 8)]) == ()
