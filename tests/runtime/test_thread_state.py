"""What of the thread's state reaches a result: nothing. Each call is made again under each state, and compared."""

import contextlib
import copy

import pytest
import torch
from support.inputs import DEVICE, make_qkv
from torch.nn.attention.flex_attention import AuxRequest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flexprefill import (
    AttentionVariant,
    FlexPrefillError,
    KeyMeans,
    ListBuffers,
    MaskCache,
    PrefillConfig,
    Sequences,
    attention_recall,
    create_prefill_block_mask,
    guard_blocks,
    mass_by_distance,
    prefill_attention,
    search_blocks,
)
from flexprefill.runtime.state import forget

CONFIG = PrefillConfig(block_size=16, alpha=0.5, sink_blocks=1, window_blocks=1, last_full_blocks=1, dense_below=0)


class PassThrough(TorchDispatchMode):
    """A user's mode that does nothing."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "autocast": lambda: torch.autocast(DEVICE, torch.bfloat16),
    "autocast to float16": lambda: torch.autocast(DEVICE, torch.float16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "flop counter": lambda: FlopCounterMode(display=False),
    "a mode of the user's": PassThrough,
}


@pytest.fixture(scope="module")
def inputs():
    query, key, value = make_qkv(300, heads=4, kv_heads=2, head_dim=16, device=DEVICE)
    sequences = Sequences.from_cu_seqlens(torch.tensor([0, 130, 300], device=DEVICE), 300)
    slopes = torch.tensor([0.1, 0.01, 0.2, 0.0], device=DEVICE)
    return query, key, value, sequences, slopes


def tensors_of(inputs):
    """What the library gives for these inputs, by name."""
    query, key, value, sequences, slopes = inputs
    found = search_blocks(query, key, CONFIG)
    guarded, report = guard_blocks(query, key, found, PrefillConfig(block_size=16, guard=0.7))
    mask = create_prefill_block_mask(query, key, CONFIG, variant=AttentionVariant(sequences, 90))
    capped = AttentionVariant(sequences, 90, 3.0, slopes, slopes)
    means = KeyMeans()
    search_blocks(query[:, :, :160], key[:, :, :160], CONFIG, means=means, last_chunk=False)
    results = {
        "search": found.words,
        "search of a variant": search_blocks(query, key, CONFIG, variant=capped).words,
        "search with kept means": search_blocks(query[:, :, 160:], key, CONFIG, means=means).words,
        "search of a cache": MaskCache().prompt(range(300)).search_blocks(0, query, key, CONFIG).words,
        "guard": guarded.words,
        "guard's recall": report.recall,
        "recall": attention_recall(query, key, found).shares.nan_to_num(2),
        "recall's rows": attention_recall(query, key, found, rows=20).rows,
        "mass by distance": mass_by_distance(query, key, edges=[20, 90], variant=capped).mass,
        "partial list": mask.kv_indices,
        "full list": mask.full_kv_indices,
        "dense": prefill_attention(query, key, value, PrefillConfig(dense_below=1000)),
        "sparse": prefill_attention(query, key, value, CONFIG),
        "sparse of a variant": prefill_attention(query, key, value, CONFIG, variant=capped),
        "mean correction": prefill_attention(
            query, key, value, PrefillConfig(**CONFIG.to_dict(), mean_correction=True)
        ),
    }
    for scorer in ("exact", "xattention"):
        results[scorer] = search_blocks(query, key, PrefillConfig(block_size=16, alpha=0.5, scorer=scorer)).words
    if DEVICE == "cuda":
        _, aux = prefill_attention(query, key, value, CONFIG, return_aux=AuxRequest(lse=True))
        results["log-sum-exp"] = aux.lse
    return results


@pytest.fixture(scope="module")
def expected(inputs):
    return tensors_of(inputs)


@pytest.mark.parametrize("state", STATES)
def test_results_depend_on_the_arguments_alone(state, inputs, expected):
    with STATES[state]():
        found = tensors_of(inputs)
    for name, right in expected.items():
        assert found[name].dtype == right.dtype and torch.equal(found[name], right), name


@contextlib.contextmanager
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def matmul_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.slow
def test_no_state_uses_up_the_recompiles_of_a_kind_of_call(inputs):
    query, key, value, _, _ = inputs
    forget("compiled attention, by kind of call")
    states = {**STATES, "threads": two_threads, "matmul precision": matmul_precision}
    with torch._dynamo.config.patch(recompile_limit=1):
        for state in states.values():
            with state():
                prefill_attention(query, key, value, CONFIG)


@pytest.mark.slow
def test_a_mode_does_not_spoil_the_calls_after_it(inputs):
    """A kind of call that nobody made before: its first one is under a mode."""
    query, key, value, _, _ = inputs
    kind = {"scale": 0.1234}
    with FlopCounterMode(display=False):
        first = prefill_attention(query, key, value, CONFIG, **kind)
    assert torch.equal(prefill_attention(query, key, value, CONFIG, **kind), first)


@pytest.mark.parametrize(
    "switched_off",
    [
        lambda: torch._dynamo.config.patch(disable=True),
        lambda: torch.compiler.set_stance("force_eager"),
        lambda: torch.compiler.set_stance("eager_on_recompile"),
    ],
)
def test_switching_torch_compile_off_for_a_while_spoils_no_call_after_it(inputs, switched_off):
    query, key, value, _, _ = inputs
    expected = prefill_attention(query, key, value, CONFIG)
    # the first call of a kind
    forget("compiled attention, by kind of call")
    with switched_off(), pytest.raises(FlexPrefillError, match="switch torch.compile on again"):
        prefill_attention(query, key, value, CONFIG)
    assert torch.equal(prefill_attention(query, key, value, CONFIG), expected)


def test_memory_made_in_inference_mode_is_used_outside_of_it(inputs):
    query, key, value, _, _ = inputs
    buffers, means, cache = ListBuffers(), KeyMeans(), MaskCache()
    with torch.inference_mode():
        prefill_attention(query, key, value, CONFIG, buffers=buffers)
        search_blocks(query[:, :, :160], key[:, :, :160], CONFIG, means=means, last_chunk=False)
        cache.prompt(range(300)).search_blocks(0, query, key, CONFIG)
        alphas = search_blocks(query, key, PrefillConfig(block_size=16, alpha=(0.1, 0.2, 0.3, 0.4)))
    expected = prefill_attention(query, key, value, CONFIG)
    assert torch.equal(prefill_attention(query, key, value, CONFIG, buffers=buffers), expected)
    assert search_blocks(query[:, :, 160:], key, CONFIG, means=means) == search_blocks(query[:, :, 160:], key, CONFIG)
    assert cache.prompt(range(300)).search_blocks(0, query, key, CONFIG) == search_blocks(query, key, CONFIG)
    assert alphas == search_blocks(query, key, PrefillConfig(block_size=16, alpha=(0.1, 0.2, 0.3, 0.4)))


def test_fake_tensors_are_refused_by_name_and_searched():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query, key, value = torch.empty(1, 4, 256, 64), torch.empty(1, 2, 256, 64), torch.empty(1, 2, 256, 64)
        assert search_blocks(query, key).words.shape == (1, 4, 2, 1)
        for config in (CONFIG, PrefillConfig(dense_below=1000)):
            with pytest.raises(ValueError, match="query must be on a device that computes, got a fake tensor"):
                prefill_attention(query, key, value, config)


def test_vmap_is_refused_by_name():
    query, key, _ = make_qkv(64, batch=3, device=DEVICE)
    for call in (search_blocks, lambda q, k: prefill_attention(q, k, k, CONFIG)):
        with pytest.raises(
            TypeError, match="query must be a tensor outside of torch.vmap: batch entries go along dim 0"
        ):
            torch.vmap(call)(query[:, None], key[:, None])


def test_modules_that_hold_a_cache_or_a_recording_are_copied(inputs):
    query, key, _, _, _ = inputs
    module = torch.nn.Linear(2, 2)
    module.cache = MaskCache(2**20)
    module.cache.prompt(range(300)).search_blocks(0, query, key, CONFIG)
    copied = copy.deepcopy(module)
    assert copied.cache is not module.cache and copied.cache.max_bytes == 2**20
    assert copied.cache[0] == module.cache[0] and copied.cache.stats().entries == 1
    copied.cache.clear()
    assert module.cache.layers() == [0]
