"""The guard: its sampled recall, its decision, and where it is asked for."""

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.device_calls import waits_are_errors
from support.inputs import DEVICE, make_qkv

from flexprefill import (
    AttentionVariant,
    BlockMap,
    MaskCache,
    PrefillConfig,
    attention_recall,
    guard_blocks,
    prefill_attention,
    record_masks,
    search_blocks,
)
from flexprefill.search import guard
from flexprefill.search.guard import MARGIN, SAMPLED_ROWS, guard_checked, sampled_rows

LEAN = PrefillConfig(alpha=0.9, block_size=16, sink_blocks=1, window_blocks=1, last_full_blocks=1, dense_below=0)


def shares_of(query, key, block_map, rows, scale, samples=SAMPLED_ROWS):
    """The kept share of the exact mass of the sampled rows, in float64: [B, Hq, samples]."""
    q_len, kv_len, size = query.shape[2], key.shape[2], block_map.block_size
    keys = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = scale * query.double() @ keys.mT
    position = torch.arange(kv_len - q_len, kv_len, device=query.device)[:, None]
    weights = logits.masked_fill(torch.arange(kv_len, device=query.device) > position, -torch.inf).softmax(-1)
    kept = block_map.to_dense().repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :q_len, :kv_len]
    return (weights * kept).sum(-1)[:, :, sampled_rows(rows, samples).to(query.device)]


@st.composite
def cases(draw):
    kv_len = draw(st.integers(1, 150))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]))
    query, key, _ = make_qkv(
        draw(st.one_of(st.just(kv_len), st.integers(1, kv_len))),
        kv_len,
        batch=draw(st.sampled_from([1, 2])),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([16, 24])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        device=DEVICE,
        seed=draw(st.integers(0, 2**31)),
    )
    config = replace(
        LEAN,
        block_size=draw(st.sampled_from([16, 32])),
        last_full_blocks=draw(st.integers(0, 2)),
        mask_heads=draw(st.sampled_from(["query", "kv"])),
        guard=draw(st.floats(0.05, 0.99)),
    )
    return query * draw(st.sampled_from([0.5, 3.0])), key, config, draw(st.booleans())


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_heads_whose_sampled_mass_is_too_little_keep_everything(implementation):
    @settings(deadline=None, max_examples=60 if implementation == "reference" else 12)
    @given(cases())
    def check(case):
        query, key, config, last_chunk = case
        found = search_blocks(query, key, replace(config, guard=None), last_chunk=last_chunk)
        guarded, report = guard_checked(query, key, found, config, 0.3, last_chunk, implementation)
        full = config.last_full_blocks if last_chunk else 0
        rows = min(query.shape[2], max(found.shape[2] - full, 1) * config.block_size)
        shares = shares_of(query, key, found, rows, 0.3)
        torch.testing.assert_close(report.recall.double(), shares.mean(-1), rtol=0, atol=1e-4)
        torch.testing.assert_close(report.lowest.double(), shares.amin(-1), rtol=0, atol=1e-4)
        least = shares.mean(-1) - MARGIN * (shares.var(-1, correction=0) / SAMPLED_ROWS).sqrt()
        wide, close = least < config.guard, (least - config.guard).abs() < 1e-3
        if config.mask_heads == "kv":
            group = query.shape[1] // key.shape[1]
            together = (part.unflatten(1, (-1, group)).any(2).repeat_interleave(group, 1) for part in (wide, close))
            wide, close = together
        assert ((report.widened == wide) | close).all()
        causal = BlockMap.causal(*query.shape[:2], **sizes_of(found), device=DEVICE)
        assert torch.equal(guarded.words, torch.where(report.widened[..., None, None], causal.words, found.words))

    check()


def sizes_of(block_map):
    return {"q_len": block_map.q_len, "kv_len": block_map.kv_len, "block_size": block_map.block_size}


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_fewer_rows_are_sampled_where_all_would_cost_too_much(implementation, monkeypatch):
    monkeypatch.setattr(guard, "FEWER", range(300, 301))
    query, key, _ = make_qkv(200, 300, heads=4, kv_heads=2, head_dim=16, device=DEVICE)
    config = replace(LEAN, guard=0.5)
    found = search_blocks(query, key, replace(config, guard=None))
    report = guard_checked(query, key, found, config, 0.25, True, implementation)[1]
    shares = shares_of(query, key, found, 192, 0.25, samples=guard.FEWER_SAMPLED_ROWS)
    torch.testing.assert_close(report.recall.double(), shares.mean(-1), rtol=0, atol=1e-4)


def two_heads(length=2000, dtype=torch.float32):
    """A head that attends to its neighbourhood, and one to single keys that the means of block 0 hide."""
    query, key, value = make_qkv(length, heads=2, kv_heads=2, head_dim=64, dtype=torch.float32, device=DEVICE)
    place = torch.arange(length, device=DEVICE)[:, None] / 400
    waves = 12 * torch.cat([torch.cos(place), torch.sin(place)], 1)
    for tensor in (query, key):
        tensor[:, 0] *= 0.1
        tensor[:, 0, :, :2] += waves
    generator = torch.Generator().manual_seed(0)
    asked = (torch.rand(length, generator=generator) * torch.arange(length)).long().to(DEVICE)
    key[:, 1] *= 8 / key[:, 1].norm(dim=-1, keepdim=True)
    query[:, 1] = 3 * key[:, 1, asked]
    query[:, 1, :, 0] += 9
    key[:, 1, :64, 0] += 9
    return query.to(dtype), key.to(dtype), value.to(dtype)


@pytest.mark.slow
def test_the_search_and_the_attention_guard_by_themselves():
    query, key, value = two_heads()
    config = replace(LEAN, block_size=64, alpha=0.05, guard=0.95)
    plain = search_blocks(query, key, replace(config, guard=None))
    every = range(query.shape[2])
    before = attention_recall(query, key, plain, rows=every).mean
    assert before[0, 0] > 0.97 and before[0, 1] < 0.9
    guarded = search_blocks(query, key, config)
    assert attention_recall(query, key, guarded, rows=every).mean.min() >= 0.95
    assert torch.equal(guarded.words[:, 0], plain.words[:, 0])
    assert guarded == guard_blocks(query, key, plain, config)[0]
    expected = prefill_attention(query, key, value, config, block_map=guarded)
    assert torch.equal(prefill_attention(query, key, value, config), expected)


def test_what_is_not_finite_is_not_trusted():
    query, key, _ = two_heads(500)
    query[0, 0, 100] = torch.nan
    config = replace(LEAN, block_size=64, guard=0.01)
    found = search_blocks(query, key, replace(config, guard=None))
    rows = min(500, (found.shape[2] - 1) * 64)
    query[0, 0, sampled_rows(rows)[7]] = torch.nan
    for implementation in ("reference", "triton"):
        report = guard_checked(query, key, found, config, 0.125, True, implementation)[1]
        assert report.widened.tolist() == [[True, False]] and report.recall[0, 0].isnan()


def test_recordings_hold_the_reports():
    class Layer(torch.nn.Module):
        def forward(self, query, key, value):
            return prefill_attention(query, key, value, config)

    config = replace(LEAN, block_size=64, alpha=0.05, guard=0.95)
    layer = Layer()
    with record_masks(layer) as masks:
        layer(*two_heads())
    assert list(masks.guards) == [0] and masks.guards[0].widened.tolist() == [[False, True]]
    assert "1 of 2 heads keep all blocks: recall below 0.95" in str(masks.guards[0])
    config = replace(config, guard=None)
    with record_masks(layer) as masks:
        layer(*two_heads())
    assert masks.guards == {}


def test_guard_is_checked():
    query, key, _ = make_qkv(100, heads=2, kv_heads=1, head_dim=16, device=DEVICE)
    for asked, error, message in (
        (1, ValueError, r"guard must be in \(0, 1\), got 1"),
        (float("nan"), ValueError, r"guard must be in \(0, 1\), got nan"),
        ("0.9", TypeError, r"guard must be a number in \(0, 1\) or None, got '0.9'"),
        (True, TypeError, r"guard must be a number in \(0, 1\) or None, got True"),
    ):
        with pytest.raises(error, match=message):
            PrefillConfig(guard=asked)
    config = replace(LEAN, guard=0.9)
    found = search_blocks(query, key, LEAN)
    with pytest.raises(ValueError, match="config.guard must be the recall to keep"):
        guard_blocks(query, key, found, LEAN)
    with pytest.raises(ValueError, match="implementation must be"):
        search_blocks(query, key, config, implementation="cuda")
    with pytest.raises(ValueError, match="config.guard cannot be combined with sliding_window, soft_cap"):
        search_blocks(query, key, config, variant=AttentionVariant(sliding_window=30, soft_cap=3.0))
    with pytest.raises(ValueError, match="config.guard must be None in a MaskCache"):
        MaskCache().prompt(torch.arange(100)).search_blocks(0, query, key, config)
    assert PrefillConfig.from_dict(config.to_dict()) == config and "guard" not in LEAN.to_dict()


def test_the_guard_is_a_part_of_one_graph_for_all_lengths():
    config = replace(LEAN, guard=0.9)
    compiled = torch.compile(
        functools.partial(search_blocks, config=config), fullgraph=True, backend="eager", dynamic=True
    )
    for length in (90, 200):
        query, key, _ = make_qkv(length, heads=2, kv_heads=1, head_dim=16, device=DEVICE)
        assert compiled(query, key) == search_blocks(query, key, config)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim, dtype", [(128, torch.bfloat16), (64, torch.float16), (192, torch.float32)])
@pytest.mark.parametrize("heads", [(8, 2), (14, 2), (4, 4)])
def test_the_kernel_equals_the_reference_at_length(head_dim, dtype, heads):
    query, key, _ = make_qkv(
        9000, heads=heads[0], kv_heads=heads[1], head_dim=head_dim, dtype=dtype, device="cuda", batch=2
    )
    for part in (query, query[:, :, 3000:]):
        config = PrefillConfig(alpha=0.9, guard=0.5)
        found = search_blocks(part * 4, key, replace(config, guard=None))
        (_, reference), (guarded, report) = (
            guard_checked(part * 4, key, found, config, head_dim**-0.5, True, name) for name in ("reference", "triton")
        )
        torch.testing.assert_close(report.recall, reference.recall, rtol=0, atol=2e-3)
        torch.testing.assert_close(report.lowest, reference.lowest, rtol=0, atol=5e-3)
        assert guarded.density().mean() > found.density().mean() or not report.widened.any()


@pytest.mark.gpu
def test_the_guard_waits_for_nothing_and_can_be_captured():
    query, key, value = two_heads(4096, torch.bfloat16)
    config = PrefillConfig(alpha=0.05, guard=0.95, dense_below=0)
    expected = prefill_attention(query, key, value, config)
    torch.cuda.synchronize()
    with waits_are_errors():
        output = prefill_attention(query, key, value, config)
    assert torch.equal(output, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = search_blocks(query, key, config)
    graph.replay()
    assert captured == search_blocks(query, key, config)
