"""Alphas by layer and head: the largest that keep a given share of the attention mass on given texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flexprefill.config import PrefillConfig
from flexprefill.evaluation.model import Attend, Decoder, causal_sdpa
from flexprefill.inspection import attention_recall
from flexprefill.runtime.progress import Advance, ignore
from flexprefill.search.blocks import search_blocks

LEAST_LOG2 = -24  # of alphas that are tried
STEPS = 10  # of the bisection between it and 0

Inputs = Sequence[tuple[Tensor, Tensor]]  # of one layer: query [B, Hq, S, D] and key [B, Hkv, S, D] of each text


def calibrate(
    layers: Sequence[Inputs],
    recall: float,
    config: PrefillConfig = PrefillConfig(),
    *,
    every: int = 61,
    advance: Advance = ignore,
) -> list[PrefillConfig]:
    """For each layer the config with the largest alpha of each head that keeps a share of the mass on every text.

    A bisection of log2 alpha, for all heads at once. A head that does not reach the share even at 2^-24 gets that.

    Args:
        layers: for each layer the queries and keys of one or more texts, scaled as the search scales them, of the same
            heads in all texts.
        recall: the share, in (0, 1).
        config: all other settings; heads that share a mask get the same alpha.
        every: measures the mass of one query row in so many, of those that may drop blocks.
        advance: called with 1 after each step, of which there are ``STEPS + 1`` for each layer.

    Raises:
        ValueError: the recall is out of range, or a layer has no text.
    """
    if not 0 < recall < 1:
        raise ValueError(f"recall must be in (0, 1), got {recall!r}")
    if not all(len(texts) for texts in layers):
        raise ValueError("layers must hold at least one text each, got a layer with none")
    return [_calibrate_layer(texts, recall, config, every, advance) for texts in layers]


def calibrate_decoder(
    model: Decoder,
    tokens: Sequence[Tensor],
    recall: float,
    config: PrefillConfig = PrefillConfig(),
    *,
    advance: Advance = ignore,
) -> list[PrefillConfig]:
    """As :func:`calibrate`, of what a decoder's layers see with dense attention.

    Args:
        tokens: texts, int64 [1, S] each, on the model's device.
    """
    layers: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.layers]

    def keeping(texts: list[tuple[Tensor, Tensor]]) -> Attend:
        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            texts.append((query, key))
            return causal_sdpa(query, key, value)

        return attend

    with torch.inference_mode():
        for text in tokens:
            model(text, [keeping(texts) for texts in layers])
        return calibrate(layers, recall, config, advance=advance)


def steps_of(layers: int) -> int:
    """How often ``advance`` is called for so many layers."""
    return layers * (STEPS + 1)


def _calibrate_layer(
    texts: Inputs, recall: float, config: PrefillConfig, every: int, advance: Advance
) -> PrefillConfig:
    query, key = texts[0]
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    # the grid's steps are halved ones: exact, so that what was measured is what is written
    low, high = torch.full((heads,), float(LEAST_LOG2)), torch.zeros(heads)
    tried = high
    for step in range(STEPS + 1):
        enough = _recall(texts, _with(config, tried), every) >= recall
        if config.mask_heads == "kv":
            enough = enough.unflatten(0, (-1, group)).all(1).repeat_interleave(group)
        low, high = torch.where(enough, tried, low), torch.where(enough, high, tried)
        if step == 0:
            # no head needs a smaller one if it keeps enough at alpha 1
            high = torch.where(enough, low, high)
        tried = (low + high) / 2
        advance(1)
    return _with(config, low)


def _with(config: PrefillConfig, log2_alphas: Tensor) -> PrefillConfig:
    return replace(config, alpha=tuple(torch.exp2(log2_alphas.double()).tolist()))


def _recall(texts: Inputs, config: PrefillConfig, every: int) -> Tensor:
    """The least over the texts of each head's kept share of the mass: [Hq]."""
    found = []
    for query, key in texts:
        length = query.shape[2]
        sparse = max(1, length - config.last_full_blocks * config.block_size)
        rows = range(min(every // 2, sparse - 1), sparse, every)
        block_map = search_blocks(query, key, config)
        found.append(attention_recall(query, key, block_map, rows=rows).mean.amin(0))
    return torch.stack(found).amin(0)
