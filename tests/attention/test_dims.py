"""Every head dimension, value dimension, dtype and block size, by backend: against dense attention under the map."""

import dataclasses
from itertools import product

import pytest
import torch
from support.inputs import DEVICE, make_qkv
from support.oracle import assert_follows_rule, corrected_attention, masked_attention, relative_error

from flexprefill import FlexPrefillError, PrefillConfig, prefill_attention, search_blocks
from flexprefill.attention.backends import FLASH_HEAD_DIMS, SIXTEEN_BIT

CONFIG = PrefillConfig(alpha=0.5, sink_blocks=1, window_blocks=1, last_full_blocks=1, dense_below=0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCKS = (64, 128)
DIMS = ((64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128), (64, 128), (128, 64))  # D, Dv
# each compiles for seconds: with test_attention's, every dimension, dtype and block size once
ON_THE_CPU = ((torch.float16, 64, (96, 96)), (torch.bfloat16, 128, (192, 128)), (torch.float32, 64, (256, 256)))
SEARCHES = ({"min_blocks": 3}, {"mask_heads": "kv", "score_rows": "visible"})


def name_of(value):
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


# each compiles twice for seconds: every dimension with both block sizes and two of the dtypes
ON_A_GPU = [
    (dtype, block_size, dims)
    for (i, dtype), (j, block_size), (k, dims) in product(enumerate(DTYPES), enumerate(BLOCKS), enumerate(DIMS))
    if (i + j + k) % 3 == 0
]
everything = pytest.mark.parametrize("dtype, block_size, dims", ON_A_GPU, ids=name_of)


def prompt(q_len, kv_len, dtype, dims):
    query, key, value = make_qkv(
        q_len, kv_len, heads=4, kv_heads=2, head_dim=dims[0], dtype=dtype, device=DEVICE, seed=sum(dims)
    )
    return query, key, torch.cat([value, -value, value], 3)[..., : dims[1]].contiguous()


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_the_search_follows_the_rule(implementation, dtype, block_size, head_dim):
    query, key, _ = prompt(140, 300, dtype, (head_dim, head_dim))
    for settings in SEARCHES:
        config = dataclasses.replace(CONFIG, block_size=block_size, **settings)
        block_map = search_blocks(query, key, config, implementation=implementation)
        assert_follows_rule(block_map, query, key, config=config)


def check_attention(backend, dtype, block_size, dims, q_len, kv_len, correct):
    inputs = prompt(q_len, kv_len, dtype, dims)
    config = dataclasses.replace(CONFIG, block_size=block_size, mean_correction=correct, mask_heads="kv")
    block_map = search_blocks(*inputs[:2], config)
    exact = masked_attention(*inputs, block_map)
    theirs = relative_error(masked_attention(*inputs, block_map, dtype=dtype), exact)
    allowed = 2 * max(theirs, 1e-6)
    if correct:
        exact = corrected_attention(*inputs, block_map)[0].to(DEVICE)
        allowed *= 1.5  # the merge rounds the output once more
    output = prefill_attention(*inputs, config, backend=backend)
    assert output.shape == exact.shape and output.dtype == dtype
    if dtype == torch.float32 and DEVICE == "cuda":
        allowed = 2e-3  # its products may be tf32
    assert relative_error(output, exact) <= allowed


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="compiles for the CPU")
@pytest.mark.parametrize("dtype, block_size, dims", ON_THE_CPU, ids=name_of)
def test_attention_on_the_cpu(dtype, block_size, dims):
    check_attention("auto", dtype, block_size, dims, 460, 460, correct=False)
    check_attention("auto", dtype, block_size, dims, 460, 460, correct=True)


@pytest.mark.gpu
@everything
def test_attention_by_triton(dtype, block_size, dims):
    check_attention("triton", dtype, block_size, dims, 1100, 1100, correct=False)
    check_attention("triton", dtype, block_size, dims, 300, 1111, correct=True)


@pytest.mark.gpu
@pytest.mark.usefixtures("flash")
@everything
def test_attention_by_flash(dtype, block_size, dims):
    if dtype in SIXTEEN_BIT and block_size == 128 and set(dims) <= set(FLASH_HEAD_DIMS):
        check_attention("flash", dtype, block_size, dims, 1100, 1100, correct=False)
        check_attention("flash", dtype, block_size, dims, 300, 1111, correct=True)
        return
    with pytest.raises(FlexPrefillError, match="backend 'flash' cannot do this: .*; 'triton' can"):
        check_attention("flash", dtype, block_size, dims, 300, 300, correct=False)
