"""Time to first token of a Llama-3.1-8B-shaped stack through transformers: flexprefill, sdpa and FlashAttention-4.

    python examples/benchmarks/time_to_first_token.py

Random weights, made on the device; as many layers as --layers says, so that all fits the time. One forward pass of the
prompt and the logits of its last token, in turns in one run; the attention's share is what events around the attention
function take, of flexprefill with search and lists. Prints medians. --output keeps every
repeat.

The prompt is stretches of --stretch times one token. Of tokens drawn one by one, whose blocks have like means, such a
model keeps every block; of these it keeps about what the paper's models keep (at 32,768 and 131,072 tokens 16 and 4.5 %
there, about 19 and 5 % here). The density is measured with the times, and they say nothing about accuracy.
"""

import argparse
import json
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import sdpa_mask

from flexprefill import PrefillConfig, record_masks
from flexprefill.integrations.transformers import register
from flexprefill.runtime.machine import describe_machine, versions

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
parser.add_argument("--lengths", default="32768,131072", help="tokens, separated by commas (default: %(default)s)")
parser.add_argument("--layers", type=int, default=8, help="of the model's 32 (default: %(default)s)")
parser.add_argument("--hidden", type=int, default=4096, help="(default: %(default)s)")
parser.add_argument("--intermediate", type=int, default=14_336, help="(default: %(default)s)")
parser.add_argument("--heads", type=int, default=32, help="(default: %(default)s)")
parser.add_argument("--kv-heads", type=int, default=8, help="(default: %(default)s)")
parser.add_argument("--vocabulary", type=int, default=32_000, help="(default: %(default)s)")
parser.add_argument("--alpha", type=float, default=0.18, help="published for Llama-3.1-8B (default: %(default)s)")
parser.add_argument("--stretch", type=int, default=400, help="tokens that are alike (default: %(default)s)")
parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
parser.add_argument("--output", type=Path, help="a JSON file for every repeat (default: none)")
settings = parser.parse_args()
device = torch.device(settings.device)
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
lengths = [int(length) for length in settings.lengths.split(",")]


def synchronize():
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Watched:
    """An attention function of transformers that adds up its own time."""

    def __init__(self, attend):
        self.attend, self.spans, self.on = attend, [], False

    def __call__(self, *arguments, **keywords):
        if not self.on:
            return self.attend(*arguments, **keywords)
        if device.type != "cuda":
            start = time.perf_counter()
            result = self.attend(*arguments, **keywords)
            self.spans.append(1000 * (time.perf_counter() - start))
            return result
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = self.attend(*arguments, **keywords)
        end.record()
        self.spans.append((start, end))
        return result

    def milliseconds(self):
        return sum(span if isinstance(span, float) else span[0].elapsed_time(span[1]) for span in self.spans)


def flash_attention_4(module, query, key, value, attention_mask, scaling=None, **_):
    from flash_attn.cute import flash_attn_func  # a package that need not be there

    inputs = (tensor.transpose(1, 2) for tensor in (query, key, value))  # [B, S, H, D]
    result = flash_attn_func(*inputs, softmax_scale=scaling, causal=True)
    return (result[0] if isinstance(result, tuple) else result), None


register(PrefillConfig(alpha=settings.alpha), name="flexprefill")
AttentionInterface.register("fa4-dense", flash_attention_4)
AttentionMaskInterface.register("fa4-dense", sdpa_mask)
functions = AttentionInterface()
watched = {}
for contestant in ("flexprefill", "sdpa", "fa4-dense"):
    name = f"watched {contestant}"
    watched[contestant] = Watched(functions[contestant])
    AttentionInterface.register(name, watched[contestant])
    AttentionMaskInterface.register(name, AttentionMaskInterface()[contestant])

config = LlamaConfig(
    vocab_size=settings.vocabulary,
    hidden_size=settings.hidden,
    intermediate_size=settings.intermediate,
    num_hidden_layers=settings.layers,
    num_attention_heads=settings.heads,
    num_key_value_heads=settings.kv_heads,
    max_position_embeddings=max(lengths),
    rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
)
torch.set_default_dtype(dtype)
with device:
    model = LlamaForCausalLM(config).eval()
torch.set_default_dtype(torch.float32)
generator = torch.Generator().manual_seed(0)


@torch.no_grad()
def first_token(tokens, contestant):
    """Milliseconds of the prompt's forward pass, of which the attention's, and the token."""
    model.set_attn_implementation(f"watched {contestant}")
    attention = watched[contestant]
    synchronize()
    attention.spans, attention.on = [], True
    start = time.perf_counter()
    token = model(tokens, use_cache=False, logits_to_keep=1).logits.argmax(-1)
    synchronize()
    took = 1000 * (time.perf_counter() - start)
    attention.on = False
    return took, attention.milliseconds(), token


@torch.no_grad()
def mean_density(tokens):
    """The share of the causal blocks that each layer keeps, over its heads."""
    model.set_attn_implementation("watched flexprefill")
    with record_masks(model) as masks:
        model(tokens, use_cache=False, logits_to_keep=1)
    return [block_map.density().mean().item() for block_map in masks.values()]


found = {}
for length in lengths:
    topics = torch.randint(settings.vocabulary, (1, -(-length // settings.stretch)), generator=generator)
    tokens = topics.repeat_interleave(settings.stretch, 1)[:, :length].to(device)
    times = {contestant: {"whole_ms": [], "attention_ms": []} for contestant in watched}
    absent = {}
    for turn in range(1 + settings.repeats):  # the first compiles
        for contestant in watched:
            if contestant in absent:
                continue
            try:
                whole, attention, _ = first_token(tokens, contestant)
            except Exception as error:  # whatever a package built for another version comes up with
                if contestant == "flexprefill":
                    raise
                absent[contestant] = f"{type(error).__name__}: {error}"[:300]
                continue
            if turn:
                times[contestant]["whole_ms"].append(whole)
                times[contestant]["attention_ms"].append(attention)
    density = mean_density(tokens)
    kept = (
        f"{statistics.mean(density):.1%} of the causal blocks kept ({min(density):.1%} to {max(density):.1%} by layer)"
    )
    print(f"\n{length:,} tokens, {settings.layers} layers, {kept}: median ms to the first token")
    medians = {
        contestant: {name: statistics.median(values) for name, values in series.items()}
        for contestant, series in times.items()
        if contestant not in absent
    }
    ours = medians["flexprefill"]
    for contestant, each in medians.items():
        gain = f"{each['whole_ms'] / ours['whole_ms']:.2f}x flexprefill's whole, "
        gain += f"{each['attention_ms'] / ours['attention_ms']:.2f}x its attention"
        share = f"of which attention {each['attention_ms']:9.1f} ({each['attention_ms'] / each['whole_ms']:.1%})"
        print(f"  {contestant:<12} {each['whole_ms']:10.1f}, {share}, {gain}", flush=True)
    for contestant, reason in absent.items():
        print(f"  {contestant:<12} not measured: {reason}")
    measured = {name: times[name] for name in medians}
    found[length] = {"density_by_layer": density, "medians": medians, "times": measured, "absent": absent}

record = {
    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    "machine": describe_machine(device),
    "versions": versions(),
    "settings": {name: value for name, value in vars(settings).items() if name not in ("output", "device")},
    "by_length": found,
}
if settings.output:
    settings.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nfigures  {settings.output}")
