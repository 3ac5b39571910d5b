import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import DEVICE, make_qkv
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from flexprefill import BlockMap, PrefillConfig, create_prefill_block_mask, search_blocks
from flexprefill.blockmap.block_mask import causal_mask
from flexprefill.blockmap.index_lists import ListBuffers, index_lists


@st.composite
def maps(draw, *, most_rows=45):
    """Maps whose rows are more than one word, or less, of any number of query blocks up to ``most_rows``."""
    block_size = draw(st.sampled_from([16, 32, 128]))
    kv_len = draw(st.integers(1, 45 * block_size))
    most = min(kv_len, most_rows * block_size)
    q_len = draw(st.one_of(st.just(most), st.integers(1, most)))
    shape = (
        draw(st.sampled_from([1, 2])),
        draw(st.sampled_from([1, 3])),
        -(-q_len // block_size),
        -(-kv_len // block_size),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dense = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    return BlockMap.from_dense(dense.to(DEVICE), q_len=q_len, kv_len=kv_len, block_size=block_size)


def expected_lists(block_map, all_partial):
    """Plain loops over the definition: full means every row of the block sees every key of a whole block."""
    size, dense = block_map.block_size, block_map.to_dense().cpu()
    for row in dense.flatten(0, 1).unbind(0):
        for i, kept in enumerate(row):
            kept = kept.nonzero().flatten().tolist()
            first = block_map.offset + i * size
            full = [] if all_partial else [j for j in kept if (j + 1) * size - 1 <= first]
            yield [j for j in kept if j not in full], full


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("all_partial", [False, True])
def test_the_lists_are_ascending_contiguous_equally_wide_with_zero_tails(all_partial):
    @settings(deadline=None, max_examples=60)
    @given(maps())
    def check(block_map):
        further = (lambda b, h, q, k: q >= 0) if all_partial else None
        mask = block_map.to_block_mask(further)
        lists = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
        assert all(part.dtype == torch.int32 and part.is_contiguous() for part in lists)
        assert mask.kv_indices.shape == mask.full_kv_indices.shape == block_map.shape
        assert mask.kv_num_blocks.shape == mask.full_kv_num_blocks.shape == block_map.shape[:3]
        assert mask.q_indices is None and mask.full_q_indices is None
        rows = zip(*(part.cpu().flatten(0, 2) for part in lists), expected_lists(block_map, all_partial), strict=True)
        for partial_num, partial, full_num, full, (expected_partial, expected_full) in rows:
            columns = partial.shape[0]
            assert partial_num == len(expected_partial) and full_num == len(expected_full)
            assert partial.tolist() == expected_partial + [0] * (columns - len(expected_partial))
            assert full.tolist() == expected_full + [0] * (columns - len(expected_full))
        assert BlockMap.from_block_mask(mask) == block_map

    check()


FOR_KERNELS = maps(most_rows=6 if DEVICE == "cpu" else 45)


@settings(deadline=None, max_examples=12 if DEVICE == "cpu" else 40)
@given(FOR_KERNELS, st.booleans())
def test_the_list_kernel_equals_the_plain_lists(block_map, all_partial):
    from flexprefill.blockmap import index_lists_kernel as lists_kernel

    sizes = block_map.q_len, block_map.kv_len, block_map.block_size, all_partial
    plain = index_lists(block_map.words.cpu(), *sizes)
    kernel = tuple(torch.full(tensor.shape, 7, dtype=torch.int32, device=DEVICE) for tensor in plain)
    lists_kernel.fill_lists(kernel, block_map.words.to(DEVICE), block_map.geometry, all_partial)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(kernel, plain, strict=True))
    # lists that a fuller and an emptier map left behind
    for other in (BlockMap.causal(*block_map.shape[:2], **sizes_of(block_map)), block_map, block_map ^ block_map):
        lists_kernel.fill_lists(kernel, other.words.to(DEVICE), block_map.geometry, all_partial, reused=True)
        expected = index_lists(other.words.cpu(), *sizes)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(kernel, expected, strict=True))


def names_for(block_map, pieces, seed=0):
    """Names of the blocks' pieces in an order of chance, and none for pieces without keys."""
    (batch, _, _, columns), piece = block_map.shape, block_map.block_size // pieces
    count = -(-block_map.kv_len // piece)
    generator = torch.Generator().manual_seed(seed)
    names = torch.full((batch, columns * pieces), -1, dtype=torch.int32)
    for entry in range(batch):
        names[entry, :count] = torch.randperm(3 * count, generator=generator)[:count].int()
    return names


@pytest.mark.slow
@settings(deadline=None, max_examples=8 if DEVICE == "cpu" else 40)
@given(FOR_KERNELS, st.sampled_from([1, 2, 4]))
def test_lists_of_names_name_the_pieces_of_the_listed_blocks(block_map, pieces):
    from flexprefill.blockmap import index_lists_kernel as lists_kernel

    sizes = block_map.q_len, block_map.kv_len, block_map.block_size, False
    names, blocks = names_for(block_map, pieces), index_lists(block_map.words.cpu(), *sizes)
    named = index_lists(block_map.words.cpu(), *sizes, None, names)
    batch, heads, rows, _ = block_map.shape
    for b, h, row in itertools.product(range(batch), range(heads), range(rows)):
        for counts, indices, own_counts, own in ((*blocks[:2], *named[:2]), (*blocks[2:], *named[2:])):
            listed = indices[b, h, row, : counts[b, h, row]].tolist()
            expected = [name for j in listed for name in names[b, j * pieces : (j + 1) * pieces].tolist() if name >= 0]
            assert own[b, h, row].tolist() == expected + [0] * (own.shape[3] - len(expected))
            assert own_counts[b, h, row] == len(expected)
    kernel = tuple(torch.full(tensor.shape, 7, dtype=torch.int32, device=DEVICE) for tensor in named)
    arguments = block_map.geometry, False, None, names.to(DEVICE)
    lists_kernel.fill_lists(kernel, block_map.words.to(DEVICE), *arguments)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(kernel, named, strict=True))
    for other in (BlockMap.causal(*block_map.shape[:2], **sizes_of(block_map)), block_map):
        lists_kernel.fill_lists(kernel, other.words.to(DEVICE), *arguments, reused=True)
        expected = index_lists(other.words.cpu(), *sizes, None, names)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(kernel, expected, strict=True))


@pytest.mark.parametrize("q_len, kv_len, block_size", [(300, 300, 16), (33, 700, 16), (640, 640, 32), (1, 513, 16)])
@pytest.mark.parametrize("reused", [False, True])
def test_bits_that_no_map_has_write_no_entry(q_len, kv_len, block_size, reused):
    """In the causal future and past the last column: a list with them would reach over its row's end."""
    from flexprefill.blockmap import index_lists_kernel as lists_kernel

    sizes = {"q_len": q_len, "kv_len": kv_len, "block_size": block_size}
    everything = BlockMap.causal(1, 2, **sizes, device=DEVICE)
    words = torch.full_like(everything.words, -1)
    expected = index_lists(everything.words.cpu(), *sizes.values(), False)
    assert all(
        torch.equal(*pair) for pair in zip(index_lists(words.cpu(), *sizes.values(), False), expected, strict=True)
    )
    # each list in the middle of other memory
    around = [torch.full((tensor.numel() + 512,), 7, dtype=torch.int32, device=DEVICE) for tensor in expected]
    lists = [memory[256:-256].view(t.shape) for memory, t in zip(around, expected, strict=True)]
    for tensor in lists if reused else ():
        tensor.zero_()
    lists_kernel.fill_lists(lists, words, everything.geometry, reused=reused)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(lists, expected, strict=True))
    assert all((memory[:256] == 7).all() and (memory[-256:] == 7).all() for memory in around)


def sizes_of(block_map):
    return {"q_len": block_map.q_len, "kv_len": block_map.kv_len, "block_size": block_map.block_size}


def test_buffers_are_used_again_and_hold_no_stale_index():
    buffers = ListBuffers()
    query, key, _ = make_qkv(300, heads=4, kv_heads=2, device=DEVICE)
    addresses = set()
    for alpha in (0.01, 0.9, 0.3):
        config = PrefillConfig(block_size=16, alpha=alpha, window_blocks=1)
        ours = create_prefill_block_mask(query, key, config, buffers=buffers)
        fresh = create_prefill_block_mask(query, key, config)
        for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
            assert torch.equal(getattr(ours, name), getattr(fresh, name))
            assert getattr(ours, name).is_contiguous()
        addresses.add(ours.kv_indices.data_ptr())
    assert len(addresses) == 1
    assert buffers.nbytes == 2 * 4 * (4 * 19 + 4 * 19 * 19)
    longer = search_blocks(*make_qkv(400, heads=4, kv_heads=2, device=DEVICE)[:2], config)
    assert BlockMap.from_block_mask(longer.to_block_mask(buffers=buffers)) == longer
    with pytest.raises(TypeError, match="buffers must be a ListBuffers, got dict"):
        longer.to_block_mask(buffers={})


def test_create_prefill_block_mask_traces_into_one_graph_for_all_lengths():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    config = PrefillConfig(block_size=16, alpha=0.6, window_blocks=1)

    @torch.compile(fullgraph=True, backend=count)
    def lists(query, key):
        mask = create_prefill_block_mask(query, key, config)
        return mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices

    for length in (300, 512, 401, 700, 90):
        query, key, _ = make_qkv(length, heads=4, kv_heads=2, device=DEVICE)
        mask = create_prefill_block_mask(query, key, config)
        expected = mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices
        assert all(torch.equal(a, b) for a, b in zip(lists(query, key), expected, strict=True))
    assert len(graphs) <= 2


def test_buffers_inside_a_compiled_function_are_refused():
    query, key, _ = make_qkv(90, device=DEVICE)
    compiled = torch.compile(
        lambda q, k: create_prefill_block_mask(q, k, buffers=ListBuffers()).kv_indices, fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match="buffers cannot be used inside torch.compile"):
        compiled(query, key)


@pytest.mark.parametrize("length, block_size", [(512, 128), (384, 32)])
def test_a_full_causal_map_equals_pytorchs_own_mask(length, block_size):
    mask = BlockMap.causal(1, 1, q_len=length, kv_len=length, block_size=block_size).to_block_mask()
    theirs = create_block_mask(causal_mask, 1, 1, length, length, device="cpu", BLOCK_SIZE=block_size)
    assert torch.equal(mask.to_dense(), theirs.to_dense())
    assert torch.equal(mask.kv_num_blocks, theirs.kv_num_blocks)
    assert torch.equal(mask.full_kv_num_blocks, theirs.full_kv_num_blocks)
    assert BlockMap.from_block_mask(theirs) == BlockMap.from_block_mask(mask)
    assert mask.shape == (1, 1, length, length)


@pytest.mark.parametrize("q_len, kv_len", [(50, 50), (50, 77), (1, 77)])
def test_the_mask_mod_is_causal_at_the_offset_and_joins_a_callers(q_len, kv_len):
    block_map = BlockMap.causal(1, 1, q_len=q_len, kv_len=kv_len, block_size=16)
    q, k = torch.arange(q_len)[:, None], torch.arange(kv_len)
    zero = torch.zeros((), dtype=torch.int32)
    causal = q + kv_len - q_len >= k
    assert torch.equal(block_map.to_block_mask().mask_mod(zero, zero, q, k), causal)
    further = block_map.to_block_mask(lambda b, h, q_idx, kv_idx: kv_idx % 2 == 0)
    assert torch.equal(further.mask_mod(zero, zero, q, k), causal & (k % 2 == 0))


def test_tails_behind_the_counts_are_not_read():
    counts = torch.tensor([[[1, 2]]], dtype=torch.int32)
    indices = torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=16, mask_mod=causal_mask, compute_q_blocks=False)
    assert BlockMap.from_block_mask(mask).to_dense().tolist() == [[[[True, False], [True, True]]]]
    indices[0, 0, 0, 1] = 99
    assert BlockMap.from_block_mask(mask).to_dense().tolist() == [[[[True, False], [True, True]]]]


def test_create_prefill_block_mask_is_search_and_lists():
    query, key, _ = make_qkv(300, heads=4, kv_heads=2, device=DEVICE)
    config = PrefillConfig(block_size=16, alpha=0.6, window_blocks=1)
    mask = create_prefill_block_mask(query, key, config, scale=0.3, last_chunk=False)
    block_map = search_blocks(query, key, config, scale=0.3, last_chunk=False)
    assert BlockMap.from_block_mask(mask) == block_map and mask.BLOCK_SIZE == (16, 16)
    assert mask.shape == (1, 4, 300, 300)


def test_masks_that_cannot_be_maps_are_refused():
    with pytest.raises(TypeError, match="block_mask must be a BlockMask, got int"):
        BlockMap.from_block_mask(3)
    uneven = create_block_mask(causal_mask, 1, 1, 128, 128, device="cpu", BLOCK_SIZE=(64, 32))
    with pytest.raises(ValueError, match=r"square blocks.*\(64, 32\)"):
        BlockMap.from_block_mask(uneven)
    longer = create_block_mask(causal_mask, 1, 1, 128, 64, device="cpu", BLOCK_SIZE=32)
    with pytest.raises(ValueError, match="no more queries than keys"):
        BlockMap.from_block_mask(longer)
    query, key, _ = make_qkv(32)
    with pytest.raises(TypeError, match="mask_mod must be a function.*str"):
        create_prefill_block_mask(query, key, mask_mod="causal")


@pytest.mark.parametrize("all_partial", [False, True])
def test_the_operator_passes_opcheck(all_partial):
    words = torch.full((1, 2, 5, 1), 3, dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(torch.ops.flexprefill.index_lists, (words, 70, 90, 16, all_partial))
    names = torch.arange(12, dtype=torch.int32).repeat(words.shape[0], 1)
    torch.library.opcheck(torch.ops.flexprefill.index_lists, (words, 70, 90, 16, all_partial, None, names))
