"""Nothing silently dense, nothing silently wrong. conftest.py watches every other test in the same two ways."""

import re

import pytest
import torch
from support.device_calls import kernels_of
from support.inputs import DEVICE, make_qkv
from support.oracle import masked_attention, relative_error
from support.watch import NotContiguous, RanEagerly, check_lists, eager_flex_raises
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flexprefill import (
    BlockMap,
    FlexPrefillError,
    ListBuffers,
    PrefillConfig,
    create_prefill_block_mask,
    explain_backend,
    prefill_attention,
    search_blocks,
)
from flexprefill.attention import steps
from flexprefill.blockmap import map as maps
from flexprefill.blockmap.block_mask import causal_mask, list_blocks

SPARSE = PrefillConfig(block_size=16, alpha=1.0, sink_blocks=1, window_blocks=1, last_full_blocks=0, dense_below=0)
SMALL = {"heads": 2, "head_dim": 16, "device": DEVICE}


def sparse_case(length=208):
    query, key, value = make_qkv(length, **SMALL)
    block_map = search_blocks(query, key, SPARSE)
    assert block_map.density().max() < 0.5
    return query, key, value, block_map


def test_the_watch_sees_eager_flex_attention():
    query, key, value, block_map = sparse_case()
    with pytest.raises(RanEagerly):
        flex_attention(query, key, value, block_mask=block_map.to_block_mask(), enable_gqa=True)
    compiled = torch.compile(prefill_attention, backend="eager")
    with pytest.raises(Exception, match="ran eagerly"):
        compiled(query, key, value, SPARSE)


@pytest.mark.eager_flex
def test_eager_flex_attention_is_dense_so_the_watch_is_needed():
    query, key, value, block_map = sparse_case()
    output = flex_attention(query, key, value, block_mask=block_map.to_block_mask(), enable_gqa=True)
    everything = BlockMap.causal(1, 2, q_len=208, kv_len=208, block_size=16, device=DEVICE)
    assert relative_error(output, masked_attention(query, key, value, everything)) <= 2e-3
    assert relative_error(output, masked_attention(query, key, value, block_map)) > 0.1
    with eager_flex_raises(), pytest.raises(RanEagerly):
        flex_attention(query, key, value, block_mask=block_map.to_block_mask(), enable_gqa=True)


def test_the_watch_sees_lists_that_are_not_contiguous(monkeypatch):
    query, key, value, block_map = sparse_case()
    listed = list_blocks(block_map.words, block_map.geometry)
    lists = listed.lists
    check_lists(lists)
    for place in range(4):
        transposed = list(lists)
        transposed[place] = lists[place].transpose(1, 2).contiguous().transpose(1, 2)
        with pytest.raises(NotContiguous):
            check_lists(transposed)
    with pytest.raises(NotContiguous):
        check_lists([*lists[:3], lists[3][..., :-1].contiguous()])

    def transposed_lists(*arguments):
        return listed._replace(lists=tuple(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in lists))

    monkeypatch.setattr(steps, "list_blocks", transposed_lists)
    with pytest.raises(NotContiguous, match="kv_num_blocks has strides"):
        prefill_attention(query, key, value, SPARSE)
    monkeypatch.setattr(maps, "list_blocks", transposed_lists)
    with pytest.raises(NotContiguous):
        block_map.to_block_mask()


@pytest.mark.parametrize("layout", ["contiguous", "view of rows", "transposed", "expanded"])
@pytest.mark.parametrize("buffers", [False, True])
def test_lists_are_contiguous_whatever_the_words_are(layout, buffers):
    block_map = sparse_case()[3]
    words = block_map.words
    if layout == "view of rows":
        words = torch.cat([words, words], 2)[:, :, : words.shape[2]]
    elif layout == "transposed":
        words = words.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "expanded":
        words = words[:, :1].expand(-1, 3, -1, -1)
    strange = BlockMap(words, 208, 208, 16)
    mask = strange.to_block_mask(buffers=ListBuffers() if buffers else None)
    check_lists((mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices))
    assert BlockMap.from_block_mask(mask) == BlockMap(words.contiguous(), 208, 208, 16)


def depends_on_dropped_blocks(call, query, key, value, block_map):
    """Whether a call's output changes with the values of keys that no query block of the map keeps."""
    dropped = ~block_map.to_dense().any(2).any(1).any(0)
    assert dropped.any()
    tokens = dropped.repeat_interleave(block_map.block_size)[: key.shape[2]]
    other = torch.where(tokens[:, None], value + 1000, value)
    return not torch.equal(call(query, key, value), call(query, key, other))


def test_what_is_computed_does_not_see_dropped_blocks():
    query, key, value = make_qkv(208, **SMALL)
    dense = torch.eye(13, dtype=torch.bool, device=DEVICE).repeat(1, 2, 1, 1)
    dense[..., 3] = False
    dense[..., 3, 2] = True  # a row of blocks that keeps one it sees
    block_map = BlockMap.from_dense(dense, q_len=208, kv_len=208, block_size=16)

    def sparse(*tensors):
        return prefill_attention(*tensors, block_map=block_map)

    def silently_dense(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    assert not depends_on_dropped_blocks(sparse, query, key, value, block_map)
    assert depends_on_dropped_blocks(silently_dense, query, key, value, block_map)


def test_another_threads_compilation_does_not_make_it_dense(monkeypatch):
    query, key, value, _ = sparse_case()
    expected = prefill_attention(query, key, value, SPARSE)
    # what torch 2.13 and later say in every thread while one compiles
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.equal(prefill_attention(query, key, value, SPARSE), expected)
    torch.compiler.set_stance("force_eager")
    try:
        with pytest.raises(FlexPrefillError, match=r"without torch\.compile"):
            prefill_attention(query, key, value, SPARSE)
    finally:
        torch.compiler.set_stance("default")


# by the names of the kernels on the device, or in the code that was generated for the CPU
KERNELS = {
    "triton": r"triton_tem_fused.*flex_attention",
    "flash": r"(?i)flash_?attention_?forward_?sm90|flash_attncute|flash_fwd_sm90",
    "dense-flash": r"(?i)flash_?attention_?forward_?sm90|flash_attncute|flash_fwd_sm90",
    "dense-sdpa": r"(?i)cudnn.*(sdpa|attention)|cudnn_generated|pytorch_flash|fmha|flash_fwd|softmax",
    "cpp": r"cpp_.*flex_attention|kv_num_blocks|kvBlockSize",
}


def assert_ran(choice, names):
    """Raises unless the kernel of a BackendChoice is among those that ran, and no other attention kernel is."""
    assert any(re.search(KERNELS[choice.name], name) for name in names), f"{choice.name} is not among {sorted(names)}"
    others = {"triton", "flash", "dense-sdpa"} - {choice.name}
    if choice.name in ("flash", "dense-flash"):
        others -= {"flash", "dense-flash", "dense-sdpa"}  # whose names are parts of its own
        assert any(re.search(KERNELS["flash"], name) for name in names)
    if choice.name == "cpp":
        others = set()
    for other in others:
        found = [name for name in names if re.search(KERNELS[other], name)]
        assert not found, f"{choice.name} was reported, but {found} ran"


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "triton", "flash"])
@pytest.mark.parametrize(
    "q_len, kv_len, block_size", [(2048, 2048, 128), (512, 1500, 128), (1, 900, 128), (1024, 1024, 64)]
)
def test_the_kernel_that_ran_is_the_one_reported(backend, q_len, kv_len, block_size):
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 128, "dtype": torch.bfloat16, "device": "cuda"}
    tensors = make_qkv(q_len, kv_len, **shape)
    config = PrefillConfig(block_size=block_size, alpha=0.5, window_blocks=1, dense_below=0)
    try:
        choice = explain_backend(*tensors, config, backend=backend)
    except FlexPrefillError as error:
        assert backend == "flash"
        pytest.skip(str(error))
    names = kernels_of(lambda: prefill_attention(*tensors, config, backend=backend))
    assert_ran(choice, names)
    whole = explain_backend(*tensors, PrefillConfig(dense_below=10**6))
    assert whole.dense
    assert_ran(whole, kernels_of(lambda: prefill_attention(*tensors, PrefillConfig(dense_below=10**6))))
    # and a wrong report would be seen
    other = "dense-sdpa" if choice.name in ("triton", "flash", "dense-flash") else "triton"
    with pytest.raises(AssertionError):
        assert_ran(type(choice)(other, "a wrong one"), names)


@pytest.mark.skipif(DEVICE == "cuda", reason="of the CPU's kernel")
def test_the_code_that_ran_on_the_cpu_is_the_one_reported():
    from torch._inductor.utils import get_code, run_and_get_code

    query, key, value = make_qkv(80, heads=1, head_dim=16)
    assert explain_backend(query, key, value, SPARSE).name == "cpp"
    # the code is, what g++ once made of it is not
    made_anew = torch._inductor.config.patch(fx_graph_cache=False)
    with made_anew:
        # a kind of call that nothing else in the process has compiled
        _, sources = run_and_get_code(prefill_attention, query, key, value, SPARSE, scale=0.2718)
    choice = explain_backend(query, key, value, SPARSE)
    assert_ran(choice, sources)
    # dense code is not taken for it
    dense = torch.compile(lambda q, k, v: ((q @ k.mT).softmax(-1) @ v).sum())
    with made_anew:
        others = get_code(dense, query, key, value)  # of which none is compiled
    assert any("softmax" in code for code in others)
    with pytest.raises(AssertionError, match="cpp is not among"):
        assert_ran(choice, others)


def test_a_mask_that_torch_is_given_by_the_library_carries_its_own_causal_mask_mod():
    # FlashAttention-4 reads no lists where the mask_mod is torch's own no-op
    from torch.nn.attention.flex_attention import noop_mask

    query, key, _, block_map = sparse_case()
    for mask in (block_map.to_block_mask(), create_prefill_block_mask(query, key, SPARSE)):
        assert isinstance(mask, BlockMask) and mask.mask_mod is causal_mask is not noop_mask
