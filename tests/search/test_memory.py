import subprocess
import sys

import pytest
import torch
from support.device_calls import waits_are_errors
from support.inputs import DEVICE, make_qkv

from flexprefill import (
    BlockMap,
    FlexPrefillError,
    ListBuffers,
    NotEnoughMemoryError,
    PrefillConfig,
    create_prefill_block_mask,
    prefill_attention,
    search_blocks,
)
from flexprefill.runtime import memory
from flexprefill.runtime.memory import free_bytes, room_for

CONFIG = PrefillConfig(block_size=16, alpha=0.5, window_blocks=1)


def huge_map(heads=10**6):
    """Of far more lists than any memory holds, from the words of one head."""
    words = BlockMap.causal(1, 1, q_len=2**18, kv_len=2**18, block_size=128, device=DEVICE).words
    return BlockMap(words.expand(1, heads, -1, -1), 2**18, 2**18, 128)


@pytest.mark.parametrize("buffers", [False, True])
def test_lists_that_do_not_fit_are_refused_before_anything_is_allocated(buffers):
    query, key, _ = make_qkv(300, heads=2, device=DEVICE)
    buffers = ListBuffers() if buffers else None
    expected = search_blocks(query, key, CONFIG)
    expected.to_block_mask(buffers=buffers)
    with pytest.raises(
        NotEnoughMemoryError, match=r"memory for the index lists .*takes [\d,]{18,} bytes on .*in chunks"
    ) as raised:
        huge_map().to_block_mask(buffers=buffers)
    assert isinstance(raised.value, (FlexPrefillError, torch.OutOfMemoryError))
    assert buffers is None or buffers.nbytes == 0
    # and all goes on
    assert BlockMap.from_block_mask(expected.to_block_mask(buffers=buffers)) == expected


@pytest.fixture
def little_memory(monkeypatch):
    monkeypatch.setattr(memory, "WORTH_ASKING", 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 200)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_search_that_does_not_fit_is_refused(implementation):
    query, key, value = make_qkv(400, heads=2, device=DEVICE)
    with pytest.raises(
        NotEnoughMemoryError, match=r"memory for the search.* takes [\d,]+ bytes on .*200 are free; "
    ) as raised:
        search_blocks(query, key, CONFIG, implementation=implementation)
    assert "in chunks" in str(raised.value) or "fewer sequences" in str(raised.value)
    for call in (prefill_attention, lambda q, k, v: create_prefill_block_mask(q, k, CONFIG)):
        with pytest.raises(NotEnoughMemoryError):
            call(query, key, value)


@pytest.mark.usefixtures("little_memory")
def test_what_the_message_advises_fits():
    query, key, _ = make_qkv(128, heads=1, head_dim=16, device=DEVICE)
    with pytest.raises(NotEnoughMemoryError):
        search_blocks(query, key, CONFIG, implementation="reference")
    chunk = search_blocks(query[:, :, 96:112], key[:, :, :112], CONFIG, implementation="reference", last_chunk=False)
    assert chunk.shape == (1, 1, 1, 7)


def test_free_memory_is_about_what_the_system_says():
    device = torch.empty(0, device=DEVICE).device  # with its index
    free = free_bytes(device)
    if DEVICE == "cuda":
        assert 0 < free <= torch.cuda.mem_get_info()[1]
    else:
        with open("/proc/meminfo") as table:
            total = 1024 * int(table.readline().split()[1])
        assert 0 < free <= total
    assert free_bytes(torch.device("meta")) is None


def test_an_allocators_own_refusal_says_the_same():
    message = r"memory for a step .*takes 3 bytes on cpu, and .*one piece; do less"
    device = torch.device("cpu")
    with pytest.raises(NotEnoughMemoryError, match=message) as raised, room_for("a step", 3, device, "do less"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert str(raised.value.__cause__) == "CUDA out of memory"
    with pytest.raises(RuntimeError, match="another"), room_for("a step", 3, device, "do less"):
        raise RuntimeError("another")


@pytest.mark.gpu
def test_a_full_gpu_refuses_and_stays_usable():
    code = """
import torch, sys
from flexprefill import *
from flexprefill.runtime.memory import free_bytes
torch.cuda.set_per_process_memory_fraction(4e9 / torch.cuda.get_device_properties(0).total_memory)
query, key = (torch.randn(1, heads, 262144, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2))
small = search_blocks(query[:, :, :4096], key[:, :, :4096])
block_map = search_blocks(query, key, PrefillConfig(alpha=1.0))
wide = BlockMap(block_map.words.repeat(1, 16, 1, 1), 262144, 262144, 128)
torch.cuda.synchronize()
before = torch.cuda.memory_allocated()
try:
    wide.to_block_mask()
    sys.exit("lists of 4.3 GB fit into 4 GB")
except NotEnoughMemoryError as error:
    print(error)
assert torch.cuda.memory_allocated() == before
filler = torch.empty(free_bytes(torch.device("cuda", 0)) - 300_000_000, device="cuda", dtype=torch.uint8)
before = torch.cuda.memory_allocated()
try:
    search_blocks(query, key, PrefillConfig(alpha=1.0, block_size=16))
    sys.exit("the search of 0.5 GB of words and scores fits into 0.3 GB")
except NotEnoughMemoryError as error:
    print(error)
assert torch.cuda.memory_allocated() == before
del filler
assert search_blocks(query[:, :, :4096], key[:, :, :4096]) == small
chunk = search_blocks(query[:, :, -4096:], key, PrefillConfig(alpha=1.0))
chunk.to_block_mask()
torch.cuda.synchronize()
print("usable")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr + result.stdout
    for words in ("memory for the index lists", "memory for the search", "bytes on cuda:0", "usable"):
        assert words in result.stdout


@pytest.mark.gpu
def test_asking_for_memory_waits_for_nothing_and_can_be_captured():
    query, key, _ = make_qkv(2048, heads=4, device="cuda", dtype=torch.bfloat16)
    memory_asked, memory.WORTH_ASKING = memory.WORTH_ASKING, 0
    try:
        expected = search_blocks(query, key)
        expected.to_block_mask()
        torch.cuda.synchronize()
        with waits_are_errors():
            search_blocks(query, key).to_block_mask()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            block_map = search_blocks(query, key)
            mask = block_map.to_block_mask()
        graph.replay()
        assert block_map == expected and BlockMap.from_block_mask(mask) == expected
    finally:
        memory.WORTH_ASKING = memory_asked
