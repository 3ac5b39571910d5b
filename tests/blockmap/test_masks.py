import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import DEVICE, make_qkv
from support.oracle import masked_attention, relative_error
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from flexprefill import BlockMap, ListBuffers, PrefillConfig, prefill_attention, search_blocks
from flexprefill.blockmap import masking as masks
from flexprefill.blockmap.block_mask import causal_mask
from flexprefill.blockmap.masking import classify_blocks

CONFIG = PrefillConfig(alpha=0.5, sink_blocks=1, window_blocks=1, last_full_blocks=1, dense_below=0)


def mask_mods(seed, batch, kv_len, q_len):
    """Of FlexAttention's documentation, and with results that depend on the batch entry, the head or neither."""
    generator = torch.Generator().manual_seed(seed)
    document = (torch.rand(batch, kv_len, generator=generator) < 0.03).cumsum(1).to(DEVICE)
    reach = torch.randint(1, kv_len + 1, (4,), generator=generator).to(DEVICE)
    offset = kv_len - q_len
    return {
        "documents": lambda b, h, q, k: document[b, q + offset] == document[b, k],
        "window": lambda b, h, q, k: q + offset - k < reach[0],
        "prefix": lambda b, h, q, k: k < reach[1],
        "heads": lambda b, h, q, k: q + offset - k < reach[h],
        "everything": lambda b, h, q, k: torch.ones((), dtype=torch.bool, device=DEVICE),
        "nothing": lambda b, h, q, k: torch.zeros_like(k, dtype=torch.bool),
        "rows": lambda b, h, q, k: q % 3 > 0,
    }


@st.composite
def masked_maps(draw):
    b = draw(st.sampled_from([16, 32]))
    kv_len = draw(st.integers(1, 12 * b))
    q_len = draw(st.one_of(st.just(kv_len), st.integers(1, kv_len)))
    batch, heads, seed = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3])), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(batch, heads, -(-q_len // b), -(-kv_len // b), generator=generator) < 0.6
    block_map = BlockMap.from_dense(dense.to(DEVICE), q_len=q_len, kv_len=kv_len, block_size=b)
    mods = mask_mods(seed, batch, kv_len, q_len)
    return block_map, mods[draw(st.sampled_from(sorted(mods)))]


def elements(mask_mod, block_map):
    """The mask_mod on every element: bool [B, H, S_q, S_kv]."""
    sizes = (*block_map.shape[:2], block_map.q_len, block_map.kv_len)
    index = torch.meshgrid(*(torch.arange(size, device=DEVICE) for size in sizes), indexing="ij")
    return mask_mod(*index).expand(sizes).cpu()


def expected_kinds(mask_mod, block_map):
    """By plain loops: which kept blocks are partial and which full, and the allowed elements."""
    allowed, size, offset = elements(mask_mod, block_map), block_map.block_size, block_map.offset
    q, k = torch.arange(block_map.q_len)[:, None] + offset, torch.arange(block_map.kv_len)
    allowed = allowed & (q >= k)
    kept = block_map.to_dense().cpu()
    partial, full = torch.zeros_like(kept), torch.zeros_like(kept)
    for n, h, i, j in kept.nonzero().tolist():
        block = allowed[n, h, i * size : (i + 1) * size, j * size : (j + 1) * size]
        full[n, h, i, j] = block.all() and (j + 1) * size <= block_map.kv_len
        partial[n, h, i, j] = block.any() and not full[n, h, i, j]
    return partial, full, allowed


def listed(counts, indices):
    dense = torch.zeros(indices.shape, dtype=torch.bool)
    for place in torch.stack(torch.meshgrid(*map(torch.arange, counts.shape), indexing="ij"), -1).flatten(0, 2):
        row = tuple(place.tolist())
        entries = indices[row][: counts[row]].tolist()
        assert entries == sorted(set(entries)) and not indices[row][counts[row] :].any()
        dense[(*row, entries)] = True
    return dense


def check_lists(mask, mask_mod, block_map):
    lists = mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices
    assert all(part.dtype == torch.int32 and part.is_contiguous() for part in lists)
    assert mask.kv_indices.shape == mask.full_kv_indices.shape == block_map.shape
    partial, full, allowed = expected_kinds(mask_mod, block_map)
    assert torch.equal(listed(*(part.cpu() for part in lists[:2])), partial)
    assert torch.equal(listed(*(part.cpu() for part in lists[2:])), full)
    assert torch.equal(elements(mask.mask_mod, block_map), allowed)
    assert mask.BLOCK_SIZE == (block_map.block_size,) * 2


@settings(deadline=None, max_examples=60)
@given(masked_maps())
@pytest.mark.usefixtures("poisoned_memory")
def test_blocks_are_dropped_partial_or_full_as_the_mask_mod_leaves_them(case):
    block_map, mask_mod = case
    check_lists(block_map.with_mask(mask_mod), mask_mod, block_map)
    # made once for all heads and layers
    batch, heads, size = *block_map.shape[:2], block_map.block_size
    sizes = {"q_len": block_map.q_len, "kv_len": block_map.kv_len, "block_size": size, "device": DEVICE}
    check_lists(block_map & BlockMap.causal(batch, heads, **sizes).with_mask(mask_mod), mask_mod, block_map)


@settings(deadline=None, max_examples=30)
@given(masked_maps())
def test_a_block_mask_of_pytorchs_own_is_intersected(case):
    block_map, mask_mod = case
    sizes = *block_map.shape[:2], block_map.q_len, block_map.kv_len
    theirs = create_block_mask(mask_mod, *sizes, device=DEVICE, BLOCK_SIZE=block_map.block_size)
    ours = block_map & theirs
    partial, full, allowed = expected_kinds(mask_mod, block_map)
    found_partial = listed(ours.kv_num_blocks.cpu(), ours.kv_indices.cpu())
    found_full = listed(ours.full_kv_num_blocks.cpu(), ours.full_kv_indices.cpu())
    # PyTorch takes a short last row of blocks for cut, and a block that the causal edge empties is only partial there
    assert not (full & ~found_full)[:, :, : block_map.q_len // block_map.block_size].any()
    assert not (found_full & ~full).any() and not (partial & ~found_partial).any()
    assert torch.equal(elements(ours.mask_mod, block_map), allowed)


@settings(deadline=None, max_examples=20)
@given(masked_maps(), st.sampled_from([1, 5000, 100000]))
def test_pieces_change_no_classification(case, piece):
    block_map, mask_mod = case
    before = classify_blocks(mask_mod, block_map.words, block_map.geometry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "PIECE", piece)
        assert all(
            torch.equal(a, b)
            for a, b in zip(before, classify_blocks(mask_mod, block_map.words, block_map.geometry), strict=True)
        )


@settings(deadline=None, max_examples=12)
@given(masked_maps())
def test_the_list_kernel_takes_what_a_mask_leaves_whole(case):
    from flexprefill.blockmap import index_lists_kernel as lists_kernel
    from flexprefill.blockmap.index_lists import index_lists

    block_map, mask_mod = case
    uncut = classify_blocks(mask_mod, block_map.words, block_map.geometry).whole
    sizes = block_map.q_len, block_map.kv_len, block_map.block_size, False
    plain = index_lists(block_map.words.cpu(), *sizes, uncut.cpu())
    kernel = tuple(torch.full(tensor.shape, 7, dtype=torch.int32, device=DEVICE) for tensor in plain)
    lists_kernel.fill_lists(kernel, block_map.words, block_map.geometry, uncut=uncut)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(kernel, plain, strict=True))


def test_attention_under_a_block_mask_equals_attention_under_its_mask_mod():
    query, key, value = (tensor.to(DEVICE) for tensor in make_qkv(900, heads=4, kv_heads=2))
    document = torch.tensor([0, 0, 0, 1, 1, 2], device=DEVICE).repeat_interleave(150)

    def documents(b, h, q, k):
        return document[q] == document[k]

    sizes = {"q_len": 900, "kv_len": 900, "block_size": 128, "device": DEVICE}
    mask = BlockMap.causal(1, 1, **sizes).with_mask(documents)
    block_map = search_blocks(query, key, CONFIG)
    assert (block_map & mask).kv_num_blocks.sum() < block_map.counts().sum()
    expected = masked_attention(query, key, value, block_map, mask=document[:, None] == document)
    for buffers in (None, ListBuffers()):
        output = prefill_attention(query, key, value, CONFIG, mask_mod=mask, buffers=buffers)
        assert relative_error(output, expected) <= (1e-5 if DEVICE == "cpu" else 2e-3)


def test_masks_that_do_not_fit_a_map_are_refused():
    block_map = BlockMap.causal(2, 4, q_len=64, kv_len=64, block_size=16)

    def mask(batch=1, heads=1, length=64, block=16):
        return create_block_mask(causal_mask, batch, heads, length, length, device="cpu", BLOCK_SIZE=block)

    assert isinstance(block_map & mask(2, 4), BlockMask)
    for wrong, message in (
        (mask(length=80), r"block_mask must have the map's seq_lengths \(64, 64\), got \(80, 80\)"),
        (mask(block=32), r"block_mask must have the map's BLOCK_SIZE \(16, 16\), got \(32, 32\)"),
        (mask(heads=2), r"block_mask must be of batch 1 or 2 and heads 1 or 4, got \[1, 2\]"),
        (mask(batch=3), r"block_mask must be of batch 1 or 2 and heads 1 or 4, got \[3, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            block_map & wrong
    with pytest.raises(TypeError, match="mask_mod must be a function.*got BlockMask"):
        block_map.with_mask(mask())
    with pytest.raises(TypeError, match="& needs a BlockMap on both sides, got int"):
        block_map & 3
