"""Which operator does what to channels: names of ATen operators, without overload and trailing underscore."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from torch import fx

__all__ = [
    "BINARY",
    "ELEMENTWISE",
    "KEEPS_CHANNELS",
    "MOVEMENT",
    "OVER_DIM",
    "REDUCTION",
    "SPATIAL",
    "ZERO_AT_ZERO",
    "op_name",
    "stays_zero",
]


def op_name(target: Any) -> str:
    """'relu' for ``aten.relu_.default``; the function's name for plain Python functions."""
    schema = getattr(target, "_schema", None)
    name = schema.name.split("::")[-1] if schema is not None else getattr(target, "__name__", str(target))
    return name.rstrip("_") if schema is not None and name.rstrip("_") else name


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# f(0) = 0: a suppressed channel stays zero on its way through.
ZERO_AT_ZERO = _words("""
    relu relu6 leaky_relu prelu rrelu silu mish gelu hardswish hardtanh elu celu selu tanh softsign softshrink
    hardshrink dropout feature_dropout alpha_dropout clone contiguous alias detach detach_copy to _to_copy
    type_as neg abs square sqrt sin erf expm1 log1p trunc round floor ceil sign lift_fresh_copy lift_fresh
""")
# Element by element, but f(0) ≠ 0 (or not in general).
ELEMENTWISE = ZERO_AT_ZERO | _words("""
    sigmoid hardsigmoid log_sigmoid softplus exp log rsqrt reciprocal cos clamp clamp_min clamp_max logit
    nan_to_num isnan isinf logical_not bitwise_not zeros_like ones_like full_like empty_like rand_like
""")
BINARY = _words("""
    add sub rsub mul div maximum minimum fmod remainder pow atan2 where lerp eq ne lt le gt ge logical_and
    logical_or bitwise_and bitwise_or
""")
# Data movement: run on the labels themselves.
MOVEMENT = _words("""
    view reshape _unsafe_view view_as reshape_as permute transpose t numpy_T flatten unflatten squeeze unsqueeze
    expand expand_as slice select narrow split split_with_sizes chunk tensor_split unbind roll flip
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle repeat tile movedim swapaxes swapdims
    unsafe_split unsafe_chunk diagonal repeat_interleave unfold
""")
# Per channel, over the places of a (B, C, ...) map; zero maps to zero.
SPATIAL = _words("""
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d max_pool2d_with_indices upsample_nearest1d
    upsample_nearest2d upsample_nearest3d upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d
    _upsample_bicubic2d_aa upsample_linear1d upsample_trilinear3d _upsample_nearest_exact2d reflection_pad2d
    replication_pad2d grid_sampler grid_sampler_2d
""")
# Channel j of the result is made of channel j of the first argument, in the same dimension.
KEEPS_CHANNELS = ELEMENTWISE | SPATIAL | _words("pad constant_pad_nd")
REDUCTION = _words("""
    mean sum amax amin var std norm linalg_vector_norm max min prod var_mean logsumexp
""")
OVER_DIM = _words("""
    softmax _softmax log_softmax _log_softmax cumsum cumprod sort topk normalize
""")


def stays_zero(node: fx.Node, inputs: Sequence[fx.Node], zero: Container[fx.Node]) -> bool:
    """Whether suppressed channels are zero in what the operator gives.

    Args:
        inputs: Its arguments that hold the channels. zero: The values in which they are zero.
    """
    name, known = op_name(node.target), [a in zero for a in inputs]
    if name == "mul":
        return any(known)
    if name == "scaled_dot_product_attention":
        return node.args[2] in zero
    if name in ("matmul", "bmm"):
        return all(known)
    if name == "div":
        return bool(node.args) and node.args[0] in zero
    if name in ("add", "sub"):
        return all(known) and all(isinstance(a, fx.Node) and a in inputs for a in node.args[:2])
    if name in ZERO_AT_ZERO | SPATIAL | MOVEMENT | REDUCTION:
        return all(known)
    if name in ("cat", "stack", "getitem", "pad"):
        return all(known)
    if name.startswith("conv") or name == "linear":
        return all(known) and (len(node.args) < 3 or node.args[2] is None)  # carried, without bias
    return False
