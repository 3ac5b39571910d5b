"""prefill_attention, search and lists included, against dense attention, on one GPU in one run of some minutes.

python examples/benchmarks/prefill_attention.py
python examples/benchmarks/prefill_attention.py --crossover

The first form measures the whole call at given densities and at those of FlashPrefill's published runs, by either
backend and by default, and short lengths a second time with the host's time included. The second one compares the
sparse call with dense attention from 1K to 24K tokens, by the device's time and by the wall clock, one by one and in a
row. `flexprefill.attention.backends.DENSE_BELOW` goes by the wall clock. It also times the first dense call of lengths
that are new: some kernels are compiled for each. Both print tables. --output keeps every repeat.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from flexprefill import BlockMap, PrefillConfig
from flexprefill.bench import report
from flexprefill.bench.contestants import CONTESTANTS
from flexprefill.bench.inputs import Case, make_qkv
from flexprefill.bench.measure import Run, measure_length
from flexprefill.bench.settings import DEFAULTS, Settings, default_density
from flexprefill.bench.timing import by_the_clock, make_watch
from flexprefill.runtime.machine import describe_machine, versions

WHOLES = ("prefill-attention", "prefill-triton", "prefill-flash")
CROSSING = ("prefill-triton", "prefill-flash", "two-sided-triton", "two-sided-flash")
PARTS = ("search", "lists", "attention-triton", "attention-flash")
DENSES = ("sdpa", "sdpa-flash", "sdpa-cudnn", "flash-attention-4", "own-dense")
GOALS = {4096: 0.47, 32768: 0.07, 131072: 0.025, 262144: 0.017}
PUBLISHED = {4096: 0.71, 8192: 0.458, 16384: 0.28, 32768: 0.16, 65536: 0.082, 131072: 0.045}
SHORT = (1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576)
NEW = range(900, 1000, 7)  # lengths whose first calls are timed
EAGER = (1024, 2048, 4096, 8192, 16384)  # beyond, launches are short against the work


class Part(NamedTuple):
    """One table of the run."""

    title: str
    densities: dict[int, float]
    only: tuple[str, ...]
    eager: bool = False
    dense_below: int | None = None


def parts_of(crossover: bool) -> list[Part]:
    if crossover:
        usual = {length: default_density("cuda", length) for length in SHORT}
        published = {length: PUBLISHED[min(PUBLISHED, key=lambda known: abs(known - length))] for length in SHORT}
        return [
            Part(name, densities, (*CROSSING, *DENSES), dense_below=0)
            for name, densities in (("usual densities", usual), ("published densities", published))
        ]
    short = {length: default_density("cuda", length) for length in EAGER}
    return [
        Part("given densities", GOALS, (*PARTS, *WHOLES, *DENSES)),
        Part("published densities", PUBLISHED, (*WHOLES, "flash-attention-4")),
        Part("host time included", short, (*WHOLES, *DENSES), eager=True),
    ]


def crossovers(runs: list[Run]) -> dict[str, dict[str, int | None]]:
    """By whole call and clock, the shortest length from which on it is never slower than the best dense attention."""
    clocks = {"device": runs} | {kind: [report.by_the_clock(run, kind) for run in runs] for kind in report.BY_THE_CLOCK}
    return {whole: {clock: first_sparse(clocked, whole) for clock, clocked in clocks.items()} for whole in CROSSING}


def first_sparse(runs: list[Run], whole: str) -> int | None:
    """The shortest length from which on the whole is never slower than the best dense attention."""
    found = None
    for run in sorted(runs, key=lambda run: run.length, reverse=True):
        dense = report.best_dense(run)
        if whole not in run.contestants or (dense and dense.median_ms < run.contestants[whole].median_ms):
            break
        found = run.length
    return found


def first_calls(name: str, device: torch.device) -> list[float]:
    """Milliseconds by the wall clock of a dense attention's first call of each new length, after one of another."""
    sizes = (DEFAULTS["cuda"][size] for size in ("heads", "kv_heads", "head_dim"))
    tensors = make_qkv(NEW.stop, *sizes, torch.bfloat16, device)
    times = []
    for length in (NEW.stop, *NEW):
        qkv = [tensor[:, :, :length].contiguous() for tensor in tensors]
        everything = BlockMap.causal(*qkv[0].shape[:2], q_len=length, kv_len=length, block_size=128, device=device)
        call = CONTESTANTS["cuda"][name].prepare(Case(*qkv, PrefillConfig(), everything))
        times.append(by_the_clock(make_watch(call, device, graph=False), 1).measure())
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crossover", action="store_true", help="look for the length from which sparse pays")
    parser.add_argument("--repeats", type=int, default=20, help="fewer where they take long (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a JSON file for every repeat (default: none)")
    arguments = parser.parse_args()
    command = f"python examples/benchmarks/prefill_attention.py{' --crossover' if arguments.crossover else ''}"
    usual = {name: DEFAULTS["cuda"][name] for name in ("heads", "kv_heads", "head_dim", "dtype")}

    device = torch.device("cuda")
    record: dict[str, Any] = {
        "command": command,
        "machine": describe_machine(device),
        "versions": versions(),
        "parts": {},
    }
    if arguments.crossover:
        print(f"\nthe first call of each of {len(NEW)} new lengths: median ms and the greatest")
        record["first_calls_ms"] = {name: first_calls(name, device) for name in DENSES}
        for name, times in record["first_calls_ms"].items():
            print(f"  {name:<18} {median(times):8.2f} {max(times):8.2f}", flush=True)
    for part in parts_of(arguments.crossover):
        only = [name for name in CONTESTANTS["cuda"] if name in part.only]
        rule = PrefillConfig(dense_below=part.dense_below)
        lengths, densities = list(part.densities), list(part.densities.values())
        settings = Settings(
            lengths,
            densities,
            **usual,
            rule=rule,
            repeats=arguments.repeats,
            device=device,
            only=only,
            eager=part.eager,
        )
        runs: list[Run] = []
        print(f"\n{part.title}\n", flush=True)
        for length, density in part.densities.items():
            with torch.no_grad():
                runs.append(measure_length(settings, length, density, None))
            print(report.row(runs[-1]), flush=True)
        names = {name: CONTESTANTS["cuda"][name].name for name in only}
        print("", report.tables(runs, names, "flexprefill bench has them"), sep="\n", flush=True)
        table = {"settings": report.describe_settings(settings), "runs": [dataclasses.asdict(run) for run in runs]}
        if arguments.crossover:
            table["first_sparse"] = crossovers(runs)
        record["parts"][part.title] = table
        if arguments.output:
            arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.crossover:
        print("\nshortest length from which on sparse is never slower than the best dense attention")
        for title, table in record["parts"].items():
            for whole, by_clock in table["first_sparse"].items():
                print(f"  {title:<22} {whole:<18} {by_clock}")
    if arguments.output:
        print(f"\nfigures  {arguments.output}")


if __name__ == "__main__":
    main()
