"""A benchmark's results: tables to read, lines to draw, and the file with every repeat."""

from __future__ import annotations

import dataclasses
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flexprefill.bench.contestants import DENSE, WHOLE
from flexprefill.bench.measure import LAYERS, Measurement, Run
from flexprefill.bench.settings import Settings
from flexprefill.plotting import TimeLine, token_label

WIDTH = 118
NAME_WIDTH, CELL_WIDTH = 23, 13
BOUNDS = {"matrix": "mat", "exponentials": "exp", "bytes": "mem"}
ABSENT = "–"
BY_THE_CLOCK = {"single_ms": "a single call on an idle GPU", "row_ms": f"one of {LAYERS} calls in a row"}


def describe_settings(settings: Settings) -> dict[str, Any]:
    """The settings that all lengths share, ready for JSON."""
    rule = settings.rule.to_dict()
    del rule["alpha"]  # each length has its own
    shared = {name: value for name, value in vars(settings).items() if name not in ("lengths", "densities")}
    names = {"device": str(settings.device), "dtype": str(settings.dtype).removeprefix("torch.")}
    return {**shared, **names, "only": list(settings.only), "rule": rule}


def heading(record: Mapping[str, Any]) -> str:
    """What is measured and on which machine, from the record's first fields."""
    machine, settings = record["machine"], record["settings"]
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    installed = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    rule = ", ".join(f"{name.replace('_', ' ')} {number}" for name, number in settings["rule"].items())
    return (
        f"{machine['name']}{driver}, {machine['threads']} CPU threads\n{installed}\n"
        f"B 1, {settings['heads']} query and {settings['kv_heads']} key heads, D {settings['head_dim']}, "
        f"{settings['dtype']}; up to {settings['repeats']} repeats, in turns\n{rule}"
    )


def row(run: Run) -> str:
    """One line on a length that is done."""
    start = f"{run.length:>9,} tokens"
    if run.density is None:
        return f"{start}  not measured: {next(iter(run.absent.values()))}"
    parts = [start, f"density {100 * run.density:.1f} %"]
    whole, dense = _whole(run), best_dense(run)
    parts += [f"{result.name} {format_ms(result.median_ms)} ms" for result in (whole, dense) if result]
    if whole and dense:
        parts.append(f"{dense.median_ms / whole.median_ms:.2f}×")
    if not (whole or dense):
        parts.append(f"{len(run.contestants)} of {len(run.contestants) + len(run.absent)} measured")
    return "  ".join(parts)


def tables(runs: Sequence[Run], names: Mapping[str, str], no_floors: str | None) -> str:
    """The times of all runs, the reached share of the floors, and what is missing. A row is a contestant.

    Args:
        runs: The lengths, in columns.
        names: What to call each contestant, in order.
        no_floors: Why there are no floors; None if there are.
    """
    header = _line("", [token_label(run.length) for run in runs])
    lines = [
        "median ms ± half of the range of the middle half of the repeats",
        header,
        _line("density", [_density(run) for run in runs]),
    ]
    lines += [_line(name, [_time_cell(run.contestants.get(key)) for run in runs]) for key, name in names.items()]
    lines += [*_speedups(runs), ""]

    for kind, title in BY_THE_CLOCK.items():
        clocked = [by_the_clock(run, kind) for run in runs]
        if any(run.contestants for run in clocked):
            lines += [f"{title}, by the wall clock: median ms ± the same", header]
            for key, name in names.items():
                if any(key in run.contestants for run in clocked):
                    lines.append(_line(name, [_time_cell(run.contestants.get(key)) for run in clocked]))
            lines += [*_speedups(clocked), ""]

    if no_floors:
        lines.append(f"no floors: {no_floors}")
    else:
        lines += ["part of the theoretical floor reached, bound by matrix work, exponentials or memory", header]
        for key, name in names.items():
            cells = [_floor_cell(run.contestants.get(key)) for run in runs]
            if set(cells) != {ABSENT}:
                lines.append(_line(name, cells))

    absent = _by_text(runs, names, lambda run, key: run.absent.get(key))
    notes = _by_text(runs, names, lambda run, key: run.contestants[key].note if key in run.contestants else None)
    for title, found in ((f"{ABSENT} not measured", absent), ("* eager, host time included; no graph", notes)):
        if found:
            lines += ["", title, *found]
    return "\n".join(lines)


def time_lines(runs: Sequence[Run], names: Mapping[str, str]) -> list[TimeLine]:
    """The medians as lines to draw. Contestants without any are left out."""
    lines = []
    for key, name in names.items():
        found = {run.length: run.contestants[key] for run in runs if key in run.contestants}
        if found:
            kind = next(iter(found.values())).kind
            lines.append(TimeLine(name, kind, {length: result.median_ms for length, result in found.items()}))
    return lines


def with_runs(record: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
    """The record and its runs, as they are written."""
    return {**record, "runs": [dataclasses.asdict(run) for run in runs]}


def best_dense(run: Run) -> Measurement | None:
    """The fastest dense contestant, if any was measured."""
    dense = [result for result in run.contestants.values() if result.kind == DENSE]
    return min(dense, key=lambda result: result.median_ms, default=None)


def half_range(series: Sequence[float]) -> float:
    """Half of the range of a series' middle half; 0 for one repeat. A stray repeat does not change it."""
    if len(series) == 1:
        return 0.0
    first, _, third = statistics.quantiles(series, n=4, method="inclusive")
    return (third - first) / 2


def format_ms(ms: float) -> str:
    """A time in three digits, with at most four decimals."""
    decimals = 0 if ms >= 100 else 1 if ms >= 10 else 2 if ms >= 1 else 3 if ms >= 0.1 else 4
    return f"{ms:,.{decimals}f}"


def _whole(run: Run) -> Measurement | None:
    return next((result for result in run.contestants.values() if result.kind == WHOLE), None)


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<{NAME_WIDTH}}" + "".join(f"{cell:>{CELL_WIDTH}}" for cell in cells)


def _density(run: Run) -> str:
    return ABSENT if run.density is None else f"{100 * run.density:.1f} %"


def _time_cell(result: Measurement | None) -> str:
    if result is None:
        return ABSENT
    spread = 100 * half_range(result.repeats_ms) / result.median_ms
    return f"{format_ms(result.median_ms)} ±{spread:.0f}%{'*' if result.note else ''}"


def _speedups(runs: Sequence[Run]) -> list[str]:
    """A line on how much faster the whole call is than the best dense attention, if both ran at some length."""
    pairs = [(_whole(run), best_dense(run)) for run in runs]
    cells = [f"{dense.median_ms / whole.median_ms:.2f}×" if whole and dense else ABSENT for whole, dense in pairs]
    return [] if set(cells) == {ABSENT} else [_line("faster than best dense", cells)]


def by_the_clock(run: Run, kind: str) -> Run:
    """The same run with the times of a kind of BY_THE_CLOCK."""
    clocked = {
        name: dataclasses.replace(result, note=None, median_ms=statistics.median(series), repeats_ms=series)
        for name, result in run.contestants.items()
        if (series := getattr(result, kind))
    }
    return dataclasses.replace(run, contestants=clocked)


def _floor_cell(result: Measurement | None) -> str:
    if result is None or result.reached is None or result.bound is None:
        return ABSENT
    return f"{100 * result.reached:.0f}% {BOUNDS[result.bound]}"


def _by_text(runs: Sequence[Run], names: Mapping[str, str], text_of: Callable[[Run, str], str | None]) -> list[str]:
    """Each contestant's texts, once each. The lengths are named unless a text is about all of them."""
    lines = []
    for key, name in names.items():
        about: dict[str, list[int]] = {}
        for run in runs:
            if text := text_of(run, key):
                about.setdefault(text, []).append(run.length)
        for text, lengths in about.items():
            where = "" if len(lengths) == len(runs) else f" ({', '.join(map(token_label, lengths))})"
            lines.append(textwrap.fill(f"{name}{where}: {text}", WIDTH, initial_indent="  ", subsequent_indent="    "))
    return lines
