"""What every public function does with arguments that do not fit: an error that names them, or a right result."""

import dataclasses
import inspect
import math
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from support.inputs import DEVICE, at_an_odd_address, make_qkv
from torch.nn.attention.flex_attention import BlockMask

import flexprefill
from flexprefill import (
    AttentionVariant,
    BlockMap,
    FlexPrefillError,
    KeyMeans,
    ListBuffers,
    MaskCache,
    PrefillConfig,
    Scorer,
    attention_recall,
    create_prefill_block_mask,
    explain_backend,
    guard_blocks,
    load_masks,
    mass_by_distance,
    prefill_attention,
    read_mask_info,
    record_masks,
    register_scorer,
    save_masks,
    search_blocks,
)
from flexprefill.inspection import block_patterns, compare_maps, head_similarity, summarize_heads
from flexprefill.plotting import plot_difference, plot_heads, plot_layers
from flexprefill.runtime.state import forget
from flexprefill.variant.inputs import HEAD_DIMS

CONFIG = PrefillConfig(block_size=16, alpha=0.5, sink_blocks=1, window_blocks=1, last_full_blocks=1, dense_below=0)
GUARDED = dataclasses.replace(CONFIG, guard=0.9)
LENGTH, HEADS, KV_HEADS, DIM = 96, 2, 1, 16
TOLERANCE = 1e-5 if DEVICE == "cpu" else 6e-2  # a GPU's float32 products may be tf32
SIZES = {"q_len": LENGTH, "kv_len": LENGTH, "block_size": 16}


def inputs(**changes):
    return make_qkv(LENGTH, **{"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "device": DEVICE} | changes)


def a_map(**changes):
    return BlockMap.causal(1, HEADS, **SIZES | changes, device=DEVICE)


def cached_search(query, key):
    return MaskCache().prompt(range(1000)).search_blocks(0, query, key, CONFIG)


# every public function that takes query, key and value, and one that none of them is a part of
CALLS = {
    "search_blocks": lambda q, k, v: search_blocks(q, k, CONFIG),
    "search_blocks, triton": lambda q, k, v: search_blocks(q, k, CONFIG, implementation="triton"),
    "search_blocks, means": lambda q, k, v: search_blocks(q, k, CONFIG, means=KeyMeans()),
    "create_prefill_block_mask": lambda q, k, v: create_prefill_block_mask(q, k, CONFIG),
    "prefill_attention": lambda q, k, v: prefill_attention(q, k, v, CONFIG),
    "prefill_attention, block_map": lambda q, k, v: prefill_attention(q, k, v, block_map=a_map()),
    "explain_backend": lambda q, k, v: explain_backend(q, k, v, CONFIG),
    "attention_recall": lambda q, k, v: attention_recall(q, k, a_map()),
    "mass_by_distance": lambda q, k, v: mass_by_distance(q, k),
    "guard_blocks": lambda q, k, v: guard_blocks(q, k, a_map(), GUARDED),
    "search_blocks, guard": lambda q, k, v: search_blocks(q, k, GUARDED),
    "CachedPrompt.search_blocks": lambda q, k, v: cached_search(q, k),
}
TAKES_VALUE = ("prefill_attention", "prefill_attention, block_map", "explain_backend")


HINT = r"if \w+ \[.*\] is \[B, S, H, D\], pass \w+\.transpose\(1, 2\)"


def tokens_before_heads(*tensors):
    return [tensor.transpose(1, 2) for tensor in tensors]


@pytest.mark.parametrize("name", CALLS)
def test_tokens_before_heads_get_a_hint(name):
    with pytest.raises(ValueError, match=HINT):  # fewer key heads than query heads, which then look like lengths
        CALLS[name](*tokens_before_heads(*inputs()))
    query, key, value = inputs(kv_heads=HEADS)
    with pytest.raises(ValueError, match=HINT):
        CALLS[name](*tokens_before_heads(query), *tokens_before_heads(key[:, :, :60], value[:, :, :60]))
    if name in TAKES_VALUE:
        with pytest.raises(ValueError, match=HINT.replace(r"\w+ ", "value ", 1)):
            CALLS[name](query, key, *tokens_before_heads(value))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "prefill_attention" else ()) for name in CALLS]
)
def test_tokens_before_heads_that_fit_together_get_a_warning_or_a_hint(name):
    query, key, value = make_qkv(300, heads=2, kv_heads=2, head_dim=DIM, device=DEVICE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            CALLS[name](*tokens_before_heads(query, key, value))
        except ValueError as error:
            assert re.search(HINT, str(error)), error
    assert any(re.search(HINT, str(warning.message)) for warning in caught)


def test_what_is_of_other_sizes_hints_at_tokens_before_heads():
    query, key, _ = inputs(kv_heads=HEADS)
    swapped = tokens_before_heads(query, key)
    sequences = flexprefill.Sequences.from_lengths(torch.tensor([LENGTH], device=DEVICE), LENGTH, padding="left")
    with pytest.raises(ValueError, match=f"sequences must be of key's length.*{HINT}"):
        search_blocks(*swapped, CONFIG, variant=AttentionVariant(sequences))
    means = KeyMeans()
    search_blocks(query, key, CONFIG, means=means)
    with pytest.raises(ValueError, match=f"means is of keys with kv_heads.*{HINT}"):
        search_blocks(*swapped, CONFIG, means=means)


def test_a_short_prompt_of_many_heads_gets_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        search_blocks(*make_qkv(16, heads=64, kv_heads=64, head_dim=DIM, device=DEVICE)[:2], CONFIG)


def negated(tensor):
    """The same values, the sign only noted: the imaginary part of a conjugate."""
    return torch.complex(tensor, -tensor).conj().imag


WRONG = {
    "no tensor": lambda t: t.tolist(),
    "an array": lambda t: t.cpu().numpy(),
    "None": lambda t: None,
    "nested": lambda t: torch.nested.nested_tensor([t[0]]),
    "jagged": lambda t: torch.nested.nested_tensor([t[0]], layout=torch.jagged),
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t[0, 0].to_sparse_csr(),
    "negated": negated,
    "float64": lambda t: t.double(),
    "integers": lambda t: t.int(),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "no rank": lambda t: t.sum(),
    "rank 3": lambda t: t[0],
    "rank 5": lambda t: t[None],
    "no batch": lambda t: t[:0],
    "no heads": lambda t: t[:, :0],
    "no tokens": lambda t: t[:, :, :0],
    "no dimension": lambda t: t[..., :0],
    "dimension 12": lambda t: torch.cat([t, t], 3)[..., :12],
    "dimension 8": lambda t: t[..., :8],
    "dimension 512": lambda t: t.repeat(1, 1, 1, 32),
    "needs a gradient": lambda t: t.clone().requires_grad_(),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("call", CALLS)
def test_a_tensor_that_fits_nowhere_is_named(call, wrong):
    for place, name in enumerate(("query", "key", "value") if call in TAKES_VALUE else ("query", "key")):
        tensors = list(inputs())
        tensors[place] = WRONG[wrong](tensors[place])
        with pytest.raises((TypeError, ValueError), match=f"^{name} (must|requires).*") as raised:
            CALLS[call](*tensors)
        assert "got" in str(raised.value) or "detach" in str(raised.value)


MISFITS = {
    "another dtype": (lambda t: t.half(), r"must have query's dtype|must be .*dtype"),
    "another device": (lambda t: t.to("meta"), "must be on query's device"),
    "another batch": (lambda t: torch.cat([t, t]), "must have query's batch size|must have key's"),
    "fewer tokens": (lambda t: t[:, :, :-1], "must be no longer than key|must have key's heads and length"),
    "more heads": (lambda t: t.repeat(1, 3, 1, 1), "must have (a multiple of )?key's heads"),
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("call", CALLS)
def test_tensors_that_do_not_fit_together_are_named(call, misfit):
    change, message = MISFITS[misfit]
    for place, name in ((1, "key"), (2, "value"))[: 2 if call in TAKES_VALUE else 1]:
        tensors = list(inputs())
        tensors[place] = change(tensors[place])
        if (name == "value" and misfit == "fewer tokens") or misfit != "fewer tokens":
            name = "query" if misfit == "more heads" and place == 1 else name
        else:
            name = "query"
        with pytest.raises((TypeError, ValueError), match=message) as raised:
            CALLS[call](*tensors)
        assert str(raised.value).startswith(name) and "got" in str(raised.value)


def test_tensors_without_values_are_searched_and_not_attended():
    tensors = [tensor.to("meta") for tensor in inputs()]
    block_map = search_blocks(*tensors[:2], CONFIG)
    assert block_map.device.type == "meta" and block_map.shape == (1, HEADS, 6, 6)
    for call in (prefill_attention, explain_backend):
        with pytest.raises(ValueError, match="query must be on a device that computes, got meta"):
            call(*tensors, CONFIG)


LAYOUTS = {
    "token by token": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "dimension by dimension": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "every second": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "part of a cache": lambda t: torch.cat([t, torch.full_like(t, math.nan)], 2)[:, :, :LENGTH],
    "at an odd address": at_an_odd_address,
    "one token for all": lambda t: t[:, :, :1].expand_as(t),
    "one number for all": lambda t: t[..., :1].expand_as(t),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, (1, 16, 8, 1)),
    "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
}


QUICK_LAYOUTS = ("part of a cache", "at an odd address", "a parameter")


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in QUICK_LAYOUTS else pytest.mark.slow) for name in LAYOUTS]
)
def test_attention_of_a_view_is_that_of_its_copy(layout):
    views = [LAYOUTS[layout](tensor) for tensor in inputs()]
    copies = [view.detach().clone(memory_format=torch.contiguous_format) for view in views]
    for call in (CALLS["prefill_attention"], CALLS["prefill_attention, block_map"]):
        torch.testing.assert_close(call(*views), call(*copies), rtol=0, atol=TOLERANCE)


def logits_of(query, key, block_map):
    """float64 [B, H, S, S_kv], -inf where a key is dropped or not seen yet; and which are there."""
    size, (q_len, kv_len) = block_map.block_size, (block_map.q_len, block_map.kv_len)
    kept = block_map.to_dense().repeat_interleave(size, 2).repeat_interleave(size, 3)[:, :, :q_len, :kv_len]
    position = torch.arange(q_len, device=kept.device)[:, None] + kv_len - q_len
    there = kept & (torch.arange(kv_len, device=kept.device) <= position)
    products = query.double() @ key.double().repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    return (products * query.shape[3] ** -0.5).masked_fill(~there, -math.inf), there


def check_not_finite(output, query, key, value, block_map):
    """docs/reference/robustness.md: softmax in IEEE arithmetic over the kept keys, values block by block."""
    logits, there = logits_of(query, key, block_map)
    poisoned = (logits.isnan() | logits.isposinf()).any(-1)
    assert output[poisoned].isnan().all()
    values = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    bad_keys = ~values.isfinite().all(-1)
    seen = (there & bad_keys[:, :, None]).any(-1)
    assert not output[seen].isfinite().all(-1).any()
    # of a block that a query block keeps, values may reach all rows of it
    size, columns = block_map.block_size, block_map.shape[3]
    padded = torch.nn.functional.pad(bad_keys, (0, columns * size - bad_keys.shape[2]))
    bad_blocks = padded.unflatten(2, (-1, size)).any(-1)
    touched = (block_map.to_dense() & bad_blocks[:, :, None]).any(-1).repeat_interleave(size, 2)
    touched = touched[:, :, : block_map.q_len]
    clean = ~(poisoned | touched)
    shares = torch.where(logits.isneginf().all(-1, keepdim=True), 0, logits.softmax(-1))  # without weight, zeros
    expected = torch.where(there, shares, 0) @ torch.where(bad_keys[..., None], 0, values.double())
    torch.testing.assert_close(output.double()[clean], expected[clean], rtol=0, atol=TOLERANCE)
    return poisoned, clean


PLACES = [(position, dimension) for position in (0, 1, 15, 16, 37, 79, 80, 94, 95) for dimension in (slice(None), 3)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_numbers_that_are_not_finite_at_any_place(which, bad):
    hit = spared = 0
    for position, dimension in PLACES:
        tensors = dict(zip(("query", "key", "value"), inputs(seed=position), strict=True))
        tensors[which][0, 0, position, dimension] = bad
        block_map = search_blocks(tensors["query"], tensors["key"], CONFIG)
        output = prefill_attention(**tensors, config=CONFIG)
        poisoned, clean = check_not_finite(output, **tensors, block_map=block_map)
        assert which != "value" or not poisoned.any()
        assert torch.equal(output.isnan(), prefill_attention(**tensors, block_map=block_map).isnan())
        hit, spared = hit + int(poisoned.sum()), spared + int(clean.sum())
    assert spared and (hit or which == "value")


@pytest.mark.parametrize("which", ["query", "key"])
def test_products_past_float32_reach_no_row_without_them(which):
    for position, dimension in PLACES:
        tensors = dict(zip(("query", "key", "value"), inputs(seed=position), strict=True))
        tensors[which][0, 0, position, dimension] = 3e38
        block_map = search_blocks(tensors["query"], tensors["key"], CONFIG)
        output = prefill_attention(**tensors, config=CONFIG)
        logits, _ = logits_of(tensors["query"], tensors["key"], block_map)
        values = tensors["value"].repeat_interleave(HEADS // KV_HEADS, 1).double()
        # whatever the signs: terms past float32 may cancel
        small = logits_of(tensors["query"].abs(), tensors["key"].abs(), block_map)[0].amax(-1) < 1e36
        expected = logits.softmax(-1) @ values
        torch.testing.assert_close(output[small].double(), expected[small], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("which", ["query", "key"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so_with_mean_correction_and_for_chunks(which, bad):
    config = dataclasses.replace(CONFIG, mean_correction=True)
    tensors = dict(zip(("query", "key", "value"), inputs(), strict=True))
    tensors[which][0, 0, 33] = bad
    block_map = search_blocks(tensors["query"], tensors["key"], config)
    output = prefill_attention(**tensors, config=config)
    logits, _ = logits_of(tensors["query"], tensors["key"], block_map)  # its block is kept by all that see it
    bad_rows = (logits.isnan() | logits.isposinf()).any(-1)
    assert bad_rows.any() and output[bad_rows].isnan().all() and output[~bad_rows].isfinite().all()

    rows = {**tensors, "query": tensors["query"][:, :, 30:]}
    block_map = search_blocks(rows["query"], rows["key"], CONFIG)
    poisoned, _ = check_not_finite(prefill_attention(**rows, config=CONFIG), **rows, block_map=block_map)
    assert poisoned.any()
    # a step of decoding is dense
    step = prefill_attention(tensors["query"][:, :, -1:], tensors["key"], tensors["value"], CONFIG)
    assert step.isnan().all() == (which == "key")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "flash"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_numbers_that_are_not_finite_on_each_backend(which, bad, backend, request):
    if backend == "flash":
        request.getfixturevalue("flash")
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 128, "dtype": torch.bfloat16, "device": "cuda"}
    config = dataclasses.replace(CONFIG, block_size=128)
    for position, dimension in ((0, slice(None)), (200, 3), (640, slice(None)), (999, 3)):
        tensors = dict(zip(("query", "key", "value"), make_qkv(1000, **shape, seed=position), strict=True))
        tensors[which][0, 0, position, dimension] = bad
        block_map = search_blocks(tensors["query"], tensors["key"], config)
        assert block_map == search_blocks(tensors["query"], tensors["key"], config, implementation="reference")
        output = prefill_attention(**tensors, config=config, backend=backend)
        check_not_finite(output, **tensors, block_map=block_map)


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_finite_under_a_mod_reaches_the_rows_that_see_it(place):
    tensors = list(inputs())
    tensors[place][0, 0, 33] = math.nan
    for changes in (
        {"mask_mod": lambda b, h, q_idx, kv_idx: kv_idx > q_idx - 8},
        {"variant": AttentionVariant(sliding_window=8)},
    ):
        bad = prefill_attention(*tensors, CONFIG, **changes).isnan().all(-1)
        rows = torch.zeros(1, HEADS, LENGTH, dtype=torch.bool, device=DEVICE)
        if place == 0:
            rows[0, 0, 33] = True
        else:
            rows[..., 33:41] = True
        assert torch.equal(bad, rows)


def test_a_compiled_callers_rows_are_marked_too():
    from flexprefill.attention.not_finite import _marked

    query, key, value = inputs()
    query[0, 1, 40] = math.nan
    words = a_map().words
    arguments = query, key, words, value.expand(-1, HEADS, -1, -1).clone(), 16, 0.25
    torch.library.opcheck(torch.ops.flexprefill.mark_rows_not_finite, arguments)
    _marked(*arguments)
    assert arguments[3].isnan().all(-1).nonzero().tolist() == [[0, 1, 40]]
    with pytest.raises(ValueError, match="query and key must be finite.*mask_mod or score_mod"):
        _marked(*arguments, mods=True)


BAD_SETTINGS = {
    "alpha": (["0.1", True, 1j, {0.1}, torch.tensor(0.1)], [None, 0, -1, 1.1, math.nan, math.inf, ()]),
    "block_size": (["16", None, True, 16.0, [16], np.bool_(True)], [0, -16, 1, 8, 48, 256, 2**40]),
    **dict.fromkeys(
        ("sink_blocks", "window_blocks", "last_full_blocks", "min_blocks"),
        (["1", None, True, 1.0, [1], np.bool_(True)], [-1, 2**31, 10**30]),
    ),
    "dense_below": (["1", True, 1.0, [1]], [-1, 2**31]),
    "mask_heads": ([], ["keys", None, 1, [], ("query",)]),
    "score_rows": ([], ["all", None, 1, []]),
    "scorer": ([None, 1, "", "a\nb", ["exact"]], []),
    "mean_correction": ([None, 1, "True"], []),
    "guard": (["0.9", True, [0.9], 1j], [0, 1, -0.5, 2, math.nan, math.inf]),
    "probe_rows": (["8", None, True, 8.0, [8]], [-1, 3, 32, 2**40]),
    "outlier_keys": (["1", None, True, 1.0], [-1, 3, 2**40]),
    **dict.fromkeys(("probe_share", "outlier_share"), (["0.1", None, True, 1j], [0, -1, 1.1, math.nan, math.inf])),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_setting_of_another_kind_or_out_of_range_is_named(name):
    assert set(BAD_SETTINGS) == {field.name for field in dataclasses.fields(PrefillConfig)}
    for error, settings in zip((TypeError, ValueError), BAD_SETTINGS[name], strict=True):
        for setting in settings:
            with pytest.raises(error, match=f"^{name} must be") as raised:
                PrefillConfig(**{name: setting})
            assert repr(setting) in str(raised.value)


def test_settings_at_the_ends_of_their_ranges_are_followed():
    query, key, _ = inputs()
    most, least = 2**31 - 1, 5e-324
    everything = BlockMap.causal(1, HEADS, **SIZES, device=DEVICE)
    for changes in ({"sink_blocks": most}, {"window_blocks": most}, {"last_full_blocks": most}, {"min_blocks": most}):
        config = dataclasses.replace(CONFIG, **changes)
        for implementation in ("reference", "triton"):
            assert search_blocks(query, key, config, implementation=implementation) == everything
    loose = dataclasses.replace(CONFIG, alpha=least, sink_blocks=0, window_blocks=0, last_full_blocks=0)
    found = search_blocks(query, key, loose, implementation="reference")
    assert found == search_blocks(query, key, loose, implementation="triton")


def arguments_of(function, **changes):
    """Fitting arguments of a public function for which single ones are changed."""
    query, key, value = inputs()
    fitting = {"query": query, "key": key, "value": value, "config": GUARDED, "block_map": a_map()}
    names = inspect.signature(function).parameters
    return {name: fitting[name] for name in fitting if name in names} | changes


COMMON = {
    "config": ([{}, PrefillConfig, 0.1], TypeError),
    "scale": (["1", True, torch.tensor(1.0), [1]], TypeError),
    "scale, range": ([math.nan, math.inf, -math.inf, 10**400, 1e300], ValueError),
    "last_chunk": ([None, 1, "yes"], TypeError),
    "means": ([1, KeyMeans, []], TypeError),
    "buffers": ([1, ListBuffers, {}], TypeError),
    "implementation": ([None, 1, "cuda", []], ValueError),
    "backend": ([None, 1, "cpp", []], ValueError),
    "mask_mod": ([1, "causal", lambda: True, lambda b, h, q, k, more: True], TypeError),
    "score_mod": ([1, lambda score: score, lambda b, h, q, k: 0], TypeError),
    "return_aux": ([True, 1, "lse"], TypeError),
    "block_map": ([1, "map", torch.zeros(1)], TypeError),
    "progress": ([1, "yes"], TypeError),
    "rows": ([1.5, [0.5], "0", [True], True], TypeError),
    "rows, range": ([[], [-1], [LENGTH], 0, -1], ValueError),
    "seed": ([1.5, "0", None, True], TypeError),
    "seed, range": ([-1, 2**63], ValueError),
    "edges": ([128, ["1"], "128", [1.0], [True]], TypeError),
    "edges, range": ([[], [0], [5, 5], [9, 3], [-1]], ValueError),
}


@pytest.mark.parametrize("argument", COMMON)
@pytest.mark.parametrize(
    "function",
    [
        search_blocks,
        create_prefill_block_mask,
        prefill_attention,
        explain_backend,
        attention_recall,
        guard_blocks,
        mass_by_distance,
    ],
)
def test_an_argument_of_another_kind_is_named(function, argument):
    bad, error = COMMON[argument]
    name = argument.split(",")[0]
    if name not in inspect.signature(function).parameters:
        pytest.skip(f"{function.__name__} takes no {name}")
    for thing in bad:
        with pytest.raises(error, match=f"^{name} must be"):
            function(**arguments_of(function, **{name: thing}))


@pytest.mark.parametrize(
    ("block_map", "message"),
    [
        (lambda: a_map(q_len=95), "block_map must be of q_len=96 and kv_len=96, got q_len=95"),
        (lambda: a_map(q_len=97, kv_len=97), "block_map must be of q_len=96 and kv_len=96, got q_len=97 and kv_len=97"),
        (
            lambda: BlockMap.causal(1, 1, **SIZES, device=DEVICE),
            r"block_map must have query's .* \(1, 2\), got \(1, 1\)",
        ),
        (
            lambda: BlockMap.causal(2, 2, **SIZES, device=DEVICE),
            r"block_map must have query's .* \(1, 2\), got \(2, 2\)",
        ),
        (lambda: a_map().to("meta"), "block_map must be on query's device .*, got meta"),
    ],
)
def test_a_map_of_another_prompt_is_refused(block_map, message):
    for function in (prefill_attention, explain_backend, attention_recall, guard_blocks):
        with pytest.raises(ValueError, match=message):
            function(**arguments_of(function, block_map=block_map()))


@pytest.mark.parametrize("block_size", [1, 8, 20, 100])
def test_a_map_of_blocks_that_no_gpu_kernel_has(block_size, machine):
    from support.machines import PUBLISHED

    from flexprefill.attention.backends import choose_backend

    machine()
    with pytest.raises(FlexPrefillError, match=f"block_map must be of blocks of 16, 32.*got block_size={block_size}"):
        choose_backend("auto", PUBLISHED._replace(block_size=block_size))


def test_means_of_another_prompt_are_refused():
    query, key, _ = inputs()
    means = KeyMeans()
    search_blocks(query, key, CONFIG, means=means)
    for changes, message in (
        ({"query": query[:, :, :50], "key": key[:, :, :50]}, "key must have all 96 tokens"),
        ({"query": query.half(), "key": key.half()}, "means is of keys with dtype"),
        ({"query": torch.cat([query] * 2), "key": torch.cat([key] * 2)}, "means is of keys with batch 1, got 2"),
        ({"config": PrefillConfig(block_size=32)}, "means is of keys with block_size 16, got 32"),
        ({"config": PrefillConfig(block_size=16, scorer="exact")}, "means is of the scorer"),
    ):
        with pytest.raises(ValueError, match=message):
            search_blocks(**{"query": query, "key": key, "config": CONFIG, "means": means} | changes)


BAD_SCORES = {
    "a number": lambda q, p, g: torch.zeros(3),
    "no tensor": lambda q, p, g: [0.0],
    "float64": lambda q, p, g: torch.zeros(*q.shape[:2], g.rows, g.columns, dtype=torch.float64, device=q.device),
    "elsewhere": lambda q, p, g: torch.zeros(*q.shape[:2], g.rows, g.columns, device="meta"),
}


@pytest.fixture
def own_scorers():
    """Scorers that a test registers are gone after it."""
    yield
    forget("registered scorers")


@pytest.mark.usefixtures("own_scorers")
@pytest.mark.parametrize("kind", BAD_SCORES)
def test_a_scorer_that_gives_something_else_is_named(kind):
    register_scorer(f"bad: {kind}", Scorer(lambda key, size: key, BAD_SCORES[kind], "a test"))
    query, key, _ = inputs()
    with pytest.raises(ValueError, match=rf"scorer 'bad: {kind}' must give scores float32 \[1, 2, 6, 6\] on .*, got"):
        search_blocks(query, key, PrefillConfig(block_size=16, scorer=f"bad: {kind}"))


@pytest.mark.usefixtures("own_scorers")
def test_a_scorer_that_pools_to_nothing_or_has_no_functions_is_named():
    register_scorer("bad pool", Scorer(lambda key, size: None, BAD_SCORES["a number"], "a test"))
    with pytest.raises(ValueError, match=r"scorer 'bad pool' must pool keys to \[1, 1\] and more, got NoneType"):
        search_blocks(*inputs()[:2], PrefillConfig(block_size=16, scorer="bad pool"))
    with pytest.raises(TypeError, match="scorer.pool must be a function, got int"):
        register_scorer("worse", Scorer(1, 2, "a test"))
    for name, scorer in (("", None), (3, None), ("x", 3)):
        with pytest.raises(TypeError, match="(name|scorer) must be"):
            register_scorer(name, scorer)


WORDS = torch.zeros(1, 2, 6, 1, dtype=torch.int32)
META = BlockMap(WORDS.to("meta"), **SIZES)
OURS = BlockMap(WORDS, **SIZES)
PROMPT = MaskCache().prompt(range(96))
# a call, the error and how its message begins
REFUSED = {
    "words sparse": (lambda: BlockMap(WORDS.to_sparse(), 96, 96, 16), TypeError, "words must be an int32 tensor"),
    "words nested": (
        lambda: BlockMap(torch.nested.nested_tensor([WORDS[0]]), 96, 96, 16), TypeError, "words must be an int32",
    ),
    "words of bool": (lambda: BlockMap(WORDS.bool(), 96, 96, 16), TypeError, "words must be an int32 tensor"),
    "words of another length": (lambda: BlockMap(WORDS, 97, 97, 16), ValueError, r"words must be \[B, H, 7, 1\]"),
    "words of another block": (lambda: BlockMap(WORDS, 96, 96, 32), ValueError, r"words must be \[B, H, 3, 1\]"),
    "words of no batch": (lambda: BlockMap(WORDS[:0], 96, 96, 16), ValueError, "words must be .* no size of 0"),
    "lengths of floats": (lambda: BlockMap(WORDS, 96.0, 96, 16), TypeError, "q_len must be an int"),
    "lengths of numpy": (lambda: BlockMap(WORDS, 96, np.int64(96), 16), TypeError, "kv_len must be an int"),
    "longer than keys": (lambda: BlockMap(WORDS, 96, 90, 16), ValueError, "q_len must be at most kv_len"),
    "dense of ints": (lambda: BlockMap.from_dense(WORDS, **SIZES), TypeError, "dense must be a bool tensor"),
    "dense nested": (
        lambda: BlockMap.from_dense(torch.nested.nested_tensor([torch.ones(6, 6, dtype=torch.bool)]), **SIZES),
        TypeError, "dense must be a bool tensor",
    ),
    "causal of no heads": (lambda: BlockMap.causal(1, 0, **SIZES), ValueError, "heads must be"),
    "causal elsewhere": (lambda: BlockMap.causal(1, 1, **SIZES, device="nope"), ValueError, "device must be the name"),
    "causal on a number": (lambda: BlockMap.causal(1, 1, **SIZES, device=1.5), TypeError, "device must be a torch.dev"),
    "to nothing": (lambda: OURS.to(None), TypeError, "device must be a torch.device"),
    "to a dtype": (lambda: OURS.to(torch.float32), TypeError, "device must be a torch.device"),
    "to a tensor": (lambda: OURS.to(WORDS), TypeError, "device must be a torch.device"),
    "to nowhere": (lambda: OURS.to("nope"), ValueError, "device must be the name"),
    "to a GPU too many": (lambda: OURS.to("cuda:99"), ValueError, "device must be one that is here"),
    "and with a mask": (lambda: OURS & WORDS, TypeError, "& needs a BlockMap on both sides"),
    "or with nothing": (lambda: OURS | None, TypeError, r"\| needs a BlockMap on both sides"),
    "xor of other blocks": (
        lambda: OURS ^ BlockMap.causal(1, 2, q_len=96, kv_len=96, block_size=32), ValueError, r"\^ needs maps of one",
    ),
    "and on another device": (lambda: OURS & META, ValueError, "& needs both maps on one device"),
    "equal to another device's": (lambda: OURS == META, ValueError, "== needs both maps on one device"),
    "equal without bits": (lambda: META == META, ValueError, "== needs maps with bits"),
    "hash": (lambda: hash(OURS), TypeError, "unhashable type: 'BlockMap'"),
    "chunks of nothing": (lambda: BlockMap.from_chunks(None), TypeError, "chunks must be a list of BlockMaps"),
    "chunks that are one map": (lambda: BlockMap.from_chunks(OURS), TypeError, "chunks must be a list of BlockMaps"),
    "chunks of words": (lambda: BlockMap.from_chunks("ab"), TypeError, "chunks must be BlockMaps, got str"),
    "chunks of one place": (lambda: BlockMap.from_chunks([OURS, OURS]), ValueError, "chunks must follow each other"),
    "mask of nothing": (lambda: BlockMap.from_block_mask(None), TypeError, "block_mask must be a BlockMask"),
    "mask with a mod of no arguments": (lambda: OURS.to_block_mask(lambda: True), TypeError, "mask_mod must be a func"),
    "mask of no mod": (lambda: OURS.with_mask(None), TypeError, "mask_mod must be a function"),
    "mask of a number": (lambda: OURS.with_mask(3), TypeError, "mask_mod must be a function"),
    "mask with buffers of nothing": (lambda: OURS.to_block_mask(buffers=3), TypeError, "buffers must be a ListBuffers"),
    "cache of a float": (lambda: MaskCache(1.5), TypeError, "max_bytes must be an int"),
    "cache of nothing": (lambda: MaskCache(0), ValueError, "max_bytes must be at least 1"),
    "cache elsewhere": (lambda: MaskCache(device="nope"), ValueError, "device must be the name"),
    "cache without memory": (lambda: MaskCache(device="meta"), ValueError, "device must be one that can hold"),
    "cache of a missing layer": (lambda: MaskCache()[0], KeyError, "'layer 0 has no map"),
    "prompt of nothing": (lambda: MaskCache().prompt(), ValueError, "prompt takes either"),
    "prompt of both": (lambda: MaskCache().prompt([1], key=1), ValueError, "prompt takes either"),
    "prompt of a name": (lambda: MaskCache().prompt("abc"), TypeError, "token_ids must be whole numbers"),
    "prompt of floats": (lambda: MaskCache().prompt([1.5]), TypeError, "token_ids must be whole numbers"),
    "prompt of large numbers": (lambda: MaskCache().prompt([2**70]), TypeError, "token_ids must be a tensor or list"),
    "prompt of rank 3": (lambda: MaskCache().prompt(torch.ones(1, 2, 3).int()), ValueError, r"token_ids must be \[S\]"),
    "prompt of no tokens": (lambda: MaskCache().prompt(torch.ones(1, 0).int()), ValueError, r"token_ids must be \[S\]"),
    "prompt of a list as key": (lambda: MaskCache().prompt(key=[]), TypeError, "key must be hashable"),
    "prompt of fewer tokens": (
        lambda: MaskCache().prompt([1, 2]).search_blocks(0, *inputs()[:2]), ValueError, "key must have at most",
    ),
    "prompt of another batch": (
        lambda: PROMPT.search_blocks(0, *inputs(batch=2)[:2]), ValueError, "query must have the prompt's batch size",
    ),
    "prompt's layer": (lambda: PROMPT.search_blocks("0", *inputs()[:2]), TypeError, "layer must be an int"),
    "search's implementation": (
        lambda: search_blocks(*inputs()[:2], implementation="x"), ValueError, "implementation must be one of",
    ),
    "record nothing": (lambda: record_masks(3).__enter__(), TypeError, "model must be a torch.nn.Module"),
    "patterns of nothing": (lambda: block_patterns(3, 0), TypeError, "block_map must be a BlockMap"),
    "patterns of a head": (lambda: block_patterns(OURS, 2), ValueError, "head must be one of 0 … 1"),
    "patterns without bits": (lambda: block_patterns(META, 0), ValueError, "block_map must have bits"),
    "summary of nothing": (lambda: summarize_heads(None), TypeError, "block_map must be a BlockMap"),
    "summary without bits": (lambda: summarize_heads(META), ValueError, "block_map must have bits"),
    "comparison with nothing": (lambda: compare_maps(OURS, None), TypeError, "second must be a BlockMap"),
    "comparison without bits": (lambda: compare_maps(META, META), ValueError, "first must have bits"),
    "likeness of other lengths": (
        lambda: head_similarity(OURS, BlockMap.causal(1, 2, q_len=90, kv_len=96, block_size=16)), ValueError,
        "second must have first's q_len",
    ),
    "picture of nothing": (lambda: plot_heads(None, "x.png"), TypeError, "block_map must be a BlockMap"),
    "picture without bits": (lambda: plot_heads(META, "x.png"), ValueError, "block_map must have bits"),
    "picture of no kind": (lambda: plot_heads(OURS, "x"), ValueError, "path must end in the kind of picture"),
    "picture of a batch entry": (lambda: plot_heads(OURS, "x.png", batch=1), ValueError, "batch must be one of 0 … 0"),
    "picture with titles": (lambda: plot_heads(OURS, "x.png", titles=["a"]), ValueError, "titles must have one entry"),
    "picture of two with names": (
        lambda: plot_difference(OURS, OURS, "x.png", names=("a",)), TypeError, "names must be two names",
    ),
    "picture of layers by name": (
        lambda: plot_layers({"a": torch.ones(1)}, "x.png", label="x"), TypeError, "values must have layer numbers",
    ),
    "picture of shares above 1": (
        lambda: plot_layers({0: torch.tensor([2.0])}, "x.png", label="x"), ValueError, r"values\[0\] must be shares",
    ),
    "settings that are a list": (lambda: PrefillConfig.from_dict([1]), TypeError, "settings must be a mapping"),
    "settings of other names": (lambda: PrefillConfig.from_dict({"sinks": 1}), ValueError, "settings has unknown"),
    "published for nothing": (lambda: PrefillConfig.published(None), TypeError, "model must be a string"),
    "file that is a number": (lambda: load_masks(3), TypeError, "path must be a file name"),
    "file that is a folder": (lambda: load_masks("/"), FlexPrefillError, "/ is no readable mask file"),
    "info of nothing": (lambda: read_mask_info(None), TypeError, "path must be a file name"),
    "file loaded elsewhere": (lambda: load_masks("x", device="nope"), ValueError, "device must be the name"),
    "file loaded on a number": (lambda: load_masks("x", device=1.5), TypeError, "device must be a torch.device"),
    "maps by name": (lambda: save_masks("x", {"0": OURS}), TypeError, "masks must have layer numbers as keys"),
    "maps that are none": (lambda: save_masks("/tmp", {0: OURS}), ValueError, "path must be a file"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_maps_without_bits_are_not_saved(tmp_path):
    for thing, error in ((META, ValueError), (None, TypeError)):
        with pytest.raises(error, match=r"^masks\[0\] must"):
            save_masks(tmp_path / "masks", {0: thing})
    assert not list(tmp_path.iterdir())


def test_what_is_public_is_what_is_tested_here():
    """A new public name has to be put to the same test."""
    made_by_the_library = {
        *("BackendChoice", "CacheStats", "CachedPrompt", "DistanceMass", "GuardReport", "MaskFileInfo", "Recall"),
        "Recording",
    }
    errors = {"FlexPrefillError", "MaskFileError", "NotEnoughMemoryError", "RanEagerlyError", "UnsupportedError"}
    tested = {
        "BlockMap", "KeyMeans", "ListBuffers", "MaskCache", "PrefillConfig", "Scorer", "attention_recall",
        "create_prefill_block_mask", "explain_backend", "guard_blocks", "load_masks", "mass_by_distance",
        "prefill_attention", "read_mask_info", "record_masks", "register_scorer", "save_masks", "search_blocks",
    }  # fmt: skip
    tested |= {"AttentionVariant", "Sequences"}  # in test_variant.py, test_terms.py and test_sequences.py
    tested |= {"PagedKV", "PageMeans"}  # in tests/attention/test_paged.py and tests/search/test_pages.py
    assert set(flexprefill.__all__) == tested | made_by_the_library | errors | {"__version__"}
    with_arguments = {"from_dense", "causal", "from_chunks", "from_block_mask", "to_block_mask", "to", "with_mask"}
    without = {"to_dense", "geometry", "offset", "shape", "device", "counts", "density"}
    methods = {name for name in vars(BlockMap) if not name.startswith("_")}
    assert methods - {"words", "q_len", "kv_len", "block_size"} == with_arguments | without


def test_a_block_mask_that_lists_blocks_which_are_not_there_is_read_without_them():
    def mask(counts, indices):
        lists = (
            torch.tensor(counts, dtype=torch.int32, device=DEVICE),
            torch.tensor(indices, dtype=torch.int32, device=DEVICE),
        )
        return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=16, compute_q_blocks=False)

    for counts, indices in (([[[1, 2]]], [[[[7, 0], [-3, 1]]]]), ([[[9, 2]]], [[[[2**31 - 1, -(2**31)], [1, 99]]]])):
        found = BlockMap.from_block_mask(mask(counts, indices))
        assert found.to_dense().tolist() == [[[[False, False], [False, True]]]]


def test_head_dims_are_those_of_the_docs():
    assert list(HEAD_DIMS) == list(range(16, 257, 8))


def test_a_map_that_was_pickled_is_the_same():
    assert pickle.loads(pickle.dumps(OURS)) == OURS
