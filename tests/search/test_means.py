import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import DEVICE, make_qkv
from support.oracle import relative_error

from flexprefill import BlockMap, KeyMeans, PrefillConfig, create_prefill_block_mask, prefill_attention, search_blocks
from flexprefill.search import operator as op
from flexprefill.search.rule import Rule

LEAN = PrefillConfig(block_size=16, alpha=0.5, sink_blocks=1, window_blocks=1, last_full_blocks=1)
RULE = Rule.of(LEAN, scale=1.0, last_chunk=True)


def ends_of(chunks, length):
    """Where chunks of these sizes end, the last one at length."""
    ends = torch.tensor(chunks).cumsum(0).tolist()
    return [end for end in ends if end < length] + [length]


def search_in_chunks(query, key, config, ends, *, means, **arguments):
    """The maps of chunks that end at these positions."""
    offset = key.shape[2] - query.shape[2]
    starts = [offset, *ends[:-1]]
    return [
        search_blocks(
            query[:, :, start - offset : end - offset],
            key[:, :, :end],
            config,
            last_chunk=end == key.shape[2],
            means=means,
            **arguments,
        )
        for start, end in zip(starts, ends, strict=True)
    ]


def test_a_last_chunk_of_fewer_than_last_full_blocks_keeps_all_of_its_own_alone():
    query, key, _ = make_qkv(112)
    config = PrefillConfig(**(LEAN.to_dict() | {"last_full_blocks": 2, "alpha": 1.0}))
    whole, joined = (
        search_blocks(query, key, config).to_dense(),
        BlockMap.from_chunks(search_in_chunks(query, key, config, [96, 112], means=KeyMeans())).to_dense(),
    )
    assert torch.equal(joined[:, :, [0, 1, 2, 3, 4, 6]], whole[:, :, [0, 1, 2, 3, 4, 6]])
    assert whole[:, :, 5, :6].all() and not joined[:, :, 5, :6].all()


sizes = st.lists(st.integers(1, 6), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(
    sizes,
    st.integers(1, 700),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1, 2]),
    st.integers(0, 2**31),
)
def test_chunks_of_whole_blocks_give_the_map_of_the_whole(blocks, length, dtype, batch, seed):
    query, key, _ = make_qkv(length, batch=batch, heads=4, kv_heads=2, dtype=dtype, seed=seed)
    chunks = search_in_chunks(query, key, LEAN, ends_of([16 * count for count in blocks], length), means=KeyMeans())
    assert BlockMap.from_chunks(chunks) == search_blocks(query, key, LEAN)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 130), min_size=1, max_size=12), st.integers(1, 500), st.data())
def test_chunks_of_any_size_follow_the_rule_for_their_own_query_blocks(chunks, length, data):
    query, key, _ = make_qkv(data.draw(st.integers(1, length)), length, seed=data.draw(st.integers(0, 2**31)))
    offset = length - query.shape[2]
    ends = ends_of([offset + chunks[0], *chunks[1:]], length)
    with_means = search_in_chunks(query, key, LEAN, ends, means=KeyMeans())
    assert with_means == search_in_chunks(query, key, LEAN, ends, means=None)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("dtype", "chunks"),
    [
        (torch.bfloat16, [64, 32, 128, 16]),
        (torch.bfloat16, [100, 1, 50, 77]),
        (torch.float32, [7, 9, 16, 200]),
    ],
)
def test_the_kernels_pool_a_range_of_blocks_to_the_same_bits(dtype, chunks):
    query, key, _ = make_qkv(300, heads=2, dtype=dtype, device=DEVICE)
    means = KeyMeans()
    for end in ends_of(chunks, 300):
        held = means.extend(key[:, :, :end], RULE, "triton").means
        assert torch.equal(held, op.pool_keys(key[:, :, :end], 16, "triton"))
        assert held.is_contiguous() and means.kv_len == end and means.nbytes == held.nbytes
    chunked = search_in_chunks(query, key, LEAN, ends_of(chunks, 300), means=KeyMeans(), implementation="triton")
    assert chunked == search_in_chunks(query, key, LEAN, ends_of(chunks, 300), means=None, implementation="reference")


def test_each_key_is_pooled_once_but_for_short_blocks(monkeypatch):
    pooled = []

    def pool_keys(key, *arguments, pool=op.pool_keys):
        pooled.append(key.shape[2])
        return pool(key, *arguments)

    monkeypatch.setattr(op, "pool_keys", pool_keys)
    query, key, _ = make_qkv(300)
    search_in_chunks(query, key, LEAN, [64, 128, 200, 201, 300], means=KeyMeans())
    # 200 is 8 keys into a block, and 201 is 9
    assert pooled == [64, 64, 72, 9, 108]


def test_keys_that_are_all_known_are_not_pooled(monkeypatch):
    query, key, _ = make_qkv(64)
    means = KeyMeans()
    first = search_blocks(query, key, LEAN, means=means)
    monkeypatch.setattr(op, "pool_keys", None)
    assert search_blocks(query, key, LEAN, means=means) == first


def test_it_holds_one_value_for_each_block_of_keys():
    means = KeyMeans()
    assert means.kv_len == means.nbytes == 0
    _, key, _ = make_qkv(1, 512, kv_heads=2, heads=2, dtype=torch.bfloat16)
    for end in range(16, 513, 16):
        means.extend(key[:, :, :end], RULE, "reference")
    assert means.nbytes == 2 * (512 // 16) * 64 * 2


def test_the_output_of_chunks_is_that_of_the_whole():
    config = PrefillConfig(alpha=0.5, sink_blocks=1, window_blocks=1)
    query, key, value = make_qkv(1300, heads=4, kv_heads=2)
    whole = prefill_attention(query, key, value, config)
    means, outputs = KeyMeans(), []
    for start, end in ((0, 512), (512, 640), (640, 1300)):
        seen = key[:, :, :end], value[:, :, :end]
        outputs.append(prefill_attention(query[:, :, start:end], *seen, config, last_chunk=end == 1300, means=means))
    assert means.kv_len == 1300
    assert relative_error(torch.cat(outputs, 2), whole) <= 1e-5


def test_create_prefill_block_mask_takes_it():
    query, key, _ = make_qkv(300)
    means = KeyMeans()
    block_mask = create_prefill_block_mask(query, key, LEAN, means=means)
    assert means.kv_len == 300
    assert BlockMap.from_block_mask(block_mask) == search_blocks(query, key, LEAN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda key: key[:, :, :99], "key must have all 100 tokens that means is of, got S_kv=99"),
        (lambda key: key.repeat(2, 1, 1, 1), "means is of keys with batch 1, got 2"),
        (lambda key: key[:, :1], "means is of keys with kv_heads 2, got 1"),
        (lambda key: key[..., :32], "means is of keys with head_dim 64, got 32"),
        (lambda key: key.half(), "means is of keys with dtype torch.float32, got torch.float16"),
        (lambda key: key.to("meta"), "means is of keys with device cpu, got meta"),
    ],
)
def test_keys_of_something_else_are_refused(change, message):
    _, key, _ = make_qkv(100, heads=2, kv_heads=2)
    means = KeyMeans()
    means.extend(key, RULE, "reference")
    with pytest.raises(ValueError, match=message):
        means.extend(change(key), RULE, "reference")
    assert means.kv_len == 100
    for block_size, implementation, named in ((32, "reference", "block_size 16"), (16, "triton", "implementation")):
        with pytest.raises(ValueError, match=f"means is of keys with {named}"):
            means.extend(key, RULE._replace(block_size=block_size), implementation)


def test_means_that_are_none_are_refused():
    query, key, value = make_qkv(100)
    for call in (search_blocks, create_prefill_block_mask):
        with pytest.raises(TypeError, match="means must be a KeyMeans, got dict"):
            call(query, key, means={})
    with pytest.raises(TypeError, match="means must be a KeyMeans, got dict"):
        prefill_attention(query, key, value, means={})
    with pytest.raises(Exception, match="means cannot be used inside torch.compile"):
        torch.compile(lambda q, k: search_blocks(q, k, means=KeyMeans()), fullgraph=True, backend="eager")(query, key)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size, chunk", [(128, 4096), (128, 1000), (64, 640)])
def test_chunks_on_a_gpu(block_size, chunk):
    config = PrefillConfig(alpha=0.5, block_size=block_size, dense_below=0)
    query, key, value = make_qkv(10_000, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda")
    ends = ends_of([chunk] * (10_000 // chunk), 10_000)
    chunks = search_in_chunks(query, key, config, ends, means=KeyMeans())
    assert chunks == search_in_chunks(query, key, config, ends, means=None)
    if chunk % block_size == 0:
        assert BlockMap.from_chunks(chunks) == search_blocks(query, key, config)
        means, outputs = KeyMeans(), []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            seen = key[:, :, :end], value[:, :, :end]
            last = end == 10_000
            outputs.append(prefill_attention(query[:, :, start:end], *seen, config, last_chunk=last, means=means))
        whole = prefill_attention(query, key, value, config)
        assert relative_error(torch.cat(outputs, 2), whole) <= 5e-3
