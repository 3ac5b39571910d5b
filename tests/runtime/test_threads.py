"""Threads, processes and streams: results as in one thread."""

import copy
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.inputs import DEVICE, make_qkv
from support.oracle import masked_attention, relative_error

from flexprefill import (
    BlockMap,
    KeyMeans,
    ListBuffers,
    MaskCache,
    PrefillConfig,
    Scorer,
    attention_recall,
    load_masks,
    prefill_attention,
    register_scorer,
    save_masks,
    search_blocks,
)
from flexprefill.search import operator as op
from flexprefill.search import reference
from flexprefill.search.rule import Rule

CONFIG = PrefillConfig(block_size=16, alpha=0.9, window_blocks=1, dense_below=0)
RULE = Rule.of(CONFIG, scale=1.0, last_chunk=True)
THREADS = 8


def at_once(work, count=THREADS):
    """The results of work(0) … work(count - 1), all begun at one moment, each in a thread of its own."""
    barrier = threading.Barrier(count, timeout=60)

    def begin(number):
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


# FlexAttention compiles for queries of less than 128 apart on a GPU
LENGTH = 100 if DEVICE == "cpu" else 200


def inputs_of(number, length=LENGTH):
    return make_qkv(length + 37 * number, heads=2, head_dim=16, device=DEVICE, seed=number)


@pytest.fixture(scope="module")
def first_calls():
    """How many graphs the first calls of a kind made, 12 at once, and their outputs."""
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    outputs = at_once(lambda number: prefill_attention(*inputs_of(number), CONFIG), 12)
    return counters["stats"]["unique_graphs"] - before, outputs


def test_the_first_calls_of_many_threads_compile_as_often_as_one_thread(first_calls):
    graphs, outputs = first_calls
    assert graphs <= 2  # beyond 8 they would raise
    for number, output in enumerate(outputs):
        query, key, value = inputs_of(number)
        expected = masked_attention(query, key, value, search_blocks(query, key, CONFIG))
        assert relative_error(output, expected) <= (1e-5 if DEVICE == "cpu" else 2e-3)


def test_threads_that_attend_other_lengths_get_what_one_thread_gets(first_calls):
    one_by_one = [prefill_attention(*inputs_of(number), CONFIG) for number in range(THREADS)]
    many = at_once(lambda number: [prefill_attention(*inputs_of(number), CONFIG) for _ in range(10)])
    for outputs, expected in zip(many, one_by_one, strict=True):
        assert all(torch.equal(output, expected) for output in outputs)


def test_threads_search_list_cache_save_and_measure_as_one(tmp_path):
    """Everything but attention, from shared objects where they may be shared."""
    cache, buffers = MaskCache(), ListBuffers()

    def work(number):
        found = []
        for turn in range(6):
            query, key, _ = inputs_of(number, 200)
            chunk = 64 * (turn + 1)
            block_map = search_blocks(query[:, :, :chunk], key[:, :, :chunk], CONFIG)
            mask = block_map.to_block_mask(buffers=buffers)
            prompt = cache.prompt(torch.arange(key.shape[2]) + 1000 * number)
            cached = prompt.search_blocks(0, query[:, :, :chunk], key[:, :, :chunk], CONFIG)
            path = tmp_path / f"{number}.safetensors"
            save_masks(path, {0: block_map})
            recall = attention_recall(query[:, :, :chunk], key[:, :, :chunk], block_map).shares
            found.append(
                (block_map, cached, load_masks(path, device=DEVICE)[0], BlockMap.from_block_mask(mask), recall)
            )
        return found

    one_by_one = [work(number) for number in range(THREADS)]
    cache.clear()
    for results, expected in zip(at_once(work), one_by_one, strict=True):
        for (*maps, recall), (map_of_one, *_, recall_of_one) in zip(results, expected, strict=True):
            assert all(block_map == map_of_one for block_map in maps)
            assert torch.allclose(recall, recall_of_one, rtol=1e-5, equal_nan=True)


def test_buffers_are_each_threads_own():
    block_map = search_blocks(*inputs_of(0)[:2], CONFIG)
    other = BlockMap.causal(1, 2, q_len=LENGTH, kv_len=LENGTH, block_size=16, device=DEVICE)
    buffers = ListBuffers()
    ours = block_map.to_block_mask(buffers=buffers)
    held = buffers.nbytes
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(lambda: other.to_block_mask(buffers=buffers)).result()
        assert buffers.nbytes == 2 * held > 0
    assert BlockMap.from_block_mask(ours) == block_map and BlockMap.from_block_mask(theirs) == other
    assert copy.deepcopy(buffers).nbytes == 2 * held
    longer = BlockMap.causal(1, 2, q_len=2 * LENGTH, kv_len=2 * LENGTH, block_size=16, device=DEVICE)
    longer.to_block_mask(buffers=buffers)
    fresh = ListBuffers()
    longer.to_block_mask(buffers=fresh)
    assert buffers.nbytes == fresh.nbytes  # what a thread had that has ended is given back


def test_means_that_threads_share_are_of_one_of_them():
    query, key, _ = make_qkv(800, heads=2, head_dim=16, device=DEVICE)
    implementation = "triton" if DEVICE == "cuda" else "reference"
    whole = op.pool_keys(key, 16, implementation)
    for _ in range(20):
        means = KeyMeans()

        def extend(number, means=means):
            try:
                return search_blocks(
                    query[:, :, : 100 * number + 100], key[:, :, : 100 * number + 100], CONFIG, means=means
                )
            except ValueError as error:  # of fewer keys than another thread's
                assert "a new prompt needs a new KeyMeans" in str(error)

        for number, found in enumerate(at_once(extend)):
            end = 100 * number + 100
            assert found is None or found == search_blocks(query[:, :, :end], key[:, :, :end], CONFIG)
        blocks = means.kv_len // 16
        assert torch.equal(means.extend(key, RULE, implementation).means[:, :, :blocks], whole[:, :, :blocks])


def test_one_of_many_threads_registers_a_name():
    scorers = [Scorer(reference.pool_keys, reference.log_scores, "a test") for _ in range(THREADS)]

    def register(number):
        try:
            register_scorer("of one thread", scorers[number])
        except ValueError as error:
            return str(error)

    refused = [message for message in at_once(register) if message]
    assert len(refused) == THREADS - 1 and "'of one thread' is taken" in refused[0]


FORK = """
import os, sys, threading
sys.path.insert(0, {tests!r})
import torch
import flexprefill
assert threading.active_count() == 1 and not torch.cuda.is_initialized()
from support.inputs import make_qkv
from flexprefill import *

def results():
    config = PrefillConfig(block_size=16, alpha=0.9, window_blocks=1, dense_below=0)
    query, key, value = make_qkv(100, heads=2, head_dim=16)
    block_map = search_blocks(query, key, config)
    cache = MaskCache()
    save_masks(path, {{0: block_map}})
    return (
        block_map, cache.prompt(range(100)).search_blocks(0, query, key, config), load_masks(path)[0],
        BlockMap.from_block_mask(block_map.to_block_mask(buffers=ListBuffers())),
        prefill_attention(query, key, value, config), attention_recall(query, key, block_map).mean,
    )

path = {path!r} + str(os.getpid())
parent, child = os.pipe()
pid = os.fork()
path = {path!r} + str(os.getpid())
if pid == 0:
    torch.save([r.words if isinstance(r, BlockMap) else r for r in results()], {path!r} + "child")
    os._exit(0)
ours = results()
_, status = os.waitpid(pid, 0)
assert status == 0, status
theirs = torch.load({path!r} + "child")
for a, b in zip(ours, theirs):
    assert torch.equal(a.words if isinstance(a, BlockMap) else a, b)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="a process that uses CUDA cannot fork; the CPU's results are compared")
def test_a_fork_after_the_import_gives_the_same_results(tmp_path):
    from pathlib import Path

    code = FORK.format(tests=str(Path(__file__).parents[1]), path=str(tmp_path / "masks"))
    # torch has as many threads as it takes by itself
    environment = {name: text for name, text in os.environ.items() if name != "OMP_NUM_THREADS"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert result.stdout == "equal\n", result.stdout + result.stderr


FORK_LATE = """
import os, torch
from flexprefill import *
torch.set_num_threads(2)
query, key = torch.randn(1, 4, 1000, 64), torch.randn(1, 2, 1000, 64)
expected = search_blocks(query, key)
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)
    os._exit(0 if search_blocks(query, key) == expected else 1)
print(os.waitpid(pid, 0)[1])
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="a process that uses CUDA cannot fork")
def test_a_fork_of_a_parent_that_has_computed_works_as_the_page_says():
    result = subprocess.run([sys.executable, "-c", FORK_LATE], capture_output=True, text=True, timeout=60)
    assert result.stdout == "0\n", result.stdout + result.stderr


@pytest.mark.gpu
def test_two_streams_give_what_one_gives():
    shape = {"heads": 8, "kv_heads": 2, "head_dim": 128, "dtype": torch.bfloat16, "device": "cuda"}
    config = PrefillConfig(alpha=0.5, window_blocks=1, dense_below=0)
    inputs = [make_qkv(length, **shape, seed=length) for length in (4096, 3001)]
    expected = [(search_blocks(*each[:2], config), prefill_attention(*each, config)) for each in inputs]
    torch.cuda.synchronize()
    streams, buffers = [torch.cuda.Stream() for _ in inputs], ListBuffers()
    found = [[], []]
    for _ in range(50):
        for place, (stream, tensors) in enumerate(zip(streams, inputs, strict=True)):
            with torch.cuda.stream(stream):
                output = prefill_attention(*tensors, config, buffers=buffers)
                found[place].append((search_blocks(*tensors[:2], config), output))
    torch.cuda.synchronize()
    for (block_map, output), results in zip(expected, found, strict=True):
        assert all(theirs == block_map and torch.equal(other, output) for theirs, other in results)


@pytest.mark.gpu
def test_a_cached_map_is_waited_for_by_another_stream():
    query, key, _ = make_qkv(4096, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda")
    config = PrefillConfig(alpha=0.5, window_blocks=1)
    expected = search_blocks(query, key, config)
    torch.cuda.synchronize()
    for _ in range(5):
        cache = MaskCache()
        prompt = cache.prompt(range(4096))
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        with torch.cuda.stream(first):
            torch.cuda._sleep(200_000_000)  # so that the search is not done when its map is found again
            prompt.search_blocks(0, query, key, config)
        with torch.cuda.stream(second):
            again = prompt.search_blocks(0, query, key, config)
            copied = again.words.clone()
        torch.cuda.synchronize()
        assert cache.stats().hits == 1 and torch.equal(copied, expected.words)


@pytest.mark.gpu
def test_threads_on_streams_of_their_own_give_what_one_gives():
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 128, "dtype": torch.bfloat16, "device": "cuda"}
    config = PrefillConfig(alpha=0.5, window_blocks=1, dense_below=0)
    inputs = [make_qkv(512 + 300 * number, **shape, seed=number) for number in range(THREADS)]
    expected = [prefill_attention(*tensors, config) for tensors in inputs]
    torch.cuda.synchronize()
    cache = MaskCache()

    def work(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            outputs = []
            for _ in range(10):
                query, key, _ = inputs[number]
                prompt = cache.prompt(torch.arange(query.shape[2]) + 10_000 * number)
                block_map = prompt.search_blocks(0, query, key, config)
                outputs.append((prefill_attention(*inputs[number], config), block_map))
            torch.cuda.current_stream().synchronize()
        return outputs

    for number, outputs in enumerate(at_once(work)):
        block_map = search_blocks(*inputs[number][:2], config)
        assert all(torch.equal(output, expected[number]) and found == block_map for output, found in outputs)
