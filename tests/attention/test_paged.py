"""prefill_attention over keys and values in pages, against dense attention under the map in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import make_qkv
from support.oracle import masked_attention, relative_error
from support.paged import in_pages, interleaved, laid_in
from torch.nn.attention.flex_attention import AuxRequest

from flexprefill import (
    AttentionVariant,
    BlockMap,
    FlexPrefillError,
    ListBuffers,
    PagedKV,
    PageMeans,
    PrefillConfig,
    create_prefill_block_mask,
    explain_backend,
    prefill_attention,
    search_blocks,
)
from flexprefill.attention import paged as over_pages
from flexprefill.blockmap.block_mask import causal_mask_in_places, offsets_at
from flexprefill.blockmap.places import ABSENT, lists_in_places
from flexprefill.runtime.listeners import listen

LEAN = PrefillConfig(block_size=16, alpha=0.7, sink_blocks=1, window_blocks=1, last_full_blocks=1)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def check(query, key, value, paged, config, **call):
    """The output is that of the kept blocks alone, and says so."""
    block_map = search_blocks(query, key, config)
    output = prefill_attention(query, paged, config=config, **call)
    expected = masked_attention(query, key, value, block_map)
    assert output.dtype == query.dtype
    assert relative_error(output, expected) <= TOLERANCE[query.dtype]
    return block_map


@pytest.mark.slow
def test_chunks_over_shuffled_pages_that_hold_whole_blocks():
    densities = []
    # chunks begin inside blocks and pages, and the last page is short
    for (q_len, kv_len), page_size in itertools.product([(300, 300), (131, 333), (50, 301), (2, 490)], (16, 48)):
        query, key, value = make_qkv(q_len, kv_len, heads=4, kv_heads=2)
        paged = in_pages(key, value, page_size)
        assert explain_backend(query, paged, config=LEAN).gathers is None
        densities.append(check(query, key, value, paged, LEAN).density().mean().item())
    assert min(densities) < 0.5


def test_nothing_is_gathered_where_nothing_says_so(monkeypatch):
    query, key, value = make_qkv(131, 333, heads=4, kv_heads=2)
    paged = in_pages(key, value, 48)
    monkeypatch.setattr(PagedKV, "gather", None)
    for buffers in (None, ListBuffers()):
        check(query, key, value, paged, LEAN, buffers=buffers, block_map=search_blocks(query, key, LEAN))


def test_two_requests_that_share_a_prefix():
    query, key, value = make_qkv(84, 212, heads=4, kv_heads=2)
    _, other_key, other_value = make_qkv(84, 212, heads=4, kv_heads=2, seed=1)
    other_key[:, :, :128], other_value[:, :, :128] = key[:, :, :128], value[:, :, :128]
    tables = torch.tensor([[7, 2, 5, 0, 3, 9, 1], [7, 2, 5, 0, 8, 4, 6]], dtype=torch.int32)
    pages = laid_in((10, 32), torch.cat([key, other_key]), torch.cat([value, other_value]), tables)
    means = PageMeans()
    check(query, key, value, PagedKV(*pages, tables[:1], 212), LEAN, means=means)
    check(query, other_key, other_value, PagedKV(*pages, tables[1:], 212), LEAN, means=means)
    layer = laid_in((10, 32), torch.cat([other_key, key]), torch.cat([other_value, value]), tables)
    first_of_layer = PagedKV(*pages, tables[:1], 212).of_layer(*layer)
    check(query, other_key, other_value, first_of_layer, LEAN)


def test_what_is_not_finite_stays_where_it_is_seen():
    query, key, value = make_qkv(131, 333, heads=4, kv_heads=2)
    key[0, 0, 200] = torch.nan
    output = prefill_attention(query, in_pages(key, value, 48), config=LEAN)
    wrong = masked_attention(query, key, value, search_blocks(query, key, LEAN)).isnan()
    assert torch.equal(output.isnan(), wrong) and wrong.any() and not wrong.all()


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(
    st.integers(17, 300), st.integers(33, 300), st.sampled_from([16, 32, 80]), st.floats(0, 1), st.integers(0, 2**31)
)
def test_any_map_over_any_pages(q_len, kv_len, page_size, share, seed):
    query, key, value = make_qkv(min(q_len, kv_len), kv_len, heads=4, kv_heads=2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 4, -(-query.shape[2] // 16), -(-kv_len // 16))
    sizes = {"q_len": query.shape[2], "kv_len": kv_len, "block_size": 16}
    block_map = BlockMap.from_dense(torch.rand(shape, generator=generator) < share, **sizes)
    output = prefill_attention(query, in_pages(key, value, page_size, seed=seed), block_map=block_map)
    expected = masked_attention(query, key, value, block_map).nan_to_num(0)
    assert (output - expected).abs().max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "block_size", "page_size", "batch"),
    [
        pytest.param(torch.bfloat16, 128, 128, 1, marks=pytest.mark.release),
        (torch.float16, 128, 64, 2),
        (torch.bfloat16, 64, 16, 1),
    ],
)
def test_dtypes_batches_and_pages_that_are_parts_of_blocks(dtype, block_size, page_size, batch):
    config = PrefillConfig(alpha=0.8, block_size=block_size, sink_blocks=1, window_blocks=1, last_full_blocks=0)
    for q_len, kv_len in ((600, 1411), (130, 1000)):
        query, key, value = make_qkv(q_len, kv_len, batch=batch, heads=4, kv_heads=2, dtype=dtype)
        paged = in_pages(key, value, page_size)
        if page_size == 128:
            paged = interleaved(paged)
        assert explain_backend(query, paged, config=config).gathers is None
        assert check(query, key, value, paged, config).density().mean() < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("page_size", [24, 100])
def test_pages_that_share_no_piece_with_blocks_are_gathered_and_that_is_said(page_size):
    query, key, value = make_qkv(131, 333, heads=4, kv_heads=2)
    paged = in_pages(key, value, page_size)
    assert explain_backend(query, paged, config=LEAN).gathers == (
        f"pages of {page_size} keys and blocks of 16 have no common divisor of 16 or more"
    )
    check(query, key, value, paged, LEAN)


def test_pages_head_by_head_are_gathered_and_that_is_said():
    query, key, value = make_qkv(131, 333, heads=4, kv_heads=2)
    paged = in_pages(key, value, 48)
    assert paged.in_a_row() is not None
    pages = [tensor.contiguous() for tensor in (paged.pages_of_keys, paged.pages_of_values)]
    by_head = PagedKV(*pages, paged.block_table, 333)
    assert "do not stand one behind the other" in explain_backend(query, by_head, config=LEAN).gathers
    assert all(map(torch.equal, by_head.gather(), (key, value)))
    assert search_blocks(query, by_head, LEAN) == search_blocks(query, key, LEAN)
    alone = PagedKV(pages[0][:1], pages[1][:1], torch.zeros(1, 1, dtype=torch.int64), 48)
    assert alone.in_a_row() is not None and alone.why_gathered(16) is None


def test_lists_of_pieces_that_take_more_than_a_copy_are_not_made():
    query, key, value = make_qkv(4096, heads=16, kv_heads=1, head_dim=16, dtype=torch.float16)
    config = PrefillConfig(block_size=32)
    said = "lists of pieces of 16 keys would take 4,194,304 bytes, and copies of the keys and values 262,144"
    assert said in explain_backend(query, in_pages(key, value, 16), config=config).gathers
    assert explain_backend(query, in_pages(key, value, 32), config=config).gathers is None
    assert explain_backend(query[:, :, :160], in_pages(key, value, 16), config=config).gathers is None


def test_dense_calls_gather_and_say_so():
    query, key, value = make_qkv(131, 333, heads=4, kv_heads=2)
    paged, means = in_pages(key, value, 48), PageMeans()
    every = BlockMap.causal(1, 4, q_len=131, kv_len=333, block_size=16)
    short = PrefillConfig(block_size=16, dense_below=334)
    choice = explain_backend(query, paged, config=short)
    assert choice.dense and choice.gathers == "dense attention takes keys in a row" and "334" in choice.reason
    output = prefill_attention(query, paged, config=short, means=means)
    assert relative_error(output, masked_attention(query, key, value, every)) <= 2e-6
    step = prefill_attention(query[:, :, -1:], paged, config=LEAN, means=means)
    assert relative_error(step, output[:, :, -1:]) <= 2e-6


def test_the_mask_alone_is_causal_and_shows_no_other_page():
    """Lists and mask hide what the other would: so the mask is looked at without lists, and the lists without it."""
    _, key, value = make_qkv(1, 333, batch=2)
    for page_size, block_size in ((48, 16), (16, 64), (64, 64)):
        paged = in_pages(key, value, page_size)
        places = paged.places(block_size)
        words = torch.zeros(2, 1, dtype=torch.int32)
        mod = causal_mask_in_places(offsets_at(words, 200), places.positions)
        slots = torch.arange(paged.pages_of_keys.shape[0] * page_size)
        seen = mod(torch.arange(2)[:, None, None], None, torch.arange(133)[:, None], slots)
        position = torch.full((2, len(slots)), ABSENT)
        for entry in range(2):
            for place in range(333):
                page = paged.block_table[entry, place // page_size]
                position[entry, page * page_size + place % page_size] = place
        # behind the last key stand slots of the last page: no query is there to see them
        assert torch.equal(seen, position[:, None] <= torch.arange(200, 333)[:, None])

        every = BlockMap.causal(2, 3, q_len=133, kv_len=333, block_size=block_size)
        lists = lists_in_places(every.words, every.geometry, places)
        for counts, indices in (lists[:2], lists[2:]):
            assert indices.is_contiguous() and indices.shape[3] * places.size >= len(slots)
            for b, h, row in itertools.product(range(2), range(3), range(counts.shape[2])):
                listed = indices[b, h, row, : counts[b, h, row]].tolist()
                assert len(set(listed)) == len(listed) and (places.positions[b, :: places.size][listed] < 333).all()
        listed = lists[0] + lists[2]
        last = 200 + torch.arange(counts.shape[2]).add(1).mul(block_size).clamp(max=133) - 1
        visible = ((last // block_size + 1) * block_size).clamp(max=-(-333 // places.size) * places.size) // places.size
        assert torch.equal(listed[0, 0].long(), visible)


def test_listeners_hear_of_maps_and_of_keys_in_a_row():
    query, key, value = make_qkv(131, 333, heads=4, kv_heads=2)
    heard = []

    class Hearing:
        def hear_map(self, block_map, searched, mask_mods):
            heard.append(block_map)

        def hear_attention(self, attention, config):
            heard.append(attention.key)

    with listen(Hearing()):
        prefill_attention(query, in_pages(key, value, 48), config=LEAN)
    heard_key, heard_map = heard
    assert torch.equal(heard_key, key) and heard_map == search_blocks(query, key, LEAN)


REFUSED = {
    "value": ({"value": torch.zeros(1, 2, 96, 64)}, "value must be None with a PagedKV"),
    "variant": ({"variant": AttentionVariant(sliding_window=8)}, "variant cannot be combined with a PagedKV"),
    "mask_mod": ({"mask_mod": lambda b, h, q, k: q >= k}, "mask_mod cannot be combined with a PagedKV"),
    "score_mod": ({"score_mod": lambda s, b, h, q, k: s}, "score_mod cannot be combined with a PagedKV"),
    "guard": ({"config": PrefillConfig(guard=0.9)}, "config.guard cannot be combined with a PagedKV"),
    "scorer": ({"config": PrefillConfig(scorer="exact")}, "config.scorer 'exact' cannot be combined with a PagedKV"),
    "mean_correction": (
        {"config": PrefillConfig(mean_correction=True)},
        "config.mean_correction cannot be combined with a PagedKV",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_pages_cannot_give_is_refused_by_name(what):
    query, key, value = make_qkv(96, heads=4, kv_heads=2)
    paged = in_pages(key, value, 16)
    changes, message = REFUSED[what]
    for call in (prefill_attention, explain_backend):
        with pytest.raises(ValueError, match=f"^{message}") as raised:
            call(query, paged, **changes)
        assert what == "value" or "pass the tensors of PagedKV.gather()" in str(raised.value)
    if what in ("variant", "guard", "scorer"):
        with pytest.raises(ValueError, match=f"^{message}"):
            search_blocks(query, paged, **changes)


def test_other_calls_and_other_queries_are_refused():
    query, key, value = make_qkv(96, heads=4, kv_heads=2)
    paged = in_pages(key, value, 16)
    with pytest.raises(TypeError, match="key must be a tensor.*got a PagedKV"):
        create_prefill_block_mask(query, paged)
    for bad, message in (
        (query[:, :3], "query must have a multiple of key's heads"),
        (query[..., :32], "key must have query's head dimension 32, got 64"),
        (torch.cat([query] * 2, 2), "query .* must be no longer than key"),
        (torch.cat([query] * 2), "key must have query's batch size 2, got 1"),
    ):
        for call in (search_blocks, prefill_attention):
            with pytest.raises(ValueError, match=message):
                call(bad, paged)
    with pytest.raises(TypeError, match="key must have query's dtype torch.float16, got torch.float32"):
        prefill_attention(query.half(), paged)
    with pytest.raises(TypeError, match="value must be a tensor .*, got NoneType"):
        prefill_attention(query, key)
    with pytest.raises(FlexPrefillError, match="return_aux is not supported by FlexAttention on cpu"):
        prefill_attention(query, paged, return_aux=AuxRequest(lse=True))
    with pytest.raises(Exception, match=r"torch.compile cannot be combined with a PagedKV"):
        torch.compile(lambda q: search_blocks(q, paged), fullgraph=True, backend="eager")(query)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pages_of_keys": None}, TypeError, "pages_of_keys must be a tensor .*page size, D.*, got NoneType"),
        ({"pages_of_values": torch.zeros(3, 2, 16, 5)}, ValueError, "pages_of_values must have a head dimension"),
        ({"pages_of_values": torch.zeros(3, 2, 8, 64)}, ValueError, "pages_of_values must have the pages, heads and"),
        ({"pages_of_values": torch.zeros(3, 2, 16, 64).half()}, TypeError, "pages_of_values must have the dtype"),
        ({"pages_of_values": torch.zeros(3, 2, 16, 64, device="meta")}, ValueError, "pages_of_values must be on the"),
        ({"block_table": [[0, 1]]}, TypeError, "block_table must be a tensor of int32 or int64.*, got list"),
        ({"block_table": torch.zeros(1, 2)}, TypeError, "block_table must be .*, got torch.float32"),
        ({"block_table": torch.tensor([0, 1])}, ValueError, r"block_table must be \[B, n\].*got \[2\]"),
        ({"kv_len": 49}, ValueError, "block_table must be .* at least 4 for kv_len=49 in pages of 16"),
        ({"kv_len": 0}, ValueError, "kv_len must be at least 1"),
        ({"kv_len": 2.0}, TypeError, "kv_len must be an int"),
        ({"block_table": torch.tensor([[0, 3]])}, ValueError, "block_table must name pages 0 … 2, got 0 … 3"),
        ({"block_table": torch.tensor([[-1, 2]])}, ValueError, "block_table must name pages 0 … 2, got -1 … 2"),
        ({"block_table": torch.tensor([[2, 2]])}, ValueError, "block_table must name a page at most once"),
    ],
)
def test_pages_of_another_kind_are_refused(change, error, message):
    fitting = {
        "pages_of_keys": torch.zeros(3, 2, 16, 64),
        "pages_of_values": torch.zeros(3, 2, 16, 64),
        "block_table": torch.tensor([[2, 0, -1]]),
        "kv_len": 20,
    }
    paged = PagedKV(**fitting)  # the entry behind the last key is not looked at
    with pytest.raises(error, match=message):
        PagedKV(**(fitting | change))
    with pytest.raises(ValueError, match="pages_of_keys must be 3 pages of 16 keys as in the other layer, got 2 of 16"):
        PagedKV(*[fitting["pages_of_keys"]] * 2, torch.tensor([[0, 1]]), 20).of_layer(
            *[fitting["pages_of_keys"][:2]] * 2
        )
    assert paged.page_size == 16 and paged.batch == 1


def test_which_kernel_reads_pages_on_a_gpu(machine, monkeypatch):
    """The choice alone, for a machine that is not here."""
    from support.machines import PUBLISHED

    machine()
    query, key, value = make_qkv(256, 512, heads=4, kv_heads=2, head_dim=128, dtype=torch.bfloat16)
    monkeypatch.setattr(over_pages.Call, "request", lambda call: PUBLISHED._replace(block_size=call.block_size))
    config = PrefillConfig(dense_below=0)
    for page_size, backend, name, why in (
        (256, "auto", "flash", over_pages.FLASH_GATHERS),
        (128, "flash", "flash", over_pages.FLASH_GATHERS),
        (32, "triton", "triton", "pieces of 32 keys"),
        (24, "triton", "triton", "no common divisor"),
    ):
        choice = explain_backend(query, in_pages(key, value, page_size), config=config, backend=backend)
        assert choice.name == name and why in choice.gathers
    whole = in_pages(key, value, 256)
    choice = explain_backend(query, whole, config=config, backend="triton")
    assert (choice.name, choice.gathers) == ("triton", None)
    # keys and values in turns, as engines keep them: offsets grow twice as fast as the number of elements
    both = torch.zeros(4, 128, 4, 2, 64)
    pages = both[..., 0, :].transpose(1, 2), both[..., 1, :].transpose(1, 2)
    assert PagedKV(*pages, torch.tensor([[0]]), 128).reach == both.numel() - 64
    monkeypatch.setattr(over_pages, "MAX_ELEMENTS", 100_000)
    assert "the pages span 327,680 elements" in explain_backend(query, whole, config=config, backend="triton").gathers


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("page_size", "dtype"),
    [
        *((size, torch.bfloat16) for size in (16, 64, 128, 256, 100)),
        *((128, dtype) for dtype in (torch.float16, torch.float32)),
    ],
)
def test_pages_on_a_gpu(page_size, dtype):
    shape = {"heads": 8, "kv_heads": 2, "head_dim": 128, "dtype": dtype, "device": "cuda"}
    config = PrefillConfig(alpha=0.5, dense_below=0)
    means = PageMeans() if page_size % 128 == 0 else None
    for q_len, kv_len in ((4096, 4096), (1000, 5001), (2048, 8192)):
        query, key, value = make_qkv(q_len, kv_len, **shape)
        paged = in_pages(key, value, page_size, more=200 - -(-kv_len // page_size) if means is not None else 3)
        if means is not None:
            means.forget()
        found = search_blocks(query, key, config)
        assert search_blocks(query, paged, config, means=means) == found and found.density().mean() < 0.8
        gathers = explain_backend(query, paged, config=config, backend="triton").gathers
        assert (gathers is None) == (page_size % 128 == 0)
        expected = prefill_attention(query, key, value, config, backend="triton")
        for pages, backend in ((paged, "auto"), (paged, "triton"), (interleaved(paged), "triton")):
            output = prefill_attention(query, pages, config=config, means=means, backend=backend)
            assert relative_error(output, expected) <= 5e-3
        if (page_size, dtype) == (128, torch.bfloat16):
            asked = {"config": config, "backend": "triton", "return_aux": AuxRequest(lse=True)}
            _, aux = prefill_attention(query, paged, **asked)
            _, wanted = prefill_attention(query, key, value, **asked)
            assert (aux.lse - wanted.lse).abs().max() <= 1e-2


@pytest.mark.gpu
def test_pages_are_gathered_for_flash(flash):
    query, key, value = make_qkv(1000, 5001, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda")
    output = prefill_attention(query, in_pages(key, value, 128), config=PrefillConfig(alpha=0.5), backend="flash")
    expected = prefill_attention(query, key, value, PrefillConfig(alpha=0.5), backend="flash")
    assert relative_error(output, expected) <= 5e-3


@pytest.mark.gpu
def test_two_batch_entries_on_a_gpu():
    shape = {"batch": 2, "heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": torch.bfloat16, "device": "cuda"}
    query, key, value = make_qkv(1000, 3000, **shape)
    config = PrefillConfig(alpha=0.5, dense_below=0)
    for page_size, backend in ((64, "auto"), (128, "auto"), (128, "triton")):
        output = prefill_attention(query, in_pages(key, value, page_size), config=config, backend=backend)
        assert relative_error(output, prefill_attention(query, key, value, config)) <= 5e-3
