import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import random_map
from torch.utils import _pytree as pytree

from flexprefill import BlockMap
from flexprefill.blockmap.bits import pack_bits, popcount, unpack_bits


@st.composite
def geometries(draw):
    block_size = draw(st.sampled_from([1, 16, 128]))
    kv_len = draw(st.integers(1, 80 * block_size))
    return draw(st.integers(1, kv_len)), kv_len, block_size


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(0, 2**31))
def test_packing_is_exact_for_any_width(columns, seed):
    dense = torch.rand(2, 3, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    words = pack_bits(dense)
    assert words.dtype == torch.int32 and words.shape == (2, 3, -(-columns // 32))
    assert torch.equal(unpack_bits(words, columns), dense)
    for j in range(columns):  # the documented place of each bit
        bit = (words[0, 0, j // 32].item() >> (j % 32)) & 1
        assert bit == dense[0, 0, j].item()
    assert torch.equal(popcount(words).sum(-1), dense.sum(-1))
    assert not unpack_bits(words, words.shape[-1] * 32)[..., columns:].any()


def test_popcount_of_every_single_bit_and_of_the_extremes():
    words = torch.tensor([1 << bit if bit < 31 else -(2**31) for bit in range(32)], dtype=torch.int32)
    assert popcount(words).tolist() == [1] * 32
    assert popcount(torch.tensor([0, -1, 2**31 - 1, 0x55555555], dtype=torch.int32)).tolist() == [
        0,
        32,
        31,
        16,
    ]


@settings(deadline=None, max_examples=60)
@given(geometries(), st.integers(0, 2**31))
def test_a_dense_tensor_survives_without_its_causal_future(geometry, seed):
    q_len, kv_len, block_size = geometry
    block_map, dense = random_map(q_len, kv_len, block_size, seed=seed)
    rows, columns = dense.shape[2:]
    visible = torch.tensor(
        [
            [j * block_size <= kv_len - q_len + min((i + 1) * block_size, q_len) - 1 for j in range(columns)]
            for i in range(rows)
        ]
    )
    assert torch.equal(block_map.to_dense(), dense & visible)
    assert block_map.shape == tuple(dense.shape)
    assert torch.equal(block_map.counts().long(), (dense & visible).sum(-1))
    expected = (dense & visible).sum((-1, -2)).double() / visible.sum()
    torch.testing.assert_close(block_map.density().double(), expected, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=60)
@given(geometries())
def test_the_causal_map_keeps_whatever_can_be_kept(geometry):
    q_len, kv_len, block_size = geometry
    causal = BlockMap.causal(2, 3, q_len=q_len, kv_len=kv_len, block_size=block_size)
    assert causal == random_map(q_len, kv_len, block_size, batch=2, heads=3, share=1.0)[0]
    assert (causal.density() == 1).all()


def test_set_operations_and_equality():
    a, b = random_map(900, 1000, 16, seed=1)[0], random_map(900, 1000, 16, seed=2)[0]
    assert torch.equal((a & b).to_dense(), a.to_dense() & b.to_dense())
    assert torch.equal((a | b).to_dense(), a.to_dense() | b.to_dense())
    assert torch.equal((a ^ b).to_dense(), a.to_dense() ^ b.to_dense())
    assert a == random_map(900, 1000, 16, seed=1)[0] and a != b
    assert (a ^ a).counts().sum() == 0
    assert a != random_map(900, 1001, 16, seed=1)[0]
    assert a != "a map"
    with pytest.raises(TypeError):
        hash(a)


def test_maps_of_different_lengths_do_not_combine():
    a, b = random_map(100, 200, 16)[0], random_map(100, 201, 16)[0]
    for combine in (lambda: a & b, lambda: a | b, lambda: a ^ b):
        with pytest.raises(ValueError, match="kv_len=201"):
            combine()
    with pytest.raises(TypeError, match="int"):
        a & 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dense": torch.ones(1, 1, 2, 3)}, TypeError, "dense must be a bool tensor, got torch.float32"),
        ({"dense": torch.ones(1, 2, 3, dtype=torch.bool)}, ValueError, r"dense must be \[B, H, 2, 3\]"),
        ({"q_len": 0}, ValueError, "q_len must be at least 1 and below 2.*31, got 0"),
        ({"q_len": 600}, ValueError, "q_len must be at most kv_len"),
        ({"block_size": 0}, ValueError, "block_size"),
        ({"kv_len": "300"}, TypeError, "kv_len"),
    ],
)
def test_from_dense_names_what_is_wrong(change, error, message):
    arguments = {
        "dense": torch.ones(1, 1, 2, 3, dtype=torch.bool),
        "q_len": 200,
        "kv_len": 300,
        "block_size": 128,
    }
    with pytest.raises(error, match=message):
        BlockMap.from_dense(**(arguments | change))


def test_words_of_a_wrong_kind_are_refused():
    with pytest.raises(TypeError, match="int64"):
        BlockMap(torch.zeros(1, 1, 1, 1, dtype=torch.int64), 100, 100, 128)
    with pytest.raises(TypeError, match="words must be an int32 tensor, got str"):
        BlockMap("x", 100, 100, 128)
    with pytest.raises(ValueError, match=r"\[B, H, 1, 1\]"):
        BlockMap(torch.zeros(1, 0, 1, 1, dtype=torch.int32), 100, 100, 128)
    for heads, error in ((-1, ValueError), ("a", TypeError), (None, TypeError), (True, TypeError)):
        with pytest.raises(error, match="heads must be"):
            BlockMap.causal(1, heads, q_len=100, kv_len=100, block_size=128)
    with pytest.raises(ValueError, match=r"\[B, H, 1, 1\]"):
        BlockMap(torch.zeros(1, 1, 1, 2, dtype=torch.int32), 100, 100, 128)


def test_is_a_pytree_and_says_what_it_is():
    block_map, _ = random_map(900, 1000, 16)
    leaves, spec = pytree.tree_flatten({"layer": block_map})
    assert len(leaves) == 1 and pytree.tree_unflatten(leaves, spec)["layer"] == block_map
    assert pytree.tree_map(lambda leaf: leaf.to("meta"), block_map).device.type == "meta"
    assert "None" in repr(pytree.tree_map(lambda leaf: None, block_map))
    assert block_map.to("cpu") is block_map
    assert "q_len=900" in repr(block_map) and "H=2" in repr(block_map)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec


def test_goes_in_and_out_of_compiled_functions():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def combine(a, b):
        return (
            a & b,
            (a | b).density(),
            a.to_dense(),
            BlockMap.from_dense(b.to_dense(), q_len=900, kv_len=1000, block_size=16),
        )

    a, b = random_map(900, 1000, 16, seed=1)[0], random_map(900, 1000, 16, seed=2)[0]
    both, density, dense, again = combine(a, b)
    assert both == a & b and again == b
    assert torch.equal(density, (a | b).density()) and torch.equal(dense, a.to_dense())


@pytest.mark.gpu
def test_operations_on_the_gpu_equal_those_on_the_cpu():
    a, b = random_map(5000, 9000, 16, seed=1)[0], random_map(5000, 9000, 16, seed=2)[0]
    x, y = a.to("cuda"), b.to("cuda")
    assert (x & y).to("cpu") == a & b and (x | y).to("cpu") == a | b and (x ^ y).to("cpu") == a ^ b
    assert torch.equal(x.counts().cpu(), a.counts()) and torch.equal(x.density().cpu(), a.density())
    with pytest.raises(ValueError, match="cuda"):
        assert a == x
    again = BlockMap.from_dense(x.to_dense(), q_len=5000, kv_len=9000, block_size=16)
    assert again == x


def test_chunks_that_follow_each_other_join():
    dense = torch.rand(1, 2, 70, 70) < 0.5
    whole = BlockMap.from_dense(dense, q_len=1113, kv_len=1113, block_size=16)
    chunks = [
        BlockMap.from_dense(
            dense[:, :, start:end, :end],
            q_len=min(16 * end, 1113) - 16 * start,
            kv_len=min(16 * end, 1113),
            block_size=16,
        )
        for start, end in ((0, 3), (3, 40), (40, 70))
    ]
    assert BlockMap.from_chunks(chunks) == whole
    later = BlockMap.from_chunks(chunks[1:])
    assert later.offset == 48 and torch.equal(later.to_dense(), whole.to_dense()[:, :, 3:])
    assert BlockMap.from_chunks(iter(chunks[:1])) == chunks[0]
    for wrong, message in (
        ([], "at least one"),
        (chunks[::2], "offset must be 48, got 640"),
        ([chunks[0], chunks[1].to("meta")], "device must be cpu, got meta"),
        ([chunks[0], BlockMap.causal(1, 1, q_len=16, kv_len=64, block_size=16)], "batch and heads must be"),
        ([BlockMap.causal(1, 1, q_len=n, kv_len=k, block_size=16) for n, k in ((20, 20), (16, 36))], "q_len=20"),
        (
            [BlockMap.causal(1, 1, q_len=32, kv_len=k, block_size=b) for k, b in ((32, 16), (64, 32))],
            "block_size must be",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            BlockMap.from_chunks(wrong)
    with pytest.raises(TypeError, match="chunks must be BlockMaps, got int"):
        BlockMap.from_chunks([3])
