"""search_blocks: the key blocks that each query block has to attend to."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from flexprefill.blockmap.map import BlockMap
from flexprefill.config import PrefillConfig, check_alphas
from flexprefill.runtime.listeners import is_recording, note_attention
from flexprefill.runtime.tracing import is_tracing
from flexprefill.search import operator
from flexprefill.search.defaults import resolve_config
from flexprefill.search.guard import guard_checked, guard_measured
from flexprefill.search.key_means import KeyMeans, check_means
from flexprefill.search.page_means import PageMeans
from flexprefill.search.rule import Rule
from flexprefill.search.scorers import MEANS_SCORER, find_scorer
from flexprefill.variant.inputs import check_attention_inputs, check_last_chunk, resolve_scale
from flexprefill.variant.logits import PlainAttention
from flexprefill.variant.paged_kv import PagedKV
from flexprefill.variant.variant import PLAIN, AttentionVariant, check_variant

IMPLEMENTATIONS = ("auto", "reference", "triton")


def search_blocks(
    query: Tensor,
    key: Tensor | PagedKV,
    config: PrefillConfig | None = None,
    *,
    variant: AttentionVariant | None = None,
    scale: float | None = None,
    last_chunk: bool = True,
    implementation: str = "auto",
    means: KeyMeans | PageMeans | None = None,
) -> BlockMap:
    """Finds the key blocks that each query block has to attend to.

    By FlashPrefill (arXiv 2603.06199) each key block is pooled to its mean. Its score is the sum over the query block's
    rows of exp(scale · row · mean). Blocks that reach ``config.alpha`` times the best score of their row are kept. So
    are sinks, a local window and the last query blocks. ``config`` can name another score.

    By the two-sided search, the default, some rows of each query block attend exactly and vote, and the oddest keys of
    each key block are scored by themselves (docs/explanations/two_sided.md).

    Nothing waits for the device. The call traces under ``torch.compile(fullgraph=True)``.

    Args:
        query: [B, Hq, S_q, D], float16, bfloat16 or float32. Queries are the last S_q of the S_kv positions. D is a
            multiple of 8 from 16 to 256.
        key: [B, Hkv, S_kv, D], with query's dtype and device. Hq is a multiple of Hkv. S_q is at most S_kv. Or a
            `PagedKV`, whose keys are pooled where they lie. It takes no variant, no guard and only the scorer
            "flashprefill".
        config: The settings of the rule. None is `PrefillConfig.recommended()`, the two-sided search. With sequences, a
            window, a soft cap or ALiBi, and for a `PagedKV`, it is FlashPrefill's `PrefillConfig()`: the two-sided
            search takes none of them.
        variant: What the attention is besides causal: sequences, a sliding window, a soft cap, ALiBi, sinks. The scores
            follow it. See `AttentionVariant`.
        scale: Factor on the dot products. None is 1 / sqrt(D).
        last_chunk: Whether these queries end the prompt. If False, a later chunk follows, and no query block counts as
            one of the last. `BlockMap.from_chunks` joins the maps of chunks.
        implementation: "reference" is plain PyTorch in float32, on any device. "triton" needs a CUDA device, or the CPU
            under TRITON_INTERPRET=1. "auto" is triton on CUDA for the scorer "flashprefill", else reference.
        means: Block means of earlier chunks' keys. They are not pooled again. This chunk's means are added to them. Not
            for use inside torch.compile. For a `PagedKV` it is a `PageMeans`.

    Returns:
        A BlockMap [B, Hq, ceil(S_q / block_size), ceil(S_kv / block_size)] on query's device.

    Raises:
        TypeError: An argument has the wrong type or dtype. The message names it.
        ValueError: An argument does not fit. The message names it.
        NotEnoughMemoryError: The search does not fit into the device's memory. Nothing was begun.
    """
    check_last_chunk(last_chunk)
    if isinstance(key, PagedKV):
        config = resolve_config(config, PLAIN, in_a_row=False)
        refuse_with_pages(config, {"variant": variant})
        key.check_query(query)
        check_means(means, key)
        scale = resolve_scale(scale, query.shape[3])
        if is_recording():
            note_attention(PlainAttention(query, key.gather_keys(), scale, PLAIN), config)
        assert not isinstance(means, KeyMeans)  # checked
        return search_pages(query, key, config, scale, last_chunk, implementation, means)
    check_attention_inputs(query, key)
    check_means(means, key)
    assert not isinstance(means, PageMeans)  # checked
    variant = check_variant(variant, query, key)
    config = resolve_config(config, variant)
    scale = resolve_scale(scale, query.shape[3])
    if is_recording():
        note_attention(PlainAttention(query, key, scale, variant), config)
    return search_checked(query, key, config, scale, last_chunk, implementation, means, variant)


def against_variant(config: PrefillConfig, variant: AttentionVariant) -> str | None:
    """Why a config's search cannot look at a variant. None if it can.

    Raises:
        ValueError: No scorer has the config's name.
    """
    scorer = find_scorer(config.scorer)  # raises here, not inside the operator
    changes = ", ".join(variant.changes_search)
    if not changes:
        return None
    if not scorer.knows_variant:
        return f"config.scorer {config.scorer!r} does not know of {changes}: 'flashprefill' and 'exact' do"
    if config.guard is not None:
        return (
            f"config.guard cannot be combined with {changes}: it samples plain causal attention; pass a config with "
            "guard=None"
        )
    if config.two_sided:
        return (
            f"config.probe_rows and config.outlier_keys cannot be combined with {changes}: probes and outliers attend "
            "plainly and causally; pass a config without them, such as PrefillConfig()"
        )
    return None


def search_checked(
    query: Tensor,
    key: Tensor,
    config: PrefillConfig,
    scale: float,
    last_chunk: bool,
    implementation: str,
    means: KeyMeans | None,
    variant: AttentionVariant = PLAIN,
) -> BlockMap:
    """As `search_blocks`, for arguments that were checked."""
    check_alphas(config, query.shape[1], key.shape[1])
    rule = Rule.of(config, scale=scale, last_chunk=last_chunk)
    if (against := against_variant(config, variant)) is not None:
        raise ValueError(against)
    implementation = resolve_implementation(implementation, query.device, rule.scorer)
    if rule.probe_rows and config.guard is not None:
        return _guarded_by_probes(query, key, config, rule, implementation, means)
    if means is None:
        words = operator.search_words(query, key, *rule, implementation, *variant.parts)
    elif rule.two_sided:
        sketch = means.extend(key, rule, implementation)
        words = operator.two_sided_words(query, key, sketch, rule, implementation, measured=False)[0]
    else:
        if rule.scorer != MEANS_SCORER:
            raise ValueError(
                f"means is of the scorer {MEANS_SCORER!r}, the only one that pools keys to means: pass None for the "
                f"scorer {rule.scorer!r}"
            )
        if variant.sequences is not None:
            raise ValueError("means is of whole blocks, not of sequences in them: pass None with sequences")
        pooled = means.extend(key, rule, implementation).means
        assert pooled is not None
        words = operator.score_words(query, pooled, key.shape[2], rule, implementation, variant)
    block_map = BlockMap(words, query.shape[2], key.shape[2], config.block_size)
    if config.guard is None:
        return block_map
    own = "triton" if query.is_cuda else implementation  # the guard has a kernel, even if the scorer has none
    return guard_checked(query, key, block_map, config, scale, last_chunk, own)[0]


def _guarded_by_probes(
    query: Tensor, key: Tensor, config: PrefillConfig, rule: Rule, implementation: str, means: KeyMeans | None
) -> BlockMap:
    """The search's map, guarded by what its probes saw."""
    if means is None:
        words, held = operator.measured_words(query, key, *rule, implementation)
    else:
        sketch = means.extend(key, rule, implementation)
        words, held = operator.two_sided_words(query, key, sketch, rule, implementation, measured=True)
    block_map = BlockMap(words, query.shape[2], key.shape[2], config.block_size)
    return guard_measured(block_map, held, config, rule.last_full_blocks, key.shape[1])[0]


def search_pages(
    query: Tensor,
    paged: PagedKV,
    config: PrefillConfig,
    scale: float,
    last_chunk: bool,
    implementation: str,
    means: PageMeans | None,
) -> BlockMap:
    """As `search_blocks` over keys in pages, for arguments that were checked."""
    check_alphas(config, query.shape[1], paged.pages_of_keys.shape[1])
    rule = Rule.of(config, scale=scale, last_chunk=last_chunk)
    implementation = resolve_implementation(implementation, query.device, rule.scorer)
    if means is None:
        pooled = operator.pool_pages(paged, config.block_size, implementation)
    else:
        pooled = means.of_blocks(paged, query.shape[2], config.block_size, implementation)
    words = operator.score_words(query, pooled, paged.kv_len, rule, implementation)
    return BlockMap(words, query.shape[2], paged.kv_len, config.block_size)


def refuse_with_pages(config: PrefillConfig, arguments: Mapping[str, object], *, searched: bool = True) -> None:
    """Raises ValueError if something is asked for that keys in pages cannot give.

    Args:
        config: The call's.
        arguments: The call's arguments that must be None, or a plain variant, by name.
        searched: Whether there is a search. Its settings do not count otherwise.
    """
    asked = [(name, "is about keys in a row") for name, given in arguments.items() if given not in (None, PLAIN)]
    if config.mean_correction:
        asked.append(("config.mean_correction", "needs the means of values, which no page keeps"))
    if searched and config.guard is not None:
        asked.append(("config.guard", "samples attention to keys in a row"))
    if searched and config.two_sided:
        asked.append(("config.probe_rows or config.outlier_keys", "reads keys in a row, not only their blocks' means"))
    if searched and config.scorer != MEANS_SCORER:
        asked.append((f"config.scorer {config.scorer!r}", "reads keys in a row, not their blocks' means"))
    if is_tracing():
        asked.append(("torch.compile", "would make a graph of one block table"))
    for name, reason in asked:
        raise ValueError(
            f"{name} cannot be combined with a PagedKV, because it {reason}: pass the tensors of PagedKV.gather()"
        )


def resolve_implementation(implementation: str, device: torch.device, scorer: str) -> str:
    """The named implementation, or what "auto" means for a scorer on a device.

    Raises:
        ValueError: None has that name, or it cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation == "auto":
        return "triton" if device.type == "cuda" and scorer == MEANS_SCORER else "reference"
    if implementation == "triton" and scorer != MEANS_SCORER:
        raise ValueError(
            f"implementation 'triton' has no kernel for the scorer {scorer!r}, only for {MEANS_SCORER!r}; "
            "'reference' runs every scorer on any device"
        )
    if implementation == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"implementation 'triton' needs tensors on a CUDA device (or TRITON_INTERPRET=1), got {device}; "
            "'reference' runs on any device"
        )
    return implementation
