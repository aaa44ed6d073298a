"""A model's tensors side by side on large pages, where the system has them.

The kernels read rows of weights that lie far apart, from more pages of 4 KiB than the processor keeps the addresses
of, and in a virtual machine it looks each of the others up twice. Measured (AMD Zen 4, a virtual machine, one thread):
0.95 of the time of MobileNetV2, 0.98 of that of ResNet-50, ConvNeXt-T and ViT-S at 224×224, 0.99 of ResNet-50's at
640×480.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor, nn

from .rows import LINE

__all__ = ["move"]

LARGE = 2 << 20  # bytes of a large page


def move(module: nn.Module, besides: nn.Module | None = None) -> bool:
    """Move a module's parameters and buffers to large pages; the tensors stay the same objects, of the same strides.

    Nobody else may be using them meanwhile.

    Args:
        module: What does not fill a page, is not on the CPU, or shares memory with ``besides``, is left where it is.

    Returns:
        Whether anything was moved: not on systems without large pages, or where no memory is left.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # Linux has it
        return False
    others = set() if besides is None else {_at(t) for t in _tensors(besides)}
    together: dict[int, list[Tensor]] = {}
    for t in _tensors(module):
        if _at(t) not in others:
            together.setdefault(_at(t), []).append(t)
    size = sum(_lines(ts[0].untyped_storage().nbytes()) for ts in together.values())
    if size < LARGE:
        return False
    try:
        memory = mmap.mmap(-1, size + LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return False
    at = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % LARGE
    for tensors in together.values():
        old = tensors[0].untyped_storage()
        new = torch.frombuffer(memory, dtype=torch.uint8, count=old.nbytes(), offset=at)
        new.untyped_storage().copy_(old)
        for t in tensors:
            # One by one, so that what is left behind is free before the next one comes.
            t.data = new.view(t.dtype).as_strided(t.shape, t.stride(), t.storage_offset())
        at += _lines(old.nbytes())
    return True


def _tensors(module: nn.Module) -> list[Tensor]:
    found = (*module.parameters(), *module.buffers())
    return [t for t in found if t.device.type == "cpu" and t.layout is torch.strided and t.untyped_storage().nbytes()]


def _at(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _lines(size: int) -> int:
    return -(-size // LINE) * LINE
