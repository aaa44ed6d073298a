"""The model to be trained: dense, statically pruned or gated, all from the same start, and how results come back."""

from __future__ import annotations

import copy
import difflib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..compare import prune_static
from ..errors import CheckpointError, ConfigError, GatedPruneError, ModelError
from ..files import atomic_folder, read_tensors, write_tensors
from ..io import find_imported, is_saved, load, save
from ..sites import find_sites, normalise_inputs
from ..training import bake_norms, calibrate, predictor_rates, reestimate_norms
from ..wrapping import is_gated, macs_left, unwrap, wrap
from .data import check_outputs
from .options import FinetuneConfig

__all__ = ["Start", "build", "load_finetuned", "save_finetuned"]

WEIGHTS, CONFIG = "model.safetensors", "finetuned.json"
FORMAT = 1


@dataclass
class Start:
    """Where a training starts.

    Attributes:
        model: What is trained; a gated one at its target ratios.
        dense: The dense model that it was made from, or an equal one.
        teacher: Who teaches: nobody, the folder that the configuration names, or ``dense``.
        kept: Of a pruned model: site → the channels that stayed.
        rates: Of a gated one: site → the share of the learning rate that its predictor has.
        trained_head: Whether the classifier came with weights for these very classes.
        example: (1, C, H, W), zeros.
        dense_macs: Of the dense model, per image.
    """

    model: Any
    dense: nn.Module
    teacher: nn.Module | None
    kept: dict[str, Tensor] | None
    trained_head: bool
    example: Tensor
    dense_macs: int
    rates: dict[str, float] = field(default_factory=dict)


def build(config: FinetuneConfig, classes: Sequence[str], kept: Mapping[str, Tensor] | None = None,
          images: Callable[[nn.Module, Tensor], Sequence[Tensor]] | None = None,
          device: torch.device | str = "cpu") -> Start:  # fmt: skip
    """Make the model that a configuration asks for. Random weights follow from its seed.

    Args:
        classes: Of the data.
        kept: Of a training that is resumed: the channels that stayed.
        images: Takes the dense model and its example, and gives batches (B, C, H, W): predictors' learning rates follow
            from them, and where the configuration says so gates are calibrated on them, and static pruning keeps the
            channels that contribute most there. Default: predictors learn at the layers' rate, gates start as `wrap`
            made them, and static pruning keeps the channels with the largest weights.
        device: Where they are calibrated; the model that comes back lies on the CPU.

    Raises:
        ConfigError: No such model, or options that exclude each other.
        DataError: The model is for another number of classes.
        CheckpointError: Weights cannot be had or do not fit.
        ModelError: It cannot be gated or pruned.
    """
    torch.manual_seed(config.seed)
    network, trained_head = _network(config, classes)
    size = normalise_inputs(network, None)[0].shape[1:] if config.size is None else (3, *config.size)
    example = torch.zeros(1, *size)
    with torch.no_grad():
        check_outputs(network, copy.deepcopy(network).eval()(example), classes, f"The model {config.model}")
    teach = _teacher(config, trained_head, example, classes)
    if config.mode == "dynamic":
        dense = _dense(copy.deepcopy(network))
        if is_gated(network):
            if config.macs is not None:
                raise ConfigError(f"{config.model} has gates already: give a `ratio`, or leave theirs.")
            if config.ratio is not None:
                network.set_ratio(config.ratio)  # type: ignore[operator]
        else:
            network = wrap(network, config=config.gates(), example_inputs=example)
        gated: Any = network
        rates: dict[str, float] = {}
        if images is not None:
            seen, where = images(dense, example), _calibration_device(device)
            if config.calibrate:
                choice: dict[str, Any] = {} if config.calibration == "dynamic" else {"dynamic": False, "strength": 1.0}
                calibrate(gated.to(where), seen, **choice)
                bake_norms(gated)
            rates = predictor_rates(gated.to(where), seen, reach=config.gate_lr)
            gated.cpu()
        return Start(gated, dense, teach(dense), None, trained_head, example, gated.site_report.macs, rates)
    network = _dense(network)
    if config.mode == "dense":
        dense = copy.deepcopy(network)
        return Start(network, dense, teach(dense), None, trained_head, example, find_sites(network, example).macs)
    if _origin(config.model)[1] is not None:
        raise ConfigError(f"{config.model} is pruned already: go on with it as it is (mode 'dense').")
    if kept is None:
        marked = wrap(copy.deepcopy(network), config=config.gates(), example_inputs=example)
        report, keep, where = marked.site_report, None, _calibration_device(device)
        samples = images(network, example) if images is not None and config.calibrate else ()
        if samples:  # with the same care as gates
            calibrate(marked.to(where), samples, dynamic=False)
            marked.cpu()
            keep = {name: gate.bias.topk(gate.active_count).indices for name, gate in marked.gates.items()}
        pruned = prune_static(marked, keep=keep, example_inputs=example, by="torch-pruning")
        if samples:
            reestimate_norms(pruned.model.to(where), samples)
            pruned.model.cpu()
    else:
        report = find_sites(network, example)
        pruned = prune_static(network, report, keep=kept, example_inputs=example, by="torch-pruning")
    return Start(pruned.model, network, teach(network), pruned.kept, trained_head, example, report.macs)


def _calibration_device(device: torch.device | str) -> torch.device | str:
    return device if torch.device(device).type == "cuda" else "cpu"  # its sums are double: not every device has that


def _dense(model: nn.Module) -> nn.Module:
    dense: nn.Module = unwrap(model) if is_gated(model) else model
    return dense


def _network(config: FinetuneConfig, classes: Sequence[str]) -> tuple[nn.Module, bool]:
    """The model, with gates where it was saved with them, and whether its head knows the classes."""
    name = config.model
    folder = is_saved(name) or (Path(name) / CONFIG).is_file()
    if folder or ":" in name:
        if config.pretrained or config.weights:
            raise ConfigError(f"`pretrained` and `weights` are for models by name. {name} comes with its own weights.")
        return (load_finetuned(name), True) if folder else (_imported(name), True)
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise ConfigError(
            f"timm {timm.__version__} has no model {name!r}.{hint} Name your own as module:callable, a saved one by "
            "its folder."
        )
    options: dict[str, Any] = {"num_classes": len(classes)}
    if config.size is not None and timm.get_pretrained_cfg(name).fixed_input_size:
        options["img_size"] = config.size
    if not (config.pretrained or config.weights):
        return timm.create_model(name, **options), False
    if config.weights is not None:
        if not Path(config.weights).is_file():
            raise CheckpointError(f"The weights {config.weights} are not there, or are no file.")
        # timm then fits the file to the model: another number of classes, another size of position embeddings.
        options["pretrained_cfg_overlay"] = {"file": config.weights, "num_classes": _head(config.weights, name)}
    try:
        model = timm.create_model(name, pretrained=True, **options)
    except Exception as error:
        where = config.weights or "the Hugging Face hub"
        fix = "Give the file of this model's weights." if config.weights else (
            "Check the connection; without network, give a file of weights (--weights)."
        )  # fmt: skip
        why = f"{type(error).__name__}: {_line(error)}"
        if isinstance(error, KeyError) and config.weights:  # timm looks for the classifier that `_head` did not find
            why = "no classifier is in it, or its tensors have other names than timm's"
        raise CheckpointError(f"The weights of {name} cannot be had from {where} ({why}). {fix}") from error
    known = _head(config.weights, name) if config.weights else timm.get_pretrained_cfg(name).num_classes
    return model, known == len(classes)


def _head(weights: str, name: str) -> int | None:
    """How many classes the classifier in a file of weights has; None where it has no classifier."""
    from timm.models import load_state_dict

    try:
        state = load_state_dict(weights, weights_only=True)
        classifier = timm.get_pretrained_cfg(name).classifier
        names = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
        found = [len(state[f"{n}.bias"]) for n in names if n and f"{n}.bias" in state]
    except Exception:  # noqa: BLE001 (whatever is wrong with the file is said when the model loads it)
        return None
    return found[0] if found else None


def _imported(value: str) -> nn.Module:
    try:
        target = find_imported(value)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"The model {value!r} cannot be imported: {error}.") from error
    model = target() if callable(target) else target
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{value}() returns a {type(model).__name__}, not a torch.nn.Module.")
    return model


def macs(model: nn.Module, example: Tensor) -> int:
    """MACs per image of a trained model, predictors included: arithmetic on its operators, the same for all modes."""
    if is_gated(model):
        return macs_left(model)
    plain = copy.deepcopy(model)
    if "_original_forward" in vars(plain):  # Accelerate's mixed precision, whose casts hide weights from the capture
        plain.__dict__.pop("forward", None)
    return find_sites(plain, example).macs


def save_finetuned(
    start: Start, config: FinetuneConfig, classes: Sequence[str], model: nn.Module, folder: Path
) -> None:
    """Write a trained model as a folder: by `gatedprune.save` where it is gated, in the same manner where it is not."""
    name, kept = _origin(config.model)
    if start.kept is not None:
        kept = {site: k.tolist() for site, k in start.kept.items()}
    described = {"format": FORMAT, "mode": config.mode, "model": name, "classes": list(classes),
                 "size": list(start.example.shape[2:]), "kept": kept}  # fmt: skip

    def write(fresh: Path) -> None:
        if is_gated(model):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that timm cannot build it: we know who can
                save(model, fresh)
        else:
            write_tensors(fresh / WEIGHTS, model.state_dict(), {"format": "pt"})
        (fresh / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    atomic_folder(folder, write)


def load_finetuned(folder: str | Path) -> Any:
    """The model in the folder ``model`` of a fine-tuning's output: gated, statically pruned or dense. In eval mode.

    Raises:
        CheckpointError: The folder is missing or damaged, or holds a model that must be built by its owner.
    """
    folder = Path(folder)
    if is_saved(folder) and not (folder / CONFIG).is_file():
        return load(folder)
    name, size, kept, classes = _described(folder)
    try:
        plain = FinetuneConfig(name, "", "", mode="dense", size=size)
        model = _dense(_network(plain, classes)[0])
        if kept is not None:
            keep = {site: torch.tensor(indices) for site, indices in kept.items()}
            model = prune_static(model, keep=keep, example_inputs=torch.zeros(1, 3, *size), by="torch-pruning").model
        if is_saved(folder):
            return load(folder, model)
        model.load_state_dict(read_tensors(folder / WEIGHTS))
    except (GatedPruneError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be restored: {_line(error)}") from error
    return model.eval()


def _described(folder: Path) -> tuple[str, tuple[int, int], dict[str, list[int]] | None, list[str]]:
    """Name of the dense model, size, channels that stayed, classes."""
    try:
        described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if described["format"] != FORMAT:
            raise ValueError(f"format {described['format']!r}")
        height, width = described["size"]
        return described["model"], (height, width), described["kept"], described["classes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder} is no model that `gatedprune finetune` wrote, or is damaged ({type(error).__name__}: {error})."
        ) from error


def _origin(model: str) -> tuple[str, dict[str, list[int]] | None]:
    """What a model is built from, where it may be the result of another training: its name, and the channels kept."""
    if not (Path(model) / CONFIG).is_file():
        return model, None
    name, _, kept, _ = _described(Path(model))
    return name, kept


def _teacher(
    config: FinetuneConfig, trained_head: bool, example: Tensor, classes: Sequence[str]
) -> Callable[[nn.Module], nn.Module | None]:
    """Takes the dense model at the start, and gives who teaches: nobody, the model in the folder that the configuration
    names, or that dense one. What is wrong with a teacher is said now: pruning and calibrating take time.

    Raises:
        ConfigError: The dense model at the start knows nothing about these classes.
    """
    if not config.distill:
        return lambda dense: None
    if config.teacher is None:
        if not trained_head:
            raise ConfigError(
                f"`distill` needs somebody to learn from, and {config.model} starts with a classifier that has never "
                "seen these classes. Train it dense first (--mode dense), and name the result: --teacher OUTPUT/model."
            )
        return lambda dense: dense
    found = _dense(load_finetuned(config.teacher))
    with torch.no_grad():
        try:
            outputs = found(example)
        except RuntimeError as error:
            raise ModelError(f"The teacher {config.teacher} does not take these images: {_line(error)}") from error
    check_outputs(found, outputs, classes, f"The teacher {config.teacher}")
    return lambda dense: found


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no reason given"
