"""The same input gives the same bits; what may differ, and by how much, is in docs/reference/robustness.md.

Batch positions, chunks and repeated runs on any device are in test_properties.py.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.inputs import DEVICE, make_qkv

from flexprefill import BlockMap, PrefillConfig, prefill_attention, search_blocks

CONFIG = PrefillConfig(alpha=0.5, window_blocks=1, last_full_blocks=1, dense_below=0)

IN_A_PROCESS = """
import sys
sys.path[:0] = {tests!r}
from test_determinism import fingerprint
print(fingerprint())
"""


def fingerprint():
    """Of the masks of a few searches."""
    digest = hashlib.sha256()
    for length, dtype in ((500, torch.float32), (300, torch.bfloat16)):
        query, key, _ = make_qkv(length, heads=4, kv_heads=2, dtype=dtype, device=DEVICE)
        for changes in ({}, {"mask_heads": "kv"}, {"block_size": 32, "min_blocks": 3}):
            config = PrefillConfig(**CONFIG.to_dict() | changes)
            digest.update(search_blocks(query, key, config).words.cpu().numpy().tobytes())
    return digest.hexdigest()


def test_another_process_finds_the_same_bits():
    code = IN_A_PROCESS.format(tests=[str(folder) for folder in Path(__file__).parents[:2]])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == fingerprint(), result.stderr


@pytest.mark.skipif(DEVICE == "cuda", reason="of the CPU's threads")
def test_the_number_of_threads_changes_no_bit():
    expected, threads = fingerprint(), torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            assert fingerprint() == expected
        finally:
            torch.set_num_threads(threads)


PUBLISHED = {"heads": 8, "kv_heads": 2, "head_dim": 128, "dtype": torch.bfloat16, "device": "cuda"}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("length", [4096, 4001, 20000])
def test_runs_and_places_in_a_batch_give_the_same_bits_on_a_gpu(length, backend):
    query, key, value = make_qkv(length, **PUBLISHED)
    block_map = search_blocks(query, key, CONFIG)
    output = prefill_attention(query, key, value, CONFIG, backend=backend)
    for _ in range(20):
        assert search_blocks(query, key, CONFIG) == block_map
        assert torch.equal(prefill_attention(query, key, value, CONFIG, backend=backend), output)
    threefold = [torch.cat([tensor.flip(2), tensor, tensor * 2]) for tensor in (query, key)]
    assert torch.equal(search_blocks(*threefold, CONFIG).words[1:2], block_map.words)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"mask_heads": "kv"}, {"score_rows": "visible"}, {"min_blocks": 3}])
def test_chunkings_give_the_same_bits_on_a_gpu(settings):
    query, key, _ = make_qkv(8192, **PUBLISHED)
    config = PrefillConfig(**CONFIG.to_dict() | settings)
    whole = search_blocks(query, key, config)
    for chunk in (128, 1024, 3072):
        ends = [*range(chunk, 8192, chunk), 8192]
        parts = [
            search_blocks(query[:, :, start:end], key[:, :, :end], config, last_chunk=end == 8192)
            for start, end in zip([0, *ends], ends, strict=False)
        ]
        assert BlockMap.from_chunks(parts) == whole


@pytest.mark.gpu
def test_how_far_kernels_differ(capsys):
    """Hopper kernel, portable one and reference differ in the share of blocks of docs/reference/robustness.md."""
    from flexprefill.search.kernels import launch as kernels

    query, key, _ = make_qkv(16384, **PUBLISHED)
    hopper = search_blocks(query, key, CONFIG)
    takes, kernels.hopper_takes = kernels.hopper_takes, lambda *arguments: False
    try:
        portable = search_blocks(query, key, CONFIG)
    finally:
        kernels.hopper_takes = takes
    reference = search_blocks(query, key, CONFIG, implementation="reference")
    kept = reference.counts().sum()
    for other in (hopper, portable):
        assert (other ^ reference).counts().sum() <= 2e-5 * kept + 1
