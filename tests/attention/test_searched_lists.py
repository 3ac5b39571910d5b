"""Calls of a layout that was searched before take the same launches, and get the blocks that others get."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from support.inputs import as_projected, at_an_odd_address, make_qkv
from support.oracle import relative_error
from torch.nn.attention.flex_attention import AuxRequest

from flexprefill import (
    AttentionVariant,
    BlockMap,
    KeyMeans,
    ListBuffers,
    PrefillConfig,
    explain_backend,
    prefill_attention,
    search_blocks,
)
from flexprefill.attention import prefill, searched_lists
from flexprefill.attention.backends import BackendChoice
from flexprefill.attention.call import Call
from flexprefill.attention.tail import TAIL_SPLIT_FROM, Split, lists_in_parts
from flexprefill.blockmap import index_lists
from flexprefill.blockmap.block_mask import list_blocks
from flexprefill.runtime import replaying
from flexprefill.runtime.listeners import listen
from flexprefill.runtime.replaying import Recording, record
from flexprefill.runtime.state import forget
from flexprefill.search.rule import Rule
from flexprefill.variant.variant import PLAIN

PUBLISHED = PrefillConfig(alpha=0.5, sink_blocks=1, window_blocks=1, dense_below=0)
TWO_SIDED = replace(PrefillConfig.recommended(), dense_below=0)


class OnGpu:
    """A tensor as far as a call that is not run looks at it."""

    is_cuda = True
    shape = (1, 4, 1024, 64)


def test_only_plain_and_short_searches_are_recorded():
    call = Call(OnGpu(), OnGpu(), OnGpu(), PUBLISHED, PLAIN, None, None, None, 0.1, True, "auto", None)
    choice = BackendChoice("triton", "")
    assert searched_lists._is_plain(call, choice)
    assert searched_lists._is_plain(call._replace(config=TWO_SIDED, last_chunk=False), choice)
    longer, on_cpu = OnGpu(), OnGpu()
    longer.shape, on_cpu.is_cuda = (1, 4, 65_536, 64), False
    for changes in (
        {"key": longer},
        {"query": on_cpu},
        {"block_map": BlockMap.causal(1, 4, q_len=1024, kv_len=1024, block_size=128)},
        {"mask_mod": lambda b, h, q, k: q >= k},
        {"score_mod": lambda score, b, h, q, k: score},
        {"variant": AttentionVariant(sliding_window=500)},
        *({"config": replace(PUBLISHED, **setting)} for setting in (
            {"guard": 0.9}, {"mean_correction": True}, {"alpha": (0.1, 0.2, 0.3, 0.4)}, {"scorer": "exact"},
        )),
    ):  # fmt: skip
        assert not searched_lists._is_plain(call._replace(**changes), choice), changes
    assert searched_lists._is_plain(call, replace(choice, tail_parts=2))
    assert not searched_lists._is_plain(call, replace(choice, dense=True))
    with listen(object()):
        assert not searched_lists._is_plain(call, choice)


@pytest.mark.parametrize("config", [PUBLISHED, TWO_SIDED], ids=["published", "two-sided"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_recorded_search_with_its_lists_is_that_of_other_prompts(monkeypatch, config, parts):
    """By Triton's interpreter."""
    pytest.importorskip("triton")
    from flexprefill.blockmap.index_lists_kernel import fill_lists

    def by_kernel(lists, words, geometry, listing, *, reused):
        fill_lists(lists, words, geometry, *listing, reused=reused)

    monkeypatch.setattr(index_lists, "_fill", by_kernel)
    rule = Rule.of(replace(config, block_size=16, last_full_blocks=1), scale=0.3, last_chunk=True)
    split = Split(1, parts) if parts > 1 else None
    prompts = [make_qkv(90, 250, heads=4, kv_heads=2, head_dim=32, seed=seed)[:2] for seed in range(2)]
    lists, recording = record(partial(searched_lists._search_and_list, rule, split), *prompts[0])
    assert len(recording.results) == 4 * parts and all(map(torch.equal, recording.replay(*prompts[0]), lists))
    expected = searched_lists._search_and_list(rule, split, *prompts[1])
    assert all(map(torch.equal, recording.replay(*prompts[1]), expected)) and not torch.equal(expected[3], lists[3])


@pytest.fixture
def seen(monkeypatch):
    """The lists of calls whose launches are recorded, one after the other."""
    found = []

    def attend(call, choice, *listed):
        found.append(listed)
        return attend_listed(call, choice, *listed)

    attend_listed = prefill.attend_listed
    monkeypatch.setattr(prefill, "attend_listed", attend)
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("config", [PUBLISHED, TWO_SIDED], ids=["published", "two-sided"])
@pytest.mark.parametrize(
    ("q_len", "kv_len"), [(4096, 4096), (700, 5001), (3000, 3000), (16_384, 16_384), (1000, 20_001)]
)
def test_calls_of_one_layout_get_their_own_blocks(seen, backend, config, q_len, kv_len):
    shape = {"batch": 2, "heads": 8, "kv_heads": 2, "head_dim": 128, "dtype": torch.bfloat16, "device": "cuda"}
    expected = []
    for seed in range(4):
        inputs = make_qkv(q_len, kv_len, seed=seed, **shape)
        output = prefill_attention(*inputs, config, backend=backend)
        found = search_blocks(*inputs[:2], config)
        choice = explain_backend(*inputs, config, backend=backend)
        assert (choice.tail_parts > 1) == (kv_len >= TAIL_SPLIT_FROM)
        wanted = (list_blocks(found.words, found.geometry),)
        if choice.tail_parts > 1:
            wanted = lists_in_parts(found, Split(config.last_full_blocks, choice.tail_parts))
        assert len(seen) == seed + 1
        for ours, theirs in zip(seen[-1], wanted, strict=True):
            assert all(map(torch.equal, ours.lists, theirs.lists))
            needless = choice.by_itself or theirs.offset is None
            assert ours.offset is None if needless else torch.equal(ours.offset, theirs.offset)
        assert not expected or not torch.equal(wanted[0].lists[3], expected[-1])
        expected.append(wanted[0].lists[3])
        made = list_blocks(found.words, found.geometry)
        plain = prefill_attention(*inputs, config, backend=backend, block_map=found)
        assert torch.equal(output, plain)
    assert len(seen) == 4
    kinds = {kind[0][0] for kind, found in replaying._recordings._held.items() if isinstance(found, Recording)}
    assert kinds >= {"search", "search and lists"}
    forget("launches of whole steps")
    assert search_blocks(*inputs[:2], config) == found
    assert all(map(torch.equal, made.lists, list_blocks(found.words, found.geometry).lists))


def count_recorded():
    """How many kinds of a search with its lists are recorded."""
    held = replaying._recordings._held.items()
    return sum(kind[0][0] == "search and lists" and isinstance(found, Recording) for kind, found in held)


@pytest.mark.gpu
def test_layouts_settings_and_places_in_memory_have_their_own_launches(seen):
    def call(inputs, config=PUBLISHED, **arguments):
        found = search_blocks(*inputs[:2], config, **arguments)
        for _ in range(3):
            output = prefill_attention(*inputs, config, **arguments)
            expected = prefill_attention(*inputs, config, block_map=found, scale=arguments.get("scale"))
            assert relative_error(output, expected) <= 1e-6

    shape = {"heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": torch.bfloat16, "device": "cuda"}
    inputs = make_qkv(2048, **shape)
    call(inputs)
    call(inputs, scale=0.3)
    call(inputs, last_chunk=False)
    call(inputs, TWO_SIDED)
    call(as_projected(*inputs))
    call([at_an_odd_address(tensor) for tensor in inputs])
    assert len(seen) == 18 and count_recorded() == 6
    # what cannot be recorded is right too: negated queries, and two inputs that are one
    call(inputs, scale=-0.3, config=TWO_SIDED)
    query, _, value = inputs
    call((query[:, :2], query[:, :2], value))
    assert len(seen) == 24 and count_recorded() == 6
    for more in ({"means": KeyMeans()}, {"buffers": ListBuffers()}, {"return_aux": AuxRequest(lse=True)}):
        prefill_attention(*inputs, PUBLISHED, **more)
    assert len(seen) == 25, "the log-sum-exp alone comes with recorded launches"


@pytest.mark.gpu
def test_recorded_launches_are_captured_into_graphs_and_run_on_the_callers_stream(seen):
    inputs = make_qkv(2048, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda")
    others = make_qkv(2048, heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda", seed=5)
    for _ in range(3):
        expected = prefill_attention(*inputs, PUBLISHED, backend="triton")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        output = prefill_attention(*inputs, PUBLISHED, backend="triton")
    graph.replay()
    assert torch.equal(output, expected)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        there = prefill_attention(*others, PUBLISHED, backend="triton")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(there, prefill_attention(*others, PUBLISHED, backend="triton"))
    for tensor, other in zip(inputs, others, strict=True):
        tensor.copy_(other)
    graph.replay()
    assert torch.equal(output, there) and len(seen) == 6
