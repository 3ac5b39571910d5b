"""Prompts of 131,072 to 1,048,576 tokens on 1, 8 and 64 GPUs: times and bytes, computed from figures of one GPU.

    python examples/benchmarks/scale.py

The model is Llama-3.1-8B's shape. Attention is what an H200 took (results/prefill_attention_h200.json), the rest of the
model what an H100 took (results/time_to_first_token_h100.json). Longer prompts are extrapolated: dense attention and
the search with the square of the length, sparse attention in proportion to it, as between the two longest measured
ones. Links are at their nominal rates. So everything here is computed, and nothing overlaps.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).with_name("results")
LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, BLOCK, BYTES = 32, 32, 8, 128, 4096, 128, 2
NVLINK, NETWORK = 450e9, 50e9  # bytes a second into one GPU: NVLink of an H200, and 400 Gbit/s
LONGEST_MEASURED = 262_144


def contestants(file, part, length):
    """The medians in ms by name."""
    runs = json.loads((RESULTS / file).read_text("utf-8"))["parts"][part]["runs"]
    (run,) = (run for run in runs if run["length"] == length)
    return {name: of["median_ms"] for name, of in run["contestants"].items()}


@dataclass(frozen=True)
class Layer:
    """Milliseconds of one layer on one GPU."""

    rest: float
    dense: float
    search: float
    sparse: float


def layer_of(length):
    measured = contestants("prefill_attention_h200.json", "given densities", min(length, LONGEST_MEASURED))
    longer = length / min(length, LONGEST_MEASURED)
    stack = json.loads((RESULTS / "time_to_first_token_h100.json").read_text("utf-8"))
    whole = stack["by_length"]["131072"]["medians"]["flexprefill"]
    rest = (whole["whole_ms"] - whole["attention_ms"]) / stack["settings"]["layers"] / 131_072
    return Layer(
        rest * length,
        measured["own-dense"] * longer**2,
        measured["search"] * longer**2,
        (measured["lists"] + measured["attention-flash"]) * longer,
    )


def row(*cells):
    print("| " + " | ".join(map(str, cells)) + " |")


def table(*names):
    row(*names)
    print("|" + "---|" * len(names))


def ms(value):
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def amount(count):
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB" if count else "–"


def one_gpu(lengths):
    table(
        "tokens",
        "rest of a layer, ms",
        "dense, ms",
        "search, ms",
        "sparse, ms",
        "first token: dense",
        "flexprefill",
        "sooner by",
    )
    for length in lengths:
        layer = layer_of(length)
        dense, ours = (LAYERS * (layer.rest + part) / 1000 for part in (layer.dense, layer.search + layer.sparse))
        times = ms(layer.rest), ms(layer.dense), ms(layer.search), ms(layer.sparse)
        row(f"{length:,}", *times, f"{dense:,.1f} s", f"{ours:,.1f} s", f"{dense / ours:.1f}×")


@dataclass(frozen=True)
class Exchanged:
    """Bytes that one GPU receives in a layer: block means for the search, by NVLink, and by the network."""

    means: float = 0
    nvlink: float = 0
    network: float = 0

    @property
    def ms(self):
        return 1000 * (self.nvlink / NVLINK + self.network / NETWORK)


def summed(length, gpus):
    """Two sums over all GPUs, each twice round a ring."""
    return 4 * (gpus - 1) / gpus * length * HIDDEN * BYTES


def gathered(length, gpus, kv_heads):
    """The block means, and the keys and values, of the positions of other GPUs."""
    others = (gpus - 1) / gpus * length * kv_heads * HEAD_DIM * BYTES
    return others / BLOCK, 2 * others


def several(lengths):
    table(
        "GPUs", "tokens", "parallel", "compute, ms", "means", "by NVLink", "by network", "exchange, ms", "first token"
    )
    for length in lengths:
        layer = layer_of(length)
        whole = layer.rest + layer.search + layer.sparse
        means, keys = gathered(length, 8, KV_HEADS)
        all_means, all_keys = gathered(length, 64, KV_HEADS)
        own_means, own_keys = gathered(length, 8, KV_HEADS // 8)
        chunks = length / 8192
        filled = (chunks + 7) / chunks  # the first stage waits for nothing, the last for 7 chunks
        ways = {
            (8, "tensor"): (whole / 8, Exchanged(0, summed(length, 8))),
            (8, "context"): (whole / 8, Exchanged(means, means + keys)),
            (8, "pipeline"): (whole / 8 * filled, Exchanged(0, length * HIDDEN * BYTES / LAYERS)),
            (64, "context"): (whole / 64, Exchanged(all_means, 0, all_means + all_keys)),
            (64, "tensor 8 × context 8"): (
                whole / 64,
                Exchanged(own_means, summed(length / 8, 8), own_means + own_keys),
            ),
        }
        for (gpus, kind), (compute, sent) in ways.items():
            first = f"{LAYERS * (compute + sent.ms) / 1000:,.1f} s"
            received = map(amount, (sent.means, sent.nvlink, sent.network))
            row(gpus, f"{length:,}", kind, ms(compute), *received, ms(sent.ms), first)


def cache(lengths):
    table("tokens", "keys and values of all layers", "over 400 Gbit/s", "prefill on one GPU")
    for length in lengths:
        held, layer = LAYERS * length * KV_HEADS * 2 * HEAD_DIM * BYTES, layer_of(length)
        ours = LAYERS * (layer.rest + layer.search + layer.sparse) / 1000
        row(f"{length:,}", amount(held), f"{held / NETWORK:,.2f} s", f"{ours:,.1f} s")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--lengths", default="131072,262144,524288,1048576", help="by commas (default: %(default)s)")
lengths = [int(length) for length in parser.parse_args().lengths.split(",")]
for show in (one_gpu, several, cache):
    show(lengths)
    print()
