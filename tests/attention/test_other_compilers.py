"""A graph that another compiler than inductor runs, or nobody compiles, is as sparse as the fused kernel."""

import pytest
import torch
from support.inputs import DEVICE, make_qkv
from support.oracle import relative_error
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest

from flexprefill import AttentionVariant, PrefillConfig, UnsupportedError, prefill_attention
from flexprefill.attention.flex import with_lse

CONFIG = PrefillConfig(block_size=16, alpha=1.0, sink_blocks=1, window_blocks=1, last_full_blocks=0, dense_below=0)
CLOSE = 1e-6 if DEVICE == "cpu" else 2e-3
SHAPE = {"heads": 2, "head_dim": 16, "device": DEVICE}

# the graphs run FlexAttention eagerly, and what is computed so is thrown away
pytestmark = pytest.mark.eager_flex


def attend(query, key, value):
    return prefill_attention(query, key, value, CONFIG)


@pytest.fixture(scope="module")
def prompt():
    inputs = make_qkv(300, **SHAPE)
    sparse = prefill_attention(*inputs, CONFIG)
    dense = prefill_attention(*inputs, PrefillConfig(dense_below=1000))
    assert relative_error(sparse, dense) > 0.1
    return inputs, sparse


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_every_backend_gives_the_sparse_result(prompt, backend):
    inputs, sparse = prompt
    with torch.no_grad():
        found = torch.compile(attend, backend=backend, fullgraph=True)(*inputs)
    assert relative_error(found, sparse) <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_windows_caps_and_sinks_are_those_of_the_call(backend):
    inputs = make_qkv(300, **SHAPE)

    def attend(query, key, value, sinks):
        variant = AttentionVariant(sliding_window=90, soft_cap=3.0, sinks=sinks)
        return prefill_attention(query, key, value, CONFIG, variant=variant)

    sinks = torch.tensor([0.5, -1.0], device=DEVICE)
    expected = attend(*inputs, sinks)
    with torch.no_grad():
        assert relative_error(torch.compile(attend, backend=backend, fullgraph=True)(*inputs, sinks), expected) <= CLOSE


@pytest.mark.parametrize(
    "mods", [{"mask_mod": lambda b, h, q, k: k % 3 > 0}, {"score_mod": lambda s, b, h, q, k: s + k}]
)
def test_a_callers_own_mod_is_refused_rather_than_dense(mods):
    inputs = make_qkv(300, **SHAPE)
    compiled = torch.compile(lambda *tensors: prefill_attention(*tensors, CONFIG, **mods), backend="eager")
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedError, match="mask_mod, score_mod.*need a graph that is compiled by"),
    ):
        compiled(*inputs)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_takes_every_length_and_is_sparse_as_it_is(prompt, strict):
    class Attend(torch.nn.Module):
        def forward(self, query, key, value):
            return attend(query, key, value)

    inputs, sparse = prompt
    length = torch.export.Dim("length", min=128, max=500)
    with torch.no_grad():
        program = torch.export.export(Attend(), inputs, dynamic_shapes=({2: length},) * 3, strict=strict)
        module = program.module()
        assert relative_error(module(*inputs), sparse) <= CLOSE
        other = make_qkv(417, seed=3, **SHAPE)
        assert relative_error(module(*other), attend(*other)) <= CLOSE


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_log_sum_exps_are_sparse_too(backend):
    inputs = make_qkv(1000, heads=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16, device="cuda")
    config = PrefillConfig(alpha=0.9, window_blocks=1, dense_below=0)

    def attend(*tensors):
        return prefill_attention(*tensors, config, return_aux=AuxRequest(lse=True))

    output, aux = attend(*inputs)
    with torch.no_grad():
        found, found_aux = torch.compile(attend, backend=backend, fullgraph=True)(*inputs)
    assert relative_error(found, output) <= 1e-2 and (found_aux.lse - aux.lse).abs().max() <= 1e-2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_graph_returns_another_log_sum_exp(backend):
    def scaled(lse):
        aux = with_lse(AuxOutput(lse=lse), 2 * lse)
        return lse, with_lse(aux, 3 * aux.lse)

    lse = torch.ones(3, device=DEVICE)
    _, aux = torch.compile(scaled, backend=backend, fullgraph=True)(lse)
    assert isinstance(aux, AuxOutput) and torch.equal(aux.lse, 6 * lse)


def test_tensors_of_several_dtypes_are_cast_under_autocast_as_sdpa_casts_them():
    query, key, value = make_qkv(300, **SHAPE)
    mixed = query, key, value.bfloat16()
    expected = prefill_attention(*(tensor.bfloat16() for tensor in mixed), CONFIG)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(prefill_attention(*mixed, CONFIG), expected)
        assert prefill_attention(query, key, value, CONFIG).dtype == torch.float32
    with pytest.raises(TypeError, match="value must have query's dtype torch.float32, got torch.bfloat16"):
        prefill_attention(*mixed, CONFIG)
