"""Progress on long work, for the commands."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def stage(name: str, steps: int) -> Iterator[Callable[[int], None]]:
    """Shows on stderr that a stage goes on: a bar with tqdm, else a line. Yields what to call as steps are done."""
    if importlib.util.find_spec("tqdm") is None:
        print(f"{name} …", file=sys.stderr, flush=True)
        yield lambda steps: None
        return
    from tqdm import tqdm

    with tqdm(total=steps, desc=name, leave=False, file=sys.stderr) as bar:
        yield bar.update
