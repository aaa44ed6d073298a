"""The native CPU backend: an indexed implicit GEMM in C++, built once for each version of torch, then cached.

It needs a C++ compiler and ninja. Without them `load` says why, and the engine computes with plain PyTorch.
"""

from .build import build_error, instruction_set, is_loaded, load

__all__ = ["build_error", "instruction_set", "is_loaded", "load"]
