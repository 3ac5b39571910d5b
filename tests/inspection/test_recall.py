"""The attention mass that a map keeps, against float64 over all rows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import make_qkv, random_map
from support.oracle import attention_weights

from flexprefill import (
    AttentionVariant,
    BlockMap,
    PrefillConfig,
    Recall,
    Sequences,
    attention_recall,
    mass_by_distance,
    search_blocks,
)
from flexprefill.evaluation import TASKS, babble, load_model
from flexprefill.evaluation.model import causal_sdpa
from flexprefill.inspection.recall import join_recalls

MODEL = Path(__file__).parents[2] / "examples" / "needle_model" / "model.safetensors"
SPARSE = PrefillConfig(block_size=16, alpha=0.8, sink_blocks=0, window_blocks=1, last_full_blocks=0)


def by_definition(query, key, block_map, **attention):
    """Of every row: what it loses, float64 [B, Hq, S_q], and whether it sees a key in a dropped block."""
    weights, size = attention_weights(query, key, **attention), block_map.block_size
    blocks = block_map.to_dense().repeat_interleave(size, 2).repeat_interleave(size, 3)
    dropped = ~blocks[:, :, : block_map.q_len, : block_map.kv_len]
    return (weights * dropped).sum(-1), ((weights > 0) & dropped).any(-1)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_all_rows_that_can_lose_are_measured_exactly_and_no_others(data):
    kv_len = data.draw(st.integers(1, 150))
    q_len = data.draw(st.integers(1, kv_len))
    batch, share = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    seed, window = data.draw(st.integers(0, 9)), data.draw(st.sampled_from([None, 1, 20, 60]))
    soft_cap = data.draw(st.sampled_from([None, 2.0]))
    slopes = data.draw(st.sampled_from([None, torch.tensor([0.0, 0.1, 0.01, 0.2])]))
    query, key, _ = make_qkv(q_len, kv_len, batch=batch, heads=4, kv_heads=2, head_dim=16, seed=seed)
    block_map, _ = random_map(q_len, kv_len, 16, batch=batch, heads=4, share=share, seed=seed)
    sequences, starts = None, None
    if data.draw(st.booleans()):
        ends = [data.draw(st.integers(1, kv_len)) for _ in range(batch)]
        sequences = Sequences.from_lengths(torch.tensor(ends), kv_len)
        starts = [[0] * end + [kv_len] * (kv_len - end) for end in ends]
    variant = AttentionVariant(sequences, window, soft_cap, slopes)
    lost, can_lose = by_definition(
        query, key, block_map, scale=0.2, window=window, starts=starts, soft_cap=soft_cap, slopes=slopes
    )

    steps = []
    recall = attention_recall(query, key, block_map, variant=variant, scale=0.2, rows=None, progress=steps.append)

    assert torch.equal(recall.can_lose, can_lose.sum(-1)) and sum(steps) == 4 * batch
    for b in range(batch):
        for head in range(4):
            rows = can_lose[b, head].nonzero()[:, 0]
            measured = recall.rows[b, head] >= 0
            assert recall.rows[b, head][measured].tolist() == rows.tolist()
            shares = 1 - lost[b, head][rows]
            torch.testing.assert_close(recall.shares[b, head][measured].double(), shares, rtol=1e-5, atol=2e-6)
            expected = shares.mean().item() if len(rows) else 1.0
            assert recall.mean[b, head].item() == pytest.approx(expected, abs=2e-6)
            assert recall.least[b, head].item() == pytest.approx(shares.min().item() if len(rows) else 1.0, abs=2e-6)
            assert (recall.least_row[b, head] in rows) if len(rows) else recall.least_row[b, head] == -1
            if len(rows):
                median = torch.quantile(shares, 0.5).item()
                assert recall.quantile(0.5)[b, head].item() == pytest.approx(median, abs=2e-6)
    # all rows together lose what those that can lose do
    every = attention_recall(query, key, block_map, variant=variant, scale=0.2, rows=range(q_len))
    torch.testing.assert_close(every.shares.double(), 1 - lost, rtol=1e-5, atol=2e-6)
    assert every.shares[~can_lose].eq(1).all()


def test_sampled_rows_are_spread_over_those_that_can_lose_and_drawn_by_the_seed():
    query, key, _ = make_qkv(2000, heads=2)
    block_map, _ = random_map(2000, 2000, 16, share=0.5)
    everything = BlockMap.causal(1, 2, q_len=2000, kv_len=2000, block_size=16)
    words = block_map.words.clone()
    words[:, :, 60:] = everything.words[:, :, 60:]  # rows from 960 on can lose nothing
    block_map = replace(block_map, words=words)
    recall = attention_recall(query, key, block_map, rows=32)
    losing = attention_recall(query, key, block_map, rows=None)
    for head in range(2):
        candidates = losing.rows[0, head].tolist()
        candidates = [row for row in candidates if row >= 0]
        places = [candidates.index(row) for row in recall.rows[0, head].tolist()]
        stretch = len(candidates) / 32
        assert [int(place / stretch + 1e-9) for place in places] == list(range(32))
    same, other = (attention_recall(query, key, block_map, rows=32, seed=seed) for seed in (0, 1))
    assert torch.equal(same.rows, recall.rows) and torch.equal(same.shares, recall.shares)
    assert not torch.equal(other.rows, recall.rows)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    attention_recall(query, key, block_map)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sample_is_close_to_all_rows():
    query, key, _ = make_qkv(1500, heads=4, kv_heads=2)
    block_map = search_blocks(query, key, replace(SPARSE, sink_blocks=1, alpha=0.9))
    sampled, every = (attention_recall(query, key, block_map, rows=rows) for rows in (200, None))
    error = every.shares.nan_to_num(0).std(-1) / 200**0.5
    assert ((sampled.mean - every.mean).abs() <= 4 * error).all()
    assert sampled.overall == pytest.approx(sampled.mean.mean().item(), abs=1e-6)


def test_a_head_that_keeps_everything_has_nothing_to_lose_and_does_not_raise_the_figure():
    query, key, _ = make_qkv(300)
    dense = torch.ones(1, 2, 19, 19, dtype=torch.bool)
    dense[0, 1, 10:, 2] = False
    block_map = BlockMap.from_dense(dense, q_len=300, kv_len=300, block_size=16)
    recall = attention_recall(query, key, block_map)
    assert recall.can_lose.tolist() == [[0, 140]] and recall.rows[0, 1].tolist() == list(range(160, 300))
    assert recall.mean[0, 0] == recall.least[0, 0] == recall.quantile(0)[0, 0] == 1 > recall.mean[0, 1]
    assert recall.overall == pytest.approx(recall.mean[0, 1].item())
    assert "1 of 2 heads drop nothing that a query sees" in str(recall)
    whole, losing = recall.to_dicts()
    assert whole["least_row"] is None and whole["measured_rows"] == whole["rows_that_can_lose"] == 0
    assert losing == {
        "batch": 0,
        "head": 1,
        "recall": recall.mean[0, 1].item(),
        "recall_p05": recall.quantile(0.05)[0, 1].item(),
        "recall_median": recall.quantile(0.5)[0, 1].item(),
        "recall_least": recall.least[0, 1].item(),
        "least_row": recall.least_row[0, 1].item(),
        "measured_rows": 140,
        "rows_that_can_lose": 140,
    }
    everything = BlockMap.causal(1, 2, q_len=300, kv_len=300, block_size=16)
    recall = attention_recall(query, key, everything)
    assert recall.overall == 1 and recall.mean.eq(1).all() and not recall.mean.isnan().any()
    assert str(recall).splitlines()[1:] == ["2 of 2 heads drop nothing that a query sees"]


def test_a_map_that_keeps_nothing_holds_nothing():
    query, key, _ = make_qkv(200)
    block_map = BlockMap.from_dense(torch.zeros(1, 2, 2, 2).bool(), q_len=200, kv_len=200, block_size=128)
    recall = attention_recall(query, key, block_map)
    assert recall.overall == pytest.approx(0, abs=1e-6) and recall.can_lose.tolist() == [[200, 200]]


def test_what_is_printed_lists_the_heads_that_lose_most_and_where():
    shares = torch.tensor([[[0.9, 0.5, 0.7]] * 11 + [[0.25, 1.0, torch.nan]]])
    rows = torch.tensor([[[3, 40, 900]] * 11 + [[7, 8000, -1]]])
    recall = Recall(shares, rows, torch.tensor([[3000] * 11 + [2]]))
    lines = str(recall).splitlines()
    assert lines[2].split() == ["11", "0.625", "0.287", "0.625", "0.250", "7", "2/2", "rows"]
    assert lines[3].split() == ["0", "0.700", "0.520", "0.700", "0.500", "40", "3/3,000", "rows"]
    two = Recall(shares.expand(2, -1, -1), rows.expand(2, -1, -1), recall.can_lose.expand(2, -1))
    assert [line.strip().split("  ")[0] for line in str(two).splitlines()[1:4]] == ["batch, head", "0, 11", "1, 11"]
    assert lines[-1] == "… and 2 heads that lose less" and len(lines) == 13
    assert recall.least_rows(2)[0][0, [0, 11]].tolist() == torch.tensor([[0.5, 0.7], [0.25, 1.0]]).tolist()
    assert recall.least_rows(4)[1][0, [0, 11]].tolist() == [[40, 900, 3, -1], [7, 8000, -1, -1]]
    assert recall.least_rows(4)[0][0, 11].tolist() == [0.25, 1, 1, 1]
    assert repr(recall) == "Recall(overall=0.694, least_head=0.625, B=1, H=12, rows=3)"
    for wrong, error in ((True, TypeError), ("0.5", TypeError), (-0.1, ValueError), (1.1, ValueError)):
        with pytest.raises(error, match="^q must be"):
            recall.quantile(wrong)
    for wrong, error in ((0.5, TypeError), (0, ValueError)):
        with pytest.raises(error, match="^count must be"):
            recall.least_rows(wrong)


def test_a_broken_row_is_not_hidden():
    query, key, _ = make_qkv(300)
    query[0, 0, 250] = torch.nan
    block_map, _ = random_map(300, 300, 16, share=0.5)
    recall = attention_recall(query, key, block_map, rows=None)
    assert recall.mean[0, 0].isnan() and not recall.mean[0, 1].isnan()


def test_rows_are_those_of_queries_or_a_number():
    query, key, _ = make_qkv(200)
    block_map = search_blocks(query, key)
    with pytest.raises(ValueError, match="rows must be at least one of the queries 0 … 199"):
        attention_recall(query, key, block_map, rows=[200])
    with pytest.raises(ValueError, match="rows must be at least 1 row to sample, got 0"):
        attention_recall(query, key, block_map, rows=0)
    for rows in (torch.tensor([5, 7, 5]), [5, 7, 5], iter([5, 7, 5])):
        assert attention_recall(query, key, block_map, rows=rows).rows.tolist() == [[[5, 7, 5]] * 2]


def test_a_map_that_does_not_fit_is_refused():
    query, key, _ = make_qkv(200)
    other = search_blocks(*make_qkv(201)[:2])
    with pytest.raises(ValueError, match="block_map must be of q_len=200 and kv_len=200, got q_len=201"):
        attention_recall(query, key, other)
    with pytest.raises(TypeError, match="block_map must be a BlockMap, got NoneType"):
        attention_recall(query, key, None)


@pytest.fixture(scope="module")
def needle_heads():
    """Queries and keys of every layer of the shipped model."""
    model, found = load_model(MODEL), []
    samples = TASKS["single"](torch.Generator().manual_seed(0), babble(100_000), 1, 2048)

    def attend(query, key, value):
        found.append((query, key))
        return causal_sdpa(query, key, value)

    with torch.inference_mode():
        model(samples.tokens, attend)
    return found


@pytest.mark.parametrize("layer", [0, 3])
def test_the_shipped_models_default_figure_does_not_flatter(needle_heads, layer):
    query, key = needle_heads[layer]
    block_map = search_blocks(query, key, PrefillConfig(alpha=0.5))
    truth = {}  # of all rows that can lose, by head
    for head in range(query.shape[1]):
        of_head = replace(block_map, words=block_map.words[:, head : head + 1])
        pair = query[:, head : head + 1], key[:, head // 4 : head // 4 + 1]
        lost, can_lose = by_definition(*pair, of_head)
        if can_lose.any():
            truth[head] = (1 - lost[can_lose]).mean().item()
    mean = sum(truth.values()) / len(truth)
    recall = attention_recall(query, key, block_map)
    assert [recall.mean[0, head].item() for head in truth] == pytest.approx(list(truth.values()), abs=0.015)
    assert recall.overall == pytest.approx(mean, abs=0.005)
    # rows of a fixed step, most of which keep all that they see
    stepped = attention_recall(query, key, block_map, rows=range(0, 2048, 500))
    assert stepped.mean.mean().item() > mean + 0.05


@pytest.mark.gpu
def test_figures_of_the_device_are_those_of_the_cpu():
    query, key, _ = make_qkv(3000, heads=4, kv_heads=2)
    block_map = search_blocks(query, key, replace(SPARSE, alpha=0.9))
    variant = AttentionVariant(sliding_window=1000)
    there = query.cuda(), key.cuda()
    torch.use_deterministic_algorithms(True)
    try:
        recall = attention_recall(*there, block_map.to("cuda"), variant=variant)
        distance = mass_by_distance(*there, variant=variant)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = attention_recall(query, key, block_map, variant=variant)
    assert torch.equal(recall.rows, expected.rows) and torch.equal(recall.can_lose, expected.can_lose)
    torch.testing.assert_close(recall.shares, expected.shares, atol=1e-3, rtol=0, equal_nan=True)
    torch.testing.assert_close(distance.mass, mass_by_distance(query, key, variant=variant).mass, atol=1e-3, rtol=0)


def test_chunks_are_joined_so_that_each_row_weighs_the_same():
    def recall(measured, total, share):
        rows = torch.arange(measured) * (total // measured)
        return Recall(torch.full((1, 1, measured), share), rows[None, None], torch.tensor([[total]]))

    joined = join_recalls(recall(256, 512, 1.0), recall(256, 2048, 0.5), 1000)
    assert joined.rows[0, 0].tolist() == [*range(4, 512, 8), *range(1000, 3048, 8)]
    assert joined.mean.item() == pytest.approx((512 * 1.0 + 2048 * 0.5) / 2560) and joined.can_lose.item() == 2560
    nothing = Recall(torch.empty(1, 1, 0), torch.empty(1, 1, 0, dtype=torch.int64), torch.tensor([[0]]))
    assert join_recalls(nothing, recall(3, 3, 0.5), 8).rows.tolist() == [[[8, 9, 10]]]
    assert join_recalls(nothing, nothing, 8).mean.item() == 1
    # many short chunks weigh neither double nor nothing
    many = recall(256, 2048, 0.0)
    for chunk in range(512):
        many = join_recalls(many, recall(4, 4, 1.0), 2048 + 4 * chunk)
    assert many.can_lose.item() == 4096 and many.mean.item() == pytest.approx(0.5, abs=0.1)


def test_a_row_that_is_not_finite_is_no_row_that_lost_nothing():
    shares = torch.tensor([[[torch.nan, torch.nan, torch.nan], [0.5, torch.nan, 0.25]]])
    rows = torch.tensor([[[7, -1, -1], [1, 2, 3]]])
    recall = Recall(shares, rows, torch.tensor([[1, 3]]))
    assert recall.least_row.tolist() == [[7, 3]] and recall.least[0, 0].isnan() and recall.least[0, 1] == 0.25
    assert recall.least_rows(3)[1].tolist() == [[[7, -1, -1], [3, 1, 2]]]
    assert str(recall).splitlines()[2].split()[0] == "0"  # the worst first
