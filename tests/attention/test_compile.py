"""How often things are compiled, and CUDA graphs of the whole."""

import functools

import pytest
import torch
from support.decoder import make_decoder
from support.inputs import DEVICE, make_qkv
from support.oracle import relative_error

from flexprefill import KeyMeans, PrefillConfig, explain_backend, prefill_attention, search_blocks
from flexprefill.attention import flex
from flexprefill.runtime.state import forget

CONFIG = PrefillConfig(alpha=0.5, sink_blocks=1, window_blocks=1, last_full_blocks=1, dense_below=0)
LENGTHS = (700, 512, 1024, 333, 129, 900, 640, 1111, 256, 515)


@pytest.mark.eager_flex
def test_a_callers_model_is_compiled_at_most_twice_for_ten_lengths():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = torch.compile(make_decoder(CONFIG, device=DEVICE), fullgraph=True, backend=count)
    with torch.no_grad():
        for length in LENGTHS:
            assert model(torch.zeros(1, length, dtype=torch.int64, device=DEVICE)).isfinite().all()
    assert len(graphs) <= 2


@pytest.mark.eager_flex
def test_prefill_attention_is_compiled_at_most_twice_for_ten_lengths_and_twice_for_chunks(monkeypatch):
    # what is counted is traced alike, and faster to come by, without code for a device
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    # beyond the limit it raises
    with torch._dynamo.config.patch(recompile_limit=2):
        for length in LENGTHS:
            prefill_attention(*make_qkv(length, heads=1, head_dim=16, device=DEVICE), CONFIG)
        for length in LENGTHS:
            tensors = make_qkv(length - 100, length, heads=1, head_dim=16, device=DEVICE)
            prefill_attention(*tensors, CONFIG, last_chunk=False)


@pytest.mark.eager_flex
def test_a_caller_may_make_every_size_a_symbol():
    def attend(*tensors):
        return prefill_attention(*tensors, CONFIG)

    model = torch.compile(attend, fullgraph=True, dynamic=True, backend="eager")
    for length in (700, 512):
        tensors = make_qkv(length, heads=4, kv_heads=2, device=DEVICE)
        block_map = search_blocks(*tensors[:2], CONFIG)
        # without code for a device FlexAttention is dense under its mask_mod, the map beside it
        assert model(*tensors).shape == tensors[0].shape
        compiled = torch.compile(search_blocks, fullgraph=True, dynamic=True, backend="eager")
        assert compiled(*tensors[:2], CONFIG) == block_map


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_decoder_gives_the_logits_of_the_uncompiled_one(mode):
    model = make_decoder(CONFIG, device="cuda", dtype=torch.bfloat16, heads=8, head_dim=128)
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    unique = torch._dynamo.utils.counters["stats"]
    with torch.no_grad():
        expected = []
        for seed, length in enumerate(LENGTHS):
            generator = torch.Generator("cuda").manual_seed(seed)
            tokens = torch.randint(64, (1, length), generator=generator, device="cuda")
            expected.append((tokens, model(tokens)))
        before = unique["unique_graphs"]
        # twice, so that recorded CUDA graphs are replayed
        for _ in range(2):
            for tokens, logits in expected:
                torch.compiler.cudagraph_mark_step_begin()
                assert relative_error(compiled(tokens), logits) <= 0.02
        assert unique["unique_graphs"] - before <= 2


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("q_len", "kv_len", "settings", "arguments"),
    [
        (2048, 2048, {}, {"backend": "triton"}),
        (2048, 2048, {}, {}),
        (1001, 1001, {}, {}),
        (1024, 3000, {}, {"backend": "triton"}),
        (1024, 3000, {}, {}),
        (1024, 1024, {"dense_below": 2000}, {}),
        (512, 1024, {"dense_below": 2000}, {}),
        (1, 1024, {}, {}),
        (2048, 2048, {"mask_heads": "kv", "score_rows": "visible", "mean_correction": True}, {}),
        (1024, 3000, {"mean_correction": True}, {"backend": "triton"}),
    ],
)
def test_search_and_attention_replay_as_one_cuda_graph(q_len, kv_len, settings, arguments):
    config = PrefillConfig(**(CONFIG.to_dict() | settings))
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 128, "dtype": torch.bfloat16}
    tensors = make_qkv(q_len, kv_len, device="cuda", **shape)
    expected_kernel = explain_backend(*tensors, config, **arguments)
    for _ in range(3):
        prefill_attention(*tensors, config, **arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = prefill_attention(*tensors, config, **arguments)
    for seed in (5, 6):
        for new, old in zip(make_qkv(q_len, kv_len, seed=seed, **shape), tensors, strict=True):
            old.copy_(new)
        graph.replay()
        assert torch.equal(output, prefill_attention(*tensors, config, **arguments)), expected_kernel


@pytest.mark.gpu
def test_chunks_replay_as_one_cuda_graph():
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 128, "dtype": torch.bfloat16}
    query, key, value = make_qkv(3072, device="cuda", **shape)

    def prefill():
        means, outputs = KeyMeans(), []
        for end in (1024, 2048, 3072):
            seen = key[:, :, :end], value[:, :, :end]
            rows, last = query[:, :, end - 1024 : end], end == 3072
            outputs.append(prefill_attention(rows, *seen, CONFIG, last_chunk=last, means=means))
        return torch.cat(outputs, 2)

    for _ in range(2):
        prefill()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = prefill()
    for new, old in zip(make_qkv(3072, seed=5, **shape), (query, key, value), strict=True):
        old.copy_(new)
    graph.replay()
    assert torch.equal(output, prefill())


@pytest.mark.eager_flex
@pytest.mark.parametrize(
    "message, tries", [("‘cur_kvSplitSize1’ was not declared in this scope", 2), ("something else", 1)]
)
def test_attention_whose_sizes_torch_mixes_up_is_compiled_with_other_names(monkeypatch, message, tries):
    names, ran = [], []

    def compile_whole(function, name):
        names.append(name)
        compiled = compile_once(function, name)

        def fails_at_first(*inputs):
            ran.append(name)
            if len(ran) == 1:
                raise torch._dynamo.exc.BackendCompilerFailed(functools.partial, RuntimeError(message), None)
            return compiled(*inputs)

        return fails_at_first

    compile_once = flex.compile_whole
    monkeypatch.setattr(flex, "compile_whole", compile_whole)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    query, key, value = make_qkv(300, heads=2, kv_heads=1, head_dim=16, device=DEVICE)
    config = PrefillConfig(dense_below=0, alpha=0.123)
    forget("compiled attention, by kind of call")
    try:
        if tries == 1:
            with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
                prefill_attention(query, key, value, config)
        else:
            for _ in range(2):
                prefill_attention(query, key, value, config)
            assert names == ["inputs_0", "inputs_1"] and ran == ["inputs_0", "inputs_1", "inputs_1"]
    finally:
        forget("compiled attention, by kind of call")
