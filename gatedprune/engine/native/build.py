"""Build, cache and load the C++ operators."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import os
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...errors import BackendError

__all__ = ["build_error", "instruction_set", "is_loaded", "load"]

_SOURCES = Path(__file__).parent / "src"
_lock = threading.Lock()
_state: dict[str, str | bool | None] = {"loaded": False, "error": None}


def is_loaded() -> bool:
    """Whether the operators are there."""
    return bool(_state["loaded"])


def build_error() -> str | None:
    """Why the last attempt to load failed; None if it did not."""
    return _state["error"]  # type: ignore[return-value]


def load(required: bool = False) -> bool:
    """Load the operators; the first time on a machine this builds them (about half a minute).

    Args:
        required: Raise if they cannot be had.

    Returns:
        Whether they can be used.

    Raises:
        BackendError: ``required``, and there is no compiler or the build failed.
    """
    with _lock:
        if not _state["loaded"] and _state["error"] is None:
            try:
                _load()
                _state["loaded"] = True
            except Exception as e:  # noqa: BLE001 - whatever a compiler or a linker may do
                _state["error"] = _explain(e)
                logging.getLogger("gatedprune").warning(
                    "The native engine is not available, plain PyTorch is used: %s", _state["error"]
                )
    if required and not _state["loaded"]:
        raise BackendError(
            f"backend='native' was asked for, but cannot be had: {_state['error']} "
            "Use backend='auto' or 'torch' to compute with plain PyTorch."
        )
    return bool(_state["loaded"])


def instruction_set(name: str = "") -> str:
    """The instruction set in use: "avx512", "avx2" or "generic" (128 bits: SSE2, NEON). A name chooses another.

    Raises:
        BackendError: This CPU does not have it, or the native backend is not loaded.
    """
    load(required=True)
    found: str = torch.ops.gatedprune.instruction_set(name)
    if not found:
        raise BackendError(f"This CPU or this build does not have {name!r}.")
    return found


def _load() -> None:
    if os.environ.get("GATEDPRUNE_NATIVE", "1") == "0":
        raise RuntimeError("it is switched off by GATEDPRUNE_NATIVE=0.")
    if sys.platform == "win32":
        raise RuntimeError("it has not been ported to Windows.")
    sources = sorted(_SOURCES.glob("*.cpp"))
    flags = ["-O3", "-DNDEBUG", "-Wno-psabi", *_threads()[0], *os.environ.get("GATEDPRUNE_CFLAGS", "").split()]
    content = hashlib.sha256("\0".join([torch.__version__, *flags]).encode())
    for file in sorted(_SOURCES.iterdir()):
        content.update(file.name.encode() + file.read_bytes())
    name = "gatedprune_native_" + content.hexdigest()[:16]
    with _path(), _quiet() as heard:
        from torch.utils import cpp_extension  # here, because it warns when imported

        directory = Path(cpp_extension._get_build_directory(name, verbose=False))
        library, finished = directory / f"{name}.so", directory / "finished"
        # The name says what it was built of. Asking ninja again would build it anew for each copy of the sources, and
        # wait for whoever else is asking.
        if library.exists() and finished.exists():
            torch.ops.load_library(str(library))
        else:
            _build(cpp_extension, name, sources, flags, directory, heard)
            finished.touch()
    _register_fakes()
    _register_flops()


def _build(cpp_extension: Any, name: str, sources: list[Path], flags: list[str], directory: Path,
           heard: io.StringIO) -> None:  # fmt: skip
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(next(iter(_compiler()), "")) is None:
        raise RuntimeError(f"there is no C++ compiler ({compiler}). Install g++ or clang++, or set CXX.")
    cpp_extension.verify_ninja_availability()
    say = logging.getLogger("gatedprune").warning
    say("Building the native engine in %s: once, about half a minute.", directory)
    if "-fopenmp" not in flags and torch.backends.openmp.is_available():
        say("It will run on one thread: torch's OpenMP runtime cannot be built for here (on Linux, g++ can).")
    try:
        cpp_extension.load(name, [str(s) for s in sources], extra_cflags=flags, extra_ldflags=_link_flags(flags),
                           is_python_module=False)  # fmt: skip
    except RuntimeError as e:
        raise RuntimeError(f"{e}\n{heard.getvalue()[-2000:]}") from e


def _threads() -> tuple[list[str], list[str]]:
    """Flags to compile and to link with the OpenMP runtime that torch itself has loaded: a second would fight it.

    On Linux that is GCC's, which clang does not compile for; on macOS it is not where a linker would look. Without
    flags at::parallel_for is a plain loop.
    """
    if not torch.backends.openmp.is_available() or sys.platform == "darwin" or _is_clang():
        return [], []
    package = Path(torch.__file__).parent
    own = sorted(f for place in (package / "lib", package.with_name("torch.libs")) for f in place.glob("libgomp*.so*"))
    return ["-fopenmp"], [str(own[0])] if own else ["-fopenmp"]


def _compiler() -> list[str]:
    """What PyTorch builds extensions with, and perhaps a launcher such as ccache before it."""
    return shlex.split(os.environ.get("CXX", "c++"))


def _is_clang() -> bool:
    """Whether the compiler that builds extensions is clang, under whatever name: `c++` may be a link to it."""
    return any(Path(shutil.which(word) or word).resolve().name.startswith("clang") for word in _compiler())


def _link_flags(flags: list[str]) -> list[str]:
    return [*_threads()[1], *(f for f in flags if f.startswith("-fsanitize"))]


@contextlib.contextmanager
def _path() -> Iterator[None]:
    """pip puts ninja beside python, where it is not found unless the environment is activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """torch warns that there is no CUDA and that it chose an architecture; neither matters here."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level, heard = logger.level, io.StringIO()
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(heard):
            yield heard
    finally:
        logger.setLevel(level)


def _explain(error: Exception) -> str:
    text = str(error).strip()
    return text if text.endswith(".") else f"{text}."


def _register_fakes() -> None:
    """What torch.compile and torch.export need: the shapes of the results."""

    @torch.library.register_fake("gatedprune::conv2d")
    def conv2d(x, weight, bias, in_index, out_index, gain, residual, stride, padding, dilation, groups, whole_groups,
               activation, mean, winograd=False):  # fmt: skip
        shape = weight.shape
        rows = shape[0] if out_index is None else out_index.shape[1]
        size = [
            (x.shape[d + 2] + 2 * padding[d] - dilation[d] * (shape[d + 2] - 1) - 1) // stride[d] + 1 for d in (0, 1)
        ]
        return x.new_empty(x.shape[0], rows, *size), x.new_empty((x.shape[0], rows) if mean else (0,))

    @torch.library.register_fake("gatedprune::conv2d_into")
    def conv2d_into(x, weight, bias, in_index, out_index, gain, residual, stride, padding, dilation, groups,
                    whole_groups, activation, mean, winograd=False):  # fmt: skip
        return x.new_empty(residual.shape[:2] if mean else (0,))

    @torch.library.register_fake("gatedprune::max_pool2d")
    def max_pool2d(x, kernel, stride, padding, ceil_mode):
        return torch.nn.functional.max_pool2d(x, kernel, stride, padding, 1, ceil_mode)

    @torch.library.register_fake("gatedprune::upsample_bilinear2d")
    def upsample_bilinear2d(x, size, align_corners, factors):
        return x.new_empty((*x.shape[:2], *size))

    @torch.library.register_fake("gatedprune::linear")
    def linear(x, weight, bias, in_index, out_index, gain, residual, activation, x_columns=False, y_columns=False):
        shape = list(x.shape)
        shape.pop(1 if x_columns else -1)
        shape.insert(1 if y_columns else len(shape), weight.shape[0] if out_index is None else out_index.shape[1])
        return x.new_empty(shape)

    @torch.library.register_fake("gatedprune::affine")
    def affine(x, scale, shift, index, activation, mean):
        return torch.empty_like(x), x.new_empty((x.shape[0] if mean else 0, x.shape[1]))

    @torch.library.register_fake("gatedprune::channel_index")
    def channel_index(tables, fixed, active, channels):
        n = fixed.numel() + sum(a.shape[1] * t.shape[1] for a, t in zip(active, tables, strict=True))
        return fixed.new_empty(active[0].shape[0], n)

    @torch.library.register_fake("gatedprune::channel_gain")
    def channel_gain(units, active, gain, sizes, index):
        return gain[0].new_empty(gain[0].shape[0], units[0].numel() if index is None else index.shape[1])

    @torch.library.register_fake("gatedprune::subsample")
    def subsample(x, channel_dim, signed=False):
        return x.new_empty(x.shape[0], x.shape[channel_dim])

    @torch.library.register_fake("gatedprune::gate")
    def gate(s, weight, bias, start, strength, index, k, boost, max_gain=None, channel_dim=None, reduce=None):
        return s.new_empty((s.shape[0], k), dtype=torch.long), s.new_empty(s.shape[0], k)


def _register_flops() -> None:
    """What torch.utils.flop_counter counts: two operations for each multiply-accumulate that is really done."""
    from torch.utils.flop_counter import register_flop_formula

    ops = torch.ops.gatedprune

    def convolution(rows, x, weight, out, groups, whole_groups):
        weight = weight if len(weight) == 4 else (*weight[1:], 3, 3)
        read = weight[1] if whole_groups and groups > 1 else x[1] // groups
        return 2 * x[0] * rows * read * weight[2] * weight[3] * out[-2] * out[-1]

    @register_flop_formula(ops.conv2d)
    def conv2d(x, weight, bias, in_index, out_index, gain, residual, stride, padding, dilation, groups, whole_groups,
               *rest, out_shape=None, **kwargs):  # fmt: skip
        out = out_shape[0]
        return convolution(out[1], x, weight, out, groups, whole_groups)

    @register_flop_formula(ops.conv2d_into)
    def conv2d_into(x, weight, bias, in_index, out_index, gain, residual, stride, padding, dilation, groups,
                    whole_groups, *rest, out_shape=None, **kwargs):  # fmt: skip
        return convolution(residual[1], x, weight, residual, groups, whole_groups)

    @register_flop_formula(ops.linear)
    def linear(x, weight, bias, in_index, *rest, out_shape=None, **kwargs):
        return 2 * math.prod(out_shape) * (weight[1] if in_index is None else in_index[1])

    @register_flop_formula(ops.gate)
    def gate(s, weight, bias, start, strength, index, k, boost, max_gain=None, channel_dim=None, reduce=None,
             out_shape=None, **kwargs):  # fmt: skip
        return 2 * s[0] * (math.prod(weight) + (0 if reduce is None else math.prod(reduce)))
