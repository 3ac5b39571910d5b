"""Progress on long work: of the commands, and of functions that take an argument ``progress``."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

Advance = Callable[[int], object]  # called with how many more steps are done
MOMENT = 0.5  # seconds; what takes less needs no bar


@contextlib.contextmanager
def stage(name: str, steps: int, *, delay: float = 0) -> Iterator[Advance]:
    """Shows on stderr that a stage goes on: a bar with tqdm, after ``delay`` seconds, else a line."""
    if not _has_tqdm():
        print(f"{name} …", file=sys.stderr, flush=True)
        yield ignore
        return
    from tqdm import tqdm

    with tqdm(total=steps, desc=name, leave=False, file=sys.stderr, delay=delay) as bar:
        yield bar.update


def terminal_stage(name: str, steps: int) -> AbstractContextManager[Advance]:
    """A stage of a command that is mostly quick: after a moment a bar, in a terminal that can redraw a line."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and _has_tqdm():
        return stage(name, steps, delay=MOMENT)
    return nullcontext(ignore)


def asked_stage(progress: bool | Advance | None, name: str, steps: int) -> AbstractContextManager[Advance]:
    """What a caller's argument ``progress`` asks for: a stage if it is True, else that function or nothing.

    Raises:
        TypeError: it is neither.
    """
    if progress is True:
        return stage(name, steps)
    if progress is None or progress is False:
        return nullcontext(ignore)
    if not callable(progress):
        raise TypeError(f"progress must be a bool, None or a function of the steps done, got {progress!r}")
    return nullcontext(progress)


def ignore(steps: int) -> None:
    """For whom no one watches."""


def _has_tqdm() -> bool:
    return importlib.util.find_spec("tqdm") is not None
