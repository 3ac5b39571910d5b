import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.device_calls import waits_are_errors
from support.inputs import DEVICE, make_qkv
from support.oracle import assert_follows_rule

from flexprefill import BlockMap, ListBuffers, PrefillConfig, attention_recall, prefill_attention, search_blocks
from flexprefill.blockmap.geometry import Geometry
from flexprefill.search.grid import Grid

SPARSE = PrefillConfig(block_size=16, alpha=0.5, sink_blocks=1, window_blocks=1, last_full_blocks=1)
SHARED = replace(SPARSE, mask_heads="kv", score_rows="visible")


@st.composite
def cases(draw, *, max_length, dtypes, head_dims, max_group=8):
    kv_len = draw(st.integers(1, max_length))
    kv_heads = draw(st.sampled_from([1, 2]))
    config = PrefillConfig(
        alpha=draw(st.floats(0.001, 1)),
        block_size=draw(st.sampled_from([16, 64, 128] if max_length <= 512 else [64, 128])),
        sink_blocks=draw(st.integers(0, 3)),
        window_blocks=draw(st.integers(0, 4)),
        last_full_blocks=draw(st.integers(0, 3)),
        min_blocks=draw(st.sampled_from([0, 0, 1, 3])),
        mask_heads=draw(st.sampled_from(["query", "kv"])),
        score_rows=draw(st.sampled_from(["whole", "visible"])),
    )
    query, key, _ = make_qkv(
        draw(st.one_of(st.just(kv_len), st.integers(1, kv_len))),
        kv_len,
        batch=draw(st.sampled_from([1, 2])),
        heads=kv_heads * draw(st.sampled_from([group for group in (1, 2, 4, 8) if group <= max_group])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from(head_dims)),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**31)),
    )
    return (
        query,
        key,
        {"config": config, "scale": draw(st.sampled_from([None, 0.3])), "last_chunk": draw(st.booleans())},
    )


@settings(deadline=None, max_examples=150)
@given(cases(max_length=1300, dtypes=[torch.float32, torch.bfloat16, torch.float16], head_dims=[64, 128]))
def test_the_reference_follows_the_rule(case):
    query, key, arguments = case
    block_map = search_blocks(query, key, implementation="reference", **arguments)
    assert (block_map.q_len, block_map.kv_len) == (query.shape[2], key.shape[2])
    assert_follows_rule(block_map, query, key, **arguments)


def check_kernels(case):
    query, key, arguments = case
    query, key = query.to(DEVICE), key.to(DEVICE)
    block_map = search_blocks(query, key, implementation="triton", **arguments)
    assert_follows_rule(block_map, query, key, **arguments)


FOR_KERNELS = cases(
    max_length=300 if DEVICE == "cpu" else 1300,
    dtypes=[torch.float32, torch.bfloat16, torch.float16],
    head_dims=[16, 64, 96, 128] if DEVICE == "cpu" else [16, 64, 72, 96, 128, 192, 256],
    max_group=2,
)


@settings(deadline=None, max_examples=12 if DEVICE == "cpu" else 100)
@given(FOR_KERNELS)
def test_the_kernels_follow_the_rule(case):
    check_kernels(case)


@pytest.mark.release
@settings(deadline=None, max_examples=25)
@given(FOR_KERNELS)
def test_the_kernels_follow_the_rule_in_more_cases(case):
    check_kernels(case)


@pytest.mark.parametrize("q_len, kv_len", [(40, 40), (48, 48), (5, 40), (17, 50), (1, 33), (1, 1)])
@pytest.mark.parametrize("first_key", [False, True])
def test_which_rows_give_a_score_to_which_blocks(q_len, kv_len, first_key):
    grid = Grid(Geometry(q_len, kv_len, 16), 1.0, first_key)
    assert (grid.rows, grid.columns, grid.offset) == (-(-q_len // 16), -(-kv_len // 16), kv_len - q_len)
    rows = torch.zeros(grid.rows * 16, grid.columns, dtype=torch.bool)
    for row in range(q_len):
        for column in range(grid.columns):
            needed = 16 * column if first_key else min(16 * column + 16, kv_len) - 1
            rows[row, column] = grid.offset + row >= needed
    assert torch.equal(grid.scoring_rows("cpu"), rows.unflatten(0, (-1, 16)))
    assert torch.equal(grid.scored("cpu"), rows.unflatten(0, (-1, 16)).any(1))


def both_implementations(query, key, config, **arguments):
    reference, triton = (
        search_blocks(query.to(DEVICE), key.to(DEVICE), config, implementation=name, **arguments)
        for name in ("reference", "triton")
    )
    assert reference == triton
    return reference


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("q_len, kv_len", [(512, 512), (500, 500), (129, 129), (1, 1), (1, 400), (100, 399), (16, 500)])
def test_both_implementations_write_every_word(q_len, kv_len):
    query, key, _ = make_qkv(q_len, kv_len, heads=2 if q_len > 200 else 4, kv_heads=1 if q_len > 200 else 2)
    both_implementations(query, key, SPARSE)
    both_implementations(query, key, PrefillConfig(alpha=0.5, window_blocks=1, sink_blocks=0, last_full_blocks=0))
    both_implementations(query, key, SHARED)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_key_that_is_not_finite_keeps_its_block_and_touches_no_other(bad):
    query, key, _ = make_qkv(208)
    clean = both_implementations(query, key, SPARSE).to_dense()
    key[0, 0, 37] = bad
    spoilt = both_implementations(query, key, SPARSE).to_dense()
    seen_by = torch.arange(13, device=DEVICE) >= 2
    assert torch.equal(spoilt[..., 2], seen_by.expand(1, 2, 13))
    both_implementations(query, key, SHARED)
    others = torch.arange(13) != 2
    clean_best_is_elsewhere = spoilt[..., others] >= clean[..., others]
    assert clean_best_is_elsewhere.all()  # without block 2 the row's maximum can only fall


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_query_that_is_not_finite_keeps_its_row_and_touches_no_other(bad):
    query, key, _ = make_qkv(208)
    clean = both_implementations(query, key, SPARSE).to_dense()
    query[0, 1, 170] = bad
    shared = both_implementations(query, key, SHARED).to_dense()
    assert shared[0, :, 170 // 16, : 170 // 16 + 1].all()  # of both heads
    spoilt = both_implementations(query, key, SPARSE).to_dense()
    row, others = 170 // 16, torch.arange(13) != 170 // 16
    # the row of query 170 sees blocks 0 … 9 whole; its own block is in the window
    assert spoilt[0, 1, row, : row + 1].all()
    assert torch.equal(spoilt[0, 0], clean[0, 0]) and torch.equal(spoilt[0, 1, others], clean[0, 1, others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_scores_are_all_kept(dtype):
    query, key = torch.ones(1, 1, 400, 64, dtype=dtype), torch.ones(1, 1, 400, 64, dtype=dtype)
    config = PrefillConfig(block_size=16, alpha=1.0, sink_blocks=0, window_blocks=1, last_full_blocks=0)
    dense = both_implementations(query, key, config).to_dense()
    # ties at the threshold count; the diagonal has one row's score against sixteen, but is in the window
    assert torch.equal(dense[0, 0].cpu(), torch.ones(25, 25, dtype=torch.bool).tril())


def test_large_scores_and_one_huge_key():
    query, key, _ = make_qkv(400, dtype=torch.bfloat16)
    query, key = query.sign() * 60000, key.sign() * 60000
    both_implementations(query, key, SPARSE)
    query, key, _ = make_qkv(208)
    key[0, 0, 100] = 1e4 * query[0, 0, 200]
    dense = both_implementations(query, key, SPARSE).to_dense()
    assert dense[0, 0, 200 // 16, 100 // 16]


@pytest.mark.parametrize("scale", [30.0, -30.0, -0.1, 0.0, 1e-40])
def test_any_scale(scale):
    # at 30 the scores of a row are further apart than float32 powers of two reach
    query, key, _ = make_qkv(208)
    both_implementations(query, key, SPARSE, scale=scale)
    both_implementations(query, key, SHARED, scale=scale)


@pytest.mark.parametrize("alpha", [1e-20, 1e-35, 1e-300])
def test_a_tiny_alpha_keeps_what_a_power_of_two_would_lose(alpha):
    query, key, _ = make_qkv(208)
    config = PrefillConfig(block_size=16, alpha=alpha, sink_blocks=0)
    both_implementations(query, key, config, scale=10.0)
    both_implementations(query, key, replace(config, mask_heads="kv"), scale=10.0)


@pytest.mark.parametrize("level", [-3, -1, 0, 1])
def test_ties_exactly_at_the_threshold_are_kept(level):
    # with this scale, scores are whole powers of two: block j's keys give 2^(its level)
    query, key = torch.zeros(1, 1, 400, 64), torch.zeros(1, 1, 400, 64)
    query[..., 0] = 1.0
    levels = torch.tensor([0, -1, -2, -3, 1] * 5)
    key[..., 0] = levels.repeat_interleave(16)
    config = PrefillConfig(block_size=16, alpha=2.0 ** (level - 1), sink_blocks=0, window_blocks=1, last_full_blocks=0)
    dense = both_implementations(query, key, config, scale=math.log(2)).to_dense()[0, 0].cpu()
    row = torch.arange(25)
    best = levels.cummax(0).values.roll(1)  # of the blocks before the diagonal, which sixteen rows see
    expected = (levels >= best[:, None] + level - 1) & (row <= row[:, None]) | (row == row[:, None])
    assert torch.equal(dense[5:], expected[5:])


def test_min_blocks_are_the_best_and_alpha_alone_keeps_the_best():
    query, key, _ = make_qkv(512, heads=1)
    one = PrefillConfig(block_size=16, alpha=1.0, sink_blocks=0, window_blocks=0, last_full_blocks=0)
    assert (both_implementations(query, key, one).counts() == 1).all()
    for min_blocks in (2, 5, 31, 32, 10**9):
        config = PrefillConfig(**(one.to_dict() | {"min_blocks": min_blocks}))
        counts = both_implementations(query, key, config).counts()
        expected = torch.arange(1, 33, device=DEVICE).clamp(max=min_blocks)
        assert torch.equal(counts[0, 0], expected.int())


def test_chunks_of_whole_blocks_give_the_rows_of_the_whole_search():
    query, key, _ = make_qkv(512)
    whole = both_implementations(query, key, SPARSE).to_dense()
    for start, end in ((0, 128), (128, 256), (256, 512)):
        chunk = both_implementations(query[:, :, start:end], key[:, :, :end], SPARSE, last_chunk=end == 512)
        assert torch.equal(chunk.to_dense(), whole[:, :, start // 16 : end // 16, : end // 16])


def test_views_are_read_by_their_strides():
    query, key, _ = make_qkv(150, heads=4, kv_heads=2)
    expected = both_implementations(query, key, SPARSE)
    strided = [torch.empty(1, 150, 2 * t.shape[1], 64, dtype=t.dtype)[:, :, ::2].transpose(1, 2) for t in (query, key)]
    for view, tensor in zip(strided, (query, key), strict=True):
        view.copy_(tensor)
    assert both_implementations(*strided, SPARSE) == expected
    expanded = key[:, :1].expand(1, 2, 150, 64)
    assert both_implementations(query, expanded, SPARSE) == both_implementations(query, expanded.contiguous(), SPARSE)


@pytest.mark.parametrize("sides", [(0, 0.01, 0, 0.5), (2, 0.01, 1, 0.5)])
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_the_operator_passes_opcheck(implementation, sides):
    query, key, _ = make_qkv(70, 90, heads=2, device=DEVICE)
    torch.library.opcheck(
        torch.ops.flexprefill.search_words,
        (query, key, 0.125, -1.0, 16, 1, 1, 1, 0, False, False, "flashprefill", [], *sides, implementation),
    )


def test_traces_into_one_graph_for_all_lengths():
    frames = []

    def count(graph, inputs):
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(lambda q, k: search_blocks(q, k, SPARSE), fullgraph=True, backend=count)
    for length in (300, 512, 400, 380, 700, 90):
        query, key, _ = make_qkv(length, device=DEVICE)
        assert compiled(query, key) == search_blocks(query, key, SPARSE)
    assert len(frames) <= 2


def wrong(**changes):
    query, key, _ = make_qkv(64, heads=4, kv_heads=2)
    return {"query": query, "key": key} | changes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (wrong(query=torch.zeros(1, 3, 64, 64)), ValueError, r"query must have a multiple.*\[1, 3, 64, 64\]"),
        (wrong(query=torch.zeros(1, 4, 65, 64)), ValueError, "must be no longer than key.*S_q=65"),
        (wrong(query=torch.zeros(2, 4, 64, 64)), ValueError, "key must have query's batch size 2, got 1"),
        (
            wrong(key=torch.zeros(1, 2, 64, 128)),
            ValueError,
            "key must have query's head dimension 64, got 128",
        ),
        (wrong(key=torch.zeros(1, 2, 64, 64).half()), TypeError, "key must have query's dtype.*float16"),
        (
            wrong(key=torch.zeros(1, 2, 64, 64, device="meta")),
            ValueError,
            "key must be on query's device cpu, got meta",
        ),
        (wrong(query=torch.zeros(1, 4, 64, 64).int()), TypeError, "query must be float16.*int32"),
        (wrong(query=torch.zeros(1, 4, 64, 64).double()), TypeError, "query must be float16.*float64"),
        (wrong(query=torch.zeros(4, 64, 64)), ValueError, r"query must be \[B, H, S, D\].*\[4, 64, 64\]"),
        (wrong(key=torch.zeros(1, 2, 0, 64)), ValueError, r"key must be \[B, H, S, D\].*\[1, 2, 0, 64\]"),
        (wrong(query=torch.zeros(1, 4, 64, 20)), ValueError, "query must have a head dimension.*D=20"),
        (wrong(query=torch.zeros(1, 4, 64, 512)), ValueError, "query must have a head dimension.*D=512"),
        (wrong(query=torch.zeros(1, 4, 64, 64, requires_grad=True)), ValueError, "query requires grad"),
        (wrong(query=[1.0]), TypeError, "query must be a tensor.*list"),
        (wrong(query=torch.zeros(1, 4, 64, 64).to_sparse()), TypeError, "query must be a strided tensor"),
        (wrong(config={"alpha": 0.1}), TypeError, "config must be a PrefillConfig, got dict"),
        (wrong(scale="1"), TypeError, "scale must be a number"),
        (wrong(scale=float("inf")), ValueError, "scale must be finite"),
        (wrong(last_chunk=None), TypeError, "last_chunk must be a bool"),
        (wrong(implementation="cuda"), ValueError, "implementation must be one of.*'cuda'"),
    ],
)
def test_a_wrong_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        search_blocks(**arguments)


def test_triton_on_the_cpu_without_the_interpreter_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="implementation 'triton' needs tensors on a CUDA device.*got cpu"):
        search_blocks(**wrong(implementation="triton"))


def test_parameters_may_require_grad_under_no_grad():
    arguments = wrong(query=torch.zeros(1, 4, 64, 64, requires_grad=True))
    with torch.no_grad():
        search_blocks(**arguments)


@pytest.fixture(params=["hopper", "portable"])
def kernel(request, monkeypatch):
    """Both scoring kernels on inputs that either takes."""
    from flexprefill.search.kernels import launch as kernels

    if torch.cuda.get_device_capability()[0] != 9 and request.param == "hopper":
        pytest.skip("needs a Hopper GPU")
    taken = []

    def takes(query, rule, choose=kernels.hopper_takes):
        taken.append(request.param == "hopper" and choose(query, rule))
        return taken[-1]

    monkeypatch.setattr(kernels, "hopper_takes", takes)
    yield request.param
    assert any(taken) == (request.param == "hopper")


def published_shape(q_len, kv_len=None, *, head_dim=128, dtype=torch.bfloat16, seed=0):
    return make_qkv(q_len, kv_len, heads=8, kv_heads=2, head_dim=head_dim, dtype=dtype, device="cuda", seed=seed)[:2]


LEAN = PrefillConfig(alpha=0.7, sink_blocks=0, window_blocks=1, last_full_blocks=0)


def assert_equal_but_for_rounding(query, key, config, **arguments):
    kernels = search_blocks(query, key, config, implementation="triton", **arguments)
    reference = search_blocks(query, key, config, implementation="reference", **arguments)
    # sums in another order: a block within rounding of the threshold may fall on either side
    assert (kernels ^ reference).counts().sum() <= 2e-5 * kernels.counts().sum()


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory", "kernel")
@pytest.mark.parametrize("head_dim, dtype", [(128, torch.bfloat16), (64, torch.float16)])
@pytest.mark.parametrize(
    "q_len, kv_len",
    [(4096, 4096), (20001, 20001), (1000, 4000), (3000, 20000), (1, 1), (127, 127), (128, 128), (129, 129), (1, 700)],
)
def test_each_kernel_equals_the_reference(q_len, kv_len, head_dim, dtype):
    query, key = published_shape(q_len, kv_len, head_dim=head_dim, dtype=dtype)
    for config in (LEAN, PrefillConfig(), replace(LEAN, score_rows="visible")):
        assert_equal_but_for_rounding(query, key, config)
        assert_equal_but_for_rounding(query, key, config, scale=-0.2, last_chunk=False)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("head_dim, dtype", [(128, torch.bfloat16), (64, torch.float16), (96, torch.float32)])
@pytest.mark.parametrize("q_len, kv_len", [(4096, 4096), (3001, 20001), (1, 1), (129, 129), (1, 700)])
def test_masks_of_key_heads_equal_the_reference_on_a_gpu(q_len, kv_len, head_dim, dtype):
    query, key = published_shape(q_len, kv_len, head_dim=head_dim, dtype=dtype)
    for changes in ({}, {"score_rows": "visible"}, {"min_blocks": 3}, {"block_size": 64}):
        config = replace(LEAN, mask_heads="kv", **changes)
        assert_equal_but_for_rounding(query, key, config)
        assert_equal_but_for_rounding(query, key, config, scale=20.0)  # summed in logs


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory", "kernel")
@pytest.mark.parametrize("length", [1, 127, 128, 129, 4096])
@pytest.mark.parametrize(
    "name",
    ["constant", "huge key", "equal scores", "60000", "far apart", "zero scale", "nan", "inf", "-inf", "all inf"],
)
def test_each_kernel_equals_the_reference_on_adversarial_inputs(name, length):
    query, key = published_shape(length)
    config, scale, middle = LEAN, None, length // 3
    if name == "constant":
        key = key[:, :, :1].expand(-1, -1, length, -1)
    elif name == "huge key":
        key[0, 0, middle] = 1e4 * query[0, 0, -1]
    elif name == "equal scores":
        query, key, config = torch.ones_like(query), torch.ones_like(key), PrefillConfig(alpha=1.0, window_blocks=1)
    elif name == "60000":
        query, key = query.sign() * 60000, key.sign() * 60000
    elif name == "far apart":
        scale = 20.0
    elif name == "zero scale":
        scale = 0.0
    elif name == "all inf":
        key = torch.full_like(key, float("inf"))
    else:
        key[0, 0, middle] = float(name)
        both_implementations(query, key, config)
        query[0, 1, middle] = float(name)
    both_implementations(query, key, config, scale=scale)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory", "kernel")
def test_each_kernel_reads_any_layout():
    # two sequences as one fused projection gives them: [B, S, H, D] within [B, S, (Hq + 2 Hkv) D]
    fused = torch.randn(2, 3000, 12 * 128, device="cuda", dtype=torch.bfloat16).unflatten(2, (12, 128))
    query, key = fused[:, :, :8].transpose(1, 2), fused[:, :, 8:10].transpose(1, 2)
    for rows in (slice(None), slice(100, None)):
        contiguous = search_blocks(query[:, :, rows].contiguous(), key.contiguous(), LEAN, implementation="triton")
        assert search_blocks(query[:, :, rows], key, LEAN, implementation="triton") == contiguous
        assert_equal_but_for_rounding(query[:, :, rows], key, LEAN)
    expanded = query[:, :1].expand(-1, 8, -1, -1)
    assert_equal_but_for_rounding(expanded, key, LEAN)


@pytest.mark.gpu
@pytest.mark.usefixtures("kernel")
def test_each_kernel_keeps_ties_exactly_at_the_threshold():
    query, key = torch.zeros(1, 1, 4096, 128), torch.zeros(1, 1, 4096, 128)
    query[..., 0] = 1.0
    levels = torch.tensor([0, -1, -2, -3] * 8)
    key[..., 0] = levels.repeat_interleave(128)
    for alpha in (1.0, 0.5, 0.25):
        config = PrefillConfig(alpha=alpha, sink_blocks=0, window_blocks=1, last_full_blocks=0)
        block_map = both_implementations(query.bfloat16(), key.bfloat16(), config, scale=math.log(2))
        row = torch.arange(32)
        expected = (2.0**levels >= alpha) & (row <= row[:, None]) | (row == row[:, None])
        assert torch.equal(block_map.to_dense()[0, 0].cpu()[1:], expected[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("q_len, kv_len", [(4096, 4096), (1000, 4000), (4001, 4001)])
def test_the_kernels_equal_the_reference_at_4k(dtype, q_len, kv_len):
    query, key, _ = make_qkv(q_len, kv_len, heads=8, kv_heads=2, head_dim=128, dtype=dtype, device="cuda")
    for config in (PrefillConfig(), PrefillConfig(alpha=0.7, window_blocks=1, min_blocks=3), SPARSE):
        assert_equal_but_for_rounding(query, key, config)


def lengthy(length, heads, kv_heads):
    """Made on the device: at these lengths the host would take minutes."""
    generator = torch.Generator("cuda").manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    stretches = normal(1, kv_heads, length // 500 + 1, 128).repeat_interleave(500, 2)[:, :, :length]
    return 2 * normal(1, heads, length, 128), stretches + normal(1, kv_heads, length, 128)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("length, heads, kv_heads", [(32768, 4, 1), (131072, 4, 1), (262144, 32, 8)])
@pytest.mark.parametrize("config, most", [(PrefillConfig(), 2**26), (PrefillConfig.recommended(), 2**26 + 2**27)])
def test_the_search_runs_at_length_in_constant_memory(config, most, length, heads, kv_heads):
    query, key = lengthy(length, heads, kv_heads)
    search_blocks(query[:, :, :256], key, config)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    block_map = search_blocks(query, key, config)
    transient = torch.cuda.max_memory_allocated() - before - block_map.words.nbytes
    assert transient <= most
    tail = search_blocks(query[:, :, -512:], key, config, implementation="reference")
    rows = block_map.to_dense()[:, :, -4:]
    assert (rows != tail.to_dense()).sum() <= 2e-5 * rows.sum() + 1


@pytest.mark.gpu
@pytest.mark.parametrize("length, chunk", [(65536, 8192), (20000, 4096)])
def test_long_chunks_give_the_bits_of_the_whole_search(length, chunk):
    query, key = lengthy(length, 8, 2)
    chunks = [
        search_blocks(query[:, :, start : start + chunk], key[:, :, : start + chunk], LEAN, last_chunk=False)
        for start in range(0, length, chunk)
    ]
    assert BlockMap.from_chunks(chunks) == search_blocks(query, key, LEAN, last_chunk=False)


@pytest.mark.gpu
def test_a_million_tokens_in_chunks():
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    length, chunk = 2**20, 2**17
    query, key = lengthy(length, 32, 8)
    parts = [(query[:, :, end - chunk : end], key[:, :, :end]) for end in range(chunk, length + 1, chunk)]
    search_blocks(*parts[0], LEAN)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    chunks = [search_blocks(*part, LEAN, last_chunk=part[1].shape[2] == length) for part in parts]
    output = sum(block_map.words.nbytes for block_map in chunks)
    assert torch.cuda.max_memory_allocated() - before - output <= 64 * 2**20
    assert BlockMap.from_chunks(chunks) == search_blocks(query, key, LEAN)


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    query, key, value = make_qkv(2000, heads=4, head_dim=128, dtype=torch.bfloat16, device="cuda")
    buffers = ListBuffers()

    def run():
        search_blocks(query, key).to_block_mask()
        search_blocks(query, key, PrefillConfig(block_size=64, min_blocks=2)).to_block_mask(buffers=buffers)
        search_blocks(query[:, :, :600], key).density()
        prefill_attention(query, key, value, PrefillConfig(dense_below=0))
        prefill_attention(query, key, value, PrefillConfig(dense_below=0, mask_heads="kv", mean_correction=True))

    run()
    torch.cuda.synchronize()
    with waits_are_errors():
        run()
    # the profiler itself synchronizes where it stops
    assert waits_in(run) == waits_in(lambda: None)
    assert waits_in(lambda: search_blocks(query, key).density().max().item()) != waits_in(lambda: None)


def waits_in(function):
    """How often each call that waits for the device, and each copy, shows in a profile."""
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        function()
    words = "Synchronize", "Memcpy", "EventQuery"
    return {event.key: event.count for event in profile.key_averages() if any(word in event.key for word in words)}


@pytest.mark.gpu
def test_a_wait_would_be_noticed():
    with waits_are_errors(), pytest.raises(RuntimeError, match="synchronizing"):
        search_blocks(*published_shape(500)).density().max().item()


def test_another_default_dtype_changes_nothing():
    query, key, _ = make_qkv(300)
    expected = both_implementations(query, key, SPARSE)
    recall = attention_recall(query, key, expected.to("cpu")).mean
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert both_implementations(query, key, SPARSE) == expected
        assert torch.equal(attention_recall(query, key, expected.to("cpu")).mean, recall)
        assert expected.density().dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_tracers_see_one_operator():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    query, key, _ = make_qkv(100, head_dim=16)

    def search(query, key):
        return search_blocks(query, key, SPARSE).to_block_mask().kv_indices

    called = [str(node.target) for node in make_fx(search)(query, key).graph.nodes if node.op == "call_function"]
    assert called[0].startswith("flexprefill.search_words")
    assert any(name.startswith("flexprefill.index_lists") for name in called)
    with FakeTensorMode() as mode:
        words = search_blocks(mode.from_tensor(query), mode.from_tensor(key), SPARSE).words
    assert tuple(words.shape) == (*query.shape[:2], 7, 1)


def test_the_operator_takes_a_rules_settings_in_their_order():
    from flexprefill.search.rule import Rule

    names = [argument.name for argument in torch.ops.flexprefill.search_words.default._schema.arguments]
    assert names[2 : 2 + len(Rule._fields)] == list(Rule._fields)


def test_a_launch_that_is_kept_is_that_of_the_call_alone():
    from flexprefill.search.kernels import launch
    from flexprefill.search.rule import Rule

    rule = Rule.of(PrefillConfig(), scale=0.1, last_chunk=True)
    cpu, common = torch.device("cpu"), launch.SearchLaunch(True, 128, 4, 128)
    plain = (1, 8, 300, 64), cpu, 2, 300, rule, common
    shape, kept = plain[0], launch._plan_search
    others = [(*shape[:i], size, *shape[i + 1 :]) for i, size in enumerate((2, 4, 200, 128))]
    changed = [(other, *plain[1:]) for other in others]
    changed += [(*plain[:2], 4, *plain[3:]), (*plain[:3], 400, *plain[4:])]
    settings = {
        "log2_alpha": -1.0, "block_size": 64, "sink_blocks": 1, "window_blocks": 1, "last_full_blocks": 0,
        "min_blocks": 1, "kv_masks": True, "first_key": True, "log2_alphas": (-1.0,) * 8,
    }  # fmt: skip
    changed += [(*plain[:4], rule._replace(**{name: setting}), common) for name, setting in settings.items()]
    for name, setting in {"hopper": False, "d_step": 32, "programs": 2, "registers": None}.items():
        changed.append((*plain[:5], common._replace(**{name: setting})))
    changed += [(*arguments[:5], common._replace(hopper=False)) for arguments in changed]
    for _ in range(2):
        for arguments in (plain, *changed):
            assert kept(*arguments) == kept.__wrapped__(*arguments)
    # a scale's sign is not told apart where it is 0, so no scale may be part of a launch
    for scale in (0.0, -0.0, 0.5):
        assert kept.__wrapped__(*plain[:4], rule._replace(scale=scale), common) == kept(*plain)
