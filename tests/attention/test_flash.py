"""FlashAttention-4 called by itself, beside FlexAttention's call of it and plain PyTorch."""

import math
import sys
import threading
import types

import pytest
import torch
from support.inputs import as_projected, at_an_odd_address, make_qkv, random_map
from support.oracle import attention_weights, masked_attention, relative_error
from torch.nn.attention.flex_attention import AuxRequest

from flexprefill import AttentionVariant, BlockMap, PrefillConfig, explain_backend, prefill_attention, search_blocks
from flexprefill.attention import flash, flash_calls
from flexprefill.attention.flash import FlashMods, flash_dense, flash_over
from flexprefill.attention.flash_calls import call_flash
from flexprefill.attention.flex import FlexSettings, flex_over
from flexprefill.attention.log_sum_exp import flash_lse_factor
from flexprefill.blockmap.block_mask import list_blocks
from flexprefill.runtime.state import forget
from flexprefill.variant.inputs import Layout

CONFIG = PrefillConfig(alpha=0.5, sink_blocks=1, window_blocks=1, last_full_blocks=2, dense_below=0)
LSE = AuxRequest(lse=True)
LAYOUT = Layout()
BF16_CUDA = {"dtype": torch.bfloat16, "device": "cuda"}


@pytest.fixture
def pretended(monkeypatch):
    """The package in plain PyTorch, as far as flash_over asks for it. Gives what was asked."""
    asked = []

    def forward(q, k, v, *, out, lse, return_lse, softmax_scale, block_sparse_tensors=None, **mods):
        assert return_lse == (lse is not None)
        asked.append({"q": q, "k": k, "v": v, "lists": block_sparse_tensors, "scale": softmax_scale, **mods})
        out.fill_(1.0)

    mods = types.SimpleNamespace(causal_within=lambda window: ("mask", window), soft_capped=lambda cap: ("cap", cap))
    monkeypatch.setitem(
        sys.modules,
        "flash_attn.cute.block_sparsity",
        types.SimpleNamespace(BlockSparseTensorsTorch=lambda *lists, block_size: (*lists, block_size)),
    )
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", types.SimpleNamespace(_flash_attn_fwd=forward))
    monkeypatch.setitem(sys.modules, "flexprefill.attention.flash_mods", mods)
    monkeypatch.setattr("flexprefill.attention.flash_mods", mods, raising=False)
    return asked


def listed_of(query, key):
    kept, _ = random_map(query.shape[2], key.shape[2], 128, batch=query.shape[0], heads=query.shape[1])
    return list_blocks(kept.words, kept.geometry)


def test_the_kernel_gets_the_lists_and_what_the_attention_is(pretended):
    query, key, value = make_qkv(300, 700, batch=2, heads=4, kv_heads=2)
    listed = listed_of(query, key)
    output, aux = flash_over(query, key, value[..., :32], listed, 0.3, FlashMods(20.0, 100), True)
    (asked,) = pretended
    assert output.shape == (2, 4, 300, 32) and output.stride() == torch.empty(output.shape).stride()
    assert (output == 1).all() and aux.lse.shape == (2, 4, 300) and aux.max_scores is None
    assert asked["lists"] == (*listed.lists, (128, 128)) and asked["scale"] == 0.3 / 20.0
    assert (asked["mask_mod"], asked["score_mod"]) == (("mask", 100), ("cap", 20.0))
    assert torch.equal(asked["k"], key.transpose(1, 2))
    assert flash_over(query, key, value, listed, 0.3, FlashMods(), False)[1].lse is None
    assert (pretended[1]["mask_mod"], pretended[1]["score_mod"]) == (("mask", None), ("cap", None))
    assert pretended[1]["scale"] == 0.3


def test_outputs_lie_as_queries_do_and_tensors_off_their_alignment_are_moved(pretended):
    query, key, value = make_qkv(256, heads=4, kv_heads=2)
    listed = listed_of(query, key)
    inside = query.transpose(1, 2).contiguous().transpose(1, 2)
    output, _ = flash_over(inside, key, value, listed, 1.0, FlashMods(), False)
    assert output.stride() == inside.stride()
    shifted = at_an_odd_address(query)
    assert shifted.data_ptr() % flash.ALIGNMENT
    flash_over(shifted, key, value, listed, 1.0, FlashMods(), False)
    assert pretended[1]["q"].data_ptr() % flash.ALIGNMENT == 0 and torch.equal(pretended[1]["q"], query.transpose(1, 2))
    assert pretended[1]["k"].data_ptr() == key.data_ptr()


@pytest.fixture
def entered(pretended, monkeypatch):
    """The package as above, with a cache of compiled functions. Gives what each of their calls got."""
    called, entry = [], sys.modules["flash_attn.cute.interface"]._flash_attn_fwd

    def forward(q, k, v, *, out, lse, softmax_scale, block_sparse_tensors=None, **others):
        entry(q, k, v, out=out, lse=lse, softmax_scale=softmax_scale, **others)
        if "compiled" not in forward.compile_cache:
            forward.compile_cache["compiled"] = lambda *given: called.append(given)
        lists = None if block_sparse_tensors is None else block_sparse_tensors[:4]
        forward.compile_cache["compiled"](q.detach(), k, v, out.detach(), lse, softmax_scale, None, lists)

    forward.compile_cache = {}
    monkeypatch.setattr(sys.modules["flash_attn.cute.interface"], "_flash_attn_fwd", forward)
    forget("FlashAttention-4's functions, by layout")
    yield called
    assert type(forward.compile_cache) is dict
    forget("FlashAttention-4's functions, by layout")


def test_a_known_layout_calls_the_compiled_function_with_its_own_tensors(pretended, entered):
    for seed, needs_lse in ((0, True), (1, True), (2, False), (3, False), (4, True)):
        query, key, value = make_qkv(300, 700, batch=2, heads=4, kv_heads=2, seed=seed)
        listed = listed_of(query, key)
        output, aux = flash_over(query, key, value, listed, 0.3, FlashMods(), needs_lse, LAYOUT)
        *tensors, scale, nothing, lists = entered[-1]
        assert len(entered) == seed + 1 and (scale, nothing) == (0.3, None)
        expected = *(tensor.transpose(1, 2) for tensor in (query, key, value, output)), aux.lse
        assert [one is not None and (one.data_ptr(), one.stride()) for one in tensors] == [
            one is not None and (one.data_ptr(), one.stride()) for one in expected
        ]
        assert all(a is b for a, b in zip(lists, listed.lists, strict=True))
    assert len(pretended) == 2, "with a log-sum-exp and without"
    flash_over(query, key, value, listed, 0.5, FlashMods(), True, LAYOUT)
    flash_over(query, key, value, listed, 0.3, FlashMods(), True, Layout())
    flash_over(query, key, value, listed, 0.3, FlashMods(soft_cap=2.0), True, LAYOUT)
    assert len(pretended) == 5 and entered[-1][5] == 0.15
    for _ in range(2):
        dense = flash_dense(query, key, value, 0.3, LAYOUT)
    assert dense.shape == query.shape and len(pretended) == 6 and entered[-1][3].data_ptr() == dense.data_ptr()


def test_calls_that_do_not_tell_tensors_apart_go_through_the_entry(pretended, entered):
    query, key, value = make_qkv(300, heads=4, kv_heads=2)
    listed = listed_of(query, key)
    for _ in range(2):  # which of two equal tensors stands where cannot be told
        flash_over(query, key, key, listed, 0.3, FlashMods(), False, LAYOUT)
    assert len(pretended) == 2
    for _ in range(2):
        flash_over(query, key, value, listed, 0.3, FlashMods(), False, LAYOUT)
    assert len(pretended) == 3 and entered[-1][2].data_ptr() == value.data_ptr()
    flash_over(query, key, key, listed, 0.3, FlashMods(), False, LAYOUT)
    assert len(pretended) == 3 and entered[-1][2].data_ptr() == key.data_ptr()
    for _ in range(2):  # nor do those whose layout is not known
        flash_over(query, key, value, listed, 0.3, FlashMods(), False)
    assert len(pretended) == 5


def test_an_entry_that_fails_leaves_its_cache_as_it_was(entered):
    query, key, value = make_qkv(300, heads=4, kv_heads=2)
    with pytest.raises(TypeError, match="softmax_scale"):
        call_flash((query, key, value, query, None), dict)


@pytest.mark.gpu
@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "q_len, kv_len, head_dim, value_dim, kv_heads",
    [
        (2048, 2048, 128, 128, 2),
        (1001, 1001, 64, 64, 4),
        (700, 3001, 128, 128, 1),
        (100, 100, 96, 96, 2),
        (1000, 1000, 128, 64, 2),
        (1, 1500, 128, 128, 2),
    ],
)
def test_the_bits_are_those_that_flexattention_gives(dtype, q_len, kv_len, head_dim, value_dim, kv_heads):
    query, key, value = make_qkv(
        q_len, kv_len, batch=2, heads=4, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, device="cuda"
    )
    value = torch.cat([value, -value], 3)[..., :value_dim].contiguous()
    kept = search_blocks(query, key, CONFIG)
    listed = list_blocks(kept.words, kept.geometry)
    through = FlexSettings(128, 0.1, (("BACKEND", "FLASH"),), LSE)
    expected, expected_aux = flex_over(query, key, value, listed, through)
    output, aux = flash_over(query, key, value, listed, 0.1, FlashMods(), True)
    assert torch.equal(output, expected) and output.stride() == expected.stride()
    right = expected_aux.lse * flash_lse_factor(query.device)
    assert (aux.lse - right).abs().max() <= 1e-5 * right.abs().max()
    layout = Layout()
    for _ in range(2):  # the second calls do not go through the package's entry
        alone, without = flash_over(query, key, value, listed, 0.1, FlashMods(), False, layout)
        assert torch.equal(alone, expected) and without.lse is None
        again, aux_again = flash_over(query, key, value, listed, 0.1, FlashMods(), True, layout)
        assert torch.equal(again, expected) and torch.equal(aux_again.lse, aux.lse)
    assert sum(kind[0] is layout for kind in flash_calls._known._held) == 2, "the package has its cache elsewhere"


def in_pytorch(query, key, value, kept, soft_cap, window, dtype):
    """Capped attention over a map's blocks in ``dtype``."""
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    logits = soft_cap * torch.tanh(query @ key.mT * query.shape[3] ** -0.5 / soft_cap)
    position = torch.arange(kept.q_len, device=query.device)[:, None] + kept.offset
    keys = torch.arange(kept.kv_len, device=query.device)
    seen = (keys <= position) & (position - keys < (window or kept.kv_len))
    blocks = kept.to_dense().repeat_interleave(128, 2).repeat_interleave(128, 3)[..., : kept.q_len, : kept.kv_len]
    return logits.masked_fill(~(seen & blocks), -math.inf).softmax(-1).nan_to_num(0) @ value


def test_capped_attention_in_pytorch_is_that_of_the_oracle():
    query, key, value = (tensor.double() for tensor in make_qkv(200, 300, heads=4, kv_heads=2))
    everything = BlockMap.causal(1, 4, q_len=200, kv_len=300, block_size=128)
    expected = attention_weights(query, key, window=90, soft_cap=3.0) @ value.repeat_interleave(2, 1)
    assert relative_error(in_pytorch(query, key, value, everything, 3.0, 90, torch.float64), expected) <= 1e-12


@pytest.mark.gpu
@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("soft_cap, window", [(50.0, None), (5.0, None), (1.0, None), (30.0, 300)])
@pytest.mark.parametrize("q_len, kv_len, head_dim", [(2048, 2048, 128), (700, 3001, 64), (1001, 1001, 96)])
def test_a_soft_cap_is_right(soft_cap, window, q_len, kv_len, head_dim):
    query, key, value = make_qkv(q_len, kv_len, batch=2, heads=4, kv_heads=2, head_dim=head_dim, **BF16_CUDA)
    query = 4 * query  # scores beyond the cap
    variant = AttentionVariant(soft_cap=soft_cap, sliding_window=window)
    choice = explain_backend(query, key, value, CONFIG, variant=variant)
    assert choice.name == "flash" and choice.by_itself
    kept = search_blocks(query, key, CONFIG, variant=variant)
    exact = in_pytorch(query, key, value, kept, soft_cap, window, torch.float64)
    theirs = relative_error(in_pytorch(query, key, value, kept, soft_cap, window, torch.bfloat16), exact)
    output, aux = prefill_attention(query, key, value, CONFIG, variant=variant, return_aux=LSE)
    assert relative_error(output, exact) <= theirs
    assert torch.equal(prefill_attention(query, key, value, CONFIG, variant=variant), output)
    named = {"variant": variant, "block_map": kept, "backend": "triton", "return_aux": LSE}
    other, other_aux = prefill_attention(query, key, value, CONFIG, **named)
    assert relative_error(output, other) <= 2 * theirs
    assert (aux.lse - other_aux.lse).abs().max() <= soft_cap * 2**-10 + 1e-3  # tanh to 2**-11 of its result


@pytest.mark.gpu
@pytest.mark.usefixtures("flash")
def test_empty_rows_are_zero():
    query, key, value = make_qkv(1000, heads=4, kv_heads=2, head_dim=128, **BF16_CUDA)
    kept, _ = random_map(1000, 1000, 128, heads=4, share=0.2)
    kept = BlockMap.from_dense(kept.to_dense().cuda(), q_len=1000, kv_len=1000, block_size=128)
    output, aux = prefill_attention(query, key, value, block_map=kept, return_aux=LSE)
    exact = masked_attention(query, key, value, kept, dtype=torch.float32).nan_to_num(0)
    theirs = relative_error(masked_attention(query, key, value, kept, dtype=torch.bfloat16).nan_to_num(0), exact)
    assert relative_error(output, exact) <= 2 * theirs
    empty = ~kept.to_dense().any(-1).repeat_interleave(128, 2)[:, :, :1000]
    assert empty.any() and not output[empty].any() and torch.isneginf(aux.lse[empty]).all()


@pytest.mark.gpu
@pytest.mark.usefixtures("flash")
def test_views_modes_graphs_and_threads_change_nothing():
    query, key, value = make_qkv(2000, heads=8, kv_heads=2, head_dim=128, **BF16_CUDA)
    expected = prefill_attention(query, key, value, CONFIG)
    assert explain_backend(query, key, value, CONFIG).by_itself
    for inputs in ((at_an_odd_address(query), key, value), as_projected(query, key, value)):
        assert torch.equal(prefill_attention(*inputs, CONFIG), expected)
    with torch.no_grad():
        assert torch.equal(prefill_attention(torch.nn.Parameter(query), key, value, CONFIG), expected)
    with torch.inference_mode(), torch.autocast("cuda", torch.float16):
        assert torch.equal(prefill_attention(query, key, value, CONFIG), expected)
    outputs, stream = {}, torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def in_a_thread(name):
        with torch.cuda.stream(stream):
            outputs[name] = prefill_attention(query, key, value, CONFIG)

    threads = [threading.Thread(target=in_a_thread, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(outputs) == 4 and all(torch.equal(output, expected) for output in outputs.values())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = prefill_attention(query, key, value, CONFIG)
    captured.fill_(math.nan)
    graph.replay()
    assert torch.equal(captured, expected)
