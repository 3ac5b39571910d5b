"""What the two-sided search costs, beside FlashPrefill's search and the attention over what is kept.

    python examples/benchmarks/two_sided.py

Times calls of a length in turns by the device's clock; prints medians and spreads, and what each kernel of the search
takes. The whole call is the two-sided search and attention over FlashPrefill's map of the least density: on random
prompts the two-sided search keeps more, because single keys stand out. The attention alone is timed over random maps of
all densities. Searches and the whole call come first, at all lengths: after dense attention a GPU at its power limit is
slower. --output keeps every repeat.
"""

import argparse
import json
import statistics
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from flexprefill import PrefillConfig, prefill_attention, search_blocks
from flexprefill.bench.inputs import make_case, make_qkv, random_map
from flexprefill.bench.timing import WARM_UPS, time_in_turns
from flexprefill.runtime.machine import describe_machine, versions

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 32_768, 131_072, 262_144], help="tokens")
parser.add_argument(
    "--densities",
    type=float,
    nargs="*",
    default=[0.025, 0.1, 0.3, 0.5],
    help="of the maps; none: the searches alone (default: %(default)s)",
)
parser.add_argument("--heads", type=int, default=32, help="(default: %(default)s)")
parser.add_argument("--kv-heads", type=int, default=8, help="(default: %(default)s)")
parser.add_argument("--repeats", type=int, default=15, help="(default: %(default)s)")
parser.add_argument("--output", type=Path, help="a JSON file for every repeat (default: none)")
settings = parser.parse_args()
device = torch.device(settings.device)
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
RECOMMENDED, FLASHPREFILL = PrefillConfig.recommended(), PrefillConfig()


def kernels_of(call):
    """Device milliseconds of each kernel of a call."""
    if device.type != "cuda":
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(WARM_UPS):
            call()
        torch.cuda.synchronize()
    events = [event for event in seen.key_averages() if event.self_device_time_total]
    return {event.key: event.self_device_time_total / 1000 / WARM_UPS for event in events}


def prompt(length):
    """Queries, keys and values of a length."""
    return make_qkv(length, settings.heads, settings.kv_heads, 128, dtype, device)


def measure(length, calls):
    """Milliseconds of every repeat of each call, in turns."""
    times = time_in_turns(calls, device, settings.repeats, graph=True)
    print(f"{length:,} tokens")
    for name, repeats in times.items():
        median = statistics.median(repeats)
        print(f"    {name:<44} {median:8.3f} ms  ({min(repeats):.3f} – {max(repeats):.3f})", flush=True)
    return times


def measure_searches(length):
    query, key, _ = qkv = prompt(length)
    calls = {
        "FlashPrefill's search": lambda: search_blocks(query, key, FLASHPREFILL),
        "two-sided search": lambda: search_blocks(query, key, RECOMMENDED),
    }
    found = None
    if settings.densities:
        block_map = make_case(qkv, min(settings.densities), FLASHPREFILL).block_map
        found = block_map.density().mean().item()
        calls[f"two-sided search and attention at {found:.3f}"] = lambda: (
            search_blocks(query, key, RECOMMENDED),
            prefill_attention(*qkv, FLASHPREFILL, block_map=block_map),  # its last rows keep all keys
        )
    times = measure(length, calls)
    kernels = kernels_of(calls["two-sided search"])
    for name, took in sorted(kernels.items(), key=lambda item: -item[1]):
        print(f"        {name[:60]:<60} {took:8.3f} ms", flush=True)
    return {"density_of_the_whole_call": found, "times_ms": times, "kernels_ms": kernels}


def measure_attention(length):
    query, key, value = prompt(length)
    generator = torch.Generator(device).manual_seed(0)
    maps = {density: random_map(settings.heads, length, density, generator) for density in settings.densities}
    calls = {
        f"attention at {density:g}": lambda block_map=block_map: prefill_attention(
            query, key, value, RECOMMENDED, block_map=block_map
        )
        for density, block_map in maps.items()
    }
    calls["dense attention"] = lambda: scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    found = {density: block_map.density().mean().item() for density, block_map in maps.items()}
    return {"densities": found, "times_ms": measure(length, calls)}


record = {
    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    "machine": describe_machine(device),
    "versions": versions(),
    "settings": {name: getattr(settings, name) for name in ("lengths", "densities", "heads", "kv_heads", "repeats")},
    "by_length": {},
}
by_length = record["by_length"]


def keep():
    if settings.output:
        settings.output.write_text(json.dumps(record, indent=1) + "\n")


for length in settings.lengths:
    by_length[length] = measure_searches(length)
    keep()
for length in settings.lengths if settings.densities else ():
    found = measure_attention(length)
    by_length[length]["densities"] = found["densities"]
    by_length[length]["times_ms"] |= found["times_ms"]
    keep()
