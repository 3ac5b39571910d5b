"""Checks of the tensors that a caller hands in. Each error names the argument and what it got."""

from __future__ import annotations

import inspect
import math
import operator
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from flexprefill.blockmap import BlockMap
from flexprefill.config import PrefillConfig
from flexprefill.tracing import is_tracing

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = range(16, 257, 8)
LARGEST_SCALE = 1e38  # times log2(e) it still is a float32
MASK_MOD_ARGUMENTS = ("b", "h", "q_idx", "kv_idx")
SCORE_MOD_ARGUMENTS = ("score", *MASK_MOD_ARGUMENTS)


def check_attention_inputs(query: Tensor, key: Tensor, *value: Tensor) -> None:
    """Raises unless query [B, Hq, S_q, D] and key [B, Hkv, S_kv, D] can be searched, and with value attended.

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype or layout.
        ValueError: shapes, dtypes or devices do not fit together, or a gradient is asked for.
    """
    named = dict(zip(("query", "key", "value"), (query, key, *value), strict=False))
    for name, tensor in named.items():
        _check_tensor(name, tensor)
        _check_head_dim(name, tensor)
    for name in list(named)[1:]:
        _check_against_query(name, named[name], query)
    if value and query.device.type == "meta":
        raise ValueError("query must be on a device that computes, got meta")
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query must have a multiple of key's heads, got query {list(query.shape)} and key {list(key.shape)}"
        )
    if query.shape[3] != key.shape[3]:
        raise ValueError(
            f"key must have query's head dimension {query.shape[3]}, got {key.shape[3]} (key {list(key.shape)})"
        )
    if query.shape[2] > key.shape[2]:
        raise ValueError(
            "query [B, Hq, S_q, D] must be no longer than key [B, Hkv, S_kv, D] (queries are the last positions), "
            f"got S_q={query.shape[2]} and S_kv={key.shape[2]}"
        )
    if value and value[0].shape[1:3] != key.shape[1:3]:
        raise ValueError(
            f"value must have key's heads and length, got value {list(value[0].shape)} and key {list(key.shape)}"
        )


def check_block_map(block_map: BlockMap, query: Tensor, key: Tensor) -> None:
    """Raises unless a map is of query's batch size, heads, lengths and device."""
    check_is_map("block_map", block_map)
    if (block_map.q_len, block_map.kv_len) != (query.shape[2], key.shape[2]):
        raise ValueError(
            f"block_map must be of q_len={query.shape[2]} and kv_len={key.shape[2]}, "
            f"got q_len={block_map.q_len} and kv_len={block_map.kv_len}"
        )
    if block_map.shape[:2] != query.shape[:2]:
        raise ValueError(
            f"block_map must have query's batch size and heads {tuple(query.shape[:2])}, got {block_map.shape[:2]}"
        )
    if block_map.device != query.device:
        raise ValueError(f"block_map must be on query's device {query.device}, got {block_map.device}")


def check_is_map(name: str, block_map: object) -> None:
    """Raises TypeError unless it is a BlockMap."""
    if not isinstance(block_map, BlockMap):
        raise TypeError(f"{name} must be a BlockMap, got {type(block_map).__name__}")


def check_has_bits(name: str, block_map: object) -> None:
    """Raises unless it is a BlockMap whose bits can be read."""
    check_is_map(name, block_map)
    if block_map.device.type == "meta":
        raise ValueError(f"{name} must have bits, got a map on the device meta, which has none")


def check_mod(name: str, mod: object, arguments: Sequence[str]) -> None:
    """Raises TypeError unless it is None or a function that can be called with these."""
    if mod is None:
        return
    listed = ", ".join(arguments)
    if not callable(mod):
        raise TypeError(f"{name} must be a function of ({listed}), got {type(mod).__name__}")
    if is_tracing():
        return
    try:
        signature = inspect.signature(mod)
    except (TypeError, ValueError):  # of a builtin, which says nothing
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise TypeError(f"{name} must be a function of ({listed}), got one of {signature}") from error


def check_config(config: PrefillConfig) -> None:
    """Raises TypeError unless config is a PrefillConfig."""
    if not isinstance(config, PrefillConfig):
        raise TypeError(f"config must be a PrefillConfig, got {type(config).__name__}")


def check_alphas(config: PrefillConfig, heads: int, kv_heads: int) -> None:
    """Raises ValueError where alphas by head are not one for each, or differ among heads that share a mask."""
    if not isinstance(config.alpha, tuple):
        return
    if len(config.alpha) != heads:
        raise ValueError(
            f"config.alpha must be a number or one for each of the Hq={heads} query heads, got {len(config.alpha)}"
        )
    group = heads // kv_heads
    if config.mask_heads == "kv" and any(
        len(set(config.alpha[first : first + group])) > 1 for first in range(0, heads, group)
    ):
        raise ValueError(
            f'config.alpha must be the same for the {group} query heads that share a mask with mask_heads="kv", got '
            f"{config.alpha}"
        )


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """The given scale, or 1 / sqrt(head_dim) for None.

    Raises:
        TypeError, ValueError: ``scale`` is no finite number.
    """
    if scale is None:
        return 1.0 / math.sqrt(operator.index(head_dim))
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if not abs(scale) <= LARGEST_SCALE:  # false for NaN as well
        raise ValueError(f"scale must be finite in float32, at most {LARGEST_SCALE:g}, got {scale}")
    return float(scale)


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor [B, H, S, D], got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name} must be a strided tensor, got {kind}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}")
    if tensor.dim() != 4 or 0 in tensor.shape:
        raise ValueError(f"{name} must be [B, H, S, D] with no size of 0, got {list(tensor.shape)}")
    # a sign that is only noted, as of the imaginary part of a conjugate: kernels read the memory as it is
    if not is_tracing() and tensor.is_neg():
        raise ValueError(f"{name} must hold its own values, got a negated view: pass {name}.resolve_neg()")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, and a prefill has no backward pass: call under torch.no_grad() or pass "
            f"{name}.detach()"
        )


def _check_head_dim(name: str, tensor: Tensor) -> None:
    # a constant too where torch.compile makes every size a symbol
    if operator.index(tensor.shape[3]) not in HEAD_DIMS:
        raise ValueError(
            f"{name} must have a head dimension that is a multiple of 8 from 16 to 256, got D={tensor.shape[3]}"
        )


def _check_against_query(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")
    if tensor.dtype != query.dtype:
        raise TypeError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}")
    if tensor.shape[0] != query.shape[0]:
        raise ValueError(f"{name} must have query's batch size {query.shape[0]}, got {tensor.shape[0]}")


def check_last_chunk(last_chunk: object) -> None:
    if not isinstance(last_chunk, bool):
        raise TypeError(f"last_chunk must be a bool, got {last_chunk!r}")


def check_index(name: str, index: object, size: int) -> None:
    """Raises unless it is an int in 0 … size - 1."""
    if isinstance(index, bool) or not isinstance(index, int):
        raise TypeError(f"{name} must be an int, got {index!r}")
    if not 0 <= index < size:
        raise ValueError(f"{name} must be one of 0 … {size - 1}, got {index}")


def check_path(path: object) -> None:
    """Raises TypeError unless it is a file name."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a file name, got {type(path).__name__}")


def token_tensor(token_ids: Tensor | Sequence[int]) -> Tensor:
    """A prompt's tokens on the CPU, of any shape; TypeError unless they are whole numbers."""
    try:
        tokens = torch.as_tensor(token_ids, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"token_ids must be a tensor or list of whole numbers, got {type(token_ids).__name__}"
        ) from error
    # an empty list is of no dtype
    if tokens.numel() and (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool):
        raise TypeError(f"token_ids must be whole numbers, got {tokens.dtype}")
    return tokens
