"""timm's tiny models `test_*`, as small as tests need them: images of 64 pixels, and of blocks that are alike three."""

from __future__ import annotations

from typing import Any

import timm

SIZE = 64
# Models with position embeddings take the size as an argument.
OPTIONS: dict[str, dict[str, Any]] = {
    "test_coatnet": {"img_size": SIZE},
    "test_maxvit": {"img_size": SIZE},
    **{f"test_vit{kind}": {"img_size": SIZE, "depth": 3} for kind in ("", "2", "3", "4", "_relpos")},
}


def create(name: str, **options: Any) -> Any:
    """In eval mode, with ten classes unless ``options`` of timm say otherwise."""
    return timm.create_model(name, **{"num_classes": 10, **OPTIONS.get(name, {}), **options}).eval()
