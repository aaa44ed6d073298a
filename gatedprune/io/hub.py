"""The Hugging Face hub: `save` and upload, download and `load`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError
from .loading import load
from .saving import CONFIG, WEIGHTS, save

__all__ = ["from_pretrained", "push_to_hub"]

_CARD = """---
library_name: gatedprune
tags: [gatedprune, dynamic-pruning, timm]
---
{name} with dynamic channel pruning: every input decides which channels are computed.

    import gatedprune
    model = gatedprune.from_pretrained("{repo}"{model})
    fast = gatedprune.compact(model)
"""


def push_to_hub(gated: nn.Module, repo_id: str, *, model_args: Mapping[str, Any] | None = None,
                private: bool | None = None, token: str | None = None, **upload: Any) -> str:  # fmt: skip
    """Upload what `save` writes to a model repository of the Hugging Face hub; made where it does not exist.

    Args:
        gated: As in `save`.
        model_args: As in `save`.
        repo_id: "user/name".
        private: Make a new repository private.
        token: Of the hub; default: the one that was logged in with.
        **upload: For `huggingface_hub.upload_folder`: ``commit_message``, ``revision``, ``create_pr``, …

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: The hub cannot be reached, or refuses.
    """
    import huggingface_hub as hub  # half a second, for these two functions only

    with tempfile.TemporaryDirectory() as scratch:
        folder = save(gated, Path(scratch) / "model", model_args=model_args)

        def work() -> str:
            hub.create_repo(repo_id, private=private, token=token, exist_ok=True)
            if not hub.file_exists(repo_id, "README.md", token=token):
                known = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["architecture"]
                text = _CARD.format(
                    name=known["timm"] or known["class"], repo=repo_id, model="" if known["timm"] else ", my_model"
                )
                (folder / "README.md").write_text(text, encoding="utf-8")
            options = {"commit_message": "Upload a gated model", **upload}
            return str(hub.upload_folder(repo_id=repo_id, folder_path=folder, token=token, **options))

        return _reaching(work, f"The model could not be uploaded to {repo_id!r}")


def from_pretrained(repo_id_or_dir: str | os.PathLike[str], model: nn.Module | None = None, *,
                    example_inputs: Any = None, device: torch.device | str | None = None,
                    **download: Any) -> Any:  # fmt: skip
    """`load` from a folder, or from a repository of the Hugging Face hub that `push_to_hub` wrote.

    Args:
        repo_id_or_dir: A folder if there is one of that name, else "user/name".
        model: As in `load`.
        example_inputs: As in `load`.
        device: As in `load`.
        **download: For `huggingface_hub.snapshot_download`: ``revision``, ``token``, ``cache_dir``, …

    Raises:
        CheckpointError: As `load`, or the hub cannot be reached and has not been downloaded from before.
    """
    if os.path.isdir(repo_id_or_dir):
        if download:
            raise ConfigError(f"{', '.join(download)}: for repositories of the hub. {repo_id_or_dir} is a folder.")
        return load(repo_id_or_dir, model, example_inputs=example_inputs, device=device)
    import huggingface_hub as hub

    repo = os.fspath(repo_id_or_dir)
    folder = _reaching(
        lambda: hub.snapshot_download(repo, allow_patterns=[WEIGHTS, CONFIG], **download),
        f"{repo!r} is no folder here, and could not be downloaded",
    )
    return load(folder, model, example_inputs=example_inputs, device=device)


def _reaching(work: Callable[[], str], what: str) -> str:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return work()
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{what} from or to the Hugging Face hub ({type(error).__name__}: {first}). Check the name, the connection "
            "and the token (`hf auth login`); without network, give a folder that gatedprune.save() wrote."
        ) from error
