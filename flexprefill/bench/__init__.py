"""The benchmark: the parts of prefill_attention, the whole call and dense attention, on the same inputs."""

from __future__ import annotations

import contextlib
import datetime
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flexprefill.bench import report
from flexprefill.bench.contestants import CONTESTANTS
from flexprefill.bench.floors import Rates, read_rates
from flexprefill.bench.measure import Run, measure_length
from flexprefill.bench.settings import Settings
from flexprefill.errors import FlexPrefillError
from flexprefill.plotting import plot_times
from flexprefill.runtime.files import write_json
from flexprefill.runtime.machine import describe_machine, versions


def run(settings: Settings, output: Path, command: str) -> None:
    """Measures every length, prints the tables, and writes bench.json and, with matplotlib, bench.png.

    Progress goes to stderr. bench.json is rewritten after each length. A run that is broken off keeps the lengths that
    are done, and makes their tables and picture.

    Args:
        settings: What to measure.
        output: An existing folder.
        command: The command that was run, for the record.

    Raises:
        OSError: A file cannot be written.
    """
    names = {name: CONTESTANTS[settings.device.type][name].name for name in settings.only}
    rates: Rates | None = None
    no_floors: str | None = None
    try:
        rates = read_rates(settings.device)
    except FlexPrefillError as error:
        no_floors = str(error)
    record: dict[str, Any] = {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(settings.device),
        "rates": rates and asdict(rates),
        "no_floors": no_floors,
        "versions": versions(),
        "settings": report.describe_settings(settings),
    }
    print(report.heading(record), end="\n\n", flush=True)

    runs: list[Run] = []
    on_device = torch.cuda.device(settings.device) if settings.device.type == "cuda" else contextlib.nullcontext()
    try:
        with torch.no_grad(), on_device:
            for length, density in zip(settings.lengths, settings.densities, strict=True):
                runs.append(measure_length(settings, length, density, rates))
                write_json(output / "bench.json", report.with_runs(record, runs))
                print(report.row(runs[-1]), flush=True)
    finally:
        if runs:
            print("", report.tables(runs, names, no_floors), "", sep="\n")
            print(f"figures  {output / 'bench.json'}\npicture  {_draw(runs, names, output / 'bench.png', record)}")


def _draw(runs: list[Run], names: dict[str, str], path: Path, record: dict[str, Any]) -> str:
    """Draws the times. Returns the picture's path, or why there is none."""
    lines = report.time_lines(runs, names)
    if not lines:
        return "skipped: nothing was measured"
    settings = record["settings"]
    title = (
        f"{record['machine']['name']}, {settings['dtype']}, {settings['heads']} query and {settings['kv_heads']} "
        f"key heads, D {settings['head_dim']}"
    )
    try:
        plot_times(lines, path, title=title)
    except FlexPrefillError as error:
        return f"skipped: {error}"
    return str(path)
