"""The last query blocks on their own, split over their keys and merged."""

import math
import types

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.inputs import make_qkv
from support.oracle import masked_attention, relative_error
from support.paged import in_pages
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest

from flexprefill import BlockMap, ListBuffers, PrefillConfig, explain_backend, prefill_attention, search_blocks
from flexprefill.attention import steps, tail
from flexprefill.blockmap.block_mask import list_blocks
from flexprefill.runtime.state import forget

CONFIG = PrefillConfig(alpha=0.5, sink_blocks=1, window_blocks=1, last_full_blocks=2, dense_below=0)
LSE = AuxRequest(lse=True)


def listed_attention(query, key, value, listed, block_size, scale):
    """flex_over in plain PyTorch: partial blocks causal by the positions, full blocks whole, from the lists alone."""
    lists, offset = listed.lists, listed.offset
    batch, heads, q_len, _ = query.shape
    kv_len = key.shape[2]  # of all pages, if the keys lie in pages
    rows, columns = -(-q_len // block_size), -(-kv_len // block_size)
    kept = torch.zeros(2, batch, heads, rows, columns, dtype=torch.bool)
    for kind in range(2):
        counts, indices = lists[2 * kind], lists[2 * kind + 1]
        assert counts.shape == (batch, heads, rows) and indices.shape[:3] == counts.shape
        assert counts.is_contiguous() and indices.is_contiguous() and indices.shape == lists[1].shape
        assert counts.dtype == indices.dtype == torch.int32
        for place in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
            found = indices[tuple(place)][: counts[tuple(place)]].long()
            assert not kept[(kind, *place)][found].any()
            kept[(kind, *place)][found] = True
    positions = torch.arange(q_len) + (0 if offset is None else offset[0])
    keys = torch.arange(kv_len)[None] if listed.positions is None else listed.positions
    causal = keys[:, None, None] <= positions[:, None]
    partial, full = (
        each.repeat_interleave(block_size, 2).repeat_interleave(block_size, 3)[:, :, :q_len, :kv_len] for each in kept
    )
    key, value = (tensor.repeat_interleave(heads // key.shape[1], 1) for tensor in (key, value))
    products = (scale * query @ key.transpose(2, 3)).masked_fill(~(partial & causal | full), -math.inf)
    output = products.softmax(-1).nan_to_num() @ value.nan_to_num()  # rows without a block: zeros, as from the kernels
    return output, AuxOutput(lse=products.logsumexp(-1))


@st.composite
def cases(draw):
    block_size = draw(st.sampled_from([16, 32]))
    rows, parts = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    q_len = draw(st.integers(rows * block_size + 1, 12 * block_size))
    kv_len = q_len + draw(st.sampled_from([0, 1, block_size, 25 * block_size - 3]))
    assume(-(-kv_len // block_size) >= parts * (rows + 2))
    blocks_a_page = draw(st.sampled_from([None, 1, 3]))  # None: keys in a row
    return block_size, rows, parts, q_len, kv_len, draw(st.integers(1, 2)), draw(st.booleans()), blocks_a_page


@settings(max_examples=8, deadline=None)
@given(cases(), st.integers(0, 2**31))
@pytest.mark.slow
def test_parts_of_any_map_merge_to_what_one_call_gives(case, seed):
    block_size, rows, parts, q_len, kv_len, batch, with_buffers, blocks_a_page = case
    query, key, value = (
        tensor.double() for tensor in make_qkv(q_len, kv_len, batch=batch, heads=4, kv_heads=2, head_dim=16, seed=seed)
    )
    value = torch.cat([value, -value], 3)[..., :24]
    shape = batch, 4, -(-q_len // block_size), -(-kv_len // block_size)
    dense = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    block_map = BlockMap.from_dense(dense, q_len=q_len, kv_len=kv_len, block_size=block_size)
    buffers = ListBuffers() if with_buffers else None
    read, places = (key, value), None
    if blocks_a_page is not None:
        paged = in_pages(key.float(), value.float(), blocks_a_page * block_size)  # the same numbers
        read, places = [pages.double() for pages in paged.in_a_row()], paged.places(block_size)
    asked = []

    def attend(queries, listed, needs_lse):
        if places is None:  # causal attention by lengths alone is right too, as FlashAttention-4 computes it
            offset = 0 if listed.offset is None else listed.offset[0]
            assert offset == kv_len - queries.shape[2]
        asked.append(needs_lse)
        return listed_attention(queries, *read, listed, block_size, 0.25)

    split = tail.Split(rows, parts)
    for _ in range(2):  # the second one finds the buffers as the first one left them
        lists = tail.lists_in_parts(block_map, split, buffers, places)
        output, aux = tail.attend_in_parts(attend, query, block_map.geometry, split, *lists)
    assert asked == [False, True] * 2
    listed = list_blocks(block_map.words, block_map.geometry)
    whole, whole_aux = listed_attention(query, key, value, listed, block_size, 0.25)
    expected = masked_attention(query, key, value, block_map).nan_to_num(0)
    assert relative_error(whole, expected) <= 1e-12 and relative_error(output, expected) <= 1e-6  # merged in float32
    assert torch.allclose(aux.lse, whole_aux.lse, rtol=1e-6)


@pytest.mark.parametrize(
    ("programs", "kernel", "value_dim", "parts"),
    [(64, "flash", 128, 2), (56, "flash", 128, 7), (32, "triton", 128, 4), (16, "flash", 64, 8), (8, "flash", 128, 8),
     (256, "triton", 128, 2), (1, "triton", 64, 8), (132, "flash", 64, 2), (64, "triton", 64, 4), (64, "flash", 64, 2)],
)  # fmt: skip
def test_the_fewest_parts_that_keep_a_gpu_busy(monkeypatch, programs, kernel, value_dim, parts):
    h200 = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    tail.parts_for.cache_clear()
    try:
        assert tail.parts_for(programs, kernel, value_dim, torch.device("cuda", 0)) == parts
    finally:
        tail.parts_for.cache_clear()


@pytest.fixture
def always(monkeypatch):
    """Splits at every length."""
    monkeypatch.setattr(steps, "TAIL_SPLIT_FROM", 0)
    forget("what was decided of calls")
    yield
    forget("what was decided of calls")


@pytest.fixture(params=["triton", "flash"])
def backend(request):
    if request.param == "flash":
        pytest.importorskip("flash_attn.cute", reason="needs the package flash-attn-4")
    return request.param


@pytest.mark.gpu
def test_long_prompts_are_split_and_what_cannot_be_is_not(backend):
    query, key, value = make_qkv(tail.TAIL_SPLIT_FROM, heads=4, kv_heads=2, dtype=torch.bfloat16, device="cuda")

    def parts(*tensors, config=CONFIG, **arguments):
        choice = explain_backend(*(tensors or (query, key, value)), config, **{"backend": backend, **arguments})
        return choice.tail_parts

    assert parts() == parts(query[:, :, -1000:], key, value) == tail.parts_for(8, backend, 64, query.device)
    shorter = (tensor[:, :, 128:] for tensor in (query, key, value))
    assert parts(*shorter) == parts(query[:, :, -256:], key, value) == parts(last_chunk=False) == 1
    assert parts(config=PrefillConfig(last_full_blocks=0)) == 1
    if backend == "triton":
        assert parts(mask_mod=lambda b, h, q, k: q - k < 1000) == 1
        assert parts(return_aux=AuxRequest(max_scores=True)) == 1


@pytest.mark.gpu
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("q_len", "kv_len", "batch", "head_dim"),
    [(4096, 4096, 1, 128), (2001, 2001, 2, 64), (1024, 4096, 1, 128), (700, 3001, 2, 64)],
)
def test_a_split_call_is_as_right_as_one_that_is_not(backend, q_len, kv_len, batch, head_dim):
    inputs = make_qkv(
        q_len, kv_len, batch=batch, heads=4, kv_heads=2, head_dim=head_dim, dtype=torch.bfloat16, device="cuda"
    )
    choice = explain_backend(*inputs, CONFIG, backend=backend)
    assert choice.tail_parts > 1 and choice.by_itself == (backend == "flash")
    block_map = search_blocks(*inputs[:2], CONFIG)
    exact = masked_attention(*inputs, block_map, dtype=torch.float32)
    theirs = relative_error(masked_attention(*inputs, block_map, dtype=torch.bfloat16), exact)
    buffers = ListBuffers()
    for _ in range(2):
        output = prefill_attention(*inputs, CONFIG, backend=backend, buffers=buffers)
        assert relative_error(output, exact) <= 2 * theirs
        assert relative_error(output[:, :, -256:], exact[:, :, -256:]) <= 2 * theirs
    again, aux = prefill_attention(*inputs, CONFIG, backend=backend, return_aux=LSE)
    assert relative_error(again, exact) <= 2 * theirs
    at_once = PrefillConfig(last_full_blocks=0)  # of a given map, nothing else of the config counts
    _, whole = prefill_attention(*inputs, at_once, block_map=block_map, backend=backend, return_aux=LSE)
    assert (aux.lse - whole.lse).abs().max() <= 1e-3


@pytest.mark.gpu
@pytest.mark.usefixtures("always")
def test_rows_and_parts_without_a_block_are_zero_and_count_nothing(backend):
    inputs = make_qkv(4000, heads=4, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda")
    dense = torch.zeros(1, 4, 32, 32, dtype=torch.bool, device="cuda")
    dense[:, 0, :, 3] = dense[:, 1, :, 30:] = dense[:, 2] = True
    block_map = BlockMap.from_dense(dense, q_len=4000, kv_len=4000, block_size=128)
    output, aux = prefill_attention(*inputs, CONFIG, block_map=block_map, backend=backend, return_aux=LSE)
    exact = masked_attention(*inputs, block_map, dtype=torch.float32).nan_to_num(0)
    theirs = relative_error(masked_attention(*inputs, block_map, dtype=torch.bfloat16).nan_to_num(0), exact)
    assert relative_error(output, exact) <= 2 * theirs
    assert relative_error(output[:, :, -256:], exact[:, :, -256:]) <= 2 * theirs
    assert not output[:, 3].any() and torch.isneginf(aux.lse[:, 3]).all()


@pytest.mark.gpu
@pytest.mark.usefixtures("always")
def test_a_split_call_replays_as_a_cuda_graph(backend):
    inputs = make_qkv(4096, heads=4, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda")
    expected = prefill_attention(*inputs, CONFIG, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = prefill_attention(*inputs, CONFIG, backend=backend)
    output.fill_(math.nan)
    graph.replay()
    assert torch.equal(output, expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("always")
def test_splitting_compiles_once_for_all_lengths(backend):
    from torch._dynamo.utils import counters

    def attend(length):
        inputs = make_qkv(length, heads=2, kv_heads=1, head_dim=128, dtype=torch.bfloat16, device="cuda")
        prefill_attention(*inputs, CONFIG, backend=backend)

    for length in (1024, 1152):
        attend(length)
    before = counters["stats"]["unique_graphs"]
    for length in (1280, 2048, 4096, 4224):
        attend(length)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.gpu
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(("q_len", "kv_len", "page_size"), [(4096, 4096, 128), (700, 5001, 256)])
def test_the_last_rows_over_pages_are_split_too(q_len, kv_len, page_size):
    shape = {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 128, "dtype": torch.bfloat16, "device": "cuda"}
    query, key, value = make_qkv(q_len, kv_len, **shape)
    paged = in_pages(key, value, page_size)
    choice = explain_backend(query, paged, config=CONFIG, backend="triton")
    assert choice.tail_parts > 1 and choice.gathers is None
    output = prefill_attention(query, paged, config=CONFIG, backend="triton")
    expected = prefill_attention(query, key, value, CONFIG, backend="triton")
    assert relative_error(output, expected) <= 5e-3
