"""The search: which blocks of the attention matrix matter, from query and key alone."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from flexprefill.blockmap import BlockMap
from flexprefill.checks import check_alphas, check_attention_inputs, check_config, check_last_chunk, resolve_scale
from flexprefill.config import PrefillConfig
from flexprefill.guard import guard_checked
from flexprefill.search import op
from flexprefill.search.means import KeyMeans, check_means
from flexprefill.search.rule import Rule
from flexprefill.search.scorers import MEANS_SCORER, find_scorer
from flexprefill.sequences import Sequences
from flexprefill.terms import PLAIN, Terms

IMPLEMENTATIONS = ("auto", "reference", "triton")


def search_blocks(
    query: Tensor,
    key: Tensor,
    config: PrefillConfig = PrefillConfig(),
    *,
    scale: float | None = None,
    last_chunk: bool = True,
    implementation: str = "auto",
    means: KeyMeans | None = None,
    sequences: Sequences | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> BlockMap:
    """Finds the key blocks that each query block has to attend to (FlashPrefill, arXiv 2603.06199).

    Each key block is pooled to its mean; its score is the sum over the query block's rows of exp(scale · row ·
    mean), and blocks that reach ``config.alpha`` times the row's best are kept, with sinks, a local window and
    the last query blocks. ``config`` can name another score. Nothing waits for the device, and the call traces under
    ``torch.compile(fullgraph=True)``.

    Args:
        query: [B, Hq, S_q, D], float16, bfloat16 or float32; the last S_q of the S_kv positions.
        key: [B, Hkv, S_kv, D], of query's dtype and device; Hq is a multiple of Hkv, S_q at most S_kv.
            D is a multiple of 8 from 16 to 256.
        config: the rule's settings.
        scale: factor on the dot products; 1 / sqrt(D) if None.
        last_chunk: whether these queries end the prompt. False says that a later chunk follows, and then no
            query block counts as one of the last. Maps of chunks are joined by :meth:`BlockMap.from_chunks`.
        implementation: "reference" (plain PyTorch, float32, any device), "triton" (a CUDA device, or the CPU
            under TRITON_INTERPRET=1), or "auto" (triton on CUDA for the scorer "flashprefill", else reference).
        means: of the blocks of earlier chunks' keys, which are then not pooled again; extended by this chunk's. Not
            inside torch.compile.
        sequences: which positions belong together; keys of other sequences and of padding enter no mean and no score,
            and sinks, window and last query blocks are those of the query's own sequence (docs/masks.md).
        sliding_window: how many keys a query sees, its own the last; None: all before it. Blocks outside are neither
            scored nor kept.
        soft_cap: cap · tanh(scores / cap) takes the place of the scaled products, as in Gemma 2.
        alibi_slopes: float [Hq], on query's device: slope · (distance of the key) is subtracted from the scores.

    Returns:
        A BlockMap [B, Hq, ceil(S_q / block_size), ceil(S_kv / block_size)] on query's device.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        NotEnoughMemoryError: it does not fit into the device's memory; nothing was begun.
    """
    check_attention_inputs(query, key)
    check_config(config)
    check_last_chunk(last_chunk)
    check_means(means)
    terms = Terms.checked(query, key, sequences, sliding_window, soft_cap, alibi_slopes)
    scale = resolve_scale(scale, query.shape[3])
    return search_checked(query, key, config, scale, last_chunk, implementation, means, terms)


def search_checked(
    query: Tensor,
    key: Tensor,
    config: PrefillConfig,
    scale: float,
    last_chunk: bool,
    implementation: str,
    means: KeyMeans | None,
    terms: Terms = PLAIN,
) -> BlockMap:
    """As :func:`search_blocks`, of arguments that are known to fit together."""
    check_alphas(config, query.shape[1], key.shape[1])
    more = {"sliding_window": terms.sliding_window, "soft_cap": terms.soft_cap}
    rule = Rule.of(config, scale=scale, last_chunk=last_chunk, **more)
    # raises here, not inside the operator
    if not find_scorer(rule.scorer).knows_terms and terms.given:
        raise ValueError(
            f"config.scorer {rule.scorer!r} does not know of {', '.join(terms.given)}: 'flashprefill' and 'exact' do"
        )
    if config.guard is not None and terms.given:
        raise ValueError(
            f"config.guard cannot be combined with {', '.join(terms.given)}: it samples plain causal attention; pass a "
            "config with guard=None"
        )
    implementation = resolve_implementation(implementation, query.device, rule.scorer)
    sequences = terms.sequences
    bounds = (None, None) if sequences is None else (sequences.starts, sequences.ends)
    if means is None:
        words = op.search_words(query, key, *rule, implementation, *bounds, terms.alibi_slopes)
    else:
        if rule.scorer != MEANS_SCORER:
            raise ValueError(
                f"means is of the scorer {MEANS_SCORER!r}, which pools keys to their means: pass None for the scorer "
                f"{rule.scorer!r}"
            )
        if sequences is not None:
            raise ValueError("means is of whole blocks, not of sequences in them: pass None with sequences")
        pooled = means.extend(key, config.block_size, implementation)
        words = op.score_words(query, pooled, key.shape[2], rule, implementation, *bounds, terms.alibi_slopes)
    block_map = BlockMap(words, query.shape[2], key.shape[2], config.block_size)
    if config.guard is None:
        return block_map
    own = "triton" if query.is_cuda else implementation  # a scorer without a kernel does not take it from the guard
    return guard_checked(query, key, block_map, config, scale, last_chunk, own)[0]


def pool_checked(key: Tensor, config: PrefillConfig, implementation: str) -> KeyMeans | None:
    """The means that :func:`search_checked` takes, of all blocks of a key that is known to be right.

    None for a scorer that takes none.
    """
    implementation = resolve_implementation(implementation, key.device, config.scorer)
    if config.scorer != MEANS_SCORER:
        return None
    means = KeyMeans()
    means.extend(key, config.block_size, implementation)
    return means


def resolve_implementation(implementation: str, device: torch.device, scorer: str) -> str:
    """The named one, or what "auto" is for a scorer on a device.

    Raises:
        ValueError: there is none of that name, or it cannot run.
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
