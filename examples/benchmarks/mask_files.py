"""Mask files against their own bytes, written and read plainly in turns, and what one head of one layer costs.

    python examples/benchmarks/mask_files.py

Prints medians and spreads. --output keeps every repeat. Linux only.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

from flexprefill import BlockMap, load_masks, read_mask_info, save_masks
from flexprefill.runtime.machine import describe_machine, versions

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--length", type=int, default=131_072, help="tokens (default: %(default)s)")
parser.add_argument("--layers", type=int, default=32, help="(default: %(default)s)")
parser.add_argument("--heads", type=int, default=32, help="(default: %(default)s)")
parser.add_argument("--density", type=float, default=0.1, help="of random blocks (default: %(default)s)")
parser.add_argument("--repeats", type=int, default=15, help="(default: %(default)s)")
parser.add_argument("--folder", type=Path, help="on the disk to measure (default: where temporary files go)")
parser.add_argument("--output", type=Path, help="a JSON file for every repeat (default: none)")


def random_masks(settings):
    blocks = -(-settings.length // 128)
    generator = torch.Generator().manual_seed(0)
    shape = 1, settings.heads, blocks, blocks
    lengths = {"q_len": settings.length, "kv_len": settings.length, "block_size": 128}
    return {
        layer: BlockMap.from_dense(torch.rand(shape, generator=generator) < settings.density, **lengths)
        for layer in range(settings.layers)
    }


def write_plainly(path, data):
    """As save_masks does: to the disk, and then in the old file's place."""
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    new.replace(path)


def forget(path):
    """Drops the file from the system's cache, so that the next read goes to the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read():
    """Bytes that this process's reads have returned, from the disk or the cache, in all its threads."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def bytes_read_by(call):
    """What a call reads, by the kernel's count; the count's own reading is taken off."""
    start = bytes_read()
    own = bytes_read() - start
    start = bytes_read()
    call()
    return bytes_read() - start - own


def timed(call):
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result
    return 1000 * seconds


def measure(folder, settings):
    path, plain = folder / "masks.safetensors", folder / "plain"
    masks = random_masks(settings)
    save_masks(path, masks)
    data = path.read_bytes()
    write_plainly(plain, data)
    assert load_masks(path) == masks
    calls = {  # before the clock starts, and the call
        "save_masks": (None, lambda: save_masks(path, masks)),
        "write plainly": (None, lambda: write_plainly(plain, data)),
        "load_masks, cached": (None, lambda: load_masks(path)),
        "read plainly, cached": (None, plain.read_bytes),
        "load_masks, from disk": (path, lambda: load_masks(path)),
        "read plainly, from disk": (plain, plain.read_bytes),
        "one head of one layer": (None, lambda: load_masks(path, layers=[settings.layers // 2], heads=[0])),
        "read_mask_info": (None, lambda: read_mask_info(path)),
    }
    repeats = {name: [] for name in calls}
    for turn in tqdm(range(1 + settings.repeats), leave=False):
        for name, (to_forget, call) in calls.items():
            if to_forget is not None:
                forget(to_forget)
            milliseconds = timed(call)
            if turn:  # the first one warms up
                repeats[name].append(milliseconds)
    return {
        "file_bytes": len(data),
        "bytes_read": {name: bytes_read_by(calls[name][1]) for name in ("one head of one layer", "read_mask_info")},
        "times": {
            name: {
                "median_ms": statistics.median(times),
                "min_ms": min(times),
                "max_ms": max(times),
                "repeats_ms": times,
            }
            for name, times in repeats.items()
        },
    }


settings = parser.parse_args()
with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
    measured = measure(Path(folder), settings)
times = measured["times"]
size = measured["file_bytes"]
print(f"{settings.layers} layers, {settings.heads} heads, {settings.length:,} tokens: {size / 1e6:.1f} MB")
for name, entry in times.items():
    print(f"{name:<24} {entry['median_ms']:8.1f} ms  ({entry['min_ms']:.1f} – {entry['max_ms']:.1f})")
for ours, plain in (
    ("save_masks", "write plainly"),
    ("load_masks, cached", "read plainly, cached"),
    ("load_masks, from disk", "read plainly, from disk"),
):
    print(f"{ours} takes {times[ours]['median_ms'] / times[plain]['median_ms']:.2f} times as long as {plain}")
for name, count in measured["bytes_read"].items():
    print(f"{name} reads {count:,} bytes, {count / size:.2%} of the file")
record = {
    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    "machine": describe_machine(torch.device("cpu")) | {"cores": os.cpu_count(), "kernel": platform.release()},
    "versions": versions(),
    "settings": {name: getattr(settings, name) for name in ("length", "layers", "heads", "density", "repeats")},
    **measured,
}
if settings.output:
    settings.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {settings.output}")
