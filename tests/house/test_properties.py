"""What holds for every valid input, by hypothesis: over 2,000 examples, each against another way to the same result.

Nothing in here is compiled for an example: attention is, once for all lengths.
"""

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import DEVICE, at_an_odd_address, make_qkv
from support.oracle import masked_attention, relative_error
from torch.nn.functional import scaled_dot_product_attention

from flexprefill import (
    BlockMap,
    KeyMeans,
    ListBuffers,
    PrefillConfig,
    attention_recall,
    prefill_attention,
    search_blocks,
)
from flexprefill.inspection import compare_maps, summarize_heads

TOLERANCE = 1e-5 if DEVICE == "cpu" else 2e-3  # a GPU's float32 products may be tf32
SEEDS = st.integers(0, 2**31)
SHARES = st.sampled_from([0.1, 0.5, 0.9])


def examples(count):
    return settings(deadline=None, max_examples=count, database=None)


configs = st.builds(
    PrefillConfig,
    alpha=st.floats(0.01, 1),
    block_size=st.sampled_from([16, 32, 64]),
    sink_blocks=st.integers(0, 2),
    window_blocks=st.integers(0, 3),
    last_full_blocks=st.integers(0, 2),
    min_blocks=st.sampled_from([0, 0, 2]),
    mask_heads=st.sampled_from(["query", "kv"]),
    score_rows=st.sampled_from(["whole", "visible"]),
)


@st.composite
def prompts(draw, *, most=200, offsets=True):
    """query, key, value of any lengths and numbers of heads."""
    kv_len = draw(st.integers(1, most))
    q_len = draw(st.integers(1, kv_len)) if offsets and draw(st.booleans()) else kv_len
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)]))
    sizes = {"batch": draw(st.sampled_from([1, 2])), "heads": kv_heads * group, "kv_heads": kv_heads}
    head_dim = draw(st.sampled_from([16, 24, 64]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return make_qkv(q_len, kv_len, **sizes, head_dim=head_dim, dtype=dtype, device=DEVICE, seed=draw(SEEDS))


@st.composite
def maps(draw, **lengths):
    query, key, _ = draw(prompts(**lengths))
    config = draw(configs)
    shape = *query.shape[:2], -(-query.shape[2] // config.block_size), -(-key.shape[2] // config.block_size)
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(draw(SEEDS))) < draw(
        st.sampled_from([0.1, 0.5, 0.9])
    )
    return BlockMap.from_dense(kept.to(DEVICE), q_len=query.shape[2], kv_len=key.shape[2], block_size=config.block_size)


@examples(350)
@given(prompts(), configs, st.booleans())
def test_a_prompt_gets_the_same_bits_alone_at_any_place_of_a_batch_and_again(prompt, config, last_chunk):
    query, key, _ = prompt
    whole = search_blocks(query, key, config, last_chunk=last_chunk)
    assert whole == search_blocks(query, key, config, last_chunk=last_chunk)
    both = torch.cat([query, query]), torch.cat([key, key])
    doubled = search_blocks(*both, config, last_chunk=last_chunk).words
    assert torch.equal(doubled[: len(query)], whole.words) and torch.equal(doubled[len(query) :], whole.words)
    alone = search_blocks(query[-1:], key[-1:], config, last_chunk=last_chunk)
    assert torch.equal(alone.words, whole.words[-1:])


VIEWS = {
    "token by token": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "dimension by dimension": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "part of a cache": lambda t: torch.cat([t, torch.full_like(t, torch.nan)], 2)[:, :, : t.shape[2]],
    "part of a projection": lambda t: torch.cat([t, torch.full_like(t, torch.nan)], 3)[..., : t.shape[3]],
    "at an odd address": at_an_odd_address,
    "one head for all": lambda t: t[:, :1].expand_as(t),
    "one token for all": lambda t: t[:, :, :1].expand_as(t),
    "one number for all": lambda t: t[..., :1].expand_as(t),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, (3, 2, 1, 1)) if t.numel() > 600 else t,
    "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
}


@examples(350)
@given(prompts(), configs, st.sampled_from(list(VIEWS)), st.sampled_from(list(VIEWS)))
def test_a_view_is_searched_as_its_copy(prompt, config, of_query, of_key):
    query, key = VIEWS[of_query](prompt[0]), VIEWS[of_key](prompt[1])
    copies = query.detach().clone(memory_format=torch.contiguous_format), key.detach().contiguous()
    expected = search_blocks(*copies, config)
    assert search_blocks(query, key, config) == expected
    assert search_blocks(query, key, config, means=KeyMeans()) == expected


@examples(350)
@given(prompts(offsets=False), configs, st.lists(st.integers(1, 18), max_size=4, unique=True), st.booleans())
def test_chunks_of_whole_blocks_join_to_the_bits_of_the_whole(prompt, config, cuts, kept_means):
    query, key, _ = prompt
    length, size = query.shape[2], config.block_size
    last_rows = max(1, config.last_full_blocks)
    edges = [0, *(cut * size for cut in sorted(cuts) if -(-length // size) - cut >= last_rows), length]
    means = KeyMeans() if kept_means else None
    chunks = [
        search_blocks(query[:, :, start:end], key[:, :, :end], config, last_chunk=end == length, means=means)
        for start, end in pairwise(edges)
    ]
    assert BlockMap.from_chunks(chunks) == search_blocks(query, key, config)


@examples(350)
@given(maps(most=700), st.data())
def test_maps_are_sets_of_visible_blocks(block_map, data):
    seed = data.draw(SEEDS)
    other_kept = torch.rand(block_map.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE) < 0.5
    sizes = {"q_len": block_map.q_len, "kv_len": block_map.kv_len, "block_size": block_map.block_size}
    other = BlockMap.from_dense(other_kept, **sizes)
    everything = BlockMap.causal(*block_map.shape[:2], **sizes, device=DEVICE)
    dense, its = block_map.to_dense(), other.to_dense()
    assert torch.equal((block_map & other).to_dense(), dense & its)
    assert torch.equal((block_map | other).to_dense(), dense | its)
    assert (block_map ^ other) == ((block_map | other) & (everything ^ (block_map & other)))
    assert (block_map | everything) == everything and (block_map & everything) == block_map
    assert torch.equal(block_map.counts().long(), dense.sum(-1))
    difference = compare_maps(block_map, other)
    assert torch.equal(difference.only_first.cpu(), (dense & ~its).sum((-1, -2)).cpu())
    heads = summarize_heads(block_map)
    assert [head.kept for head in heads] == block_map.counts().sum(-1).flatten().tolist()
    assert [head.density for head in heads] == pytest.approx(block_map.density().flatten().tolist())
    mask = block_map.to_block_mask(buffers=ListBuffers() if seed % 2 else None)
    assert BlockMap.from_block_mask(mask) == block_map


@examples(200)
@given(prompts(), configs, st.data())
def test_a_looser_setting_keeps_no_block_less(prompt, config, data):
    query, key, _ = prompt
    found = search_blocks(query, key, config)
    name = data.draw(st.sampled_from(["alpha", "sink_blocks", "window_blocks", "last_full_blocks", "min_blocks"]))
    change = config.alpha * data.draw(st.floats(0.01, 1)) if name == "alpha" else getattr(config, name) + 1
    looser = search_blocks(query, key, dataclasses.replace(config, **{name: change}))
    assert (found & looser) == found
    always = BlockMap.causal(*found.shape[:2], q_len=found.q_len, kv_len=found.kv_len, block_size=found.block_size)
    columns = torch.arange(found.shape[3])
    last_seen = always.to_dense().sum(-1, keepdim=True) - 1
    in_reach = (columns < config.sink_blocks) | (columns > last_seen - config.window_blocks)
    assert not (always.to_dense() & in_reach & ~found.to_dense().cpu()).any()


@st.composite
def attended(draw):
    """Inputs of one kind for the compiled function: a whole prompt of more than one block."""
    length = draw(st.integers(33, 200))
    batch = draw(st.sampled_from([2, 3]))
    return make_qkv(length, batch=batch, heads=2, head_dim=16, device=DEVICE, seed=draw(SEEDS))


@examples(120)
@given(attended(), st.data())
def test_attention_is_softmax_over_the_kept_blocks(inputs, data):
    query, key, value = inputs
    length, blocks = query.shape[2], -(-query.shape[2] // 16)
    kept = torch.rand(len(query), 2, blocks, blocks, generator=torch.Generator().manual_seed(data.draw(SEEDS)))
    dense = (kept < data.draw(st.sampled_from([0.0, 0.3, 1.0]))) | torch.eye(blocks, dtype=torch.bool)
    block_map = BlockMap.from_dense(dense.to(DEVICE), q_len=length, kv_len=length, block_size=16)
    output = prefill_attention(query, key, value, block_map=block_map)
    assert relative_error(output, masked_attention(query, key, value, block_map)) <= TOLERANCE


@examples(100)
@given(attended())
def test_attention_that_keeps_everything_is_pytorchs_own(inputs):
    config = PrefillConfig(block_size=16, last_full_blocks=10**6, dense_below=0)
    expected = scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    assert relative_error(prefill_attention(*inputs, config), expected) <= TOLERANCE


@examples(100)
@given(maps(most=100), st.data())
def test_recall_is_a_share_that_grows_with_the_map(block_map, data):
    batch, heads = block_map.shape[:2]
    shape = {"batch": batch, "heads": heads, "kv_heads": heads, "head_dim": 16, "device": DEVICE}
    query, key, _ = make_qkv(block_map.q_len, block_map.kv_len, **shape, seed=data.draw(SEEDS))
    sizes = {"q_len": block_map.q_len, "kv_len": block_map.kv_len, "block_size": block_map.block_size}
    everything = BlockMap.causal(batch, heads, **sizes, device=DEVICE)
    every = range(block_map.q_len)
    whole = attention_recall(query, key, everything)
    assert whole.mean.eq(1).all() and whole.overall == 1 and not whole.can_lose.any() and whole.rows.shape[2] == 0
    ours = attention_recall(query, key, block_map, rows=every).shares
    assert ((ours >= 0) & (ours <= 1)).all()
    rest = attention_recall(query, key, everything ^ block_map, rows=every).shares
    assert torch.allclose(ours + rest, torch.ones_like(ours), rtol=1e-4)


def check_kernels(prompt, config):
    query, key, _ = prompt
    found, expected = (
        search_blocks(query, key, config, implementation=name).to_dense() for name in ("triton", "reference")
    )
    # sums in another order: a block within rounding of the threshold may fall on either side
    assert (found != expected).sum() <= (1 if query.dtype != torch.float32 else 0)


@examples(30)
@given(prompts(most=130), configs)
def test_the_kernels_find_what_the_reference_finds(prompt, config):
    check_kernels(prompt, config)


@pytest.mark.release
@examples(100)
@given(prompts(most=130), configs)
def test_the_kernels_find_what_the_reference_finds_on_more_prompts(prompt, config):
    check_kernels(prompt, config)
