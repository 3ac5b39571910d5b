"""vLLM's time to first token, stock and with the plug-in, and a long prompt beside steps of decoding.

    python examples/benchmarks/vllm_time_to_first_token.py --output vllm.json

A stack of Llama-3.1-8B's shape with random weights, as many layers as --layers says, in an engine of this process. Two
engines, one after the other: stock, and with the plug-in. The second one takes each measurement twice, in turns: with
the search, and with every batch left to vLLM's own attention. That second figure and the stock engine's are to agree.
Each part is written to --output as soon as it is done. With --only-plug-in and --jit-monitor error, a request that
compiles fails: vLLM watches for that from the end of its first engine's warm-up on.

The prompt is stretches of --stretch times one token, as in time_to_first_token.py: of tokens drawn one by one such a
model keeps every block. The density is measured with the times, and they say nothing about accuracy.
"""

import argparse
import contextlib
import gc
import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--lengths", default="8192,32768,65536,131072", help="tokens, by commas (default: %(default)s)")
parser.add_argument("--chunk", type=int, default=8192, help="tokens of a step at most (default: %(default)s)")
parser.add_argument("--layers", type=int, default=8, help="of the model's 32 (default: %(default)s)")
parser.add_argument("--hidden", type=int, default=4096, help="(default: %(default)s)")
parser.add_argument("--intermediate", type=int, default=14_336, help="(default: %(default)s)")
parser.add_argument("--heads", type=int, default=32, help="(default: %(default)s)")
parser.add_argument("--kv-heads", type=int, default=8, help="(default: %(default)s)")
parser.add_argument("--vocabulary", type=int, default=32_000, help="(default: %(default)s)")
parser.add_argument("--alpha", type=float, default=0.18, help="published for Llama-3.1-8B (default: %(default)s)")
parser.add_argument("--recommended", action="store_true", help="the two-sided search's setting in place of --alpha")
parser.add_argument("--stretch", type=int, default=400, help="tokens that are alike (default: %(default)s)")
parser.add_argument("--repeats", type=int, default=3, help="after one that does not count (default: %(default)s)")
parser.add_argument("--beside", type=int, default=65536, help="the long prompt beside decoding (default: %(default)s)")
parser.add_argument("--decoding", type=int, default=16, help="requests that decode beside it (default: %(default)s)")
parser.add_argument("--min-keys", type=int, help="of the plug-in (default: its own)")
parser.add_argument("--min-queries", type=int, default=1024, help="of the plug-in (default: %(default)s)")
parser.add_argument("--page", type=int, default=16, help="tokens of a cache's page (default: %(default)s)")
parser.add_argument("--memory", type=float, default=0.4, help="of the GPU's, for each engine (default: %(default)s)")
parser.add_argument("--only-plug-in", action="store_true", help="no stock engine (default: both, one after the other)")
parser.add_argument(
    "--jit-monitor", choices=("warn", "error"), default="warn", help="a request that compiles (default: warn)"
)
parser.add_argument("--eager", action="store_true", help="no compiled model and no CUDA graphs (default: both)")
parser.add_argument("--output", type=Path, help="a JSON file for every repeat (default: none)")
settings = parser.parse_args()
lengths = [int(length) for length in settings.lengths.split(",")]
longest = max(*lengths, settings.beside) + 512

# the weights are set, and the counts read, inside the engine
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
import torch  # noqa: E402
import vllm  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm_answers import agreement, answers_of, stretched_prompt  # noqa: E402

from flexprefill import PrefillConfig  # noqa: E402
from flexprefill.integrations.vllm import register  # noqa: E402
from flexprefill.integrations.vllm.figures import figures  # noqa: E402
from flexprefill.runtime.files import write_json  # noqa: E402
from flexprefill.runtime.machine import describe_machine, versions  # noqa: E402

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
record = {
    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    "machine": describe_machine(device),
    "versions": versions() | {"vllm": vllm.__version__},
    "settings": {name: value for name, value in vars(settings).items() if name != "output"},
    "engines": {},
    "first_token": {},
    "beside_decoding": {},
    "failed": {},
}


def save():
    if settings.output:
        write_json(settings.output, record)


@contextlib.contextmanager
def part(name):
    """A part that fails leaves the others standing."""
    began = time.perf_counter()
    try:
        yield
    except Exception as error:  # whatever an engine comes up with
        record["failed"][name] = f"{type(error).__name__}: {error}"[:1000]
        print(f"{name} failed: {record['failed'][name]}", flush=True)
    print(f"[{name}: {time.perf_counter() - began:.0f} s]", flush=True)
    save()


def model_folder():
    """A folder with the config alone: the weights are made on the device."""
    folder = Path(tempfile.mkdtemp(prefix="flexprefill-model-"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "vocab_size": settings.vocabulary,
        "hidden_size": settings.hidden,
        "intermediate_size": settings.intermediate,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "head_dim": settings.hidden // settings.heads,
        "max_position_embeddings": longest,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def initialize(model):
    """The same random weights in every engine, as transformers would draw them."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)


def engine(folder, **options):
    options |= {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]}} if not settings.eager else {}
    llm = LLM(
        folder,
        skip_tokenizer_init=True,
        load_format="dummy",
        max_model_len=longest,
        max_num_batched_tokens=settings.chunk,
        max_num_seqs=32,
        enable_prefix_caching=False,
        block_size=settings.page if device.type == "cuda" else None,
        gpu_memory_utilization=settings.memory,
        enforce_eager=settings.eager,
        jit_monitor_mode=settings.jit_monitor,
        **options,
    )
    llm.apply_model(initialize)
    return llm


def prompt(length, seed=0):
    return stretched_prompt(length, settings.stretch, settings.vocabulary, seed)


def sampling(tokens):
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def wait():
    if device.type == "cuda":
        torch.cuda.synchronize()


def first_token(llm, length):
    """Milliseconds to the first token, the token, and the bytes that were allocated at most."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    asked = prompt(length)
    wait()
    began = time.perf_counter()
    answer = llm.generate([asked], sampling(1), use_tqdm=False)[0].outputs[0].token_ids[0]
    took = 1000 * (time.perf_counter() - began)
    return took, answer, torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def beside_decoding(llm):
    """A long prompt comes while others decode: its time to first token, and what the others got meanwhile."""
    inner = llm.llm_engine
    meanwhile = 32 + 2 * settings.beside // settings.chunk  # steps, so that all decode until the long one is done
    for number in range(settings.decoding):
        inner.add_request(f"short {number} {time.monotonic_ns()}", prompt(128, number), sampling(meanwhile))
    for _ in range(8):
        inner.step()
    long_one = f"long {time.monotonic_ns()}"
    had = {}
    wait()
    began = last = time.perf_counter()
    inner.add_request(long_one, prompt(settings.beside), sampling(1))
    gaps, tokens = [], 0
    while True:
        outputs = inner.step()
        now = time.perf_counter()
        for output in outputs:
            count = len(output.outputs[0].token_ids)
            if output.request_id.startswith("short"):
                tokens += count - had.get(output.request_id, count - 1)
                had[output.request_id] = count
        gaps.append(1000 * (now - last))
        last = now
        if any(output.request_id.startswith("long") and output.finished for output in outputs):
            break
        if not inner.has_unfinished_requests():
            raise RuntimeError("the long prompt did not end")
    took = now - began
    while inner.has_unfinished_requests():
        inner.step()
    return {"first_token_ms": 1000 * took, "decoded_tokens_per_s": tokens / took, "longest_step_ms": max(gaps)}


def measure(name, llm, modes):
    """Everything that is measured of an engine. ``modes`` are contexts in which it runs in turns."""
    for length in lengths:
        with part(f"{name}: {length} tokens"):
            times = {mode: [] for mode in modes}
            peaks, tokens = {}, {}
            for turn in range(1 + settings.repeats):
                for mode, context in modes.items():
                    with context():
                        took, tokens[mode], peaks[mode] = first_token(llm, length)
                    if turn:
                        times[mode].append(took)
            for mode, series in times.items():
                record["first_token"].setdefault(str(length), {})[mode] = {
                    "median_ms": statistics.median(series),
                    "repeats_ms": series,
                    "token": tokens[mode],
                    "peak_bytes": peaks[mode],
                }
                print(f"{length:>8,} tokens, {mode:<22} {statistics.median(series):10.1f} ms", flush=True)
    with part(f"{name}: beside decoding"):
        for turn in range(1 + settings.repeats):
            for mode, context in modes.items():
                with context():
                    found = beside_decoding(llm)
                if turn:
                    record["beside_decoding"].setdefault(mode, []).append(found)
        for mode in modes:
            medians = {
                name: statistics.median(repeat[name] for repeat in record["beside_decoding"][mode])
                for name in record["beside_decoding"][mode][0]
            }
            print(mode, {name: round(median, 1) for name, median in medians.items()}, flush=True)


@contextlib.contextmanager
def left_to_vllm():
    """Every batch goes to vLLM's own attention, in the engine with the plug-in."""
    from flexprefill.integrations.vllm.backend import PlanningBuilder

    planned, PlanningBuilder._planned = PlanningBuilder._planned, lambda *_: None
    try:
        yield
    finally:
        PlanningBuilder._planned = planned


def searching_layers(model):
    """The attention of the layers that go through the search."""
    parts = (getattr(module, "impl", None) for module in model.modules())
    return [part for part in parts if getattr(part, "_served", None) is not None and part._served[1] is not None]


@contextlib.contextmanager
def every_block(llm):
    """Every block is kept, by an alpha that all scores reach."""
    (layers,) = llm.apply_model(searching_layers)
    before = [layer._served for layer in layers]
    for layer, (number, served) in zip(layers, before, strict=True):
        layer._served = number, replace(served, config=replace(served.config, alpha=1e-30))
    try:
        yield
    finally:
        for layer, served in zip(layers, before, strict=True):
            layer._served = served


def answers(llm):
    """16 tokens of prompts of several lengths in one batch, and the log-probabilities of the best five of each."""
    chooser = random.Random(1)
    counts = 5, 300, lengths[0] + 37, lengths[min(1, len(lengths) - 1)]
    asked = [{"prompt_token_ids": [chooser.randrange(2, settings.vocabulary) for _ in range(n)]} for n in counts]
    return answers_of(llm, asked, 16)


def density_of(sums_before):
    """The kept share of each layer's blocks since then."""
    now = figures(0).to_dict()
    before = {layer: sums_before.get(layer, dict.fromkeys(now[layer], 0)) for layer in now}
    return {
        layer: (now[layer]["kept"] - before[layer]["kept"]) / max(now[layer]["visible"] - before[layer]["visible"], 1)
        for layer in now
    }


folder = model_folder()
if not settings.only_plug_in:
    with part("stock engine"):
        began = time.perf_counter()
        llm = engine(folder)
        record["engines"]["stock"] = {"start_s": time.perf_counter() - began}
        measure("stock engine", llm, {"stock": contextlib.nullcontext})
        del llm
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
with part("engine with the plug-in"):
    config = PrefillConfig.recommended() if settings.recommended else PrefillConfig(alpha=settings.alpha)
    register(config, min_keys=settings.min_keys, min_queries=settings.min_queries)
    began = time.perf_counter()
    llm = engine(folder, attention_backend="CUSTOM")
    record["engines"]["plug-in"] = {"start_s": time.perf_counter() - began}
    for length in lengths:
        with part(f"density of {length} tokens"):
            before = figures(0).to_dict()
            took, _, _ = first_token(llm, length)
            density = density_of(before)
            record["first_token"].setdefault(str(length), {})["density_by_layer"] = density
            record["first_token"][str(length)]["first_request_ms"] = took  # would show what was not warmed up
            kept = f"{statistics.mean(density.values()):.1%} kept" if density else "dense"
            print(f"{length:>8,} tokens: {kept}, first request {took:.0f} ms", flush=True)
    if not settings.recommended:  # it has no alpha
        with part("agreement with every block kept"):
            with left_to_vllm():
                of_vllm, again = answers(llm), answers(llm)
            with every_block(llm):
                ours = answers(llm)
            record["agreement"] = {"plug-in": agreement(ours, of_vllm), "vLLM with itself": agreement(again, of_vllm)}
            print(json.dumps(record["agreement"]), flush=True)
    measure("plug-in", llm, {"plug-in, left to vLLM": left_to_vllm, "plug-in": contextlib.nullcontext})
for length, found in record["first_token"].items():
    if "plug-in" in found and "stock" in found:
        gain = found["stock"]["median_ms"] / found["plug-in"]["median_ms"]
        print(f"{int(length):>8,} tokens: {gain:.2f}x stock's time to first token")
save()
