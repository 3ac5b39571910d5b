"""The plug-in inside vLLM on the CPU: `.ci/vllm` makes the environment. Skipped where vLLM is not installed."""

import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: .ci/vllm installs it", allow_module_level=True)

# one process: the tests look inside. Set before vLLM is imported
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # several processes share the machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from support.served import make_model, prompts_of

from flexprefill import BlockMap, PrefillConfig, load_masks, search_blocks
from flexprefill.integrations import vllm as plug_in
from flexprefill.integrations.vllm.figures import figures

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ALL = PrefillConfig(alpha=1e-30)  # keeps every block
FEW = PrefillConfig(alpha=1.0, sink_blocks=1, window_blocks=1, last_full_blocks=1)
TWO_SIDED = replace(PrefillConfig.recommended(), probe_share=0.2)
LONG = {"min_keys": 256, "min_queries": 128}
ENGINE = {"dtype": "float32", "max_model_len": 4096, "max_num_batched_tokens": 1024, "enforce_eager": True}
PROMPTS = prompts_of(5, 300, 1500, 3000)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {kind: make_model(tmp_path_factory.mktemp(kind), kind) for kind in ("llama", "gemma2")}


@contextlib.contextmanager
def engine(model, **options):
    from vllm import LLM

    llm = LLM(model, skip_tokenizer_init=True, **ENGINE | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """Switches the plug-in on, with a folder of its own, to the end of the test."""
    monkeypatch.setenv("FLEXPREFILL_FOLDER", str(tmp_path))
    yield lambda config, **options: plug_in.register(config, **LONG | options)
    plug_in.unregister()


def counted():
    """What the layers of this process counted."""
    return figures(0).to_dict()


def ask(llm, prompts):
    """Token ids and the log-probabilities of each token's best five, for each prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=8, logprobs=5, detokenize=False)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = [request.outputs[0] for request in llm.generate(asked, sampling, use_tqdm=False)]
    return [
        (list(answer.token_ids), [{token: of.logprob for token, of in best.items()} for best in answer.logprobs])
        for answer in answers
    ]


def everything(llm):
    """The answers to a batch of all lengths, to a prompt behind a cached prefix, and to a long one among steps."""
    (tail,) = prompts_of(700, seed=2)
    return ask(llm, PROMPTS) + ask(llm, [PROMPTS[3][:2048] + tail]) + ask(llm, [PROMPTS[0], prompts_of(900, seed=3)[0]])


def largest_difference(answers, others):
    return max(
        abs(best[token] - other[token])
        for (_, steps), (_, other_steps) in zip(answers, others, strict=True)
        for best, other in zip(steps, other_steps, strict=True)
        for token in best.keys() & other.keys()
    )


def tokens_of(answers):
    return [tokens for tokens, _ in answers]


@pytest.fixture(scope="module")
def stock(models):
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    # the plug-in is installed, and nobody asked for it
    assert "flexprefill" in {entry.name for entry in importlib.metadata.entry_points(group="vllm.general_plugins")}
    assert os.environ.get("FLEXPREFILL") is None
    with engine(models["llama"]) as llm:
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        kinds = {type(layer.impl) for layer in worker.model_runner.compilation_config.static_forward_context.values()}
        assert kinds == {CPUAttentionBackendImpl}
        return everything(llm)


class Compilations:
    """Counts what torch.compile compiles."""

    def __init__(self):
        from torch._dynamo.callback import on_compile_start

        self.count = 0
        on_compile_start(self._add)

    def _add(self, *_):
        self.count += 1


def test_with_every_block_kept_it_is_stock(models, stock, registered):
    registered(ALL)
    with engine(models["llama"], attention_backend="CUSTOM") as llm:
        compilations = Compilations()
        answers = everything(llm)
        assert compilations.count == 0  # all of it was compiled while the model was loaded
    assert tokens_of(answers) == tokens_of(stock)
    assert largest_difference(answers, stock) < 1e-4
    sums = counted()
    assert set(sums) == {"0", "1"} and all(of["kept"] == of["visible"] > 0 for of in sums.values())
    assert sums["0"]["requests"] == 5  # 300, 1,500 and 3,000 tokens, the one behind a cache, the one among steps


@pytest.fixture
def seen(monkeypatch):
    """Query, key and value as the model gives them to each layer, by its name, a list of steps."""
    from flexprefill.integrations.vllm.backend import SparsePrefill

    steps, forward = {}, SparsePrefill.forward

    def watched(impl, layer, query, key, value, kv_cache, attn_metadata, output, **others):
        steps.setdefault(layer.layer_name, []).append((query.clone(), key.clone()))
        return forward(impl, layer, query, key, value, kv_cache, attn_metadata, output, **others)

    monkeypatch.setattr(SparsePrefill, "forward", watched)
    return steps


def test_few_blocks_change_the_answers_and_are_those_of_the_search(models, stock, seen, registered, tmp_path):
    layers = FEW, TWO_SIDED
    registered(FEW, layers={1: TWO_SIDED})
    with engine(models["llama"]) as llm:
        answers = everything(llm)
        file = plug_in.record_request(tmp_path / "masks.safetensors")
        seen.clear()
        ask(llm, prompts_of(2560, seed=4))
        time.sleep(1)
    assert tokens_of(answers[:1]) == tokens_of(stock[:1])  # 5 tokens
    assert tokens_of(answers) != tokens_of(stock) or largest_difference(answers, stock) > 1e-2
    masks = load_masks(file)
    assert sorted(masks) == [0, 1] and masks[0].q_len == 2560
    assert all(kept.density().max() < 0.6 for kept in masks.values())
    for name, steps in seen.items():
        layer = int(re.search(r"\d+", name)[0])
        query, key = (torch.cat(parts)[:2560].transpose(0, 1)[None] for parts in zip(*steps, strict=True))
        chunks = [
            search_blocks(query[:, :, start : start + 1024], key[:, :, : start + 1024], layers[layer])
            for start in range(0, 2560, 1024)
        ]
        assert masks[layer] == BlockMap.from_chunks(chunks)
    told = plug_in.report()
    assert told.requests >= 6 and 0 < min(told.density.values()) <= max(told.density.values()) < 0.9


def test_windows_stay_with_vllm_and_a_soft_cap_goes_along(models, registered):
    with engine(models["gemma2"]) as llm:
        stock = ask(llm, PROMPTS)
    registered(ALL)
    with engine(models["gemma2"]) as llm:
        answers = ask(llm, PROMPTS)
    assert tokens_of(answers) == tokens_of(stock) and largest_difference(answers, stock) < 1e-4
    assert set(counted()) == {"1"}  # layer 0 has a sliding window


def test_layers_can_stay_dense(models, stock, registered):
    registered(FEW, layers={0: None, 1: ALL})
    with engine(models["llama"]) as llm:
        answers = ask(llm, PROMPTS)
    assert tokens_of(answers) == tokens_of(stock[:4]) and set(counted()) == {"1"}


def test_a_cache_that_is_packed_otherwise_stays_with_vllm(models, registered):
    registered(FEW)
    with engine(models["llama"], dtype="bfloat16") as llm:
        assert len(ask(llm, PROMPTS[1:2])[0][0]) == 8
    assert counted() == {}


def test_each_tensor_parallel_process_searches_its_heads(models, stock, registered, tmp_path):
    registered(PrefillConfig(alpha=(1e-30, 1e-30, 1e-30, 2e-30)))
    with engine(models["llama"], tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        plug_in.record_request(tmp_path / "masks.safetensors")
        answers = ask(llm, PROMPTS)
        time.sleep(1)
    assert tokens_of(answers) == tokens_of(stock[:4]) and largest_difference(answers, stock[:4]) < 1e-4
    told = plug_in.report()
    assert (told.requests, told.density) == (3, {0: 1.0, 1: 1.0})
    halves = [load_masks(tmp_path / f"masks{ending}.safetensors")[0] for ending in ("", "-rank1")]
    assert [half.shape[1] for half in halves] == [2, 2]


def paged_attention(*, q, k, v, out, cu_seqlens_q, seqused_k, softmax_scale, causal, block_table, **others):
    """FlashAttention's function over pages [pages, page, Hkv, D], in plain PyTorch."""
    assert causal is True and others["scheduler_metadata"] is None and cu_seqlens_q[-1] == len(q)
    for row, length in enumerate(seqused_k.tolist()):
        queries = q[cu_seqlens_q[row] : cu_seqlens_q[row + 1]]
        group = q.shape[1] // k.shape[2]
        keys, values = (
            pages[block_table[row].long()].flatten(0, 1)[:length].repeat_interleave(group, 1) for pages in (k, v)
        )
        visible = torch.arange(length) <= torch.arange(length - len(queries), length)[:, None]
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * softmax_scale
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        out[cu_seqlens_q[row] : cu_seqlens_q[row + 1]] = torch.einsum("hqk,khd->qhd", weights, values)


def test_the_backend_for_cuda_takes_a_batch_apart(models, registered, monkeypatch):
    """Its builder and its attention on the CPU, with plain PyTorch in the place of FlashAttention's kernel."""
    import copy

    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.attention.backends import flash_attn
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from flexprefill.integrations.vllm.flash_attention import FlexPrefillBuilder, FlexPrefillImpl

    registered(ALL)
    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", paged_attention, raising=False)
    heads, kv_heads, dim, page = 4, 2, 64, 16
    sizes = [(1, 40), (1, 700), (300, 300), (50, 50), (200, 900), (1, 33)]  # tokens in the batch, and so far
    generator = torch.Generator().manual_seed(0)
    tables = torch.randperm(len(sizes) * 64, generator=generator).view(len(sizes), 64).to(torch.int32)
    cache = torch.randn(tables.numel(), page, kv_heads, 2 * dim, generator=generator).transpose(1, 2)  # tokens first
    starts = torch.tensor([0] + [q_len for q_len, _ in sizes]).cumsum(0).to(torch.int32)
    lengths, tokens = torch.tensor([length for _, length in sizes], dtype=torch.int32), int(starts[-1])
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=len(sizes),
        num_actual_tokens=tokens,
        max_query_len=300,
        max_seq_len=900,
        block_table_tensor=tables,
        slot_mapping=torch.arange(tokens),
    )
    name = "model.layers.0.self_attn.attn"
    layer = SimpleNamespace(layer_name=name, **dict.fromkeys(("_q_scale", "_k_scale", "_v_scale"), torch.tensor(1.0)))
    with engine(models["llama"]) as llm, set_current_vllm_config(llm.llm_engine.vllm_config):
        impl = FlexPrefillImpl(heads, dim, dim**-0.5, kv_heads, None, None, "auto")
        impl.vllm_flash_attn_version = 3
        spec = FullAttentionSpec(block_size=page, num_kv_heads=kv_heads, head_size=dim, dtype=torch.float32)
        builder = FlexPrefillBuilder(spec, [name], llm.llm_engine.vllm_config, torch.device("cpu"))
    planned = builder.build(common_prefix_len=0, common_attn_metadata=common)
    assert [prompt.row for prompt in planned.flexprefill.plan.prompts] == [2, 4]
    moved = builder.update_block_table(planned, tables.flip(0).contiguous(), torch.arange(tokens))
    query, new = torch.randn(tokens, heads, dim), torch.randn(tokens, kv_heads, dim)
    for metadata in (planned, moved):
        whole = copy.copy(metadata)
        whole.flexprefill = None
        ours, wanted = (
            impl.forward(layer, query, new, new, cache, of, torch.full_like(query, torch.nan))
            for of in (metadata, whole)
        )
        assert (ours - wanted).abs().max() < 1e-5
    assert counted()["0"]["chunks"] == 4
    assert builder.build_for_cudagraph_capture(common).flexprefill is None
    assert builder.build(0, common, fast_build=True).flexprefill is None
    assert builder.build(256, common).flexprefill is None  # cascade attention


def run(command, environment):
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout, done.stderr


def test_over_http_a_server_answers_as_without(models, tmp_path):
    """The example starts both servers and asks them by the OpenAI client."""
    options = ["--lengths", "600,2500", "--repeats", "1", "--min-keys", "256", "--min-queries", "128"]
    config = ["--config", json.dumps(ALL.to_dict()), "--record", tmp_path / "masks.safetensors", "--"]
    server = ["--dtype", "float32", "--max-model-len", "4096", "--max-num-batched-tokens", "1024", "--enforce-eager"]
    command = [sys.executable, "examples/vllm_server.py", models["llama"], *options, *config, *server]
    printed, log = run(list(map(str, command)), {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    apart = re.findall(r"16 of 16 tokens the same, their log-probabilities at most (\S+) apart", printed)
    assert len(apart) == 2 and all(float(difference) < 1e-4 for difference in apart)
    assert "4 prompts, 8 chunks, 6,200 tokens went through the search" in printed
    assert "layer 1: 100.0% of the blocks kept" in printed
    assert "flexprefill: prompts from 256 tokens on go through the search" in log
    assert load_masks(tmp_path / "masks.safetensors")[0].kv_len == 600
