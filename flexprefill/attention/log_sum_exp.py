"""Log-sum-exps over kept blocks: in plain PyTorch, and a check of FlashAttention-4's."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from flexprefill.attention.flex import LSE, FlexSettings, flex_over
from flexprefill.blockmap.bits import unpack_bits
from flexprefill.blockmap.block_mask import list_blocks
from flexprefill.blockmap.geometry import ceil_div
from flexprefill.blockmap.map import BlockMap
from flexprefill.errors import FlexPrefillError, UnsupportedError
from flexprefill.runtime.operators import operator
from flexprefill.runtime.state import remembered
from flexprefill.runtime.tracing import is_tracing
from flexprefill.variant.logits import PlainAttention
from flexprefill.variant.variant import PLAIN, AttentionVariant

KNOWN_LENGTH, KNOWN_HEAD_DIM = 128, 64  # of the input that checks FlashAttention-4's log-sum-exp
CLOSE = 0.01  # relative; the known fault is 30 %


def log_sum_exp_over(attention: PlainAttention, block_map: BlockMap) -> Tensor:
    """Natural log-sum-exps over the kept keys, causal per element: float32 [B, Hq, S_q].

    Computed in plain PyTorch, because FlexAttention's kernel for the CPU gives none.

    Raises:
        UnsupportedError: There are mods inside torch.compile.
    """
    if attention.mask_mods or attention.score_mods:
        if is_tracing():
            raise UnsupportedError(
                f"sinks with a mask_mod or score_mod cannot be compiled for {attention.query.device}, where "
                "FlexAttention gives no log-sum-exp: call prefill_attention outside of torch.compile, or on a CUDA "
                "device"
            )
        return kept_log_sum_exp(attention, block_map.words, block_map.block_size)
    query, key, parts = attention.query, attention.key, attention.variant.parts
    return kept_log_sum_exp_operator(query, key, block_map.words, block_map.block_size, attention.scale, *parts)


@operator("flexprefill::kept_log_sum_exp")
def kept_log_sum_exp_operator(
    query: Tensor, key: Tensor, words: Tensor, block_size: int, scale: float, starts: Tensor | None = None,
    ends: Tensor | None = None, sliding_window: int | None = None, soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As kept_log_sum_exp, with the variant in parts."""
    variant = AttentionVariant.of_parts((starts, ends, sliding_window, soft_cap, alibi_slopes))
    return kept_log_sum_exp(PlainAttention(query, key, scale, variant), words, block_size)


@torch.library.register_fake("flexprefill::kept_log_sum_exp")
def _(query, key, words, *_):
    return query.new_empty(query.shape[:3], dtype=torch.float32)


def kept_log_sum_exp(attention: PlainAttention, words: Tensor, block_size: int) -> Tensor:
    """As log_sum_exp_over, from a map's words. Only the logits of kept blocks are computed."""
    batch, heads, q_len, _ = attention.query.shape
    kv_len, device = attention.key.shape[2], words.device
    lse = torch.empty(batch, heads, q_len, device=device, dtype=torch.float32)
    position = torch.arange(kv_len, device=device)
    kept = unpack_bits(words, ceil_div(kv_len, block_size))
    for b, h, block in product(range(batch), range(heads), range(words.shape[2])):
        rows = slice(block * block_size, min((block + 1) * block_size, q_len))
        keys = position[kept[b, h, block].repeat_interleave(block_size)[:kv_len]]
        logits = attention.logits(slice(b, b + 1), slice(h, h + 1), rows, keys)
        lse[b, h, rows] = logits[0, 0].logsumexp(-1)
    return lse


@remembered("FlashAttention-4's log-sum-exp, by device", most=64)
def flash_lse_factor(device: torch.device) -> float:
    """The factor that corrects FlashAttention-4's log-sum-exp on a device.

    torch 2.11 multiplies it by ln 2 once too often (pytorch issue 181645). A small known input shows it, once, at the
    first use. That waits for the device.

    Raises:
        FlexPrefillError: It is wrong in another way.
    """
    generator = torch.Generator().manual_seed(0)
    # independent of the default dtype and device
    known = torch.randn(2, 1, 1, KNOWN_LENGTH, KNOWN_HEAD_DIM, generator=generator, dtype=torch.float32, device="cpu")
    query, key = known.to(device, torch.bfloat16)
    block_map = BlockMap.causal(1, 1, q_len=KNOWN_LENGTH, kv_len=KNOWN_LENGTH, block_size=KNOWN_LENGTH, device=device)
    attention = PlainAttention(query, key, KNOWN_HEAD_DIM**-0.5, PLAIN)
    settings = FlexSettings(KNOWN_LENGTH, attention.scale, (("BACKEND", "FLASH"),), LSE)
    _, aux = flex_over(query, key, key, list_blocks(block_map.words, block_map.geometry), settings)
    assert aux is not None and aux.lse is not None  # asked for
    return factor_to(aux.lse, attention.attend(key)[1])


def factor_to(found: Tensor, right: Tensor) -> float:
    """1 if the two agree, 1 / ln 2 if they agree with that factor.

    Raises:
        FlexPrefillError: They agree with neither.
    """
    for factor in (1.0, 1 / math.log(2)):
        if (factor * found - right).norm() <= CLOSE * right.norm():  # false for NaN as well
            return factor
    last, wanted = found.flatten()[-1].item(), right.flatten()[-1].item()
    raise FlexPrefillError(
        "FlashAttention-4 returns a wrong log-sum-exp through this torch, and not by the known factor ln 2: "
        f"{last:.4f} instead of {wanted:.4f}; backend='triton' gives a right one"
    )
