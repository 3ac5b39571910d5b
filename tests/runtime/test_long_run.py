"""Thousands of calls of random lengths: memory stays flat, nothing is compiled again, results are the first ones."""

import gc
import mmap
import random
from pathlib import Path

import pytest
import torch
from support.inputs import make_qkv
from torch._dynamo.utils import counters

from flexprefill import ListBuffers, MaskCache, PrefillConfig, prefill_attention, search_blocks

MIB = 2**20


def resident_bytes():
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def long_run(calls, lengths, device, config, **shape):
    """Calls of random lengths; returns what is held of device and host memory, and how many graphs there were, each
    after a third of the calls and at the end, and how many calls gave something else than the first of their length."""
    chance = random.Random(0)
    query, key, value = make_qkv(max(lengths), device=device, **shape)
    buffers, cache, first = ListBuffers(), MaskCache(max_bytes=8 * MIB), {}
    different = torch.zeros((), dtype=torch.int64, device=device)
    held = []
    for call in range(calls):
        if call in (calls // 3, calls - 1):
            gc.collect()
            on_device = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) if device == "cuda" else (0, 0)
            held.append((*on_device, resident_bytes(), counters["stats"]["unique_graphs"]))
        # all lengths twice, until what is kept of each is there
        length = lengths[call % len(lengths)] if call < 2 * len(lengths) else chance.choice(lengths)
        rows, keys, values = (tensor[:, :, :length] for tensor in (query, key, value))
        block_map = search_blocks(rows, keys, config)
        cached = cache.prompt(range(length)).search_blocks(0, rows, keys, config)
        chunk = search_blocks(rows[:, :, length // 2 :], keys, config, last_chunk=False)
        chunk.to_block_mask(buffers=buffers)
        output = prefill_attention(rows, keys, values, config, buffers=buffers if call % 2 else None)
        found = block_map.words, cached.words, chunk.words, output
        if call < len(lengths):
            continue
        if length not in first:
            first[length] = tuple(tensor.clone() for tensor in found)
        for tensor, expected in zip(found, first[length], strict=True):
            different += (tensor != expected).any() | (tensor.isnan().any() if tensor.is_floating_point() else False)
    return held[0], held[1], int(different)


@pytest.mark.slow
def test_three_hundred_calls_on_the_cpu():
    config = PrefillConfig(block_size=16, alpha=0.9, window_blocks=1, dense_below=0)
    lengths = [33 + 7 * number for number in range(40)]
    shape = {"heads": 2, "head_dim": 16}
    early, late, different = long_run(300, lengths, "cpu", config, **shape)
    assert different == 0
    assert late[3] == early[3], "compiled again"
    assert late[2] - early[2] <= 16 * MIB, f"{(late[2] - early[2]) / MIB:.1f} MiB more are held"


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
def test_ten_thousand_calls_on_a_gpu():
    """About a minute on an H200; fresh memory is filled with NaN throughout."""
    config = PrefillConfig(alpha=0.5, window_blocks=1, dense_below=0)
    chance = random.Random(1)
    lengths = [128, 2048, *(chance.randrange(2, 3000) for _ in range(100))]
    shape = {"heads": 8, "kv_heads": 2, "head_dim": 128, "dtype": torch.bfloat16}
    early, late, different = long_run(10_000, lengths, "cuda", config, **shape)
    assert different == 0
    assert late[3] == early[3], "compiled again"
    assert late[0] - early[0] <= 16 * MIB, f"{(late[0] - early[0]) / MIB:.1f} MiB more are held on the device"
    assert late[1] - early[1] <= 128 * MIB, f"{(late[1] - early[1]) / MIB:.1f} MiB more are reserved on the device"
    assert late[2] - early[2] <= 128 * MIB, f"{(late[2] - early[2]) / MIB:.1f} MiB more are held by the host"


def test_a_leak_would_be_noticed(monkeypatch):
    kept = []

    def leaking(query, key, value, config, **arguments):
        kept.append(mmap.mmap(-1, MIB))  # not what an allocator has left over
        kept[-1].write(bytes(MIB))
        return query

    monkeypatch.setitem(globals(), "prefill_attention", leaking)
    config = PrefillConfig(block_size=16, alpha=0.9, window_blocks=1, dense_below=0)
    early, late, _ = long_run(100, [33, 40, 50], "cpu", config, heads=2, head_dim=16)
    assert late[2] - early[2] > 16 * MIB
