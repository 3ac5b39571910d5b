import pytest
import torch
from support.inputs import DEVICE, make_qkv
from support.machines import PUBLISHED
from support.oracle import masked_attention, relative_error
from torch.nn.attention.flex_attention import AuxRequest

from flexprefill import (
    BlockMap,
    FlexPrefillError,
    PrefillConfig,
    explain_backend,
    prefill_attention,
    read_mask_info,
    record_masks,
    save_masks,
    search_blocks,
)
from flexprefill.attention import backends, steps
from flexprefill.runtime.state import forget

# keeps a row's own block alone: what differs from dense shows
NARROW = {"alpha": 1, "sink_blocks": 0, "window_blocks": 1, "last_full_blocks": 0}
DENSE = PrefillConfig(**NARROW, dense_below=1000)
SPARSE = PrefillConfig(**NARROW, dense_below=0)


def dense(query, key, value, **arguments):
    everything = BlockMap.causal(
        *query.shape[:2], q_len=query.shape[2], kv_len=key.shape[2], block_size=128, device=query.device
    )
    return masked_attention(query, key, value, everything, **arguments)


@pytest.fixture
def no_search(monkeypatch):
    def search(*arguments):
        raise AssertionError("searched")

    monkeypatch.setattr(steps, "search_checked", search)


@pytest.mark.usefixtures("no_search")
@pytest.mark.parametrize("q_len, kv_len", [(999, 999), (300, 999), (128, 256), (2, 700), (1, 1)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_short_prompt_is_dense_and_takes_no_search(q_len, kv_len, kv_heads):
    query, key, value = make_qkv(q_len, kv_len, batch=2, heads=4, kv_heads=kv_heads)
    choice = explain_backend(query, key, value, DENSE, last_chunk=False)
    assert choice.dense and choice.name == "dense-sdpa" and "dense_below, which is 1000" in choice.reason
    output = prefill_attention(query, key, value, DENSE, last_chunk=False)
    assert output.shape == query.shape
    assert relative_error(output, dense(query, key, value)) <= 1e-5


def test_a_prompt_of_dense_below_tokens_is_sparse():
    query, key, value = make_qkv(1000, heads=4, kv_heads=2)
    assert not explain_backend(query, key, value, DENSE).dense
    output = prefill_attention(query, key, value, DENSE)
    assert relative_error(output, masked_attention(query, key, value, search_blocks(query, key, SPARSE))) <= 1e-5
    assert relative_error(output, dense(query, key, value)) > 0.1


def test_the_search_does_not_know_of_it():
    query, key, _ = make_qkv(500)
    assert search_blocks(query, key, DENSE) == search_blocks(query, key, SPARSE)


def test_what_asks_for_kept_blocks_gets_them():
    query, key, value = make_qkv(300, heads=4, kv_heads=2)
    block_map = search_blocks(query, key, DENSE)
    for arguments in (
        {"block_map": block_map},
        {"mask_mod": lambda b, h, q, k: q >= k},
        {"score_mod": lambda score, b, h, q, k: score},
        {"scale": -0.1},
        {"return_aux": AuxRequest()},
    ):
        assert not explain_backend(query, key, value, DENSE, **arguments).dense, arguments
    model = torch.nn.Module()
    model.forward = lambda *tensors: prefill_attention(*tensors, DENSE)
    with record_masks(model) as masks:
        model(query, key, value)
    assert list(masks.values()) == [block_map]


def test_unset_is_never_dense_on_the_cpu():
    query, key, value = make_qkv(300, heads=4, kv_heads=2)
    assert not explain_backend(query, key, value, PrefillConfig()).dense


@pytest.mark.parametrize(
    ("changes", "sparse", "below"),
    [
        ({}, "flash", backends.DENSE_BELOW[backends.HOPPER, "flash", False]),
        ({}, "triton", backends.DENSE_BELOW[backends.HOPPER, "triton", False]),
        ({"dtype": torch.float32}, "triton", 0),
        ({"head_dim": 64, "value_dim": 64}, "triton", 0),
        ({"compiling": True}, "flash", 0),
        ({"device": torch.device("cpu")}, "cpp", 0),
    ],
)
def test_unset_is_what_was_measured(machine, changes, sparse, below):
    machine()
    request, choice = PUBLISHED._replace(**changes), backends.BackendChoice(sparse, "")
    assert backends.measured_dense_below(request, choice, False) == below
    # a search that takes longer pays later
    assert backends.measured_dense_below(request, choice, True) >= below
    machine(capability=(8, 0))
    assert backends.measured_dense_below(request, choice, False) == 0


def test_dense_attention_is_by_flash_where_it_can(machine):
    machine()
    for changes in ({}, {"at_offset": True}, {"mods": "own"}, {"block_size": 16}, {"lse": True, "max_scores": True}):
        assert backends.choose_dense(PUBLISHED._replace(**changes), "why").name == "dense-flash", changes
    for changes, message in (
        ({"dtype": torch.float32}, "float32"),
        ({"head_dim": 72}, "D=72"),
        ({"compiling": True}, "traced"),
    ):
        choice = backends.choose_dense(PUBLISHED._replace(**changes), "why")
        assert (choice.name, choice.reason, choice.dense) == ("dense-sdpa", "why", True)
        assert choice.passed_over[0][0] == "dense-flash" and message in choice.passed_over[0][1]
    machine(flash=False)
    assert backends.choose_dense(PUBLISHED, "why").name == "dense-sdpa"


def test_files_keep_the_setting_and_those_without_it_their_hash(tmp_path):
    query, key, _ = make_qkv(300)
    plain = PrefillConfig(**NARROW)
    hashes = []
    for config in (plain, DENSE):
        save_masks(tmp_path / "masks.safetensors", {0: search_blocks(query, key, config)}, config=config)
        info = read_mask_info(tmp_path / "masks.safetensors")
        assert info.config == config
        hashes.append(info.config_hash)
    assert hashes[0] != hashes[1]


def test_dense_and_decoding_trace_into_a_callers_graph():
    @torch.compile(fullgraph=True, backend="eager")
    def model(query, key, value):
        return prefill_attention(query, key, value, DENSE)

    for q_len, kv_len in ((300, 300), (200, 500), (1, 500)):
        query, key, value = make_qkv(q_len, kv_len, heads=4, kv_heads=2, device=DEVICE)
        assert relative_error(model(query, key, value), dense(query, key, value)) <= (1e-5 if DEVICE == "cpu" else 2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize(
    "dtype, head_dim", [(torch.bfloat16, 128), (torch.float16, 64), (torch.bfloat16, 96), (torch.float32, 128)]
)
@pytest.mark.parametrize("q_len, kv_len", [(2000, 2000), (700, 3000), (128, 1024), (2, 900), (1, 900)])
def test_dense_attention_is_right_on_a_gpu(monkeypatch, flash, dtype, head_dim, q_len, kv_len):
    query, key, value = make_qkv(
        q_len, kv_len, batch=2, heads=4, kv_heads=2, head_dim=head_dim, dtype=dtype, device="cuda"
    )
    config = PrefillConfig(**NARROW, dense_below=10**6)
    if not flash:
        fault = "switched off for a test"
        monkeypatch.setattr(backends, "flash_attention_4_fault", lambda: fault)
        forget("what was decided of calls", "choices of a dense kernel")
    elif explain_backend(query, key, value, config, last_chunk=False).name != "dense-flash":
        pytest.skip("FlashAttention-4 does not take it here")
    output = prefill_attention(query, key, value, config, last_chunk=False)
    forget("what was decided of calls", "choices of a dense kernel")
    exact = dense(query, key, value)
    theirs = relative_error(dense(query, key, value, dtype=dtype), exact)
    assert relative_error(output, exact) <= max(2 * theirs, 1e-6)
    step = prefill_attention(query[:, :, -1:], key, value, config)
    assert relative_error(step, exact[:, :, -1:]) <= max(2 * theirs, 1e-6)


@pytest.mark.gpu
def test_backends_that_are_named_are_never_dense():
    query, key, value = make_qkv(300, heads=4, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda")
    choice = explain_backend(query, key, value, DENSE, backend="triton")
    assert choice.name == "triton" and not choice.dense
    choice = explain_backend(query[:, :, -1:], key, value, DENSE, backend="triton")
    assert choice.name == "triton" and choice.dense and "decoding" in choice.reason


def test_a_named_backend_that_cannot_run_raises_also_for_a_short_prompt():
    query, key, value = make_qkv(300, heads=4, kv_heads=2)
    for tensors in ((query, key, value), (query[:, :, -1:], key, value)):
        with pytest.raises(FlexPrefillError, match="needs tensors on a CUDA device"):
            prefill_attention(*tensors, DENSE, backend="triton")
