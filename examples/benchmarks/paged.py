"""A paged cache read where its pages lie, beside gathering it first: whole prompts and the last chunk of each.

    python examples/benchmarks/paged.py --output paged.json

The pages are shuffled. Searching and attending in place, gathering and then doing so, and doing so over tensors that
were never in pages take turns, by the device's clock. The host's time of one call stands beside it. Checks that maps
are equal and that outputs agree; prints medians and spreads. --output keeps every repeat.
"""

import argparse
import json
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from flexprefill import PagedKV, PageMeans, PrefillConfig, explain_backend, prefill_attention
from flexprefill import search_blocks as search
from flexprefill.bench.contestants import sparse_backends
from flexprefill.bench.timing import time_in_turns
from flexprefill.runtime.machine import describe_machine, versions

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32_768, 131_072], help="tokens")
parser.add_argument("--page-sizes", type=int, nargs="+", default=[16, 64, 128, 256], help="tokens of a page")
parser.add_argument("--chunk", type=int, default=8192, help="queries of the last chunk (default: %(default)s)")
parser.add_argument("--alpha", type=float, default=0.12, help="(default: %(default)s)")
parser.add_argument("--heads", type=int, default=32, help="(default: %(default)s)")
parser.add_argument("--kv-heads", type=int, default=8, help="(default: %(default)s)")
parser.add_argument("--repeats", type=int, default=15, help="(default: %(default)s)")
parser.add_argument("--output", type=Path, help="a JSON file for every repeat (default: none)")
settings = parser.parse_args()
device = torch.device(settings.device)
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
CLOSE = 1e-2 if device.type == "cuda" else 1e-5  # relative error of outputs by kernels that add in another order


def random(generator, heads, length):
    return torch.randn(1, heads, length, 128, generator=generator, device=device, dtype=dtype)


def prompt(length):
    """Query and keys in stretches of 512 that share a direction, as the inputs of two_versions.py; and values."""
    generator = torch.Generator(device).manual_seed(0)
    topics = random(generator, settings.kv_heads, length // 512 + 1).repeat_interleave(512, 2)[:, :, :length]
    query = random(generator, settings.heads, length) + topics.repeat_interleave(settings.heads // settings.kv_heads, 1)
    return query, random(generator, settings.kv_heads, length) + topics, random(generator, settings.kv_heads, length)


def in_pages(key, value, page_size):
    """The same keys and values in shuffled pages, half as many again as are used."""
    length = key.shape[2]
    used = -(-length // page_size)
    table = torch.randperm(used + used // 2, generator=torch.Generator().manual_seed(0))[None, :used].to(device)
    position = torch.arange(length, device=device)
    page, slot = table[0, position // page_size], position % page_size
    pages = []
    for tensor in (key, value):
        held = tensor.new_zeros(used + used // 2, page_size, tensor.shape[1], tensor.shape[3])
        held[page, slot] = tensor[0].transpose(0, 1)
        pages.append(held.transpose(1, 2))
    return PagedKV(*pages, table.to(torch.int32), length)


def times_of(calls):
    """Device milliseconds of each call, and host milliseconds of one, every repeat."""
    on_device = time_in_turns(calls, device, settings.repeats, graph=False)
    times = {name: {"device_ms": repeats, "host_ms": []} for name, repeats in on_device.items()}
    for name, call in calls.items():
        for _ in range(settings.repeats):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            call()
            times[name]["host_ms"].append(1000 * (time.perf_counter() - start))
    return times


def relative_error(found, expected):
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def measure(length, page_size, q_len):
    """One chunk of the last q_len queries of a prompt."""
    query, key, value = prompt(length)
    query = query[:, :, length - q_len :]
    paged = in_pages(key, value, page_size)
    config = PrefillConfig(alpha=settings.alpha, dense_below=0)
    backends = sparse_backends(device)
    reads_pages = backends[0]  # FlexAttention's own
    choice = explain_backend(query, paged, config=config, backend=reads_pages)
    found = search(query, key, config)
    assert search(query, paged, config) == found, "maps differ"
    means = PageMeans() if page_size % config.block_size == 0 else None
    if means is not None:
        assert search(query, paged, config, means=means) == found, "maps differ with kept means"

    calls = {
        "in place": lambda: prefill_attention(query, paged, config=config, backend=reads_pages),
        "in place, attention alone": lambda: prefill_attention(query, paged, block_map=found, backend=reads_pages),
        "search over pages": lambda: search(query, paged, config),
        "search over tensors": lambda: search(query, key, config),
        "gather alone": paged.gather,
    }
    if means is not None:
        calls["in place, earlier means kept"] = lambda: prefill_attention(
            query, paged, config=config, means=means, backend=reads_pages
        )
        calls["search over pages, earlier means kept"] = lambda: search(query, paged, config, means=means)
    for backend in backends:
        calls[f"gathered, {backend}"] = lambda backend=backend: prefill_attention(
            query, *paged.gather(), config, backend=backend
        )
        calls[f"never in pages, {backend}"] = lambda backend=backend: prefill_attention(
            query, key, value, config, backend=backend
        )
        calls[f"never in pages, {backend}, attention alone"] = lambda backend=backend: prefill_attention(
            query, key, value, block_map=found, backend=backend
        )
    expected = calls[f"never in pages, {reads_pages}"]()
    errors = {
        name: relative_error(call(), expected)
        for name, call in calls.items()
        if name.startswith(("in place", "gathered", "never"))
    }
    assert max(errors.values()) <= CLOSE, errors
    times = times_of(calls)
    density = found.density().mean().item()
    print(f"{length:,} keys, the last {q_len:,} queries, pages of {page_size}: {density:.1%} kept, by {choice.name}")
    if choice.gathers is not None:
        print(f"    not in place: {choice.gathers}")
    for name, series in times.items():
        took = series["device_ms"]
        print(
            f"    {name:<40} {statistics.median(took):8.3f} ms  ({min(took):.3f} – {max(took):.3f}), host "
            f"{statistics.median(series['host_ms']):.3f} ms",
            flush=True,
        )
    return {
        "length": length, "q_len": q_len, "page_size": page_size, "density": density, "kernel": choice.name,
        "gathers": choice.gathers, "errors": errors, "times": times,
    }  # fmt: skip


record = {
    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    "machine": describe_machine(device),
    "versions": versions(),
    "settings": {name: setting for name, setting in vars(settings).items() if name not in ("output", "device")},
    "runs": [
        measure(length, page_size, q_len)
        for length in settings.lengths
        for q_len in sorted({length, min(settings.chunk, length)})
        for page_size in settings.page_sizes
    ],
}
if settings.output:
    settings.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {settings.output}")
