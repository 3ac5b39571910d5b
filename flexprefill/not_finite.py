"""Rows whose logits are not finite, on the CPU.

A logit that is NaN or +inf makes its row NaN, as in any softmax. FlexAttention's kernel for the CPU may pass over such
a key instead, or give zeros (torch 2.11 to 2.15).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexprefill.mean_correction import kept_log_sum_exp
from flexprefill.operators import operator

LARGEST = torch.finfo(torch.float32).max


@operator("flexprefill::mark_rows_not_finite", mutates=("output",))
def mark_rows_not_finite(
    query: Tensor, key: Tensor, words: Tensor, output: Tensor, block_size: int, scale: float, mods: bool
) -> None:
    """Writes NaN into the rows of an output that have a kept and visible key whose logit is NaN or +inf.

    Where no product can be so large, which one look at each tensor tells, nothing more is done.

    Args:
        query: [B, Hq, S_q, D]; key: [B, Hkv, S_kv, D]; words: int32 [B, Hq, M, ceil(N / 32)], a BlockMap's.
        output: [B, Hq, S_q, Dv].
        mods: whether the caller's mask_mod or score_mod changed the logits.

    Raises:
        ValueError: there are such logits and mods, which are not known here.
    """
    largest = {name: _largest(tensor) for name, tensor in (("query", query), ("key", key))}
    if abs(scale) * query.shape[3] * largest["query"] * largest["key"] < LARGEST:  # false for NaN as well
        return
    if mods:
        name = max(largest, key=lambda name: math.inf if math.isnan(largest[name]) else largest[name])
        raise ValueError(
            f"{name} must be finite, and small enough that products are, where a mask_mod or score_mod is given on the "
            f"CPU, whose kernel does not keep NaN: got a largest magnitude of {largest[name]}"
        )
    sums = kept_log_sum_exp(query, key, words, key.shape[2], block_size, scale)
    output.masked_fill_((sums.isnan() | sums.isposinf())[..., None], torch.nan)


@torch.library.register_fake("flexprefill::mark_rows_not_finite")
def _(query, key, words, output, block_size, scale, mods):
    return None


def _largest(tensor: Tensor) -> float:
    """The largest magnitude, without a copy; NaN if one is."""
    least, most = tensor.aminmax()
    return max(-least.item(), most.item())
