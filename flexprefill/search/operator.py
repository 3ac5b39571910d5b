"""The two halves of the search by either implementation, and the whole search as one custom operator.

torch.compile does not look inside the operator, so one graph serves every length.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexprefill.blockmap.bits import WORD_BITS, pack_bits
from flexprefill.blockmap.geometry import Geometry, ceil_div
from flexprefill.runtime.memory import IN_CHUNKS, room_for
from flexprefill.runtime.operators import operator
from flexprefill.runtime.replaying import LONG, Work, layouts_of, replayed
from flexprefill.runtime.tracing import one_if_known
from flexprefill.search import reference, two_sided
from flexprefill.search.grid import Grid
from flexprefill.search.rule import Rule
from flexprefill.search.scorers import MEANS_SCORER, find_scorer
from flexprefill.variant.paged_kv import PagedKV
from flexprefill.variant.sequences import Sequences
from flexprefill.variant.variant import PLAIN, AttentionVariant

BYTES_A_PAIR = 8  # the reference takes at least so much for each pair of blocks


@operator("flexprefill::search_words")
def search_words(
    query: Tensor, key: Tensor, scale: float, log2_alpha: float, block_size: int, sink_blocks: int,
    window_blocks: int, last_full_blocks: int, min_blocks: int, kv_masks: bool, first_key: bool, scorer: str,
    log2_alphas: Sequence[float], probe_rows: int, probe_share: float, outlier_keys: int, outlier_share: float,
    implementation: str, starts: Tensor | None = None, ends: Tensor | None = None,
    sliding_window: int | None = None, soft_cap: float | None = None, alibi_slopes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """query [B, Hq, S_q, D] and key [B, Hkv, S_kv, D] to a BlockMap's words, int32 [B, Hq, M, ceil(N / 32)].

    An operator takes a Rule and a variant's parts one by one.
    """
    blocks = sink_blocks, window_blocks, last_full_blocks, min_blocks
    rule = Rule(
        scale, log2_alpha, block_size, *blocks, kv_masks, first_key, scorer, tuple(log2_alphas),
        probe_rows, probe_share, outlier_keys, outlier_share,
    )  # fmt: skip
    variant = AttentionVariant.of_parts((starts, ends, sliding_window, soft_cap, alibi_slopes))
    if implementation == "triton" and variant is PLAIN and key.shape[2] < LONG:
        kind = "search", rule
        return _launched(kind, lambda query, key: [find_words(query, key, rule, implementation)], query, key)[0]
    return find_words(query, key, rule, implementation, variant)


@torch.library.register_fake("flexprefill::search_words")
def _(query, key, scale, log2_alpha, block_size, *rest):
    geometry = Geometry(query.shape[2], key.shape[2], block_size)
    # torch.export compares a size with 1, and cannot do so with an expression that is always 1
    width = one_if_known(ceil_div(geometry.columns, WORD_BITS))
    return query.new_empty(*query.shape[:2], geometry.rows, width, dtype=torch.int32)


def _launched(kind: tuple[Hashable, ...], work: Work, *inputs: Tensor) -> Sequence[Tensor]:
    """``work(*inputs)``, which launches kernels of Triton. On CUDA it is replayed for a layout that comes again."""

    def there(*inputs: Tensor) -> Sequence[Tensor]:
        # Triton launches on the current device, and the tensors may be on another
        with torch.cuda.device_of(inputs[0]):
            return work(*inputs)

    if not inputs[0].is_cuda:  # Triton's interpreter has nothing to save
        return there(*inputs)
    return replayed((*kind, layouts_of(*inputs)), there, *inputs)


def find_words(
    query: Tensor, key: Tensor, rule: Rule, implementation: str, variant: AttentionVariant = PLAIN
) -> Tensor:
    """As `search_words`, not as an operator."""
    if rule.two_sided:
        sketch = sketch_keys(key, rule, implementation)
        return two_sided_words(query, key, sketch, rule, implementation, measured=False)[0]
    if rule.scorer != MEANS_SCORER:
        pooled = find_scorer(rule.scorer).pool(key, rule.block_size)
        if not isinstance(pooled, Tensor) or pooled.shape[:2] != key.shape[:2]:
            found = list(pooled.shape) if isinstance(pooled, Tensor) else type(pooled).__name__
            raise ValueError(f"scorer {rule.scorer!r} must pool keys to {list(key.shape[:2])} and more, got {found}")
    else:
        pooled = pool_keys(key, rule.block_size, implementation, variant.sequences)
    return score_words(query, pooled, key.shape[2], rule, implementation, variant)


class Sketch(NamedTuple):
    """What a search takes of the keys of each block.

    Attributes:
        means: [B, Hkv, N, D], as `pool_keys` gives them. None if no means are scored.
        outliers: [B, Hkv, N, outlier_keys, D], as two_sided.outlier_keys gives them. None without outliers.
    """

    means: Tensor | None
    outliers: Tensor | None


def sketch_keys(key: Tensor, rule: Rule, implementation: str) -> Sketch:
    """A rule's sketch of all key blocks."""
    means = pool_keys(key, rule.block_size, implementation) if rule.scores_means else None
    outliers = pick_outliers(key, rule, implementation) if rule.outlier_keys else None
    return Sketch(means, outliers)


def pick_outliers(key: Tensor, rule: Rule, implementation: str) -> Tensor:
    """The keys farthest from their blocks' means: [B, Hkv, S_kv, D] to [B, Hkv, N, outlier_keys, D]."""
    if implementation == "reference":
        return two_sided.outlier_keys(key, rule.block_size, rule.outlier_keys)
    from flexprefill.search.kernels.farthest import farthest  # imports triton

    def picked(key: Tensor) -> list[Tensor]:
        return [farthest(key, rule.block_size, rule.outlier_keys, vectors=True)]

    return _launched(("outliers", rule.block_size, rule.outlier_keys), picked, key)[0]


def two_sided_words(
    query: Tensor, key: Tensor, sketch: Sketch, rule: Rule, implementation: str, measured: bool
) -> tuple[Tensor, Tensor]:
    """A BlockMap's words by a rule with probes or outliers, and what the probes saw of them.

    Args:
        query: [B, Hq, S_q, D].
        key: [B, Hkv, S_kv, D].
        sketch: Of all key blocks.
        rule: The settings of the call.
        implementation: "reference" or "triton".
        measured: Whether the share of the probes' attention is wanted.

    Returns:
        int32 [B, Hq, M, ceil(N / 32)], and float32 [B, Hq, M]: the share of its evenly placed probes' attention that
        each query block keeps. That tensor is empty if it is not measured.
    """
    words = None
    if sketch.means is not None:
        words = score_words(query, sketch.means, key.shape[2], rule, implementation)
    if implementation == "reference":
        needed = BYTES_A_PAIR * query.shape[0] * query.shape[1] * query.shape[2] * max(rule.probe_rows, 1)
        with room_for("the search by the reference", needed, query.device, IN_CHUNKS):
            words, held = two_sided.keep_more(query, key, sketch.outliers, words, rule, measured)
    else:
        words, held = _keep_more(query, key, sketch.outliers, words, rule, measured)
    if rule.kv_masks:
        words = union_of_groups(words, query.shape[1] // key.shape[1])
    return words, query.new_empty(0, dtype=torch.float32) if held is None else held


def _keep_more(
    query: Tensor, key: Tensor, outliers: Tensor | None, words: Tensor | None, rule: Rule, measured: bool
) -> tuple[Tensor, Tensor | None]:
    """As two_sided.keep_more, by kernels."""
    from flexprefill.search.kernels import two_sided as kernels  # imports triton

    parts = outliers, words

    def kept(query: Tensor, key: Tensor, *given: Tensor) -> list[Tensor]:
        rest = iter(given)
        far, means_side = (None if part is None else next(rest) for part in parts)
        return [one for one in kernels.keep_more(query, key, far, means_side, rule, measured) if one is not None]

    if key.shape[2] >= LONG:
        with torch.cuda.device_of(query):
            return kernels.keep_more(query, key, *parts, rule, measured)
    kind = "more blocks", rule, measured, *[part is None for part in parts]
    found, *held = _launched(kind, kept, query, key, *[part for part in parts if part is not None])
    return found, held[0] if held else None


def union_of_groups(words: Tensor, group: int) -> Tensor:
    """Gives the query heads of each key head what any of them keeps: int32 [B, Hq, M, W]."""
    of_groups = words.unflatten(1, (-1, group))
    union = of_groups[:, :, 0]
    for member in range(1, group):
        union = union | of_groups[:, :, member]
    return union.repeat_interleave(group, 1)


@operator("flexprefill::measured_words")
def measured_words(
    query: Tensor, key: Tensor, scale: float, log2_alpha: float, block_size: int, sink_blocks: int,
    window_blocks: int, last_full_blocks: int, min_blocks: int, kv_masks: bool, first_key: bool, scorer: str,
    log2_alphas: Sequence[float], probe_rows: int, probe_share: float, outlier_keys: int, outlier_share: float,
    implementation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `search_words` for a rule with probes, and the share of their attention that each query block keeps.

    Returns:
        int32 [B, Hq, M, ceil(N / 32)] and float32 [B, Hq, M].
    """
    rule = Rule(
        scale, log2_alpha, block_size, sink_blocks, window_blocks, last_full_blocks, min_blocks, kv_masks, first_key,
        scorer, tuple(log2_alphas), probe_rows, probe_share, outlier_keys, outlier_share,
    )  # fmt: skip
    return two_sided_words(query, key, sketch_keys(key, rule, implementation), rule, implementation, measured=True)


@torch.library.register_fake("flexprefill::measured_words")
def _(query, key, scale, log2_alpha, block_size, *rest):
    geometry = Geometry(query.shape[2], key.shape[2], block_size)
    width = one_if_known(ceil_div(geometry.columns, WORD_BITS))
    words = query.new_empty(*query.shape[:2], geometry.rows, width, dtype=torch.int32)
    return words, query.new_empty(*query.shape[:2], geometry.rows, dtype=torch.float32)


def pool_keys(key: Tensor, block_size: int, implementation: str, sequences: Sequences | None = None) -> Tensor:
    """Means of the key blocks in key's dtype: [B, Hkv, S_kv, D] to [B, Hkv, N, D].

    With sequences, the means are those of reference.pool_own_keys.
    """
    if implementation == "reference":
        if sequences is None:
            return reference.pool_keys(key, block_size)
        return reference.pool_own_keys(key, block_size, sequences)
    from flexprefill.search.kernels import launch  # imports triton

    if sequences is None:
        return _launched(("means", block_size), lambda key: [launch.pool_keys(key, block_size)], key)[0]
    with torch.cuda.device_of(key):
        return launch.pool_keys(key, block_size, sequences)


def pool_pages(paged: PagedKV, block_size: int, implementation: str, wanted: Tensor | None = None) -> Tensor:
    """Means of the key blocks of a paged cache in the keys' dtype, [B, Hkv, N, D], the bits of pool_keys.

    Args:
        paged: The keys.
        block_size: Tokens of a block.
        implementation: "reference" gathers keys. "triton" reads them where they lie.
        wanted: Which blocks to pool, bool [B, N], contiguous. The means of others hold anything. None: all.
    """
    if implementation != "reference":
        from flexprefill.search.kernels import launch  # imports triton

        with torch.cuda.device_of(paged.pages_of_keys):
            return launch.pool_pages(paged, block_size, wanted)
    first = 0
    if wanted is not None and wanted.device.type == "cpu":  # looking at it waits for nothing
        chosen = wanted.any(0).nonzero()
        first = int(chosen[0]) if len(chosen) else wanted.shape[1]
    columns = ceil_div(paged.kv_len, block_size)
    sizes = paged.batch, paged.pages_of_keys.shape[1], columns, paged.pages_of_keys.shape[3]
    means = paged.pages_of_keys.new_zeros(sizes)
    if first < columns:
        means[:, :, first:] = reference.pool_keys(paged.gather_keys(first * block_size), block_size)
    return means


def score_words(
    query: Tensor, pooled: Tensor, kv_len: int, rule: Rule, implementation: str, variant: AttentionVariant = PLAIN
) -> Tensor:
    """A BlockMap's words, int32 [B, Hq, M, ceil(N / 32)], from what the rule's scorer pools of the kv_len keys.

    FlashPrefill's scorer pools keys to their blocks' means, [B, Hkv, N, D].
    """
    if implementation == "reference":
        scorer = find_scorer(rule.scorer)
        first_key = rule.first_key if scorer.score_rows is None else scorer.score_rows == "visible"
        grid = Grid(Geometry(query.shape[2], kv_len, rule.block_size), rule.scale, first_key, variant)
        needed = BYTES_A_PAIR * query.shape[0] * query.shape[1] * grid.rows * grid.columns
        with room_for("the search by the reference", needed, query.device, IN_CHUNKS):
            scores = scorer.log_scores(query, pooled, grid)
            _check_scores(scores, rule.scorer, query, grid)
            return pack_bits(reference.select_blocks(scores, pooled.shape[1], grid, rule))
    from flexprefill.search.kernels import launch  # imports triton

    if variant is PLAIN:
        kind = "scores", kv_len, rule
        return _launched(kind, lambda query, means: [launch.score_words(query, means, kv_len, rule)], query, pooled)[0]
    with torch.cuda.device_of(query):
        return launch.score_words(query, pooled, kv_len, rule, variant)


def _check_scores(scores: object, scorer: str, query: Tensor, grid: Grid) -> None:
    """Raises ValueError unless a scorer gave what Scorer.log_scores has to. It may be a caller's own."""
    shape = *query.shape[:2], grid.rows, grid.columns
    if not isinstance(scores, Tensor):
        found = type(scores).__name__
    elif scores.shape == shape and scores.dtype == torch.float32 and scores.device == query.device:
        return
    else:
        found = f"{scores.dtype} {list(scores.shape)} on {scores.device}"
    raise ValueError(f"scorer {scorer!r} must give scores float32 {list(shape)} on {query.device}, got {found}")
