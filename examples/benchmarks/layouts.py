"""Attention over kept blocks where queries, keys and values are views: of a fused projection, or of a cache.

    python examples/benchmarks/layouts.py --output layouts.json

All layouts of a length take turns over the same map, by the device's clock. Checks that their outputs agree with those
of contiguous tensors; prints medians and spreads. --output keeps every repeat.
"""

import argparse
import json
import statistics
from datetime import datetime, timezone
from pathlib import Path

import torch

from flexprefill import prefill_attention
from flexprefill.bench.contestants import sparse_backends
from flexprefill.bench.inputs import random_map
from flexprefill.bench.timing import WARM_UPS, time_in_turns
from flexprefill.runtime.machine import describe_machine, versions
from flexprefill.runtime.progress import stage

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32_768], help="tokens")
parser.add_argument("--densities", type=float, nargs="+", default=[1.0, 0.21, 0.07], help="(default: %(default)s)")
parser.add_argument("--heads", type=int, default=32, help="(default: %(default)s)")
parser.add_argument("--kv-heads", type=int, default=8, help="(default: %(default)s)")
parser.add_argument("--repeats", type=int, default=15, help="(default: %(default)s)")
parser.add_argument("--output", type=Path, help="a JSON file for every repeat (default: none)")
settings = parser.parse_args()
device = torch.device(settings.device)
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
DIM, HEADS, KV_HEADS = 128, settings.heads, settings.kv_heads
CLOSE = 1e-2 if device.type == "cuda" else 1e-5  # relative error of outputs by kernels that add in another order


def layouts(length):
    """Query, key and value of the same numbers, in each layout."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = [HEADS, KV_HEADS, KV_HEADS]
    projected = torch.randn(1, length, sum(sizes) * DIM, generator=generator, device=device, dtype=dtype)
    views = [part.unflatten(2, (-1, DIM)).transpose(1, 2) for part in projected.split([n * DIM for n in sizes], 2)]
    query, key, value = (view.contiguous() for view in views)
    # a cache has room for more tokens than there are
    cache = torch.zeros(2, 1, KV_HEADS, length + 1024, DIM, device=device, dtype=dtype)
    cache[:, :, :, :length] = torch.stack((key, value))
    return {
        "contiguous": (query, key, value),
        "a fused projection": tuple(views),
        "values of a fused projection": (query, key, views[2]),
        "a projection each, [B, S, H, D]": tuple(view.transpose(1, 2).contiguous().transpose(1, 2) for view in views),
        "keys and values in a cache": (query, cache[0, :, :, :length], cache[1, :, :, :length]),
    }


def measure(length, density):
    block_map = random_map(HEADS, length, density, torch.Generator(device).manual_seed(1))
    calls = {
        f"{backend}, {name}": lambda tensors=tensors, backend=backend: prefill_attention(
            *tensors, block_map=block_map, backend=backend
        )
        for backend in sparse_backends(device)
        for name, tensors in layouts(length).items()
    }
    expected = next(iter(calls.values()))().float()
    for name, call in calls.items():
        error = ((call().float() - expected).norm() / expected.norm()).item()
        assert error <= CLOSE, (name, error)
    with stage(f"{length:,} tokens", len(calls) * (WARM_UPS + settings.repeats)) as advance:
        times = time_in_turns(calls, device, settings.repeats, graph=False, advance=advance)
    found = block_map.density().mean().item()
    print(f"{length:,} tokens, {found:.1%} of the blocks")
    for name, repeats in times.items():
        print(f"    {name:<42} {statistics.median(repeats):8.3f} ms  ({min(repeats):.3f} – {max(repeats):.3f})")
    return {"length": length, "density": found, "times_ms": times}


record = {
    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    "machine": describe_machine(device),
    "versions": versions(),
    "settings": {name: getattr(settings, name) for name in ("heads", "kv_heads", "repeats")},
    "runs": [measure(length, density) for length in settings.lengths for density in settings.densities],
}
if settings.output:
    settings.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {settings.output}")
