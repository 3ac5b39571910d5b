"""Rows with a logit that is not finite, on the CPU.

A logit that is NaN or +inf makes its row NaN, as in any softmax. FlexAttention's kernel for the CPU may skip such a key
instead, or give zeros (torch 2.11 to 2.15).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexprefill.attention.log_sum_exp import kept_log_sum_exp, log_sum_exp_over
from flexprefill.blockmap.map import BlockMap
from flexprefill.runtime.operators import operator
from flexprefill.runtime.tracing import is_tracing
from flexprefill.variant.logits import PlainAttention
from flexprefill.variant.variant import AttentionVariant

LARGEST = torch.finfo(torch.float32).max


def mark_rows_not_finite(attention: PlainAttention, block_map: BlockMap, output: Tensor) -> None:
    """Writes NaN into the rows of an output that have a kept and visible key whose logit is NaN or +inf.

    The largest magnitudes of query and key mostly show that there is no such logit. Then nothing more is done.

    Args:
        output: [B, Hq, S_q, Dv].

    Raises:
        ValueError: There may be such logits, and mods inside torch.compile, where a graph cannot look at them.
    """
    mods = bool(attention.mask_mods or attention.score_mods)
    query, key, scale = attention.query, attention.key, attention.scale
    if mods and not is_tracing():
        if may_not_be_finite(query, key, scale):
            _mark(output, log_sum_exp_over(attention, block_map))
        return
    _marked(query, key, block_map.words, output, block_map.block_size, scale, *attention.variant.parts, mods)


@operator("flexprefill::mark_rows_not_finite", mutates=("output",))
def _marked(
    query: Tensor, key: Tensor, words: Tensor, output: Tensor, block_size: int, scale: float,
    starts: Tensor | None = None, ends: Tensor | None = None, sliding_window: int | None = None,
    soft_cap: float | None = None, alibi_slopes: Tensor | None = None, mods: bool = False,
) -> None:  # fmt: skip
    if not may_not_be_finite(query, key, scale):
        return
    if mods:
        raise ValueError(
            "query and key must be finite, and their products, where a mask_mod or score_mod is compiled for the CPU: "
            "its kernel does not keep NaN. Call prefill_attention outside of torch.compile"
        )
    variant = AttentionVariant.of_parts((starts, ends, sliding_window, soft_cap, alibi_slopes))
    _mark(output, kept_log_sum_exp(PlainAttention(query, key, scale, variant), words, block_size))


@torch.library.register_fake("flexprefill::mark_rows_not_finite")
def _(query, key, words, output, *_):
    return None


def may_not_be_finite(query: Tensor, key: Tensor, scale: float) -> bool:
    """Whether the largest magnitudes of a query and keys [..., D] leave room for a logit that is NaN or infinite."""
    # NaN makes the comparison false too
    return not abs(scale) * query.shape[3] * _largest(query) * _largest(key) < LARGEST


def _largest(tensor: Tensor) -> float:
    """The largest magnitude, without a copy; NaN if one is."""
    least, most = tensor.aminmax()
    return max(-least.item(), most.item())


def _mark(output: Tensor, sums: Tensor) -> None:
    output.masked_fill_((sums.isnan() | sums.isposinf())[..., None], torch.nan)
