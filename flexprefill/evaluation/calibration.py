"""Alphas by layer and head: the largest ones that keep a given share of the attention mass on given texts."""

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

LEAST_LOG2 = -24  # log2 of the least alpha that is tried
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
    """For each layer a config with each head's largest alpha that keeps a share of the attention mass on every text.

    log2 alpha is bisected, for all heads at once. A head that does not reach the share at 2^-24 gets that alpha.

    Args:
        layers: For each layer the queries and keys of one or more texts, scaled as the search scales them. All texts
            have the same heads.
        recall: The share, in (0, 1).
        config: All other settings. Heads that share a mask get the same alpha.
        every: Of the query rows that may drop blocks, one in so many is measured.
        advance: Called with 1 after each step. Each layer has ``STEPS + 1`` steps.

    Returns:
        The configs of layers 0, 1, …

    Raises:
        ValueError: The recall is out of range, or a layer has no text.
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
    """As ``calibrate``, for the layers of a decoder, with the queries and keys of dense attention.

    Args:
        model: The decoder.
        tokens: Texts, int64 [1, S] each, on the model's device.
        recall: As in ``calibrate``.
        config: As in ``calibrate``.
        advance: As in ``calibrate``.

    Returns:
        The configs of layers 0, 1, …
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
    # halving is exact, so the alphas that were measured are the ones that are written
    low, high = torch.full((heads,), float(LEAST_LOG2)), torch.zeros(heads)
    tried = high
    for step in range(STEPS + 1):
        enough = _recall(texts, _with(config, tried), every) >= recall
        if config.mask_heads == "kv":
            enough = enough.unflatten(0, (-1, group)).all(1).repeat_interleave(group)
        low, high = torch.where(enough, tried, low), torch.where(enough, high, tried)
        if step == 0:
            # a head that keeps enough at alpha 1 needs no smaller one
            high = torch.where(enough, low, high)
        tried = (low + high) / 2
        advance(1)
    return _with(config, low)


def _with(config: PrefillConfig, log2_alphas: Tensor) -> PrefillConfig:
    return replace(config, alpha=tuple(torch.exp2(log2_alphas.double()).tolist()))


def _recall(texts: Inputs, config: PrefillConfig, every: int) -> Tensor:
    """Each head's kept share of the mass, the least over the texts: [Hq]."""
    found = []
    for query, key in texts:
        length = query.shape[2]
        sparse = max(1, length - config.last_full_blocks * config.block_size)
        rows = range(min(every // 2, sparse - 1), sparse, every)
        block_map = search_blocks(query, key, config)
        found.append(attention_recall(query, key, block_map, rows=rows).mean.amin(0))
    return torch.stack(found).amin(0)
