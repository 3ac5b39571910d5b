"""How a call is timed: in a CUDA graph, by events, or by the wall clock. Several calls take turns."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flexprefill.errors import FlexPrefillError
from flexprefill.runtime.capturing import end_broken_capture, occupy_device
from flexprefill.runtime.progress import Advance, ignore

GRAPH_CALLS = 10  # calls in a row in a graph
WARM_UPS = 3
LEAD_CYCLES = 5_000_000  # some 2.5 ms, so that the host gets ahead of the device
BUDGET_MS = 3000.0  # of each contestant at each length
MIN_REPEATS = 3

TimedCall = Callable[[], Any]


@dataclass(frozen=True)
class Watch:
    """One call, ready to be timed.

    Attributes:
        timing: How it is timed. The device's time alone: "graph of N" (N calls in a CUDA graph, divided by N) or
            "events" (around one call, with the host ahead). Host time included: "eager" (events around one call). By
            the wall clock: "wall clock" on the CPU, "single call" and "row of N" calls on CUDA.
        call: What is timed. It is kept here because a graph does not keep the tensors that it reads.
        measure: Times once and returns the milliseconds of one call.
        calls: How many calls a measurement makes.
        note: Why no graph could be captured, where "eager" was not asked for.
    """

    timing: str
    call: TimedCall
    measure: Callable[[], float]
    calls: int = 1
    note: str | None = None


def make_watch(call: TimedCall, device: torch.device, *, graph: bool, eager: bool = False) -> Watch:
    """The watch for a call that has run at least once, on the current CUDA device or the CPU.

    Args:
        call: What to time.
        device: Where it runs.
        graph: On CUDA, captures the call. A call that cannot be captured is timed eagerly.
        eager: On CUDA, times the call eagerly in any case.
    """
    if device.type == "cpu":
        return Watch("wall clock", call, lambda: _wall_ms(call))
    if eager:
        return Watch("eager", call, lambda: _eager_ms(call))
    if not graph:
        return Watch("events", call, lambda: _device_ms(call))
    try:
        captured = _capture(call)
    except Exception as error:
        # a failed capture reports its end; the cause is the error before
        return Watch("eager", call, lambda: _eager_ms(call), note=reason(error.__context__ or error))
    return Watch(f"graph of {GRAPH_CALLS}", call, lambda: _device_ms(captured.replay) / GRAPH_CALLS, GRAPH_CALLS)


def by_the_clock(watch: Watch, calls: int) -> Watch:
    """So many of the same call in a row by the wall clock, on an idle CUDA device: until the device is done."""
    name = "single call" if calls == 1 else f"row of {calls}"
    return Watch(name, watch.call, lambda: _clock_ms(watch.call, calls), calls)


def repeats_within_budget(repeats: int, watch: Watch, ms: float) -> int:
    """How often to measure a call of ``ms``: ``repeats``, or as often as the budget allows, but at least 3 times."""
    return min(repeats, max(MIN_REPEATS, int(BUDGET_MS / max(ms * watch.calls, 1e-6))))


def take_turns(
    watches: Mapping[str, Watch], repeats: Mapping[str, int], advance: Advance
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Measures each call as often as ``repeats`` says, one of each in a round.

    Returns:
        The milliseconds of each repeat of the calls that ran, and why the others failed.
    """
    times: dict[str, list[float]] = {name: [] for name in watches}
    failed: dict[str, str] = {}
    for turn in range(max(repeats.values(), default=0)):
        for name, watch in watches.items():
            if turn >= repeats[name] or name in failed:
                continue
            try:
                times[name].append(watch.measure())
            except Exception as error:
                failed[name] = reason(error)
            advance(1)
    return {name: series for name, series in times.items() if name not in failed}, failed


def time_in_turns(
    calls: Mapping[str, TimedCall], device: torch.device, repeats: int, *, graph: bool, advance: Advance = ignore
) -> dict[str, list[float]]:
    """Milliseconds of every repeat of each call, behind WARM_UPS others. None of the calls may fail.

    Args:
        calls: What to time, by name.
        device: Where they run.
        repeats: How often.
        graph: On CUDA, captures the calls.
        advance: Called behind each measurement, the warm-ups too.
    """
    for call in calls.values():
        call()
    watches = {name: make_watch(call, device, graph=graph) for name, call in calls.items()}
    for name, watch in watches.items():
        if watch.note is not None:
            warnings.warn(
                f"{name} is timed with the host's time in it, because no graph holds it: {watch.note}", stacklevel=2
            )
    times, failed = take_turns(watches, dict.fromkeys(watches, WARM_UPS + repeats), advance)
    assert not failed, failed
    return {name: series[WARM_UPS:] for name, series in times.items()}


def reason(error: BaseException, *details: str) -> str:
    """An error in one line: the start of its message and details, and its kind unless it is a plain refusal."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join([*lines[:2], *details])[:300]
    return text if isinstance(error, (FlexPrefillError, ImportError, ValueError)) else f"{type(error).__name__}: {text}"


def _wall_ms(call: TimedCall) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _clock_ms(call: TimedCall, calls: int) -> float:
    def and_wait() -> None:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return _wall_ms(and_wait) / calls


def _device_ms(call: TimedCall) -> float:
    """Events around a call. The device reaches it only when all of it is enqueued."""
    occupy_device(LEAD_CYCLES)
    return _events_ms(call)


def _eager_ms(call: TimedCall) -> float:
    torch.cuda.synchronize()
    return _events_ms(call)


def _events_ms(call: TimedCall) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _capture(call: TimedCall) -> torch.cuda.CUDAGraph:
    """A graph of GRAPH_CALLS calls in a row.

    Raises:
        Exception: The call cannot be captured. The device stays usable.
    """
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side), _refusing_waits():
        for _ in range(WARM_UPS):
            call()
    current.wait_stream(side)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=side):
            for _ in range(GRAPH_CALLS):
                call()
    except BaseException:
        torch.cuda.set_stream(current)
        end_broken_capture(pool)
        torch.cuda.synchronize()
        raise
    return graph


@contextlib.contextmanager
def _refusing_waits() -> Iterator[None]:
    """PyTorch's calls that wait for the device raise here, instead of breaking a capture off later."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
