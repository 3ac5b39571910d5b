"""What MaskCache saves when a prompt grows: 96K tokens are cached, 128K are asked for.

    python examples/benchmarks/extend_cached_prompt.py

Times the extension and a search of everything in turns, for one layer and for all layers of a model in a row, host
time included: one layer waits for the host, several in a row for the device. Checks that both give the same maps,
prints medians and spreads. --output keeps every repeat.
"""

import argparse
import json
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from flexprefill import MaskCache, PrefillConfig, search_blocks
from flexprefill.runtime.machine import describe_machine, versions

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
parser.add_argument("--cached", type=int, default=98_304, help="tokens (default: %(default)s)")
parser.add_argument("--length", type=int, default=131_072, help="tokens asked for (default: %(default)s)")
parser.add_argument("--layers", type=int, default=32, help="in a row (default: %(default)s)")
parser.add_argument("--heads", type=int, default=32, help="(default: %(default)s)")
parser.add_argument("--kv-heads", type=int, default=8, help="(default: %(default)s)")
parser.add_argument("--repeats", type=int, default=20, help="(default: %(default)s)")
parser.add_argument("--output", type=Path, help="a JSON file for every repeat (default: none)")
settings = parser.parse_args()
device = torch.device(settings.device)
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

generator = torch.Generator(device).manual_seed(0)


def random(heads, length):
    return torch.randn(1, heads, length, 128, generator=generator, device=device, dtype=dtype)


query = random(settings.heads, settings.length) + random(settings.heads, 1)
# stretches of 500 keys share a direction, so that blocks differ in what they weigh
key = random(settings.kv_heads, settings.length // 500 + 1).repeat_interleave(500, 2)[:, :, : settings.length]
key = key + random(settings.kv_heads, settings.length)
tokens = torch.randint(100_000, (settings.length,), generator=torch.Generator().manual_seed(0))
config = PrefillConfig()


def cached_prompt(layers):
    """A prompt whose first tokens a cache has seen in all layers."""
    cache = MaskCache()
    first = cache.prompt(tokens[: settings.cached])
    for layer in range(layers):
        first.search_blocks(layer, query[:, :, : settings.cached], key[:, :, : settings.cached], config)
    return cache.prompt(tokens)


def timed(search, layers):
    """Milliseconds until the maps of layers 0, 1, … are there, and the last of them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for layer in range(layers):
        block_map = search(layer)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start), block_map


def measure(layers):
    times = {"extension": [], "full search": []}
    for turn in range(3 + settings.repeats):
        prompt = cached_prompt(layers)
        extension, extended = timed(
            lambda layer, prompt=prompt: prompt.search_blocks(layer, query, key, config), layers
        )
        full, searched = timed(lambda layer: search_blocks(query, key, config), layers)
        assert extended == searched
        assert prompt.cache.stats().extensions == layers
        if turn >= 3:  # the first ones warm up
            times["extension"].append(extension)
            times["full search"].append(full)
    ratio = statistics.median(times["extension"]) / statistics.median(times["full search"])
    print(f"{layers} {'layer' if layers == 1 else 'layers'}: the extension takes {ratio:.1%} of a full search")
    for name, repeats in times.items():
        print(f"    {name:<12} {statistics.median(repeats):8.3f} ms  ({min(repeats):.3f} – {max(repeats):.3f})")
    return {"ratio": ratio, "times_ms": times}


print(f"{settings.cached:,} of {settings.length:,} tokens cached, {settings.heads} heads")
measured = {layers: measure(layers) for layers in sorted({1, settings.layers})}
record = {
    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    "machine": describe_machine(device),
    "versions": versions(),
    "settings": {name: getattr(settings, name) for name in ("cached", "length", "heads", "kv_heads", "repeats")},
    "by_layers": measured,
}
if settings.output:
    settings.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {settings.output}")
