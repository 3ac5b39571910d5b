"""The tables and lines that a benchmark prints."""

import re
from dataclasses import replace

import pytest

from flexprefill.bench import report
from flexprefill.bench.contestants import DENSE, PART, WHOLE
from flexprefill.bench.measure import Measurement, Run


def result(name, kind, ms, *, note=None, floor=(None, None, None)):
    series = [ms * share for share in (0.5, 0.9, 1.0, 1.1, 3.0)]
    timed = "eager" if note else "graph of 10"
    return Measurement(name, kind, timed, note, ms, min(series), max(series), series, *floor)


def test_the_tables_say_what_was_measured():
    names = {"scoring": "scoring", "whole": "prefill_attention", "slow": "SDPA", "fast": "FlashAttention-4"}
    short = {
        "scoring": result("scoring", PART, 0.0123, floor=(0.0061, "exponentials", 0.4959)),
        "whole": result("prefill_attention", WHOLE, 2.0),
        "slow": result("SDPA", DENSE, 9.0),
        "fast": result("FlashAttention-4", DENSE, 5.0, note="it waits"),
    }
    long = {"whole": short["whole"], "slow": result("SDPA", DENSE, 1234.5)}
    runs = [
        Run(4096, 0.5, 0.461, {"alpha": 0.5}, short, {}),
        Run(262144, 0.1, 0.0171, {"alpha": 0.5}, long, {"scoring": "out of memory", "fast": "out of memory"}),
    ]
    text = report.tables(runs, names, None)
    assert max(map(len, text.splitlines())) <= report.WIDTH
    cells = {line[: report.NAME_WIDTH].strip(): line[report.NAME_WIDTH :].split() for line in text.splitlines()}
    assert cells["density"] == ["46.1", "%", "1.7", "%"]
    assert cells["FlashAttention-4"] == ["5.00", "±10%*", "–"]
    assert cells["SDPA"] == ["9.00", "±10%", "1,234", "±10%"]
    assert cells["faster than best dense"] == ["2.50×", "617.25×"]
    assert re.search(r"^scoring +0\.0123 ±10% +–$", text, re.MULTILINE)
    assert re.search(r"^scoring +50% exp +–$", text, re.MULTILINE)
    assert "  scoring (256K): out of memory" in text and "  FlashAttention-4: it waits" not in text
    assert "  FlashAttention-4 (4K): it waits" in text
    assert "no floors: the driver is silent" in report.tables(runs, names, "the driver is silent")


@pytest.mark.parametrize(
    ("kind", "title"), [("single_ms", "a single call on an idle GPU"), ("row_ms", "one of 32 calls in a row")]
)
def test_times_by_the_clock_have_a_table_of_their_own(kind, title):
    names = {"whole": "prefill_attention", "fast": "FlashAttention-4"}
    whole = replace(result("prefill_attention", WHOLE, 2.0), **{kind: [3.0, 4.0, 5.0]})
    fast = replace(result("FlashAttention-4", DENSE, 5.0, note="it waits"), **{kind: [6.0, 6.0, 7.0]})
    runs = [
        Run(4096, 0.5, 0.461, {}, {"whole": whole, "fast": fast}, {}),
        Run(8192, 0.5, 0.461, {}, {"whole": replace(whole, **{kind: ()})}, {"fast": "out of memory"}),
    ]
    lines = report.tables(runs, names, "the driver is silent").splitlines()
    start = lines.index(f"{title}, by the wall clock: median ms ± the same")
    assert [line.split() for line in lines[start + 1 : start + 6]] == [
        ["4K", "8K"],
        ["prefill_attention", "4.00", "±12%", "–"],
        ["FlashAttention-4", "6.00", "±4%", "–"],
        ["faster", "than", "best", "dense", "1.50×", "–"],
        [],
    ]
    assert "wall clock" not in report.tables(runs[1:], names, "the driver is silent")


def test_a_line_on_a_length_compares_with_the_best_dense():
    run = Run(4096, 0.5, 0.461, {}, {"whole": result("prefill_attention", WHOLE, 2.0)}, {})
    assert "×" not in report.row(run)
    slow, fast = result("SDPA", DENSE, 9.0), result("FlashAttention-4", DENSE, 1.0)
    line = report.row(replace(run, contestants={**run.contestants, "slow": slow, "fast": fast}))
    assert line.split("  ")[-2:] == ["FlashAttention-4 1.00 ms", "0.50×"]


@pytest.mark.parametrize(
    "ms, text", [(1736.2, "1,736"), (18.85, "18.9"), (2.4, "2.40"), (0.155, "0.155"), (0.00234, "0.0023")]
)
def test_times_are_shown_with_three_digits(ms, text):
    assert report.format_ms(ms) == text


def test_the_spread_leaves_a_stray_repeat_alone():
    assert report.half_range([1.0, 2.0, 3.0, 4.0, 500.0]) == 1.0
    assert report.half_range([5.0]) == 0
