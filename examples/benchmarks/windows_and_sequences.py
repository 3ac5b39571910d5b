"""What sliding windows, sequences and score functions cost: search, lists and attention beside the plain causal call.

    python examples/benchmarks/windows_and_sequences.py

Times each in turns by the device's clock, prints medians and spreads. --output keeps every repeat.
Windows are timed at every length: their cost is to grow with the length
once, not with its square.
"""

import argparse
import json
import statistics
from datetime import datetime, timezone
from pathlib import Path

import torch

from flexprefill import AttentionVariant, PrefillConfig, Sequences, prefill_attention, search_blocks
from flexprefill.bench.timing import WARM_UPS, make_watch, reason
from flexprefill.runtime.machine import describe_machine, versions

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
parser.add_argument("--lengths", type=int, nargs="+", default=[16_384, 32_768, 65_536, 131_072], help="tokens")
parser.add_argument("--window", type=int, default=4096, help="keys (default: %(default)s)")
parser.add_argument("--documents", type=int, default=16, help="of unlike lengths in a row (default: %(default)s)")
parser.add_argument("--alpha", type=float, default=PrefillConfig.alpha, help="1 keeps least (default: %(default)s)")
parser.add_argument("--heads", type=int, default=32, help="(default: %(default)s)")
parser.add_argument("--kv-heads", type=int, default=8, help="(default: %(default)s)")
parser.add_argument("--repeats", type=int, default=10, help="(default: %(default)s)")
parser.add_argument("--output", type=Path, help="a JSON file for every repeat (default: none)")
settings = parser.parse_args()
device = torch.device(settings.device)
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
config = PrefillConfig(dense_below=0, alpha=settings.alpha)
BACKENDS = {"cuda": ["triton", "flash"], "cpu": ["auto"]}
CLOSE = 1e-2  # relative error of outputs by kernels that add in another order


def random(generator, heads, length):
    return torch.randn(1, heads, length, 128, generator=generator, device=device, dtype=dtype)


def prompt(length):
    """Heads that share a direction, keys in stretches of 500 that do: blocks differ in what they weigh."""
    generator = torch.Generator(device).manual_seed(0)
    query = random(generator, settings.heads, length) + random(generator, settings.heads, 1)
    key = random(generator, settings.kv_heads, length // 500 + 1).repeat_interleave(500, 2)[:, :, :length]
    return query, key + random(generator, settings.kv_heads, length), random(generator, settings.kv_heads, length)


def kinds(length):
    """The variants that are compared at a length."""
    cuts = torch.rand(settings.documents - 1, generator=torch.Generator().manual_seed(0)).mul(length).long().sort()
    bounds = torch.cat([torch.tensor([0]), cuts.values, torch.tensor([length])]).to(device)
    slopes = 2.0 ** (-8 * torch.arange(1, settings.heads + 1, device=device) / settings.heads)
    padded = torch.tensor([length - 100], device=device)
    return {
        "plain": AttentionVariant(),
        f"window {settings.window}": AttentionVariant(sliding_window=settings.window),
        f"{settings.documents} packed": AttentionVariant(sequences=Sequences.from_cu_seqlens(bounds, length)),
        "padded left": AttentionVariant(sequences=Sequences.from_lengths(padded, length, padding="left")),
        "soft cap 50": AttentionVariant(soft_cap=50.0),
        "ALiBi": AttentionVariant(alibi_slopes=slopes),
        "sinks": AttentionVariant(sinks=torch.zeros(settings.heads, device=device)),
    }


def measure(length):
    query, key, value = prompt(length)
    watches, found = {}, {}
    for name, variant in kinds(length).items():
        block_map = search_blocks(query, key, config, variant=variant)
        parts = {"search": lambda variant=variant: search_blocks(query, key, config, variant=variant)}
        for backend in BACKENDS[device.type]:
            parts[f"attention, {backend}"] = lambda variant=variant, block_map=block_map, backend=backend: (
                prefill_attention(query, key, value, config, variant=variant, block_map=block_map, backend=backend)
            )
        found[name] = {"density": block_map.density().mean().item(), "times_ms": {}, "absent": {}}
        expected = None
        for part, call in parts.items():
            try:
                output = call()
            except Exception as error:  # a backend that cannot do a variant may raise anything
                found[name]["absent"][part] = reason(error)
                print(f"    {name}, {part}: {reason(error)}", flush=True)
                continue
            if part != "search":
                expected = output.float() if expected is None else expected
                error = ((output.float() - expected).norm() / expected.norm()).item()
                assert error < CLOSE, (name, part, error)
            found[name]["times_ms"][part] = []
            watches[name, part] = make_watch(call, device, graph=False)
    for turn in range(WARM_UPS + settings.repeats):
        for (name, part), watch in watches.items():
            took = watch.measure()
            if turn >= WARM_UPS:
                found[name]["times_ms"][part].append(took)
    print(f"{length:,} tokens")
    for name, row in found.items():
        times = "   ".join(
            f"{part} {statistics.median(repeats):8.3f} ms ({min(repeats):.3f} – {max(repeats):.3f})"
            for part, repeats in row["times_ms"].items()
        )
        print(f"    {name:<12} {row['density']:6.1%} kept   {times}", flush=True)
    return found


record = {
    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    "machine": describe_machine(device),
    "versions": versions(),
    "settings": {
        name: getattr(settings, name)
        for name in ("lengths", "window", "documents", "alpha", "heads", "kv_heads", "repeats")
    },
    "by_length": {length: measure(length) for length in settings.lengths},
}
if settings.output:
    settings.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {settings.output}")
