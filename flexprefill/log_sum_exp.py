"""Log-sum-exps over kept blocks, and what needs them: learned sinks."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexprefill.blockmap import BlockMap, ceil_div, unpack_bits
from flexprefill.errors import FlexPrefillError
from flexprefill.masks import MaskMod
from flexprefill.operators import operator
from flexprefill.score_mods import ScoreMod
from flexprefill.search.reference import soft_capped
from flexprefill.tracing import is_tracing


def add_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Attention over keys to attention in whose softmax one more logit of each head takes part, without a value.

    Args:
        output: [B, Hq, S_q, Dv]; lse: float32 [B, Hq, S_q], natural log-sum-exps; sinks: [Hq].
    """
    share = torch.sigmoid(lse - sinks.float()[:, None])
    return (output * share[..., None]).to(output.dtype)


def log_sum_exp_over(
    query: Tensor,
    key: Tensor,
    block_map: BlockMap,
    scale: float,
    first: Tensor | None = None,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    mask_mods: tuple[MaskMod, ...] = (),
    score_mods: tuple[ScoreMod, ...] = (),
) -> Tensor:
    """Natural log-sum-exps over the kept keys, causal per element: float32 [B, Hq, S_q]. Plain PyTorch.

    FlexAttention's kernel for the CPU gives none.

    Args:
        first: the first keys that queries see; see sequences.first_keys.
        soft_cap: 0 is none.
        alibi_slopes: float [Hq].
        mask_mods, score_mods: the caller's, for FlexAttention; not inside torch.compile.

    Raises:
        FlexPrefillError: inside torch.compile with mods.
    """
    arguments = (
        query,
        key,
        block_map.words,
        block_map.kv_len,
        block_map.block_size,
        scale,
        first,
        soft_cap,
        alibi_slopes,
    )
    if not mask_mods and not score_mods:
        return kept_log_sum_exp(*arguments)
    if is_tracing():
        raise FlexPrefillError(
            f"sinks with a mask_mod or score_mod cannot be compiled for {query.device}, where FlexAttention gives no "
            "log-sum-exp: call prefill_attention outside of torch.compile, or on a CUDA device"
        )
    return _log_sum_exp(*arguments, mask_mods, score_mods)


@operator("flexprefill::kept_log_sum_exp")
def kept_log_sum_exp(
    query: Tensor,
    key: Tensor,
    words: Tensor,
    kv_len: int,
    block_size: int,
    scale: float,
    first: Tensor | None = None,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """As :func:`log_sum_exp_over`, of a map's words and lengths."""
    return _log_sum_exp(query, key, words, kv_len, block_size, scale, first, soft_cap, alibi_slopes, (), ())


@torch.library.register_fake("flexprefill::kept_log_sum_exp")
def _(query, key, words, kv_len, block_size, scale, first=None, soft_cap=0.0, alibi_slopes=None):
    return query.new_empty(query.shape[:3], dtype=torch.float32)


def _log_sum_exp(
    query: Tensor,
    key: Tensor,
    words: Tensor,
    kv_len: int,
    block_size: int,
    scale: float,
    first: Tensor | None,
    soft_cap: float,
    alibi_slopes: Tensor | None,
    mask_mods: tuple[MaskMod, ...],
    score_mods: tuple[ScoreMod, ...],
) -> Tensor:
    batch, heads, q_len, _ = query.shape
    group, columns = heads // key.shape[1], ceil_div(kv_len, block_size)
    lse = torch.empty(batch, heads, q_len, device=query.device, dtype=torch.float32)
    kept = unpack_bits(words, columns)
    missing = columns * block_size - kv_len
    key_blocks = pad(key, (0, 0, 0, missing)).unflatten(2, (columns, block_size))  # [B, Hkv, N, b, D]
    positions = torch.arange(columns * block_size, device=query.device).view(columns, block_size)
    for b, h, block in product(range(batch), range(heads), range(words.shape[2])):
        rows = slice(block * block_size, min((block + 1) * block_size, q_len))
        listed = kept[b, h, block].nonzero().squeeze(1)
        keys = key_blocks[b, h // group, listed].flatten(0, 1).float()
        row = torch.arange(rows.start, rows.stop, device=query.device)[:, None]
        position = positions[listed].flatten()
        visible = position <= row + (kv_len - q_len)
        logits = soft_capped(scale * (query[b, h, rows].float() @ keys.T), soft_cap)
        if alibi_slopes is not None:
            logits = logits - alibi_slopes[h].float() * (row + (kv_len - q_len) - position)
        if first is not None:
            visible = visible & (position >= first[b if first.shape[0] > 1 else 0, rows, None])
        # past the end a mod may have nothing to read
        index = *(torch.tensor(n, device=query.device) for n in (b, h)), row, position.clamp(max=kv_len - 1)
        for score_mod in score_mods:
            logits = score_mod(logits, *index)
        for mask_mod in mask_mods:
            visible = visible & mask_mod(*index)
        lse[b, h, rows] = logits.masked_fill(~visible, -torch.inf).logsumexp(-1)
    return lse
