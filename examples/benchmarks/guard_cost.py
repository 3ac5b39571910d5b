"""What PrefillConfig.guard costs: the call with it beside the call without, where it widens no head.

    python examples/benchmarks/guard_cost.py

Times both in turns by the device's clock, and the guard by itself; prints medians and spreads. --output keeps every
repeat.
"""

import argparse
import json
import statistics
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from flexprefill import PrefillConfig, guard_blocks, prefill_attention, search_blocks
from flexprefill.bench.timing import time_in_turns
from flexprefill.runtime.machine import describe_machine, versions

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
parser.add_argument("--lengths", type=int, nargs="+", default=[32_768, 65_536, 131_072], help="tokens")
parser.add_argument("--density", type=float, default=0.05, help="about, of the search (default: %(default)s)")
parser.add_argument("--heads", type=int, default=32, help="(default: %(default)s)")
parser.add_argument("--kv-heads", type=int, default=8, help="(default: %(default)s)")
parser.add_argument("--repeats", type=int, default=15, help="(default: %(default)s)")
parser.add_argument("--output", type=Path, help="a JSON file for every repeat (default: none)")
settings = parser.parse_args()
device = torch.device(settings.device)
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
GUARD = 1e-4  # of mass that sinks and window alone hold: no head is widened


def random(generator, heads, length):
    return torch.randn(1, heads, length, 128, generator=generator, device=device, dtype=dtype)


def prompt(length):
    """Heads that share a direction, keys in stretches of 500 that do: blocks differ in what they weigh."""
    generator = torch.Generator(device).manual_seed(0)
    query = random(generator, settings.heads, length) + random(generator, settings.heads, 1)
    key = random(generator, settings.kv_heads, length // 500 + 1).repeat_interleave(500, 2)[:, :, :length]
    return query, key + random(generator, settings.kv_heads, length), random(generator, settings.kv_heads, length)


def config_for(query, key):
    """The alpha that gives the asked density, by bisection."""
    low, high = 1e-4, 1.0
    for _ in range(12):
        config = PrefillConfig(alpha=(low * high) ** 0.5, dense_below=0)
        if search_blocks(query, key, config).density().mean() > settings.density:
            low = config.alpha
        else:
            high = config.alpha
    return config


def measure(length):
    query, key, value = prompt(length)
    config = config_for(query, key)
    guarded = replace(config, guard=GUARD)
    found = search_blocks(query, key, config)
    block_map, report = guard_blocks(query, key, found, guarded)
    assert not report.widened.any() and block_map == found
    calls = {
        "without": lambda: prefill_attention(query, key, value, config),
        "with": lambda: prefill_attention(query, key, value, guarded),
        "attention alone": lambda: prefill_attention(query, key, value, config, block_map=found),
        "guard alone": lambda: guard_blocks(query, key, found, guarded),
    }
    times = time_in_turns(calls, device, settings.repeats, graph=False)
    medians = {name: statistics.median(repeats) for name, repeats in times.items()}
    share = medians["guard alone"] / medians["attention alone"]
    print(
        f"{length:,} tokens, {found.density().mean().item():.1%} kept: the guard takes {share:.1%} of the attention; "
        f"the whole call takes {medians['with'] / medians['without'] - 1:+.1%}"
    )
    for name, repeats in times.items():
        print(f"    {name:<15} {medians[name]:8.3f} ms  ({min(repeats):.3f} – {max(repeats):.3f})", flush=True)
    return {"alpha": config.alpha, "density": found.density().mean().item(), "share": share, "times_ms": times}


record = {
    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    "machine": describe_machine(device),
    "versions": versions(),
    "settings": {name: getattr(settings, name) for name in ("lengths", "density", "heads", "kv_heads", "repeats")},
    "by_length": {length: measure(length) for length in settings.lengths},
}
if settings.output:
    settings.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {settings.output}")
