"""Checks of a caller's tensors. Each error names the argument and what it got."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from flexprefill.blockmap.masking import MASK_MOD_ARGUMENTS
from flexprefill.config import check_number, plain_number
from flexprefill.runtime.layout import layout_hint, warn_of_layout
from flexprefill.runtime.operators import stands_between
from flexprefill.runtime.replaying import layouts_of
from flexprefill.runtime.state import Remembered
from flexprefill.runtime.thread_state import is_fake, is_in_vmap
from flexprefill.runtime.tracing import is_tracing

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = range(16, 257, 8)
LARGEST_SCALE = 1e38  # times log2(e) it still is a float32
SCORE_MOD_ARGUMENTS = ("score", *MASK_MOD_ARGUMENTS)


class Layout:
    """Sizes, strides, dtypes and devices of tensors that fit together. What has the same ones is one object."""


_layouts: Remembered[Layout] = Remembered("layouts that fit", most=1024)


def check_attention_inputs(query: Tensor, key: Tensor, *value: Tensor) -> Layout | None:
    """Raises unless query [B, Hq, S_q, D] and key [B, Hkv, S_kv, D] can be searched, and with value attended.

    Returns:
        Their layout, if nothing else decides what is done with them.

    Raises:
        TypeError: An argument is no tensor, or has an unsupported dtype or layout.
        ValueError: Shapes or devices do not fit together, or a gradient is asked for.
    """

    def checked() -> Layout:
        _check_together(query, key, *value)
        return Layout()

    facts = facts_of(query, key, *value)
    layout = None
    if facts is None:
        _check_together(query, key, *value)
    else:
        layout = _layouts.get(facts, checked)
    warn_of_layout(query)
    return layout


def facts_of(*tensors: Any) -> tuple[object, ...] | None:
    """All that the checks look at. None where they are made in any case."""
    if is_tracing():
        return None
    for tensor in tensors:
        if type(tensor) is not Tensor or tensor.requires_grad:
            return None
    # a negated, nested or sparse tensor stands between too, and a vmap, and a device that does not compute
    return None if stands_between(tensors) else layouts_of(*tensors)


def _check_together(query: Tensor, key: Tensor, *value: Tensor) -> None:
    named = dict(zip(("query", "key", "value"), (query, key, *value), strict=False))
    for name, tensor in named.items():
        check_strided(name, tensor)
    for name, tensor in list(named.items())[1:]:
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}")
        if tensor.shape[0] != query.shape[0]:
            raise ValueError(f"{name} must have query's batch size {query.shape[0]}, got {tensor.shape[0]}")
    if value and (query.device.type == "meta" or is_fake(query)):
        kind = "a fake tensor of FakeTensorMode" if is_fake(query) else "meta"
        raise ValueError(f"query must be on a device that computes, got {kind}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query must have a multiple of key's heads, got query {list(query.shape)} and key {list(key.shape)}"
            f"{layout_hint(query=query, key=key)}"
        )
    if query.shape[3] != key.shape[3]:
        raise ValueError(
            f"key must have query's head dimension {query.shape[3]}, got {key.shape[3]} (key {list(key.shape)})"
        )
    if query.shape[2] > key.shape[2]:
        raise ValueError(
            "query [B, Hq, S_q, D] must be no longer than key [B, Hkv, S_kv, D] (queries are the last positions), "
            f"got S_q={query.shape[2]} and S_kv={key.shape[2]}{layout_hint(query=query, key=key)}"
        )
    if value and value[0].shape[1:3] != key.shape[1:3]:
        raise ValueError(
            f"value must have key's heads and length, got value {list(value[0].shape)} and key {list(key.shape)}"
            f"{layout_hint(key=key, value=value[0])}"
        )


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """The given scale, or 1 / sqrt(head_dim) for None.

    Raises:
        TypeError: ``scale`` is no number.
        ValueError: ``scale`` is not finite in float32.
    """
    if scale is None:
        return 1.0 / math.sqrt(operator.index(head_dim))
    scale = plain_number(scale)
    check_number("scale", scale, "a number or None")
    if not abs(scale) <= LARGEST_SCALE:  # false for NaN as well
        raise ValueError(f"scale must be finite in float32, at most {LARGEST_SCALE:g}, got {scale}")
    return float(scale)


def check_strided(name: str, tensor: Tensor, sizes: str = "[B, H, S, D]") -> None:
    """Raises unless it is a tensor of 4 dimensions that kernels can read; see check_attention_inputs."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {sizes}, got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name} must be a strided tensor, got {kind}")
    if is_in_vmap(tensor):
        raise TypeError(f"{name} must be a tensor outside of torch.vmap: batch entries go along dim 0, {sizes}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}")
    if tensor.dim() != 4 or 0 in tensor.shape:
        raise ValueError(f"{name} must be {sizes}, 4 dimensions with no size of 0, got {list(tensor.shape)}")
    # the sign is only noted, as for the imaginary part of a conjugate, and kernels read the memory as it is
    if not is_tracing() and tensor.is_neg():
        raise ValueError(f"{name} must hold its own values, got a negated view: pass {name}.resolve_neg()")
    check_no_gradients(**{name: tensor})
    # read as a constant where torch.compile makes every size a symbol
    if operator.index(tensor.shape[3]) not in HEAD_DIMS:
        raise ValueError(
            f"{name} must have a head dimension that is a multiple of 8 from 16 to 256, got D={tensor.shape[3]}"
        )


def check_no_gradients(**tensors: Tensor) -> None:
    """Raises ValueError if a gradient is asked for."""
    for name, tensor in tensors.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires grad, and a prefill has no backward pass: call under torch.no_grad() or pass "
                f"{name}.detach()"
            )


def check_last_chunk(last_chunk: object) -> None:
    """Raises TypeError unless it is a bool."""
    if not isinstance(last_chunk, bool):
        raise TypeError(f"last_chunk must be a bool, got {last_chunk!r}")


def check_heads_tensor(name: str, tensor: object) -> None:
    """Raises unless it is a tensor of floats with one dimension."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a tensor of floats [Hq], got {got}")
    if tensor.dim() != 1:
        raise ValueError(f"{name} must be [Hq], got {list(tensor.shape)}")


def check_per_head(name: str, tensor: Tensor, query: Tensor) -> None:
    """Raises unless it holds a number for each query head, on query's device."""
    if tensor.shape != query.shape[1:2]:
        raise ValueError(f"{name} must be [Hq] with Hq={query.shape[1]}, got {list(tensor.shape)}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")
