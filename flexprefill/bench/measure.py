"""Measuring one length: all contestants that can run take turns on the same inputs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexprefill.bench.contestants import CONTESTANTS, PART, Contestant, ready
from flexprefill.bench.floors import Floor, Rates, floor_of
from flexprefill.bench.inputs import Case, make_case, make_qkv
from flexprefill.bench.settings import Settings
from flexprefill.bench.timing import Watch, by_the_clock, make_watch, reason, repeats_within_budget, take_turns
from flexprefill.errors import FlexPrefillError
from flexprefill.runtime.progress import stage

LONGEST_GRAPH = 16_384  # tokens; in longer prompts launches take little of the time
LAYERS = 32  # calls in a row, as in a model


@dataclass(frozen=True)
class Measurement:
    """One contestant at one length. Times are in milliseconds.

    Attributes:
        name: The name in tables and pictures.
        kind: "part", "whole" or "dense".
        timing: As in Watch.
        note: As in Watch.
        median_ms: Median of the repeats.
        min_ms: The shortest repeat.
        max_ms: The longest repeat.
        repeats_ms: All repeats.
        floor_ms: The floor's time; None if there is no floor.
        bound: As in Floor; None if there is no floor.
        reached: floor_ms over median_ms; None if there is no floor.
        single_ms: Repeats of a single call by the wall clock, on an idle GPU. None of parts, and on the CPU, where all
            times are by the wall clock.
        row_ms: The same of LAYERS calls in a row, each time divided by their number. Up to LONGEST_GRAPH tokens.
    """

    name: str
    kind: str
    timing: str
    note: str | None
    median_ms: float
    min_ms: float
    max_ms: float
    repeats_ms: Sequence[float]
    floor_ms: float | None
    bound: str | None
    reached: float | None
    single_ms: Sequence[float] = ()
    row_ms: Sequence[float] = ()


@dataclass(frozen=True)
class Run:
    """All contestants at one length.

    Attributes:
        length: Tokens.
        asked_density: The density that was asked for.
        density: The density that was reached, the mean over the heads; None if the inputs could not be made.
        config: The settings of the search; None if the inputs could not be made.
        contestants: Results by name.
        absent: Why other contestants have no result, by name.
    """

    length: int
    asked_density: float
    density: float | None
    config: dict[str, Any] | None
    contestants: dict[str, Measurement]
    absent: dict[str, str]


def measure_length(settings: Settings, length: int, density: float, rates: Rates | None) -> Run:
    """Times the chosen contestants at one length. Those that fail are absent, with the reason.

    Args:
        settings: What to measure.
        length: Tokens.
        density: The share of the causal blocks to keep.
        rates: The device's rates, for the floors. None: no floors.
    """
    chosen = {name: CONTESTANTS[settings.device.type][name] for name in settings.only}
    try:
        qkv = make_qkv(length, settings.heads, settings.kv_heads, settings.head_dim, settings.dtype, settings.device)
        case = make_case(qkv, density, settings.rule)
    except RuntimeError as error:  # out of memory, above all
        why = f"no inputs of this length: {reason(error)}"
        return Run(length, density, None, None, {}, dict.fromkeys(chosen, why))

    watches: dict[str, Watch] = {}
    repeats: dict[str, int] = {}
    absent: dict[str, str] = {}
    with stage(f"{length:,} tokens, first runs", len(chosen)) as advance:
        for name, contestant in chosen.items():
            try:
                call = ready(contestant, case)
                watch = make_watch(call, settings.device, graph=length <= LONGEST_GRAPH, eager=settings.eager)
                repeats[name] = repeats_within_budget(settings.repeats, watch, watch.measure())
                watches[name] = watch
            except FlexPrefillError as error:
                absent[name] = str(error)
            except Exception as error:
                absent[name] = reason(error)
            advance(1)
    clocks: dict[str, int] = {}
    if settings.device.type == "cuda":
        clocks = {"single_ms": 1, "row_ms": LAYERS} if length <= LONGEST_GRAPH else {"single_ms": 1}
    calls = [name for name in watches if chosen[name].kind != PART]
    turns = sum(repeats.values()) + len(clocks) * sum(repeats[name] for name in calls)
    with stage(f"{length:,} tokens, timing", turns) as advance:
        times, failed = take_turns(watches, repeats, advance)
        clocked = {
            kind: take_turns({name: by_the_clock(watches[name], count) for name in calls}, repeats, advance)[0]
            for kind, count in clocks.items()
        }
    results = {}
    for name, series in times.items():
        own = {kind: of_all[name] for kind, of_all in clocked.items() if name in of_all}
        results[name] = _result(chosen[name], case, watches[name], series, own, rates)
    found = case.block_map.density().mean().item()
    return Run(length, density, found, case.config.to_dict(), results, absent | failed)


def _result(
    contestant: Contestant,
    case: Case,
    watch: Watch,
    series: Sequence[float],
    clocked: Mapping[str, Sequence[float]],
    rates: Rates | None,
) -> Measurement:
    median = statistics.median(series)
    floor: Floor | None = None
    if rates is not None and contestant.work is not None:
        floor = floor_of(contestant.work(case), rates)
    return Measurement(
        name=contestant.name,
        kind=contestant.kind,
        timing=watch.timing,
        note=watch.note,
        median_ms=median,
        min_ms=min(series),
        max_ms=max(series),
        repeats_ms=series,
        floor_ms=None if floor is None else floor.ms,
        bound=None if floor is None else floor.bound,
        reached=None if floor is None else floor.ms / median,
        **clocked,
    )
