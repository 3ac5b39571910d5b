"""Progress on long work, for the commands and for functions that take an argument ``progress``."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

Advance = Callable[[int], object]  # called with how many more steps are done
MOMENT = 0.5  # seconds; shorter work needs no bar


def stage(name: str, steps: int) -> AbstractContextManager[Advance]:
    """A stage of a long command: a bar in a terminal, else a line, so a log shows how far it came."""
    return _bar(name, steps) if _can_redraw() and _has_tqdm() else _line(name)


def terminal_stage(name: str, steps: int) -> AbstractContextManager[Advance]:
    """A stage of a mostly quick command: in a terminal a bar after a moment, else nothing."""
    return _bar(name, steps, delay=MOMENT) if _can_redraw() and _has_tqdm() else nullcontext(ignore)


def asked_stage(progress: bool | Advance | None, name: str, steps: int) -> AbstractContextManager[Advance]:
    """What a caller's argument ``progress`` asks for.

    True is a bar wherever stderr goes, or a line without tqdm. A function is called with the steps done. False and
    None are nothing.

    Raises:
        TypeError: It is none of these.
    """
    if progress is True:
        return _bar(name, steps) if _has_tqdm() else _line(name)
    if progress is None or progress is False:
        return nullcontext(ignore)
    if not callable(progress):
        raise TypeError(f"progress must be a bool, None or a function of the steps done, got {progress!r}")
    return nullcontext(progress)


def ignore(steps: int) -> None:
    """For whom no one watches."""


@contextlib.contextmanager
def _bar(name: str, steps: int, *, delay: float = 0) -> Iterator[Advance]:
    from tqdm import tqdm

    with tqdm(total=steps, desc=name, leave=False, file=sys.stderr, delay=delay) as bar:
        yield bar.update


def _line(name: str) -> AbstractContextManager[Advance]:
    print(f"{name} …", file=sys.stderr, flush=True)
    return nullcontext(ignore)


def _can_redraw() -> bool:
    """Whether stderr is a terminal in which a line can be written over."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _has_tqdm() -> bool:
    return importlib.util.find_spec("tqdm") is not None
