import subprocess
import sys

import pytest
import torch
from support.inputs import DEVICE, make_qkv
from support.oracle import masked_attention, relative_error
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from flexprefill import (
    BlockMap,
    FlexPrefillError,
    PrefillConfig,
    create_prefill_block_mask,
    explain_backend,
    prefill_attention,
    record_masks,
    search_blocks,
)
from flexprefill.attention import steps

CONFIG = PrefillConfig(alpha=0.5, sink_blocks=1, window_blocks=1, last_full_blocks=1, dense_below=0)


def check(query, key, value, config=CONFIG, *, tolerance=1e-5, **arguments):
    block_map = search_blocks(query, key, config)
    output = prefill_attention(query, key, value, config, **arguments)
    expected = masked_attention(query, key, value, block_map)
    assert output.shape == expected.shape and output.dtype == query.dtype
    assert relative_error(output, expected) <= tolerance
    return block_map


@pytest.mark.parametrize(
    "q_len, kv_len",
    [
        (1000, 1000),
        (1300, 1300),
        (513, 1300),
        (128, 640),
        (1, 700),
        (1, 1),
        (127, 127),
        (129, 129),
        (300, 333),
    ],
)
def test_equals_dense_attention_under_the_same_mask(q_len, kv_len):
    block_map = check(*make_qkv(q_len, kv_len, heads=4, kv_heads=2, seed=q_len))
    assert q_len < 1000 or block_map.density().mean() < 0.9  # really sparse


@pytest.mark.parametrize(
    ("q_len", "kv_len", "dtype"),
    [
        (8, 8, torch.float32),
        (24, 24, torch.float32),
        (120, 120, torch.float32),
        pytest.param(5, 40, torch.float32, marks=pytest.mark.slow),
        pytest.param(24, 24, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_few_keys_of_the_least_head_dimension(q_len, kv_len, dtype):
    """torch's C++ kernel computes these from memory that it has not written, where the CPU has AVX2 alone."""
    tensors = [tensor.to(dtype) for tensor in make_qkv(q_len, kv_len, heads=4, kv_heads=2, head_dim=16)]
    output = prefill_attention(*tensors)
    exact = [tensor.float() for tensor in tensors]
    expected = masked_attention(*exact, search_blocks(*exact[:2]))
    assert relative_error(output, expected) <= (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.slow
def test_equals_dense_attention_for_small_blocks_batches_and_other_value_dims():
    query, key, _ = make_qkv(500, batch=2, heads=4, kv_heads=2)
    value = torch.randn(2, 2, 500, 64)
    check(query, key, value, PrefillConfig(block_size=32, alpha=0.5))
    check(query, key, torch.randn(2, 2, 500, 128))


def test_a_given_map_replaces_the_search_and_a_mask_mod_cuts_inside_it():
    query, key, value = make_qkv(700, heads=4, kv_heads=2)
    dense = torch.rand(1, 4, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.4
    block_map = BlockMap.from_dense(dense | torch.eye(6, dtype=torch.bool), q_len=700, kv_len=700, block_size=128)
    output = prefill_attention(query, key, value, block_map=block_map)
    assert relative_error(output, masked_attention(query, key, value, block_map)) <= 1e-5

    document = torch.arange(700) // 300
    output = prefill_attention(
        query, key, value, block_map=block_map, mask_mod=lambda b, h, q, k: document[q] == document[k]
    )
    expected = masked_attention(query, key, value, block_map, mask=document[:, None] == document)
    assert relative_error(output, expected) <= 1e-5


@pytest.fixture
def no_search(monkeypatch):
    def search(*arguments):
        raise AssertionError("searched")

    monkeypatch.setattr(steps, "search_checked", search)


# keeps a row's own block alone: what differs from dense shows
NARROW = PrefillConfig(alpha=1, sink_blocks=0, window_blocks=1, last_full_blocks=0)


@pytest.mark.usefixtures("no_search")
@pytest.mark.parametrize("batch, kv_heads, scale", [(1, 4, None), (2, 2, 0.3), (1, 1, -0.1)])
def test_a_step_of_decoding_is_dense_and_takes_no_search(batch, kv_heads, scale):
    query, key, value = make_qkv(1, 700, batch=batch, heads=4, kv_heads=kv_heads)
    everything = BlockMap.causal(batch, 4, q_len=1, kv_len=700, block_size=128)
    choice = explain_backend(query, key, value, NARROW, scale=scale)
    assert choice.dense and choice.name == ("cpp" if scale == -0.1 else "dense-sdpa")
    output = prefill_attention(query, key, value, NARROW, scale=scale)
    rescaled = query * (1 if scale is None else scale * 64**0.5)
    assert relative_error(output, masked_attention(rescaled, key, value, everything)) <= 1e-5


@pytest.mark.usefixtures("no_search")
def test_a_step_of_decoding_with_a_mask_mod_is_dense_under_it():
    query, key, value = make_qkv(1, 700, heads=4, kv_heads=2)
    everything = BlockMap.causal(1, 4, q_len=1, kv_len=700, block_size=128)
    padding = torch.arange(700) >= 90
    output = prefill_attention(query, key, value, NARROW, mask_mod=lambda b, h, q, k: padding[k])
    assert relative_error(output, masked_attention(query, key, value, everything, mask=padding)) <= 1e-5


def test_a_step_of_decoding_leaves_the_recorded_map_of_the_prefill():
    class Layer(torch.nn.Module):
        def forward(self, query, key, value):
            return prefill_attention(query, key, value, CONFIG)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Layer()

        def forward(self, *tensors):
            return self.layer(*tensors)

    query, key, value = make_qkv(300, heads=4, kv_heads=2)
    model = Model()
    with record_masks(model) as masks:
        model(query, key, value)
        longer = (torch.cat([tensor, tensor[:, :, :1]], 2) for tensor in (key, value))
        model(query[:, :, :1], *longer)
    assert list(masks.values()) == [search_blocks(query, key, CONFIG)]


def test_a_single_query_with_a_map_or_with_more_to_come_is_sparse():
    query, key, value = make_qkv(1, 700, heads=4, kv_heads=2)
    block_map = search_blocks(query, key, NARROW)
    assert (block_map.counts() < 6).all()
    expected = masked_attention(query, key, value, block_map)
    for arguments in ({"block_map": block_map}, {"config": NARROW, "last_chunk": False}):
        assert not explain_backend(query, key, value, **arguments).dense
        assert relative_error(prefill_attention(query, key, value, **arguments), expected) <= 1e-5


def test_score_mod_and_scale_reach_the_attention():
    query, key, value = make_qkv(300, heads=4, kv_heads=2)
    everything = PrefillConfig(alpha=1e-30)
    output = prefill_attention(
        query, key, value, everything, scale=0.05, score_mod=lambda s, b, h, q, k: s - (q - k) / 50
    )
    distance = torch.arange(300)[:, None] - torch.arange(300)
    logits = 0.05 * query.double() @ key.double().repeat_interleave(2, 1).transpose(2, 3) - distance / 50
    logits = logits.masked_fill(distance < 0, -torch.inf)
    expected = logits.softmax(-1) @ value.double().repeat_interleave(2, 1)
    assert relative_error(output, expected) <= 1e-5


@pytest.mark.slow
def test_the_mask_works_in_a_callers_own_compiled_model():
    @torch.compile(fullgraph=True)
    def model(query, key, value):
        block_mask = create_prefill_block_mask(query, key, CONFIG)
        own = flex_attention(query, key, value, block_mask=block_mask, enable_gqa=True)
        return own, prefill_attention(query, key, value, CONFIG)

    with torch.no_grad():
        for length in (600, 900):
            query, key, value = make_qkv(length, heads=4, kv_heads=2, device=DEVICE)
            expected = masked_attention(query, key, value, search_blocks(query, key, CONFIG))
            for output in model(query, key, value):
                # a GPU's float32 products may be tf32
                assert relative_error(output, expected) <= (1e-5 if DEVICE == "cpu" else 2e-3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"value": torch.zeros(1, 2, 63, 64)}, ValueError, "value must have key's heads and length"),
        ({"value": torch.zeros(1, 4, 64, 64)}, ValueError, "value must have key's heads and length"),
        ({"value": torch.zeros(1, 2, 64, 64).half()}, TypeError, "value must have query's dtype"),
        ({"value": torch.zeros(1, 2, 64, 20)}, ValueError, "value must have a head dimension.*D=20"),
        ({"value": torch.zeros(1, 2, 64, 64, requires_grad=True)}, ValueError, "value requires grad"),
        ({"value": torch.zeros(1, 2, 64, 64, device="meta")}, ValueError, "value must be on query's device"),
        ({"value": None}, TypeError, "value must be a tensor"),
        ({"query": torch.zeros(1, 4, 65, 64)}, ValueError, r"query \[B, Hq, S_q, D\] must be no longer than key"),
        ({"score_mod": 1}, TypeError, "score_mod must be a function"),
        ({"mask_mod": 1}, TypeError, "mask_mod must be a function"),
        ({"config": {}}, TypeError, "config must be a PrefillConfig, got dict"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"backend": "triton"}, FlexPrefillError, "backend 'triton' needs tensors on a CUDA device, got cpu"),
        ({"backend": "flash"}, FlexPrefillError, "backend 'flash' needs tensors on a CUDA device, got cpu"),
        ({"return_aux": AuxRequest(lse=True)}, FlexPrefillError, "return_aux is not supported.*cpu"),
        ({"block_map": 3}, TypeError, "block_map must be a BlockMap, got int"),
    ],
)
def test_a_wrong_argument_is_named(changes, error, message):
    query, key, value = make_qkv(64, heads=4, kv_heads=2)
    with pytest.raises(error, match=message):
        prefill_attention(**({"query": query, "key": key, "value": value} | changes))


@pytest.mark.parametrize(
    ("shape", "lengths", "message"),
    [
        ((1, 4), (64, 65), "block_map must be of q_len=64 and kv_len=64, got q_len=64 and kv_len=65"),
        ((1, 2), (64, 64), r"block_map must have query's batch size and heads \(1, 4\), got \(1, 2\)"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(shape, lengths, message):
    query, key, value = make_qkv(64, heads=4, kv_heads=2)
    block_map = BlockMap.causal(*shape, q_len=lengths[0], kv_len=lengths[1], block_size=128)
    with pytest.raises(ValueError, match=message):
        prefill_attention(query, key, value, block_map=block_map)


def test_a_hit_recompile_limit_is_an_error_that_says_so():
    def from_key(first):
        return lambda b, h, q, k: k >= first  # a number that a mod closes over is compiled for

    inputs = make_qkv(100, heads=2, head_dim=32)
    with torch._dynamo.config.patch(recompile_limit=1):
        prefill_attention(*inputs, mask_mod=from_key(1))
        with pytest.raises(FlexPrefillError, match="recompile limit"):
            prefill_attention(*inputs, mask_mod=from_key(2))


def test_never_runs_eagerly_where_flex_attention_would_be_dense():
    query, key, value = make_qkv(64, heads=2, head_dim=32)
    torch.compiler.set_stance("force_eager")
    try:
        with pytest.raises(FlexPrefillError, match=r"without torch\.compile"):
            prefill_attention(query, key, value)
    finally:
        torch.compiler.set_stance("default")


def error_in_a_process(**environment):
    """What prefill_attention raises on the CPU in a process with this environment alone."""
    code = (
        "import torch; from flexprefill import prefill_attention, FlexPrefillError\n"
        "try: prefill_attention(*(torch.randn(1, 1, 64, 64) for _ in range(3)))\n"
        "except FlexPrefillError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    return result.stdout or result.stderr


def test_never_runs_eagerly_when_dynamo_is_switched_off():
    assert "without torch.compile" in error_in_a_process(TORCHDYNAMO_DISABLE="1")


@pytest.mark.slow
def test_a_missing_compiler_is_named(tmp_path):
    error = error_in_a_process(PATH=str(tmp_path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert "found no C++ compiler" in error


def test_low_precision_on_the_cpu_is_at_most_twice_pytorchs_own_error():
    query, key, value = make_qkv(700, heads=4, kv_heads=2, dtype=torch.bfloat16)
    block_map = search_blocks(query, key, CONFIG)
    exact = masked_attention(query, key, value, block_map)
    theirs = relative_error(masked_attention(query, key, value, block_map, dtype=torch.bfloat16), exact)
    check(query, key, value, tolerance=2 * theirs)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_may_be_on_another_device_than_the_current_one():
    inputs = make_qkv(1000, heads=4, kv_heads=2, dtype=torch.bfloat16, device="cuda:1")
    output = prefill_attention(*inputs, CONFIG)
    expected = prefill_attention(*(tensor.to("cuda:0") for tensor in inputs), CONFIG)
    assert torch.equal(output.cpu(), expected.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "q_len, kv_len, head_dim, block_size",
    [(4096, 4096, 128, 128), (4001, 4001, 64, 128), (700, 3000, 128, 128), (1, 3000, 128, 128), (2000, 2000, 128, 64),
     (1000, 1000, 64, 16), (1000, 1500, 256, 128), (1000, 1000, 96, 32)],
)  # fmt: skip
def test_the_gpu_error_is_at_most_twice_pytorchs_own(dtype, q_len, kv_len, head_dim, block_size):
    query, key, value = make_qkv(q_len, kv_len, heads=4, kv_heads=2, head_dim=head_dim, dtype=dtype, device="cuda")
    config = PrefillConfig(alpha=0.5, block_size=block_size, window_blocks=1, dense_below=0)
    block_map = search_blocks(query, key, config)
    exact = masked_attention(query, key, value, block_map, dtype=torch.float32)
    theirs = relative_error(masked_attention(query, key, value, block_map, dtype=dtype), exact)
    check(query, key, value, config, tolerance=2 * theirs)
    output, aux = prefill_attention(query, key, value, config, return_aux=AuxRequest(lse=True))
    assert relative_error(output, exact) <= 2 * theirs and aux.lse.shape == query.shape[:3]


@pytest.mark.gpu
@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("backend", ["flash", "triton"])
@pytest.mark.parametrize(
    "q_len, kv_len, head_dim, value_dim, kv_heads",
    [
        (4096, 4096, 128, 128, 2),
        (1001, 1001, 128, 128, 4),
        (2000, 2000, 64, 64, 1),
        (2000, 2000, 96, 96, 2),
        (1000, 1000, 128, 64, 2),
        (1000, 1000, 64, 128, 2),
        (100, 100, 128, 128, 2),
        (1024, 4096, 128, 128, 2),
        (700, 3001, 64, 64, 2),
        (100, 1500, 128, 128, 2),
    ],
)
def test_each_backend_is_right_on_a_gpu(backend, q_len, kv_len, head_dim, value_dim, kv_heads):
    query, key, value = make_qkv(
        q_len, kv_len, batch=2, heads=4, kv_heads=kv_heads, head_dim=head_dim, dtype=torch.bfloat16, device="cuda"
    )
    value = torch.cat([value, -value], 3)[..., :value_dim].contiguous()
    block_map = search_blocks(query, key, CONFIG)
    exact = masked_attention(query, key, value, block_map, dtype=torch.float32)
    theirs = relative_error(masked_attention(query, key, value, block_map, dtype=torch.bfloat16), exact)
    assert relative_error(prefill_attention(query, key, value, CONFIG, backend=backend), exact) <= 2 * theirs


@pytest.mark.gpu
@pytest.mark.usefixtures("flash")
def test_flash_takes_the_heads_as_they_lie_in_a_model():
    query, key, value = (
        tensor.transpose(1, 2).contiguous().transpose(1, 2)  # [B, S, H, D] in memory
        for tensor in make_qkv(2000, batch=2, heads=4, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda")
    )
    assert explain_backend(query, key, value, CONFIG).name == "flash"
    expected = prefill_attention(query.contiguous(), key.contiguous(), value.contiguous(), CONFIG, backend="flash")
    assert torch.equal(prefill_attention(query, key, value, CONFIG), expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("flash")
def test_flash_says_what_it_cannot_do_and_auto_takes_triton_there():
    query, key, value = make_qkv(512, head_dim=128, dtype=torch.float32, device="cuda")
    with pytest.raises(FlexPrefillError, match="backend 'flash' cannot do this.*float32"):
        prefill_attention(query, key, value, CONFIG, backend="flash")
    assert explain_backend(query, key, value, CONFIG).name == "triton"
    assert explain_backend(query.half(), key.half(), value.half(), CONFIG).name == "flash"
