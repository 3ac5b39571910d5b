import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import DEVICE, make_qkv

from flexprefill import (
    KeyMeans,
    MaskCache,
    PrefillConfig,
    Scorer,
    attention_recall,
    load_masks,
    prefill_attention,
    read_mask_info,
    register_scorer,
    save_masks,
    search_blocks,
)
from flexprefill.blockmap.geometry import Geometry
from flexprefill.cli import main
from flexprefill.inspection import summarize_heads
from flexprefill.runtime.state import forget
from flexprefill.search import reference, scorers
from flexprefill.search.grid import Grid
from flexprefill.search.scorers import antidiagonal_scores, exact_scores, find_scorer

LEAN = PrefillConfig(block_size=16, alpha=0.3, sink_blocks=0, window_blocks=1, last_full_blocks=0)


@st.composite
def cases(draw):
    kv_len = draw(st.integers(1, 150))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 3)]))
    tensors = make_qkv(
        draw(st.one_of(st.just(kv_len), st.integers(1, kv_len))),
        kv_len,
        batch=draw(st.sampled_from([1, 2])),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=16,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 2**31)),
    )
    block_size = draw(st.sampled_from([16, 32]))
    return tensors[:2], Grid(
        Geometry(tensors[0].shape[2], kv_len, block_size), draw(st.sampled_from([0.25, 1.0])), True
    )


def shares_by_loops(logits, query_positions, key_positions, per_block, grid):
    """log2 of each block's softmax shares, for logits [P, R] in float64."""
    visible = key_positions <= query_positions[:, None]
    weights = np.where(visible, np.exp(logits - np.where(visible, logits, -np.inf).max(1, keepdims=True)), 0)
    shares = weights / weights.sum(1, keepdims=True)
    L = np.full((grid.rows, grid.columns), -np.inf)
    for i, j in np.ndindex(*L.shape):
        rows = slice(i * per_block, (i + 1) * per_block)
        keys = slice(j * per_block, (j + 1) * per_block)
        if visible[rows, keys].any():
            L[i, j] = np.log2(shares[rows, keys].sum())
    return L


def assert_close(found, expected):
    expected = torch.from_numpy(expected)
    assert torch.equal(found.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    assert not finite.any() or (found[finite] - expected[finite]).abs().max() <= 1e-3


@settings(deadline=None, max_examples=40)
@given(cases())
def test_exact_scores_are_the_attention_mass_of_each_block(case):
    (query, key), grid = case
    found = exact_scores(query, key, grid)
    group = query.shape[1] // key.shape[1]
    for n, h in np.ndindex(*query.shape[:2]):
        logits = (query[n, h].double() @ key[n, h // group].double().T * grid.scale).numpy()
        positions = np.arange(grid.q_len) + grid.offset, np.arange(grid.kv_len)
        assert_close(found[n, h], shares_by_loops(logits, *positions, grid.block_size, grid))


@settings(deadline=None, max_examples=40)
@given(cases(), st.sampled_from([4, 8, 16]))
def test_antidiagonal_scores_follow_the_paper(case, stride):
    (query, key), grid = case
    found = antidiagonal_scores(query, key, grid, stride)
    group = query.shape[1] // key.shape[1]
    last_q = np.minimum(np.arange(0, grid.q_len, stride) + stride, grid.q_len) - 1 + grid.offset
    start_k = np.arange(0, grid.kv_len, stride)
    for n, h in np.ndindex(*query.shape[:2]):
        products = (query[n, h].double() @ key[n, h // group].double().T).numpy()
        logits = np.zeros((len(last_q), len(start_k)))
        for t, u, i in np.ndindex(len(last_q), len(start_k), stride):
            row, column = t * stride + stride - 1 - i, u * stride + i
            if row < grid.q_len and column < grid.kv_len:
                logits[t, u] += products[row, column] * grid.scale / stride
        assert_close(found[n, h], shares_by_loops(logits, last_q, start_k, grid.block_size // stride, grid))


def test_pieces_change_nothing(monkeypatch):
    query, key, _ = make_qkv(200, heads=2, device=DEVICE)
    grid = Grid(Geometry(200, 200, 16), 0.125, True)
    whole = exact_scores(query, key, grid), antidiagonal_scores(query, key, grid)
    monkeypatch.setattr(scorers, "PIECE", 5000)
    for before, after in zip(
        whole, (exact_scores(query, key, grid), antidiagonal_scores(query, key, grid)), strict=True
    ):
        assert torch.equal(before.isfinite(), after.isfinite())
        assert torch.allclose(before[before.isfinite()], after[after.isfinite()], atol=1e-4)


def test_shares_that_underflow_are_still_compared():
    query, key = torch.zeros(1, 1, 64, 16), torch.zeros(1, 1, 64, 16)
    query[..., 0], key[..., 0] = 1.0, torch.tensor([0.0, -200.0, -400.0, -200.0]).repeat_interleave(16)
    for scorer in ("exact", "xattention"):
        kept = search_blocks(query, key, dataclasses.replace(LEAN, scorer=scorer), scale=1.0).to_dense()[0, 0]
        assert torch.equal(kept, torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]).bool())


@settings(deadline=None, max_examples=40)
@given(cases(), st.sampled_from(["flashprefill", "xattention", "exact"]), st.data())
def test_the_rule_does_not_depend_on_the_scorer(case, scorer, data):
    (query, key), grid = case
    kv_masks, min_blocks = data.draw(st.booleans()), data.draw(st.sampled_from([0, 2]))
    score_rows = data.draw(st.sampled_from(["whole", "visible"]))
    grid = dataclasses.replace(grid, first_key=score_rows == "visible" or scorer != "flashprefill")
    config = dataclasses.replace(
        LEAN,
        block_size=grid.block_size,
        scorer=scorer,
        min_blocks=min_blocks,
        mask_heads="kv" if kv_masks else "query",
        score_rows=score_rows,
        sink_blocks=1,
    )
    block_map = search_blocks(query, key, config, scale=grid.scale, implementation="reference")
    L = find_scorer(scorer).log_scores(query, find_scorer(scorer).pool(key, grid.block_size), grid).double()
    group = query.shape[1] // key.shape[1]
    if kv_masks:
        L = torch.log2(torch.exp2(L).unflatten(1, (-1, group)).sum(2)).repeat_interleave(group, 1)
    best = L.amax(-1, keepdim=True)
    margins = L - best - np.log2(config.alpha)
    if min_blocks:
        margins = torch.maximum(margins, L - L.sort(-1, descending=True).values[..., :min_blocks].amin(-1, True))
    own = (torch.arange(grid.rows) + 1).clamp(max=grid.rows) * grid.block_size
    last = (own.clamp(max=grid.q_len) + grid.offset - 1) // grid.block_size
    J = torch.arange(grid.columns)
    always = (J == 0) | (J == last[:, None])
    wanted = (J <= last[:, None]) & (always | (grid.scored("cpu") & (margins >= 0)))
    wrong = (block_map.to_dense() != wanted) & (margins.abs() > 1e-3)
    assert not wrong.any()


def test_scorers_are_compared_on_one_engine():
    query, key, _ = make_qkv(1500, heads=4, kv_heads=2)
    recalls = {}
    for scorer in ("flashprefill", "xattention", "exact"):
        config = dataclasses.replace(LEAN, scorer=scorer, block_size=64, alpha=1.0, min_blocks=6, score_rows="visible")
        block_map = search_blocks(query, key, config)
        recalls[scorer] = attention_recall(query, key, block_map, rows=None).overall
        assert block_map.counts().max() <= 8
    # at the same number of blocks nothing keeps more mass than the mass itself
    assert recalls["exact"] == max(recalls.values()) > min(recalls.values()) > 0.3


def test_what_a_scorer_finds_goes_the_way_of_every_map(tmp_path, capsys):
    query, key, _ = make_qkv(300, heads=2)
    config = dataclasses.replace(LEAN, scorer="xattention", block_size=64, mask_heads="kv", score_rows="visible")
    block_map = search_blocks(query, key, config)
    assert torch.equal(block_map.words[:, 0], block_map.words[:, 1])  # one mask, for each of its query heads
    save_masks(tmp_path / "masks", {0: block_map}, config=config)
    assert load_masks(tmp_path / "masks", config=config)[0] == block_map
    info = read_mask_info(tmp_path / "masks")
    assert info.config == config and info.scoring == "xattention"
    assert main(["inspect", str(tmp_path / "masks")]) == 0
    assert "min blocks 0, mask heads kv, score rows visible, scorer xattention\n" in capsys.readouterr().out
    assert summarize_heads(block_map, config=config)[0].density == block_map.density()[0, 0]
    prompt = MaskCache().prompt(list(range(300)))
    others = [
        prompt.search_blocks(0, query, key, other) for other in (config, dataclasses.replace(config, scorer="exact"))
    ]
    assert others[0] == block_map and others[1] != block_map  # not taken for each other
    assert prompt.cache.stats().misses == 2


def test_a_prompt_that_grows_is_extended_by_every_scorer():
    query, key, _ = make_qkv(400, heads=2)
    for scorer in ("xattention", "exact"):
        config = dataclasses.replace(LEAN, scorer=scorer)
        cache = MaskCache()
        cache.prompt(list(range(400))).search_blocks(0, query[:, :, :200], key[:, :, :200], config)
        grown = cache.prompt(list(range(400))).search_blocks(0, query, key, config)
        assert grown == search_blocks(query, key, config) and cache.stats().extensions == 1


@pytest.fixture
def own_scorer():
    def largest_product(query, pooled, grid):
        group = query.shape[1] // pooled.shape[1]
        s = grid.scale * query @ pooled.repeat_interleave(group, 1).mT  # [B, Hq, S_q, N]
        s = torch.nn.functional.pad(s, (0, 0, 0, -grid.q_len % grid.block_size)).unflatten(2, (grid.rows, -1))
        return s.masked_fill(~grid.scoring_rows(query.device), -torch.inf).amax(3)

    register_scorer("largest", Scorer(reference.pool_keys, largest_product, "this test"))
    yield "largest"
    forget("registered scorers")


def test_a_callers_own_scorer(own_scorer):
    query, key, _ = make_qkv(300, heads=2)
    block_map = search_blocks(query, key, dataclasses.replace(LEAN, scorer=own_scorer))
    assert block_map != search_blocks(query, key, LEAN) and 0 < block_map.density().mean() < 1
    with pytest.raises(ValueError, match="name 'largest' is taken.*'exact'"):
        register_scorer(own_scorer, find_scorer("exact"))
    with pytest.raises(TypeError, match="scorer must be a Scorer, got function"):
        register_scorer("other", lambda query, key, grid: None)
    with pytest.raises(ValueError, match="scorer.score_rows must be None or one of.*'visible'.*got 'all'"):
        register_scorer("other", dataclasses.replace(find_scorer("exact"), score_rows="all"))
    with pytest.raises(TypeError, match="name must be a string.*got 3"):
        register_scorer(3, find_scorer("exact"))


@pytest.mark.parametrize(
    "changes", [{"scorer": "exact"}, {"mask_heads": "kv", "score_rows": "visible"}, {"scorer": "xattention"}]
)
def test_every_setting_traces_into_one_graph(changes):
    config = dataclasses.replace(LEAN, **changes)
    compiled = torch.compile(lambda query, key: search_blocks(query, key, config), fullgraph=True, backend="eager")
    query, key, _ = make_qkv(300, heads=4, kv_heads=2, device=DEVICE)
    assert compiled(query, key) == search_blocks(query, key, config)


def test_every_scorer_is_cited():
    for scorer in scorers.SCORERS.values():
        assert scorer.source and scorer.log_scores.__doc__


@pytest.mark.parametrize("call", [search_blocks, lambda query, key, config: prefill_attention(query, key, key, config)])
def test_an_unknown_scorer_is_refused_with_those_that_there_are(call):
    config = PrefillConfig.from_dict({"scorer": "xatention", "dense_below": 1000})  # as a file may have it
    with pytest.raises(ValueError, match="config.scorer must be one of.*'xattention', 'exact'.*got 'xatention'"):
        call(*make_qkv(64)[:2], config)


def test_kernels_are_for_the_default_scorer_alone():
    query, key, _ = make_qkv(64, device=DEVICE)
    config = PrefillConfig(scorer="exact")
    with pytest.raises(ValueError, match="implementation 'triton' has no kernel for the scorer 'exact'.*'reference'"):
        search_blocks(query, key, config, implementation="triton")
    assert search_blocks(query, key, config) == search_blocks(query, key, config, implementation="reference")
    with pytest.raises(ValueError, match="means is of the scorer 'flashprefill'.*'exact'"):
        search_blocks(query, key, config, means=KeyMeans())


def test_xattention_needs_blocks_of_whole_strides():
    query, key, _ = make_qkv(64)
    with pytest.raises(ValueError, match="block_size that is a multiple of 12, got 16"):
        antidiagonal_scores(query, key, Grid(Geometry(64, 64, 16), 0.1, True), 12)
