"""Probes and outliers: the two-sided search against its definition, and with everything that it meets."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import DEVICE, make_qkv

from flexprefill import (
    AttentionVariant,
    BlockMap,
    KeyMeans,
    MaskCache,
    PrefillConfig,
    Sequences,
    guard_blocks,
    prefill_attention,
    search_blocks,
)
from flexprefill.blockmap.bits import unpack_bits
from flexprefill.search import operator, two_sided
from flexprefill.search.rule import Rule

BOTH = PrefillConfig(
    alpha=None, block_size=16, sink_blocks=1, window_blocks=1, last_full_blocks=0,
    probe_rows=4, probe_share=0.05, outlier_keys=1, outlier_share=0.3,
)  # fmt: skip
IMPLEMENTATIONS = ("reference", "triton")
SLOW_IN_THE_INTERPRETER = ("reference", pytest.param("triton", marks=pytest.mark.slow))
CLOSE = 1e-4  # shares nearer to a threshold may fall on either side


def farthest_of(vectors, count):
    mean = vectors.mean(0)
    order = sorted(range(len(vectors)), key=lambda i: (-float((vectors[i] - mean).square().sum()), i))
    return [order[i % len(order)] for i in range(count)]


def oracle(query, key, config, scale):
    """The definition, block by block in float64: which blocks are kept, and which may as well not be."""
    query, key = query.double().cpu(), key.double().cpu()
    (batch, heads, q_len, _), kv_len, b = query.shape, key.shape[2], config.block_size
    group, offset = heads // key.shape[1], kv_len - q_len
    rows, columns = -(-q_len // b), -(-kv_len // b)
    keep = torch.zeros(batch, heads, rows, columns, dtype=torch.bool)
    doubt = torch.zeros_like(keep)
    share = torch.zeros(batch, heads, rows, columns, dtype=torch.float64)
    for e in range(batch):
        for h in range(heads):
            keys = key[e, h // group]
            outliers = [
                [j * b + i for i in farthest_of(keys[j * b : j * b + b], config.outlier_keys)] for j in range(columns)
            ]
            for I in range(rows):
                own = query[e, h, I * b : (I + 1) * b]
                size, last = len(own), offset + min((I + 1) * b, q_len) - 1
                visible = last // b + 1
                probes, reach = config.probe_rows, 64
                while visible > reach and probes > 1:
                    probes, reach = probes // 2, reach * 2
                even = -(-probes // 2)
                chosen = [(2 * (i * group + h % group) + 1) * size // (2 * group * even) for i in range(even)]
                chosen += farthest_of(own, probes - even)
                for row in chosen:
                    seen = keys[: offset + I * b + row + 1]
                    weights = (scale * seen @ own[row]).softmax(0)
                    for j in range(visible):
                        share[e, h, I, j] += weights[j * b : j * b + b].sum() / probes
                for j in range(visible):
                    keep[e, h, I, j] |= j < config.sink_blocks or j >= visible - config.window_blocks
                if not config.outlier_keys:
                    continue
                for row in range(size):
                    position = offset + I * b + row
                    near = (scale * keys[position // b * b : position + 1] @ own[row]).logsumexp(0)
                    strongest = torch.tensor(-math.inf, dtype=torch.float64)
                    for first in range(0, position // b, 64):
                        some = range(first, min(first + 64, position // b))
                        logits = {j: [scale * keys[k] @ own[row] for k in outliers[j]] for j in some}
                        strongest = max(strongest, *(x for part in logits.values() for x in part))
                        for j in some:
                            for x in logits[j]:
                                estimate = (x - torch.logaddexp(near, strongest)).exp()
                                keep[e, h, I, j] |= estimate >= config.outlier_share
                                doubt[e, h, I, j] |= abs(estimate - config.outlier_share) < CLOSE
    if config.probe_rows:
        best = share.unflatten(1, (-1, group)).amax(2).repeat_interleave(group, 1)
        last = [min(offset + (I + 1) * b, kv_len) - 1 for I in range(rows)]
        causal = torch.tensor([[j * b <= position for j in range(columns)] for position in last])
        keep |= ((share >= config.probe_share) | (0.4 * best >= config.probe_share)) & causal
        doubt |= ((share - config.probe_share).abs() < CLOSE) | ((0.4 * best - config.probe_share).abs() < CLOSE)
    return keep, doubt


@st.composite
def cases(draw):
    group, kv_heads = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 2))
    kv_len = draw(st.integers(1, 150))
    q_len = draw(st.integers(1, kv_len))
    config = PrefillConfig(
        alpha=None,
        block_size=draw(st.sampled_from([16, 32])),
        sink_blocks=draw(st.integers(0, 1)),
        window_blocks=draw(st.integers(0, 2)),
        last_full_blocks=0,
        probe_rows=draw(st.sampled_from([0, 1, 2, 8])),
        probe_share=draw(st.sampled_from([0.02, 0.1, 0.3])),
        outlier_keys=draw(st.integers(1, 2)),
        outlier_share=draw(st.sampled_from([0.1, 0.5])),
    )
    return draw(st.integers(0, 2**20)), group, kv_heads, q_len, kv_len, draw(st.sampled_from([16, 24])), config


def check_against_the_oracle(case):
    seed, group, kv_heads, q_len, kv_len, head_dim, config = case
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(1, group * kv_heads, q_len, head_dim, generator=generator)
    key = 2 * torch.randn(1, kv_heads, kv_len, head_dim, generator=generator)
    keep, doubt = oracle(query, key, config, head_dim**-0.5)
    # the two vectors of a block of two lie equally far from its mean
    doubt[:, :, -1] |= q_len % config.block_size == 2
    doubt[..., -1] |= kv_len % config.block_size == 2
    for implementation in IMPLEMENTATIONS:
        found = search_blocks(query.to(DEVICE), key.to(DEVICE), config, implementation=implementation)
        wrong = (found.to_dense().cpu() != keep) & ~doubt
        assert not wrong.any(), (implementation, wrong.nonzero()[:3].tolist())


@settings(max_examples=8, deadline=None)
@given(cases())
def test_random_searches_follow_the_definition(case):
    check_against_the_oracle(case)


@pytest.mark.release
@settings(max_examples=50, deadline=None)
@given(cases())
def test_many_random_searches_follow_the_definition(case):
    check_against_the_oracle(case)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("implementation", SLOW_IN_THE_INTERPRETER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_have_fewer_probes(implementation, dtype, monkeypatch):
    assert [two_sided.probes_of(visible, 8) for visible in (1, 64, 65, 128, 129, 256, 257, 10**6)] == [
        8, 8, 4, 4, 2, 2, 1, 1,
    ]  # fmt: skip
    assert two_sided.probes_of(10**6, 0) == 0
    query, key, _ = make_qkv(40, 1200, heads=2, head_dim=16, dtype=dtype, device=DEVICE)
    keep, doubt = oracle(query, key, BOTH, 0.25)
    found = search_blocks(query, key, BOTH, implementation=implementation).to_dense().cpu()
    assert not ((found != keep) & ~doubt).any()
    assert keep.any(1).float().mean() < 0.9


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_single_key_that_a_single_row_looks_for_is_found(implementation):
    query, key, _ = make_qkv(512, heads=2, head_dim=64, device=DEVICE)
    query, key = query / 8, key / 8
    for row, place in ((300, 70), (444, 37), (501, 200)):
        key[:, :, place] = 4 * torch.nn.functional.one_hot(torch.tensor(row % 64), 64).to(key)
        query[:, :, row] = 16 * torch.nn.functional.one_hot(torch.tensor(row % 64), 64).to(query)
        of_means = search_blocks(query, key, PrefillConfig(alpha=0.9, block_size=32, last_full_blocks=0))
        config = dataclasses.replace(BOTH, block_size=32, probe_rows=0, outlier_share=0.5)
        found = search_blocks(query, key, config, implementation=implementation)
        assert found.to_dense()[:, :, row // 32, place // 32].all()
    assert found.density().mean() < of_means.density().mean()


@pytest.mark.parametrize("implementation", SLOW_IN_THE_INTERPRETER)
def test_means_probes_and_outliers_together_keep_what_one_of_them_keeps(implementation):
    query, key, _ = make_qkv(50, 150, heads=4, kv_heads=2, head_dim=32, device=DEVICE)

    def kept(**changes):
        return search_blocks(query, key, dataclasses.replace(BOTH, **changes), implementation=implementation)

    means, none = kept(alpha=0.7, probe_rows=0, outlier_keys=0), {"probe_rows": 0}
    probes, outliers = kept(outlier_keys=0), kept(**none)
    assert kept(alpha=0.7) == means | probes | outliers
    assert kept() == probes | outliers and kept(alpha=0.7, **none) == means | outliers
    assert probes != outliers and means != probes
    every_head = dataclasses.replace(BOTH, mask_heads="kv")
    shared = search_blocks(query, key, every_head, implementation=implementation).to_dense()
    assert torch.equal(shared, kept().to_dense().unflatten(1, (2, 2)).any(2).repeat_interleave(2, 1))


@pytest.mark.parametrize("implementation", SLOW_IN_THE_INTERPRETER)
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_chunks_give_the_map_of_one_go(implementation, alpha):
    config = dataclasses.replace(BOTH, alpha=alpha)
    query, key, _ = make_qkv(200, heads=2, device=DEVICE)
    whole = search_blocks(query, key, config, implementation=implementation)
    means, maps, start = KeyMeans(), [], 0
    for end in (64, 96, 160, 200):
        maps.append(
            search_blocks(
                query[:, :, start:end], key[:, :, :end], config,
                last_chunk=end == 200, means=means, implementation=implementation,
            )
        )  # fmt: skip
        start = end
    assert BlockMap.from_chunks(maps) == whole
    assert means.nbytes == (2 if alpha else 1) * key[:, :, :13].nbytes
    with pytest.raises(ValueError, match="means is of keys with outlier_keys 1, got 0"):
        search_blocks(query, key, PrefillConfig(block_size=16), means=means, implementation=implementation)


def check_the_bits_of_other_cuts(query, key, config, chunk, monkeypatch):
    """Spans of key blocks, bands of query blocks and sets of heads, and chunks: none of them changes a bit."""
    from flexprefill.search.kernels import two_sided as kernels

    rule = Rule.of(dataclasses.replace(config, outlier_keys=0, last_full_blocks=0), scale=0.2, last_chunk=True)
    decide, scratch, rows = kernels.decide_kernel, [], -(-query.shape[2] // rule.block_size)

    class Recorder:
        def __getitem__(self, grid):
            def run(scratch_ptr, **arguments):
                scratch.append(scratch_ptr.clone())
                decide[grid](scratch_ptr=scratch_ptr, **arguments)

            return run

    def probe(query, key):
        scratch.clear()
        words, held = kernels.keep_more(query, key, None, None, rule, True)
        return words, held

    monkeypatch.setattr(kernels, "decide_kernel", Recorder())
    monkeypatch.setattr(kernels, "PROGRAMS_A_PLACE", 0)
    words, held = probe(query, key)
    (masses,) = scratch
    assert 0 < words.count_nonzero() and held.isfinite().all()
    for span_log2 in (0, 1):
        monkeypatch.setattr(kernels, "LARGEST_SPAN_LOG2", span_log2)
        again = probe(query, key)
        assert torch.equal(words, again[0]) and torch.equal(held, again[1])
        # what is not written is NaN
        assert torch.equal(masses.nan_to_num(7e7), scratch[0].nan_to_num(7e7))
    for limit in (4 * masses.numel() // 3, 1):
        monkeypatch.setattr(kernels, "SCRATCH_BYTES", limit)
        again = probe(query, key)
        # heads are multiplied in other company, which changes the interpreter's bits on some CPUs, and no GPU's
        assert torch.equal(words, again[0]) and (held - again[1]).abs().max() <= (0 if DEVICE == "cuda" else 2e-6)
        assert len(scratch) >= 3 and max(part.numel() for part in scratch) < masses.numel() / 2
    assert len(scratch) >= rows
    monkeypatch.undo()
    kv_end, some = key.shape[2] - query.shape[2] + chunk, chunk // rule.block_size
    early_words, early_held = probe(query[:, :, :chunk], key[:, :, :kv_end])
    columns = -(-kv_end // rule.block_size)
    assert torch.equal(unpack_bits(early_words, columns), unpack_bits(words, columns)[:, :, :some])
    assert torch.equal(early_held, held[:, :, :some])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.slow
def test_the_bits_do_not_depend_on_how_the_work_is_cut(monkeypatch):
    query, key, _ = make_qkv(70, 1070, heads=6, kv_heads=2, head_dim=16, device=DEVICE)
    check_the_bits_of_other_cuts(query, key, BOTH, 32, monkeypatch)


def test_the_probes_of_a_query_block_may_fill_more_than_a_tile():
    query, key, _ = make_qkv(40, 200, heads=20, kv_heads=1, head_dim=16, device=DEVICE)
    config = dataclasses.replace(BOTH, probe_rows=16, probe_share=0.15, outlier_keys=0)
    reference, triton = (search_blocks(query, key, config, implementation=name) for name in IMPLEMENTATIONS)
    assert reference == triton and 0.1 < triton.density().mean() < 0.9


@pytest.mark.slow
def test_a_chunk_may_begin_inside_a_block():
    query, key, _ = make_qkv(120, 203, heads=4, kv_heads=2, device=DEVICE)
    for start in (0, 7, 100):
        reference, triton = (
            search_blocks(query[:, :, start:], key, BOTH, implementation=implementation)
            for implementation in IMPLEMENTATIONS
        )
        assert reference == triton


def test_a_cached_prompt_is_extended():
    query, key, _ = make_qkv(320, heads=2, device=DEVICE)
    tokens = torch.arange(320)
    cache = MaskCache()
    part = query[:, :, :160], key[:, :, :160]
    cache.prompt(tokens[:160]).search_blocks(0, *part, BOTH)
    found = cache.prompt(tokens).search_blocks(0, query, key, BOTH)
    assert found == search_blocks(query, key, BOTH) and cache.stats().extensions == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_not_a_number_is_kept(implementation):
    query, key, _ = make_qkv(120, heads=2, kv_heads=2, device=DEVICE)
    clean = search_blocks(query, key, BOTH, implementation=implementation).to_dense()
    key[:, 1, 50] = math.nan
    found = search_blocks(query, key, BOTH, implementation=implementation).to_dense()
    assert torch.equal(found[:, 0], clean[:, 0])
    causal = BlockMap.causal(1, 2, q_len=120, kv_len=120, block_size=16).to_dense()
    assert torch.equal(found[:, 1, 4:].cpu(), causal[:, 1, 4:].cpu())


@pytest.mark.parametrize("implementation", SLOW_IN_THE_INTERPRETER)
@pytest.mark.parametrize("scale", [0.0, -0.2])
def test_any_scale_is_followed(implementation, scale):
    query, key, _ = make_qkv(100, 130, heads=2, head_dim=16, device=DEVICE)
    keep, doubt = oracle(query, key, BOTH, scale)
    found = search_blocks(query, key, BOTH, scale=scale, implementation=implementation).to_dense().cpu()
    assert not ((found != keep) & ~doubt).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_the_probes_hold_is_the_share_of_the_kept_blocks(implementation):
    """Of the evenly placed probes alone, computed here one by one."""
    query, key, _ = make_qkv(100, 230, heads=6, kv_heads=2, head_dim=16, device=DEVICE)
    rule = Rule.of(dataclasses.replace(BOTH, probe_share=0.2, last_full_blocks=0), scale=0.7, last_chunk=True)
    sketch = operator.sketch_keys(key, rule, implementation)
    words, held = operator.two_sided_words(query, key, sketch, rule, implementation, measured=True)
    kept, b, group = unpack_bits(words, -(-230 // rule.block_size)).cpu(), rule.block_size, 3
    query, key = query.double().cpu(), key.double().cpu()
    assert 0.2 < kept.float().mean() < 0.8 and held.min() < 0.9
    for h, I in itertools.product(range(6), range(kept.shape[2])):
        size, even = min(b, 100 - I * b), -(-rule.probe_rows // 2)
        shares = []
        for i in range(even):
            row = I * b + (2 * (i * group + h % group) + 1) * size // (2 * group * even)
            weights = (0.7 * key[0, h // group, : 130 + row + 1] @ query[0, h, row]).softmax(0)
            inside = kept[0, h, I].repeat_interleave(b)[: len(weights)]
            shares.append(weights[inside].sum())
        assert abs(held[0, h, I].item() - sum(shares) / even) <= 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_guard_takes_what_the_probes_saw(implementation):
    from flexprefill.runtime import listeners

    query, key, _ = make_qkv(100, 200, heads=4, kv_heads=2, device=DEVICE)
    query[:, 0] *= 4
    config = dataclasses.replace(BOTH, probe_share=0.2, outlier_keys=0)
    loose = search_blocks(query, key, config, implementation=implementation)
    guarded = search_blocks(query, key, dataclasses.replace(config, guard=0.6), implementation=implementation)
    causal = BlockMap.causal(1, 4, q_len=100, kv_len=200, block_size=16).to_dense()
    widened = [not torch.equal(guarded.to_dense()[0, h], loose.to_dense()[0, h]) for h in range(4)]
    assert any(widened) and not all(widened)
    for head in range(4):
        expected = causal if widened[head] else loose.to_dense().cpu()
        assert torch.equal(guarded.to_dense().cpu()[0, head], expected[0, head])
    _, report = guard_blocks(query, key, loose, dataclasses.replace(config, guard=0.6))
    assert report.recall[0, widened].max() < report.recall[0, [not wide for wide in widened]].min()
    means = search_blocks(
        query, key, dataclasses.replace(config, guard=0.6), means=KeyMeans(), implementation=implementation
    )
    assert means == guarded and listeners is not None


def test_it_traces_into_one_graph():
    compiled = torch.compile(lambda q, k, c: search_blocks(q, k, c), fullgraph=True, backend="eager")
    for config in (BOTH, dataclasses.replace(BOTH, guard=0.9), dataclasses.replace(BOTH, alpha=0.5)):
        query, key, _ = make_qkv(200, heads=2, device=DEVICE)
        assert compiled(query, key, config) == search_blocks(query, key, config)


def test_the_recommended_setting_runs_through_the_attention():
    config = PrefillConfig.recommended()
    assert config.two_sided and PrefillConfig.from_dict(config.to_dict()) == config
    query, key, value = make_qkv(400, heads=2, device=DEVICE)
    output = prefill_attention(query, key, value, dataclasses.replace(config, dense_below=0))
    block_map = search_blocks(query, key, config)
    assert torch.equal(output, prefill_attention(query, key, value, config, block_map=block_map))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": None}, "alpha must be a number where probe_rows and outlier_keys are 0, got None"),
        ({"alpha": None, "probe_rows": 2, "min_blocks": 1}, "min_blocks must be 0 where alpha is None"),
        ({"probe_rows": 3}, r"probe_rows must be one of \(0, 1, 2, 4, 8, 16\), got 3"),
        ({"outlier_keys": 5}, r"outlier_keys must be one of \(0, 1, 2\), got 5"),
        ({"probe_share": 0}, r"probe_share must be in \(0, 1\], got 0"),
        ({"outlier_share": math.nan}, r"outlier_share must be in \(0, 1\], got nan"),
        ({"probe_rows": 2, "scorer": "exact"}, "go with the scorer 'flashprefill', got 2 and 0 with 'exact'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PrefillConfig(**settings)


@pytest.mark.parametrize(
    "variant",
    [
        AttentionVariant(sliding_window=32),
        AttentionVariant(soft_cap=20.0),
        AttentionVariant(sequences=Sequences.from_lengths(torch.tensor([60]), 100)),
        AttentionVariant(alibi_slopes=torch.tensor([0.5, 0.25])),
    ],
    ids=["window", "soft cap", "sequences", "alibi"],
)
def test_what_is_not_plain_attention_is_refused_by_name(variant):
    query, key, value = make_qkv(100, heads=2)
    with pytest.raises(ValueError, match="config.probe_rows and config.outlier_keys cannot be combined with"):
        search_blocks(query, key, BOTH, variant=variant)
    with pytest.raises(ValueError, match="cannot be combined with"):
        prefill_attention(query, key, value, dataclasses.replace(BOTH, dense_below=0), variant=variant)


def lengthy(length, heads, kv_heads, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    return 1.5 * normal(1, heads, length, 128), 1.5 * normal(1, kv_heads, length, 128)


LONG = dataclasses.replace(PrefillConfig.recommended(), probe_share=0.1)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("length, heads, kv_heads", [(2048, 8, 2), (10_000, 6, 2), (3000, 20, 1), (17_000, 4, 4)])
def test_the_gpu_finds_what_the_reference_finds(dtype, length, heads, kv_heads):
    query, key = lengthy(length, heads, kv_heads, dtype)
    found = search_blocks(query, key, LONG).to_dense()
    plain = search_blocks(query, key, LONG, implementation="reference").to_dense()
    assert (found != plain).sum() <= 1e-4 * plain.sum() + 1
    blocks = plain.shape[2]
    assert 0.1 < plain.float().mean() / ((blocks + 1) / (2 * blocks)) < 0.99  # of the causal blocks


@pytest.mark.gpu
@pytest.mark.parametrize(
    "q_len, kv_len, heads, kv_heads, head_dim, changes",
    [
        (2048, 2048, 8, 2, 128, {}),
        (300, 1000, 6, 2, 64, {"probe_rows": 4, "guard": 0.5}),
        (20_000, 40_001, 8, 2, 128, {"probe_rows": 16, "alpha": 0.3}),
        (130, 700, 4, 4, 64, {"probe_rows": 1, "outlier_keys": 2}),
        (1, 5000, 32, 8, 128, {"outlier_keys": 2}),
    ],
)
def test_kernels_for_hopper_keep_what_the_portable_ones_keep(
    q_len, kv_len, heads, kv_heads, head_dim, changes, monkeypatch
):
    from flexprefill.search.kernels import two_sided as kernels

    generator = torch.Generator("cuda").manual_seed(kv_len)
    query = torch.randn(2, heads, q_len, head_dim, generator=generator, device="cuda").half() * 1.5
    key = torch.randn(2, kv_heads, kv_len, head_dim, generator=generator, device="cuda").half() * 1.5
    config = dataclasses.replace(LONG, **changes)
    found = search_blocks(query, key, config)
    monkeypatch.setattr(kernels, "hopper_copies", lambda tensor: False)
    portable = search_blocks(query, key, config)
    assert (found.to_dense() != portable.to_dense()).sum() <= 2e-5 * portable.counts().sum() + 1


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("heads, kv_heads, probes", [(8, 2, 8), (14, 2, 16), (4, 4, 1)])
def test_the_bits_of_long_prompts_do_not_depend_on_how_the_work_is_cut(heads, kv_heads, probes, monkeypatch):
    query, key = lengthy(17_000, heads, kv_heads)
    config = dataclasses.replace(LONG, probe_rows=probes)
    check_the_bits_of_other_cuts(query[:, :, 5000:], key, config, 8192, monkeypatch)


@pytest.mark.gpu
def test_a_captured_graph_searches_anew():
    query, key = lengthy(9000, 8, 2)
    search_blocks(query, key, LONG)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = search_blocks(query, key, LONG)
    query.copy_(query.flip(2))
    graph.replay()
    assert found == search_blocks(query, key, LONG)


@pytest.mark.gpu
def test_long_chunks_give_the_bits_of_one_go():
    query, key = lengthy(40_000, 8, 2)
    means, maps = KeyMeans(), []
    for start in range(0, 40_000, 8192):
        end = min(start + 8192, 40_000)
        maps.append(search_blocks(query[:, :, start:end], key[:, :, :end], LONG, last_chunk=end == 40_000, means=means))
    assert BlockMap.from_chunks(maps) == search_blocks(query, key, LONG)
