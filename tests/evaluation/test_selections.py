"""Other methods' choices of blocks against their definitions, written out in loops."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import make_qkv

from flexprefill import PrefillConfig, UnsupportedError
from flexprefill.blockmap.geometry import Geometry
from flexprefill.evaluation import selections
from flexprefill.evaluation.methods import Method, make_methods
from flexprefill.evaluation.selections import SELECTIONS, best_that_reach
from flexprefill.search.grid import Grid
from flexprefill.variant.variant import AttentionVariant

B = 16


def problem(length, seed, heads=2, kv_heads=1):
    query, key, _ = make_qkv(length, heads=heads, kv_heads=kv_heads, head_dim=32, seed=seed)
    grid = Grid(Geometry(length, length, B), 32**-0.5, first_key=True)
    # the key head of each query head, in float64
    return query, key, grid, query.double()[0], key.double()[0].repeat_interleave(heads // kv_heads, 0)


def weights_of(query, key):
    """The exact attention [S, S] of one head."""
    logits = (query @ key.T / math.sqrt(32)).masked_fill(torch.ones(len(query), len(key)).triu(1).bool(), -math.inf)
    return logits.softmax(-1)


def means(tensor):
    return torch.stack([part.mean(0) for part in tensor.split(B)])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=12), st.floats(0.01, 1))
def test_the_fewest_that_reach_a_share(counts, share):
    shares = torch.tensor(counts, dtype=torch.float64)
    shares = shares / shares.sum().clamp(min=1)
    kept = best_that_reach(shares, share)
    ordered = sorted(shares.tolist(), reverse=True)
    fewest = next((n for n in range(1, len(ordered) + 1) if sum(ordered[:n]) >= share - 1e-12), len(ordered))
    assert abs(int(kept.sum()) - fewest) <= (abs(sum(ordered[:fewest]) - share) < 1e-9)
    assert shares[kept].min() >= shares[~kept].max() if not kept.all() else True


@settings(max_examples=10, deadline=None)
@given(st.integers(40, 200), st.integers(0, 1000))
def test_exact_keeps_by_mean_mass(length, seed):
    query, key, grid, queries, keys = problem(length, seed)
    kept = SELECTIONS["exact"].keep(query, key, grid)
    for head in range(2):
        weights = weights_of(queries[head], keys[head])
        for I, rows in enumerate(weights.split(B)):
            for J, block in enumerate(rows.split(B, 1)):
                mass = block.sum().item() / len(rows)
                if abs(mass - 0.01) > 1e-5:
                    assert kept[0, head, I, J] == (mass >= 0.01 or (J <= I and J in (0, I)))


@settings(max_examples=10, deadline=None)
@given(st.integers(40, 300), st.integers(0, 1000))
def test_xattention_counts_what_it_always_keeps(length, seed):
    query, key, grid, *_ = problem(length, seed)
    kept = SELECTIONS["xattention"].keep(query, key, grid)
    shares = selections._shares_of(SELECTIONS["xattention"].scores(query, key, grid))
    for head, I in product(range(2), range(grid.rows)):
        row = shares[0, head, I].tolist()
        right, held = {0, I}, sum({J: row[J] for J in (0, I)}.values())
        for J in sorted(set(range(I)) - right, key=row.__getitem__, reverse=True):
            if held >= 0.9:
                break
            right.add(J)
            held += row[J]
        if abs(held - 0.9) > 1e-5:
            assert set(kept[0, head, I].nonzero().flatten().tolist()) == right


@settings(max_examples=10, deadline=None)
@given(st.integers(40, 300), st.integers(0, 1000))
def test_prism_scores_two_bands_of_pooled_pairs(length, seed):
    query, key, grid, queries, keys = problem(length, seed)
    found = selections.prism_bands(query, key, grid)
    fast, slow = [*range(8), *range(16, 24)], [*range(4, 16), *range(20, 32)]
    for head in range(2):
        q, k = means(queries[head]), means(keys[head])

        def rms(x):
            return x.square().mean().sqrt()

        for band, dims in zip(found, (fast, slow), strict=True):
            temperature = math.sqrt(len(dims) / 32) * rms(q[:, dims]) / rms(q) * rms(k[:, dims]) / rms(k)
            logits = q[:, dims] @ k[:, dims].T / (math.sqrt(len(dims)) * temperature)
            hidden = torch.ones_like(logits).triu(1).bool()
            right = logits.masked_fill(hidden, -math.inf).softmax(-1)
            torch.testing.assert_close(band[0, head].double(), right, rtol=1e-4, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.integers(120, 260), st.integers(0, 1000))
def test_minference_keeps_the_blocks_that_its_lines_meet(length, seed):
    query, key, grid, queries, keys = problem(length, seed)
    count = 12
    with pytest.MonkeyPatch.context() as patch:
        for name, number in (("VERTICALS", count), ("SLASHES", count), ("FIRST_VERTICALS", 2), ("FIRST_SLASHES", 3)):
            patch.setattr(selections, name, number)
        kept = SELECTIONS["minference"].keep(query, key, grid)[0]
    for head in range(2):
        rows = weights_of(queries[head], keys[head])[-64:]
        columns = {j: rows[:, j].sum().item() for j in range(length)}
        distances = {
            d: sum(rows[r, length - 64 + r - d].item() for r in range(64) if length - 64 + r >= d)
            for d in range(length)
        }
        columns |= dict.fromkeys(range(2), math.inf)
        distances |= dict.fromkeys(range(3), math.inf)
        best = [sorted(mass, key=mass.__getitem__, reverse=True)[:count] for mass in (columns, distances)]
        right = torch.zeros(grid.rows, grid.rows, dtype=torch.bool)
        for i in range(length):
            for j in range(i + 1):
                if j in best[0] or i - j in best[1]:
                    right[i // B, j // B] = True
        right[:, 0] = True
        right |= torch.eye(grid.rows, dtype=torch.bool)
        # a line that touches the corner of a short last block alone is kept whole
        short = length % B != 0
        assert torch.equal(kept[head][: -1 if short else None], right[: -1 if short else None])
        assert (kept[head] >= right).all()


def test_flexprefill_asks_the_last_block_which_pattern_a_head_has():
    length = 512
    query, key, grid, *_ = problem(length, 0)
    # keys are alike within a block, and so their means say all to the first head; the second looks for single keys
    key[0, 0] = torch.randn(length // B, 32).repeat_interleave(B, 0)
    query[0, 0] = key[0, 0] * 2
    query[0, 1] = torch.randn(length, 32) * 8
    columns, distances = (selections._block_sums(m, grid) for m in selections._last_rows_mass(query, key, grid, B))
    aware = selections._is_query_aware(columns, selections._pooled_shares(query, key, grid)[:, :, -1])
    assert aware.tolist() == [[True, False]]
    scores = SELECTIONS["byte-flexprefill"].scores(query, key, grid)
    assert torch.equal(scores[0, 1], selections._on_lines(columns, distances, grid)[0, 1])
    torch.testing.assert_close(scores[0, 0].sum(-1), torch.ones(grid.rows))
    kept = SELECTIONS["byte-flexprefill"].keep(query, key, grid)
    # beside the lines, the second keeps nothing that is not on one
    lines = kept[0, 1]
    columns, diagonals = lines[-1], torch.stack([lines.diagonal(-apart).all() for apart in range(grid.rows)])
    block = torch.arange(grid.rows)
    on_one = columns | diagonals[(block[:, None] - block).clamp(min=0)]
    assert not (lines & ~on_one).any()


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(sorted(SELECTIONS)), st.integers(33, 300), st.integers(0, 1000))
def test_own_rules_keep_causal_blocks_and_each_row_its_own(name, length, seed):
    query, key, *_ = problem(length, seed)
    kept = Method(name, PrefillConfig(block_size=B), name, own_rule=True).choose(query, key).to_dense()
    assert kept.diagonal(dim1=-2, dim2=-1).all() and kept[..., 0].all() and not kept.triu(1).any()


def test_a_selection_that_does_not_know_the_attention_is_refused():
    query, key, *_ = problem(100, 0)
    for method in make_methods([0.5], ["prism", "xattention-own"], PrefillConfig(block_size=B)):
        with pytest.raises(UnsupportedError, match=f"methods must be without {method.name} for this model"):
            method.choose(query, key, None, AttentionVariant(soft_cap=5.0))
