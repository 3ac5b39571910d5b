"""How often things are compiled, and CUDA graphs of the whole."""

import dataclasses
import functools
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.decoder import make_decoder
from support.inputs import DEVICE, as_projected, at_an_odd_address, make_qkv
from support.oracle import relative_error
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.symbolic_shapes import statically_known_true

from flexprefill import (
    AttentionVariant,
    KeyMeans,
    PrefillConfig,
    Sequences,
    explain_backend,
    prefill_attention,
    search_blocks,
)
from flexprefill.attention import flex
from flexprefill.runtime.state import forget

CONFIG = PrefillConfig(alpha=0.5, sink_blocks=1, window_blocks=1, last_full_blocks=1, dense_below=0)
SMALL = dataclasses.replace(CONFIG, block_size=16)
LENGTHS = (300, 256, 512, 333, 129, 400, 384, 411, 640, 515)


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
@pytest.mark.parametrize(
    "variant",
    [None, "padding", *(pytest.param(name, marks=pytest.mark.slow) for name in ("window", "packed", "soft cap"))],
)
def test_each_kind_of_call_is_compiled_once_for_all_lengths(compile_with, variant):
    # what is counted is traced alike, and faster to come by, without code for a device
    compile_with("eager")

    def attend(q_len, kv_len, batch=2):
        tensors = make_qkv(q_len, kv_len, batch=batch, heads=4, kv_heads=2, head_dim=16, device=DEVICE)
        halves, ends = torch.tensor([0, kv_len // 2, kv_len]), torch.tensor([kv_len - 1, kv_len])
        variants = {
            None: AttentionVariant(),
            "window": AttentionVariant(sliding_window=40),
            "padding": AttentionVariant(sequences=Sequences.from_lengths(ends[2 - batch :].to(DEVICE), kv_len)),
            "packed": AttentionVariant(sequences=Sequences.from_cu_seqlens(halves.to(DEVICE), kv_len)),
            "soft cap": AttentionVariant(soft_cap=20.0),
        }
        prefill_attention(*tensors, SMALL, variant=variants[variant], last_chunk=False)

    def all_lengths():
        # with batches, query blocks and key blocks of one, and as many blocks as heads
        for batch in (1, 2):
            for length in (5, 64, 100, 17, 128, 33):
                attend(length, length, batch)
                attend(length, length + 40, batch)
                attend(2, length, batch)

    # beyond the limit it raises, also in a thread, where settings are torch's own
    with torch._dynamo.config.patch(recompile_limit=1):
        all_lengths()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(all_lengths).result()


@pytest.mark.eager_flex
def test_graphs_know_that_rows_are_aligned(compile_with):
    found = []

    def note(graph, inputs):
        (node,) = (node for node in graph.graph.nodes if "flex_attention" in str(node.target))
        found.append([argument.meta["example_value"].stride() for argument in node.args[:3]])
        return graph.forward

    compile_with(note)
    for length in (200, 300, 257):
        prefill_attention(*make_qkv(length, heads=4, kv_heads=2, head_dim=32, device=DEVICE), CONFIG)
        for heads in (8, 10):
            projected = torch.randn(2, length, heads * 32, device=DEVICE).unflatten(2, (heads, 32)).transpose(1, 2)
            prefill_attention(projected[:, :4], projected[:, 4:6], projected[:, 6:8], CONFIG)
        query, *others = make_qkv(length, heads=2, head_dim=48, device=DEVICE)
        prefill_attention(query, *others, CONFIG)
        # a cache of another size in each call, and not the same for keys and values
        cached = [torch.randn(1, 2, length + room, 48, device=DEVICE)[:, :, :length] for room in (16, 4 + length % 50)]
        prefill_attention(query, *cached, CONFIG)
    assert [[stride[2:] for stride in strides] for strides in found] == [
        [(row, 1)] * 3 for row in (32, 256, 320, 48, 48)
    ]
    for strides in found:
        for batch, head, row, _ in strides:
            assert type(row) is int  # as a symbol it would be of no known alignment
            assert all(statically_known_true(stride % 16 == 0) for stride in (batch, head))


@pytest.mark.gpu
def test_kernels_load_as_widely_from_views_that_begin_inside_their_memory():
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": torch.bfloat16, "device": "cuda"}
    query, key, value = make_qkv(1000, **shape)

    def attend(*tensors):
        return prefill_attention(*tensors, CONFIG, backend="triton")

    def known_to_be_aligned(*tensors):
        forget("compiled attention, by kind of call")
        output, codes = run_and_get_code(attend, *tensors)
        assert torch.equal(output, expected)
        return set(re.findall(r"\((\d+),\): \[\['tt.divisibility', 16\]\]", "".join(codes)))

    expected = attend(query, key, value)
    for tensors in (
        (query, key, value),
        as_projected(query, key, value),
        (at_an_odd_address(query), key, value),
    ):
        assert known_to_be_aligned(*tensors) >= {"0", "1", "2"}


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
def test_attention_whose_sizes_torch_mixes_up_is_compiled_with_other_names(monkeypatch, compile_with, message, tries):
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
    compile_with("eager")
    query, key, value = make_qkv(300, heads=2, kv_heads=1, head_dim=16, device=DEVICE)
    config = PrefillConfig(dense_below=0, alpha=0.123)
    if tries == 1:
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
            prefill_attention(query, key, value, config)
    else:
        for _ in range(2):
            prefill_attention(query, key, value, config)
        assert names == ["inputs_0", "inputs_1"] and ran == ["inputs_0", "inputs_1", "inputs_1"]
