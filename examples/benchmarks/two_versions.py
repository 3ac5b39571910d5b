"""Two versions of flexprefill side by side: the same maps bit for bit, and their times, taken in turns in one run.

    git worktree add /tmp/before COMMIT
    python examples/benchmarks/two_versions.py --before /tmp/before

The other version's package is loaded under another name, so that both run in one process on one warm GPU.
"""

import argparse
import importlib
import json
import re
import statistics
import sys
import tempfile
from pathlib import Path

import torch

import flexprefill
from flexprefill.runtime.machine import describe_machine, versions

NAME = "flexprefill_before"
LENGTHS = (4096, 32768, 131072, 262144)


def load_other(folder):
    """The package of another checkout, imported as flexprefill_before, its operators renamed alike."""
    source, target = Path(folder) / "flexprefill", Path(tempfile.mkdtemp()) / NAME
    for path in source.rglob("*"):
        if path.suffix in (".py", ".html", ".css", ".js"):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text("utf-8")
            copy.write_text(re.sub(r"\bflexprefill\b(?!-)", NAME, text) if path.suffix == ".py" else text, "utf-8")
    sys.path.insert(0, str(target.parent))
    return importlib.import_module(NAME)


def make_inputs(length, device, seed=0):
    """bf16 query of 32 heads, key and value of 8, D 128; blocks stand out as in flexprefill bench."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    topics = normal(1, 8, length // 512 + 1, 128).repeat_interleave(512, 2)[:, :, :length]
    query = normal(1, 32, length, 128) + topics.repeat_interleave(4, 1)
    return query, normal(1, 8, length, 128) + topics, normal(1, 8, length, 128)


def time_in_turns(calls, repeats):
    """Device milliseconds of each call, runs taken in turns, after one that does not count."""
    times = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if turn:
                times[name].append(start.elapsed_time(end))
    return times


def calls_of(library, inputs, config, block_map):
    query, key, value = inputs
    settings = library.PrefillConfig(**config)
    own = library.BlockMap(block_map.words, block_map.q_len, block_map.kv_len, block_map.block_size)
    return {
        "search": lambda: library.search_blocks(query, key, settings),
        "lists": lambda: own.to_block_mask(),
        "attention": lambda: library.prefill_attention(query, key, value, settings, block_map=own),
        "whole": lambda: library.prefill_attention(query, key, value, settings),
    }


def captured(call):
    """Replays of a CUDA graph of a call: the device's work without the host's."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    return lambda: (graph.replay(), kept)


def compare(before, length, alpha, repeats):
    """One length: equal maps and outputs, and the medians of both versions."""
    inputs = make_inputs(length, "cuda")
    config = {"alpha": alpha, "dense_below": 0}
    maps = [library.search_blocks(*inputs[:2], library.PrefillConfig(**config)) for library in (before, flexprefill)]
    assert torch.equal(maps[0].words, maps[1].words), f"maps differ at {length}"
    outputs = [library.prefill_attention(*inputs, library.PrefillConfig(**config)) for library in (before, flexprefill)]
    assert torch.equal(*outputs), f"outputs differ at {length}"
    found = {"length": length, "density": maps[1].density().mean().item()}
    both = {
        name: calls_of(library, inputs, config, maps[1])
        for name, library in (("before", before), ("after", flexprefill))
    }
    for step in ("search", "lists", "attention", "whole"):
        times = time_in_turns({name: captured(calls[step]) for name, calls in both.items()}, repeats)
        medians = {name: statistics.median(runs) for name, runs in times.items()}
        found[step] = {
            **{
                name: {"median_ms": medians[name], "least_ms": min(runs), "most_ms": max(runs)}
                for name, runs in times.items()
            },
            "after_over_before": medians["after"] / medians["before"],
        }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="a checkout of the other version")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--alpha", type=float, default=0.12)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    before = load_other(arguments.before)
    rows = []
    for length in arguments.lengths:
        rows.append(compare(before, length, arguments.alpha, arguments.repeats))
        shown = "  ".join(
            f"{step} {rows[-1][step]['before']['median_ms']:.4g} → {rows[-1][step]['after']['median_ms']:.4g} ms "
            f"({100 * (rows[-1][step]['after_over_before'] - 1):+.1f} %)"
            for step in ("search", "lists", "attention", "whole")
        )
        print(f"{length:>7,} tokens, {100 * rows[-1]['density']:.1f} % kept, equal bit for bit: {shown}", flush=True)
    if arguments.output:
        record = {"machine": describe_machine(torch.device("cuda")), "versions": versions(), "rows": rows}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
