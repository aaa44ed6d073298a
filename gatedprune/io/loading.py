"""`load`: the model that a folder holds, or one sentence on why it cannot be had."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .._version import __version__
from ..config import GateConfig
from ..errors import CheckpointError, GatedPruneError, ModelError
from ..files import read_tensors
from ..inside import cut_again
from ..wrapping import GATES, GatedModel, is_gated, is_match, unwrap, wrap
from .architecture import build, timm_name
from .saving import CONFIG, FORMAT, WEIGHTS, digest, sites_of

__all__ = ["is_saved", "load"]


def is_saved(directory: str | os.PathLike[str]) -> bool:
    """Whether `save` wrote that folder, as far as its file names tell."""
    return (Path(directory) / CONFIG).is_file()


def load(directory: str | os.PathLike[str], model: nn.Module | None = None, *, example_inputs: Any = None,
         device: torch.device | str | None = None) -> Any:  # fmt: skip
    """The gated model that `save` wrote: the same numbers, bit for bit. In eval mode; no network is used.

    Args:
        directory: The folder.
        model: A dense model of the kind that was saved, to be wrapped in place; needed unless it was a timm model.
        example_inputs: As in `gatedprune.wrap`; default: of the shapes that the saved model was wrapped for.
        device: Where the model goes; default: the CPU, or where ``model`` is.

    Raises:
        CheckpointError: Files are missing, damaged, of another format, or hold another model. ``model`` is then as it
            was.
    """
    folder = Path(directory)
    saved = _read_config(folder)
    tensors = _read_weights(folder, saved)
    given = model is not None
    network = _build_saved(folder, saved) if model is None else _accepted(model, folder, saved)
    if saved["pruned"]:
        network = _without_dead(folder, saved, network, tensors, example_inputs)
    backbone = {k: v for k, v in tensors.items() if not k.startswith(GATES + ".")}
    _check_tensors(folder, saved, backbone, network.state_dict(), "model", given)
    _cast(network, backbone)
    same_shape = example_inputs is None
    if example_inputs is None:
        example_inputs = _inputs(folder, saved, network)
    try:
        gated = wrap(network, config=_gates(saved), example_inputs=example_inputs)
    except GatedPruneError as error:
        raise CheckpointError(f"{folder} cannot be restored: {error} {_versions(saved)}") from error
    try:
        _check_sites(folder, saved, gated, same_shape)
        _check_tensors(folder, saved, tensors, _with_matches(gated, tensors), "gates", given)
    except CheckpointError:
        unwrap(gated)
        raise
    for site in saved["sites"]:
        gated.gates[site["name"]].active_count = site["active"]
    gated.load_state_dict(tensors)
    gated._gatedprune_pruned = {name: (count, tuple(kept)) for name, (count, kept) in saved["pruned"].items()}
    return gated.eval() if device is None else gated.eval().to(device)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{folder} is no folder that gatedprune.save() wrote: {CONFIG} cannot be read ({error.strerror})."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged, it is no JSON ({error}). Copy or save the folder again.") from error
    if not isinstance(saved, dict) or "format" not in saved:
        raise CheckpointError(f"{file} does not say which format it has: it was not written by gatedprune.save().")
    if saved["format"] != FORMAT:
        raise CheckpointError(
            f"{file} has format {saved['format']!r}; gatedprune {__version__} reads format {FORMAT}. Load it with the "
            f"gatedprune that wrote it ({(saved.get('versions') or {}).get('gatedprune', 'not named')}), or save anew."
        )
    try:
        _gates(saved)
        for site in saved["sites"]:
            if not 1 <= site["active"] <= site["channels"] or not isinstance(site["name"] + "", str):
                raise ValueError(f"{site['active']} of {site['channels']} channels active")
        saved.setdefault("pruned", {})  # by versions that could not prune
        for count, kept in saved["pruned"].values():
            if not kept or list(kept) != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < count:
                raise ValueError(f"{kept} of {count} channels kept")
        _ = saved["weights"]["sha256"], saved["architecture"]["class"], saved["architecture"]["timm"], saved["macs"]
        _ = [a and (list(a["shape"]), getattr(torch, a["dtype"])) for a in saved["inputs"]], saved["versions"]["timm"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is damaged ({type(error).__name__}: {error}). Copy or save the folder again."
        ) from error
    return saved


def _gates(saved: Mapping[str, Any]) -> GateConfig:
    # Folders from before gains were bounded hold models without a bound.
    return GateConfig.from_dict({"max_gain": None, **saved["gates"]})


def _read_weights(folder: Path, saved: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = read_tensors(folder / WEIGHTS)
    if digest(folder / WEIGHTS) != saved["weights"]["sha256"]:
        raise CheckpointError(
            f"{folder / WEIGHTS} is not the file that {CONFIG} was saved with: it is damaged, or from another folder. "
            "Copy or save the folder again."
        )
    return tensors


def _build_saved(folder: Path, saved: Mapping[str, Any]) -> nn.Module:
    architecture = saved["architecture"]
    if architecture["timm"] is None:
        raise CheckpointError(
            f"{folder} holds a {architecture['class']}, which is not a model that timm can build: build it yourself, "
            "and give it as load(directory, model=my_model)."
        )
    try:
        return build(architecture["timm"], architecture["args"], "cpu")
    except Exception as error:
        raise CheckpointError(
            f"timm {timm.__version__} cannot build {architecture['timm']!r} with {architecture['args']}, which "
            f"{folder} holds ({type(error).__name__}: {error}). {_versions(saved)}"
        ) from error


def _without_dead(folder: Path, saved: Mapping[str, Any], model: nn.Module, tensors: Mapping[str, Tensor],
                  example_inputs: Any) -> nn.Module:  # fmt: skip
    """The model without the channels that `prune_dead` had removed, unless it is given without them already."""
    if all(tensors[k].shape == v.shape for k, v in model.state_dict().items() if k in tensors):
        return model
    inputs = _inputs(folder, saved, model) if example_inputs is None else example_inputs
    trial = copy.deepcopy(model)
    try:
        cut_again(trial, saved["pruned"], inputs, saved["gates"].get("stream", False))
        shapes = {k: tuple(v.shape) for k, v in trial.state_dict().items()}
        wrong = next((k for k, shape in shapes.items() if k in tensors and tuple(tensors[k].shape) != shape), None)
        if wrong is not None:
            raise ModelError(f"{wrong} is {tuple(tensors[wrong].shape)} there, and {shapes[wrong]} here.")
    except GatedPruneError as error:
        raise CheckpointError(
            f"{folder} holds a pruned model, and its channels cannot be removed from this one: {error} "
            f"{_versions(saved)}"
        ) from error
    cut_again(model, saved["pruned"], inputs, saved["gates"].get("stream", False))
    return model


def _accepted(model: nn.Module, folder: Path, saved: Mapping[str, Any]) -> nn.Module:
    if not isinstance(model, nn.Module) or is_gated(model):
        raise CheckpointError(
            "The `model` of load() must be a dense torch.nn.Module: leave it unwrapped, or unwrap() it."
        )
    mine, theirs = timm_name(model), saved["architecture"]["timm"]
    if mine and theirs and mine.split(".")[0] != theirs.split(".")[0]:
        raise CheckpointError(
            f"{folder} holds a {theirs!r}, but `model` is a {mine!r}. Give a {theirs!r}, or leave `model` out."
        )
    return model


def _with_matches(gated: GatedModel, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state dict to expect: which batch norms are matched is said by the file."""
    backbone = gated.backbone_state_dict()
    wanted: dict[str, Any] = gated.state_dict()
    for key in tensors:
        path, _, _ = key.removeprefix(GATES + ".").replace("/", ".").rpartition(":")
        if key.startswith(GATES + ".") and is_match(key) and f"{path}.running_mean" in backbone:
            wanted[key] = backbone[f"{path}.running_mean"]
    return wanted


def _check_tensors(folder: Path, saved: Mapping[str, Any], tensors: Mapping[str, Tensor], wanted: Mapping[str, Any],
                   what: str, given: bool) -> None:  # fmt: skip
    """Raise unless names, shapes and, for a model that the user gave, types are the same."""
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is foreign" for name in tensors if name not in wanted]
    for name in wanted:
        mine, theirs = wanted[name], tensors.get(name)
        if isinstance(mine, Tensor) and theirs is not None:
            if mine.shape != theirs.shape:
                problems.append(f"{name} is {tuple(theirs.shape)}, not {tuple(mine.shape)}")
            elif given and mine.dtype != theirs.dtype:
                problems.append(f"{name} is {theirs.dtype}, not {mine.dtype}")
    if problems:
        architecture = saved["architecture"]
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        fix = "Give the model that was saved" if given else "Copy or save the folder again"
        raise CheckpointError(
            f"{folder} does not hold the {what} of this {architecture['timm'] or architecture['class']}: "
            f"{'; '.join(problems[:3])}{more}. {fix}. {_versions(saved)}"
        )


def _check_sites(folder: Path, saved: Mapping[str, Any], gated: GatedModel, same_shape: bool) -> None:
    keys = ("name", "channels", "gate_sees")
    mine = {tuple(site[k] for k in keys) for site in sites_of(gated)}
    theirs = {tuple(site[k] for k in keys) for site in saved["sites"]}
    if mine != theirs:
        both = (theirs - mine, mine - theirs)
        lost, new = (", ".join(str(s[0]) for s in sorted(only)[:3]) or "none" for only in both)
        raise CheckpointError(
            f"The gates in {folder} are of other sites than this model has (only there: {lost}; only here: {new}). "
            f"{_versions(saved)}"
        )
    if same_shape and gated.site_report.macs != saved["macs"]:
        raise CheckpointError(
            f"{folder} holds a model of {saved['macs']:,} MACs, and this one has {gated.site_report.macs:,}: it is "
            f"another model. {_versions(saved)}"
        )


def _versions(saved: Mapping[str, Any]) -> str:
    mine = {"gatedprune": __version__, "timm": timm.__version__, "torch": torch.__version__}
    return (
        "Saved with "
        + ", ".join(f"{k} {saved['versions'].get(k)}" for k in mine)
        + "; here: "
        + ", ".join(f"{k} {v}" for k, v in mine.items())
        + "."
    )


def _cast(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the model the types that were saved: as a whole where they are one, buffers that are not saved included."""
    types = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if len(types) == 1:
        model.to(types.pop())
        return
    for name, value in model.state_dict(keep_vars=True).items():
        value.data = value.data.to(tensors[name].dtype)


def _inputs(folder: Path, saved: Mapping[str, Any], model: nn.Module) -> tuple[Tensor, ...]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if None in saved["inputs"]:
        raise CheckpointError(
            f"{folder} was saved from a model with arguments that are no tensors: give `example_inputs`."
        )
    # In the type that the model has, which may have been converted after it was wrapped.
    kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    shapes = [(a["shape"], getattr(torch, a["dtype"])) for a in saved["inputs"]]
    return tuple(torch.zeros(s, dtype=kind if t.is_floating_point else t, device=device) for s, t in shapes)
