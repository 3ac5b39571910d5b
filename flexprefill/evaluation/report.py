"""The comparison's results: tables to read and points to draw."""

from __future__ import annotations

from collections.abc import Sequence

from flexprefill.evaluation.comparison import Cell
from flexprefill.evaluation.methods import DENSE
from flexprefill.evaluation.scoring import Difference, Share
from flexprefill.plotting import TradeOffPoint, token_label

ABSENT = "–"


def table(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """The cells of one length, as a header and a row for each method.

    Shares of exact answers are in per cent, with their 95 % confidence interval. The average is over tasks.
    """
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    header = ["method", "density", "mass", "average", *tasks, "ms"]
    rows = []
    for method in dict.fromkeys(cell.method for cell in cells):
        own = {cell.task: cell for cell in cells if cell.method == method}
        rows.append(
            [
                method,
                _percent(_mean([cell.density for cell in own.values()])),
                _percent(_mean([cell.recall for cell in own.values()])),
                _percent(average(list(own.values()))),
                *(_result(own.get(task)) for task in tasks),
                f"{1000 * _mean([cell.seconds for cell in own.values()]):.1f}",
            ]
        )
    return header, rows


def task_table(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """The cells of one task and length as a header and a row for each method, each beside dense attention.

    Intervals are of 95 %, Student's over the prompts.
    """
    dense = next((cell for cell in cells if cell.method == DENSE), None)
    header = ["method", "density", "mass", "loss", "loss over dense", "exact", "exact over dense", "s"]
    rows = [
        [
            cell.method,
            _percent(cell.density),
            _percent(cell.recall),
            ABSENT if cell.loss is None else f"{cell.loss:.3f}",
            _over(cell.losses, dense.losses if dense else (), 1, "+.3f"),
            _exact(cell),
            _over(cell.shares, dense.shares if dense else (), 100, "+.1f"),
            f"{cell.seconds:.2f}",
        ]
        for cell in cells
    ]
    return header, rows


def _exact(cell: Cell) -> str:
    """The share of exact answers. Those of one prompt depend on each other: the interval is over prompts."""
    if cell.share is None:
        return ""
    over_prompts = Difference.of(cell.shares, [0.0] * len(cell.shares)) if cell.shares else None
    if over_prompts is None or over_prompts.half is None:
        return str(cell.share)
    return f"{100 * cell.share.value:.1f} % ± {100 * over_prompts.half:.1f}"


def _over(ours: Sequence[float], dense: Sequence[float], factor: int, form: str) -> str:
    if not ours or len(ours) != len(dense) or ours is dense:
        return ""
    difference = Difference.of(ours, dense)
    mean = f"{factor * difference.mean:{form}}"
    return mean if difference.half is None else f"{mean} ± {factor * difference.half:{form[1:]}}"


def average(cells: Sequence[Cell]) -> float | None:
    """The share of exact answers, averaged over tasks; None if text is the only task."""
    shares = [cell.share.value for cell in cells if cell.share is not None]
    return _mean(shares) if shares else None


def accuracy_points(cells: Sequence[Cell]) -> list[TradeOffPoint]:
    """For each length and method its average accuracy in per cent, its density, and how sure the accuracy is.

    The interval is Wilson's, over all samples of the tasks together.
    """
    points = []
    for length, method in dict.fromkeys((cell.length, cell.method) for cell in cells):
        own = [c for c in cells if (c.length, c.method) == (length, method) and c.share is not None]
        if own:
            together = sum((cell.share for cell in own if cell.share), Share(0, 0))
            low, high = together.interval
            points.append(_point(own, "", 100 * together.value, (100 * low, 100 * high)))
    return points


def loss_points(cells: Sequence[Cell]) -> list[TradeOffPoint]:
    """For each task, length and method the loss over dense attention's in nats, and how sure it is (Student's)."""
    dense = {(cell.task, cell.length): cell for cell in cells if cell.method == DENSE}
    points = []
    for cell in sorted(cells, key=lambda cell: cell.length):
        beside = dense.get((cell.task, cell.length))
        if beside is not None and cell.losses and len(cell.losses) == len(beside.losses):
            over = Difference.of(cell.losses, beside.losses)
            half = over.half or 0.0
            points.append(_point([cell], cell.task, over.mean, (over.mean - half, over.mean + half)))
    return points


def _point(cells: Sequence[Cell], row: str, value: float, interval: tuple[float, float]) -> TradeOffPoint:
    length, method = cells[0].length, cells[0].method.split(" ")[0]
    density = _mean([cell.density for cell in cells])
    return TradeOffPoint(row, f"{token_label(length)} tokens", method, density, value, interval)


def _result(cell: Cell | None) -> str:
    if cell is None:
        return ABSENT
    if cell.share is None:
        return f"{cell.loss:.3f}"
    low, high = cell.share.interval
    return f"{100 * cell.share.value:.1f} ({100 * low:.0f}–{100 * high:.0f})"


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f} %"
