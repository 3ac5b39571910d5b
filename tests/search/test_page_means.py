"""The search over keys in pages: the maps of gathered keys, and means that are kept by page."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import DEVICE, make_qkv
from support.paged import in_pages, laid_in

from flexprefill import KeyMeans, PagedKV, PageMeans, PrefillConfig, search_blocks
from flexprefill.search import operator as op

LEAN = PrefillConfig(block_size=16, alpha=0.5, sink_blocks=1, window_blocks=1, last_full_blocks=1)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.one_of(st.sampled_from([16, 32, 48, 128]), st.integers(1, 150)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1, 2]),
    st.integers(0, 2**31),
)
def test_the_map_is_that_of_gathered_keys(q_len, kv_len, page_size, dtype, batch, seed):
    query, key, value = make_qkv(min(q_len, kv_len), kv_len, batch=batch, heads=4, kv_heads=2, dtype=dtype, seed=seed)
    paged = in_pages(key, value, page_size, seed=seed)
    assert all(map(torch.equal, paged.gather(), (key, value)))
    assert torch.equal(paged.gather_keys(kv_len // 3), key[:, :, kv_len // 3 :])
    assert search_blocks(query, paged, LEAN) == search_blocks(query, key, LEAN)
    assert search_blocks(query, paged, LEAN, means=PageMeans() if page_size % 16 == 0 else None) == search_blocks(
        query, key, LEAN
    )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("page_size", "dtype"),
    [
        (5, torch.bfloat16),
        (16, torch.float32),
        pytest.param(48, torch.float32, marks=pytest.mark.slow),
        pytest.param(48, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_the_kernel_pools_to_the_bits_of_the_kernel_for_keys_in_a_row(page_size, dtype):
    query, key, value = make_qkv(100, 213, batch=2, heads=4, kv_heads=2, head_dim=24, dtype=dtype, device=DEVICE)
    paged = in_pages(key, value, page_size)
    assert torch.equal(op.pool_pages(paged, 16, "triton"), op.pool_keys(key, 16, "triton"))
    settings = [{}, {"mask_heads": "kv"}, {"score_rows": "visible"}]
    for setting in settings if page_size == 48 else []:
        config = PrefillConfig(**(LEAN.to_dict() | setting))
        found = search_blocks(query, paged, config, implementation="triton")
        assert found == search_blocks(query, key, config, implementation="reference")


def spoilt(paged, pages):
    """The same with NaN for the keys of some pages."""
    keys = paged.pages_of_keys.clone()
    keys[pages] = torch.nan
    return PagedKV(keys, paged.pages_of_values, paged.block_table, paged.kv_len)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_cached_prefix_is_not_pooled_again(implementation):
    query, key, value = make_qkv(64, 200, heads=4, kv_heads=2, device=DEVICE)
    other_query, other_key, other_value = make_qkv(72, 200, heads=4, kv_heads=2, device=DEVICE, seed=1)
    other_key[:, :, :128], other_value[:, :, :128] = key[:, :, :128], value[:, :, :128]
    tables = torch.tensor([[7, 2, 5, 0, 3, 9, 1], [7, 2, 5, 0, 8, 4, 6]], dtype=torch.int32, device=DEVICE)
    pages = laid_in((10, 32), torch.cat([key, other_key]), torch.cat([value, other_value]), tables)
    means = PageMeans()
    call = {"implementation": implementation}

    first = PagedKV(*pages, tables[:1], 200)
    assert search_blocks(query, first, LEAN, means=means, **call) == search_blocks(query, key, LEAN)
    # the other request's queries begin where the pages that it shares end
    second = PagedKV(*pages, tables[1:], 200)
    expected = search_blocks(other_query, other_key, LEAN)
    assert search_blocks(other_query, spoilt(second, [7, 2, 5, 0]), LEAN, means=means, **call) == expected
    # its own keys are pooled again, because its queries' are new
    assert search_blocks(other_query, second, LEAN, means=means, **call) == expected
    # what was forgotten is pooled again
    means.forget(torch.tensor([2, 5]))
    assert search_blocks(other_query, spoilt(second, [7, 0]), LEAN, means=means, **call) == expected
    assert search_blocks(other_query, spoilt(second, [7, 2, 5, 0]), LEAN, means=means, **call) == expected
    means.forget()
    assert search_blocks(other_query, second, LEAN, means=means, **call) == expected
    assert means.nbytes == 10 * 2 * 2 * 64 * 4 + 10 * 2


def test_each_key_is_pooled_once_but_for_short_blocks(monkeypatch):
    pooled = []

    def pool_keys(key, *arguments, pool=op.reference.pool_keys):
        pooled.append(key.shape[2])
        return pool(key, *arguments)

    monkeypatch.setattr(op.reference, "pool_keys", pool_keys)
    query, key, value = make_qkv(300)
    paged, means = in_pages(key, value, 32), PageMeans()
    maps = [
        search_blocks(
            query[:, :, start:end], PagedKV(paged.pages_of_keys, paged.pages_of_values, paged.block_table, end), LEAN,
            means=means, last_chunk=end == 300,
        )
        for start, end in ((0, 64), (64, 128), (128, 200), (200, 201), (201, 300))
    ]  # fmt: skip
    # as KeyMeans does: 200 is 8 keys into a block, and 201 is 9
    assert pooled == [64, 64, 72, 9, 108]
    own = KeyMeans()
    assert maps == [
        search_blocks(query[:, :, start:end], key[:, :, :end], LEAN, means=own, last_chunk=end == 300)
        for start, end in ((0, 64), (64, 128), (128, 200), (200, 201), (201, 300))
    ]
    # earlier keys that no call has pooled are pooled at once
    last = search_blocks(query[:, :, 201:], paged, LEAN, means=PageMeans())
    assert last == maps[-1] and pooled[-1] == 300


def test_keys_that_a_call_without_a_search_wrote_are_pooled_later():
    query, key, value = make_qkv(64, 128)
    paged, means = in_pages(key, value, 32), PageMeans()
    search_blocks(query, paged, LEAN, means=means)
    changed = in_pages(key.flip(2), value, 32)
    means.written(changed, 128)
    assert search_blocks(query, changed, LEAN, means=means) == search_blocks(query, key.flip(2), LEAN)
    assert PageMeans().written(paged, 128) is None


def test_pages_of_something_else_are_refused():
    query, key, value = make_qkv(100, heads=2, kv_heads=2)
    paged, means = in_pages(key, value, 32), PageMeans()
    search_blocks(query, paged, LEAN, means=means)
    for change, message in (
        (lambda: in_pages(key, value, 32, more=4), "means is of a cache with pages 7, got 8"),
        (lambda: in_pages(key, value, 64, more=5), "means is of a cache with page_size 32, got 64"),
        (lambda: in_pages(key, value, 24), "means is of whole blocks of 16 keys, which pages of 24 do not hold"),
        (lambda: in_pages(key.half(), value.half(), 32), "means is of a cache with dtype torch.float32, got"),
    ):
        with pytest.raises(ValueError, match=message):
            search_blocks(query.to(change().pages_of_keys.dtype), change(), LEAN, means=means)
    with pytest.raises(TypeError, match="means must be a PageMeans with a PagedKV, got KeyMeans"):
        search_blocks(query, paged, LEAN, means=KeyMeans())
    with pytest.raises(TypeError, match="means must be a KeyMeans, got PageMeans"):
        search_blocks(query, key, LEAN, means=means)
    with pytest.raises(TypeError, match="pages must be a tensor of int32 or int64, or None, got list"):
        means.forget([1])
