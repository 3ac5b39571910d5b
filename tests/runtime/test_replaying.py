"""What was recorded does the same for other tensors, and only launches are recorded."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import pytest
import torch
from support.inputs import make_qkv

pytest.importorskip("triton")

import triton
import triton.language as tl

from flexprefill import KeyMeans, PrefillConfig, search_blocks
from flexprefill.runtime import replaying
from flexprefill.runtime.launching import launch
from flexprefill.runtime.replaying import Recording, layouts_of, record, replayed
from flexprefill.search import operator
from flexprefill.search.operator import find_words
from flexprefill.search.rule import Rule

MADE_ANYWHERE = pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.load(x_ptr + place, mask=place < n) + tl.load(y_ptr + place, mask=place < n)
    tl.store(out_ptr + place, sums, mask=place < n)


def added(x, y):
    out = x.new_empty(x.shape)
    launch(add_kernel, (triton.cdiv(x.numel(), 16),), x, y, out, n=x.numel(), BLOCK=16)
    return out


@pytest.fixture(params=MADE_ANYWHERE)
def device(request):
    return request.param


def test_a_replay_reads_its_own_inputs_and_takes_its_own_memory(device):
    x, y = torch.arange(40.0, device=device), torch.ones(40, device=device)

    def work(x, y):
        half = added(x, y)
        return added(half, x), half

    results, recording = record(work, x, y)
    for first, second in ((x, y), (2 * x, 3 * y)):
        total, half = recording.replay(first, second)
        assert torch.equal(half, first + second) and torch.equal(total, 2 * first + second)
        assert {total.data_ptr(), half.data_ptr()}.isdisjoint(result.data_ptr() for result in results)
    assert recording.nbytes == 2 * 4 * 40


def test_what_is_more_than_launches_is_not_recorded(device):
    x, y = torch.arange(40.0, device=device), torch.ones(40, device=device)
    held = torch.zeros(40, device=device)
    for name, work in {
        "another operator": lambda x, y: (added(x, y) + 1,),
        "a copy": lambda x, y: (added(x, y.clone()),),
        "filled memory": lambda x, y: (added(x, torch.zeros(40, device=device)),),
        "memory from elsewhere": lambda x, y: (added(x, held),),
        "a part of an input": lambda x, y: (added(x[:8], y),),
        "a part of a result": lambda x, y: (added(x, y)[3:],),
        "a view of a result": lambda x, y: (added(x, y).view(8, 5),),
        "a result in another order": lambda x, y: (added(x.view(5, 8), y).transpose(0, 1),),
    }.items():
        results, recording = record(work, x, y)
        assert recording is None, name
        assert torch.equal(results[0], work(x, y)[0]), name
    results, recording = record(lambda x, y: (added(x, y),), x, x)
    assert recording is None and torch.equal(results[0], 2 * x), "which of two inputs is read cannot be told"


def test_the_second_run_is_recorded_and_the_third_is_replayed(device):
    ran = []

    def work(x, y):
        ran.append(x)
        return (added(x, y),)

    def other(x, y):
        ran.append(x)
        return (added(x, y) * 2,)

    for step in range(1, 5):
        x, y = torch.full((40,), 1.0 * step, device=device), torch.ones(40, device=device)
        assert torch.equal(replayed("a kind", work, x, y)[0], x + y) and len(ran) == min(step, 2)
    x = torch.arange(41.0, device=device)[1:]  # begins elsewhere
    assert torch.equal(replayed("a kind", work, x, y)[0], x + y) and len(ran) == 3
    for _ in range(3):  # inputs that cannot be told apart
        assert torch.equal(replayed("one", work, y, y)[0], y + y)
    assert len(ran) == 6
    for _ in range(4):
        assert torch.equal(replayed("another kind", other, x, y)[0], 2 * (x + y))
    assert len(ran) == 10, "what is more than launches runs as it is"


def test_a_recording_has_the_launches_of_parts_that_are_replayed(device):
    ones = torch.ones(40, device=device)

    def part(x, y):
        return replayed("a part", lambda x, y: [added(x, y)], x, y)[0]

    for number in (1.0, 2.0, 3.0):  # the part is recorded first
        assert torch.equal(part(number * ones, ones), (number + 1) * ones)
    recording = record(lambda x, y: [added(part(x, y), y)], ones, 2 * ones)[1]
    assert len(recording.steps) == 2
    assert torch.equal(recording.replay(4 * ones, 3 * ones)[0], 10 * ones)
    assert torch.equal(part(5 * ones, ones), 6 * ones)


@pytest.fixture
def always_replayed(device, monkeypatch):
    """Searches in Triton's interpreter are replayed too."""
    if device == "cpu":
        monkeypatch.setattr(
            operator, "_launched", lambda kind, work, *inputs: replayed((*kind, layouts_of(*inputs)), work, *inputs)
        )


@pytest.mark.usefixtures("always_replayed")
@pytest.mark.parametrize(
    "config, kinds",
    [
        (PrefillConfig(alpha=0.3, last_full_blocks=1), {"means", "scores"}),
        pytest.param(
            replace(PrefillConfig.recommended(), outlier_share=0.02),
            {"outliers", "more blocks"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            PrefillConfig(alpha=0.3, probe_rows=2, outlier_keys=1),
            {"means", "scores", "outliers", "more blocks"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["flashprefill", "two-sided", "both"],
)
def test_chunks_with_means_are_replayed_for_other_prompts(device, config, kinds):
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 64, "device": device}
    length = 230 if device == "cpu" else 4200
    if device == "cuda":
        shape |= {"dtype": torch.bfloat16}
    config = replace(config, sink_blocks=1, window_blocks=1, block_size=16 if device == "cpu" else 128)
    maps, ends = [], (length // 3, length // 2, length)  # the second one begins inside a block
    for seed in range(3):
        query, key, _ = make_qkv(length, seed=seed, **shape)
        means, start = KeyMeans(), 0
        for end in ends:
            chunk = query[:, :, start:end], key[:, :, :end]
            last = {"last_chunk": end == length, "implementation": "triton"}
            found = search_blocks(*chunk, config, **last, means=means)
            with mock.patch.object(operator, "_launched", lambda kind, work, *inputs: work(*inputs)):
                assert found == search_blocks(*chunk, config, **last)
            start = end
        maps.append(found)
    assert all(one != other for one, other in pairwise(maps))
    recorded = [kind[0][0] for kind, found in replaying._recordings._held.items() if isinstance(found, Recording)]
    assert Counter(recorded) == dict.fromkeys(kinds, len(ends))


@pytest.mark.parametrize(
    "config",
    [
        PrefillConfig(alpha=0.3, last_full_blocks=1),
        PrefillConfig(alpha=0.3, score_rows="visible", last_full_blocks=0),
        PrefillConfig.recommended(),
        PrefillConfig(alpha=0.3, probe_rows=4, outlier_keys=2),
    ],
    ids=["flashprefill", "first key", "two-sided", "both"],
)
def test_searches_are_replayed_for_other_prompts(device, config):
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 64, "device": device}
    if device == "cuda":
        shape |= {"dtype": torch.bfloat16}
    lengths = (100, 420) if device == "cpu" else (1000, 4200)
    fewer = {"block_size": 16 if device == "cpu" else 128, "sink_blocks": 1, "window_blocks": 1}
    rule = Rule.of(replace(config, **fewer), scale=0.3, last_chunk=True)
    (query, key, _), (other_query, other_key, _) = (make_qkv(*lengths, seed=seed, **shape) for seed in (1, 2))
    (words,), recording = record(lambda query, key: [find_words(query, key, rule, "triton")], query, key)
    assert recording is not None
    expected = find_words(other_query, other_key, rule, "triton")
    assert torch.equal(recording.replay(query, key)[0], words)
    assert torch.equal(recording.replay(other_query, other_key)[0], expected) and not torch.equal(expected, words)


def test_searches_with_operators_of_torch_are_not(device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query, key, _ = make_qkv(300, heads=4, kv_heads=2, head_dim=64, device=device, dtype=dtype)
    for config, scale in (
        (PrefillConfig.recommended(), -0.3),  # queries are negated
        (PrefillConfig(alpha=(0.1, 0.2, 0.3, 0.4)), 0.3),  # thresholds are copied to the device
        (PrefillConfig(alpha=0.3, probe_rows=4, mask_heads="kv"), 0.3),  # masks of a group are joined
    ):
        rule = Rule.of(config, scale=scale, last_chunk=True)
        _, recording = record(lambda query, key, rule=rule: [find_words(query, key, rule, "triton")], query, key)
        assert recording is None
