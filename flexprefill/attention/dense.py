"""Dense causal attention by the best kernel here, for decoding and for prompts too short for a search to pay."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Hashable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flexprefill.attention.flash import flash_dense
from flexprefill.runtime.thread_state import without_autocast
from flexprefill.runtime.tracing import is_tracing

_ordering = threading.Lock()  # the order of backends is the process's, and each thread puts back what it found

DENSE_KERNELS = ("dense-flash", "dense-sdpa")

# fastest first, for whole prompts on CUDA; the first one that takes the tensors runs
SDPA_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, kernel: str, layout: Hashable | None = None
) -> Tensor:
    """Causal attention of the last S_q of S_kv positions over all keys before them.

    Args:
        query: [B, Hq, S_q, D].
        key: [B, Hkv, S_kv, D].
        value: [B, Hkv, S_kv, Dv].
        scale: Positive.
        kernel: "dense-flash" or "dense-sdpa", as choose_dense names them.
        layout: Names that of the tensors, if it is known.

    Returns:
        [B, Hq, S_q, Dv].
    """
    if kernel == "dense-flash":
        return flash_dense(query, key, value, scale, layout)
    with torch.no_grad(), without_autocast():
        return _sdpa(query, key, value, scale)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    q_len, kv_len = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.dtype == torch.float32:
        # no fused kernel takes grouped heads in float32, and the math kernel holds all scores at once
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
        grouped = False
    sdpa = functools.partial(scaled_dot_product_attention, query, key, value, scale=scale, enable_gqa=grouped)
    if q_len == 1:
        return sdpa()
    if q_len == kv_len:
        if not query.is_cuda:
            return sdpa(is_causal=True)
        with contextlib.nullcontext() if is_tracing() else _ordering, sdpa_kernel(SDPA_ORDER, set_priority=True):
            return sdpa(is_causal=True)
    if is_tracing():
        # causal_lower_right returns a tensor subclass that cannot be traced
        rows = torch.arange(q_len, device=query.device)[:, None] + (kv_len - q_len)
        visible = torch.arange(kv_len, device=query.device) <= rows
        return sdpa(attn_mask=visible)
    from torch.nn.attention.bias import causal_lower_right  # imports torch._dynamo

    return sdpa(attn_mask=causal_lower_right(q_len, kv_len))
