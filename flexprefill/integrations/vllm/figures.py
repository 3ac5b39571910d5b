"""What went through the search in this process, for `report`, and the masks of a request that is recorded.

One thread writes both into the server's folder, a moment after they were noted. The thread that serves waits for
nothing.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexprefill.blockmap.geometry import Geometry, visible_blocks
from flexprefill.blockmap.map import BlockMap
from flexprefill.config import PrefillConfig
from flexprefill.integrations.vllm.planner import Prompt
from flexprefill.integrations.vllm.recording import RecordedPrompt, Served
from flexprefill.integrations.vllm.settings import FOLDER
from flexprefill.runtime.files import write_json
from flexprefill.runtime.state import remembered

logger = logging.getLogger("vllm.flexprefill")
QUIET = 0.2  # seconds after a note until it is written: a step's layers come one after the other
LOG_EVERY = 10.0  # seconds between lines in the log, as vLLM's own statistics
OPEN_ENDS = 4096  # prompts whose next chunk is waited for


@dataclass
class LayerFigures:
    """Sums over what a layer has served. ``kept`` is on the device: reading it waits."""

    requests: int = 0
    chunks: int = 0
    tokens: int = 0
    visible: int = 0
    kept: Tensor | int = 0
    ends: Counter[int] = field(default_factory=Counter)

    def add(self, prompt: Prompt, kept: BlockMap) -> None:
        """Counts a chunk. It begins a request unless it goes on where another chunk ended."""
        start = prompt.kv_len - prompt.q_len
        if start > 0 and self.ends[start] > 0:
            self.ends[start] -= 1
        else:
            self.requests += 1
        if len(self.ends) > OPEN_ENDS:
            self.ends.clear()
        self.ends[prompt.kv_len] += 1
        self.chunks += 1
        self.tokens += prompt.q_len
        self.visible += kept.shape[0] * kept.shape[1] * visible_in(kept.geometry)
        self.kept = self.kept + kept.counts().sum()


@remembered("visible blocks by sizes of prompts", most=256)
def visible_in(geometry: Geometry) -> int:
    """How many blocks the queries of one head see."""
    return int(visible_blocks(geometry, "cpu").sum(dtype=torch.int64))


class Figures:
    """Sums by layer, and the recording that was asked for, of one process."""

    def __init__(self, folder: Path | None, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self._layers: dict[int, LayerFigures] = {}
        self._recorded: RecordedPrompt | None = None
        self._lock = threading.Lock()
        self._noted = threading.Event()
        self._done: Any = None  # the CUDA event behind the last sum
        self._writing = threading.Lock()
        self._writer: threading.Thread | None = None
        self._said = 0.0

    def note(self, served: Served, kept: BlockMap, config: PrefillConfig) -> None:
        """Counts what a layer kept of a prompt. Waits for nothing, unless the prompt is recorded."""
        with self._lock:
            self._layers.setdefault(served.layer, LayerFigures()).add(served.prompt, kept)
            if self.folder is not None:
                self._recorded = RecordedPrompt.asked_for(self.folder, self._recorded)
                if self._recorded is not None:
                    self._recorded.note(served, kept, config)
            if kept.device.type == "cuda":
                self._done = torch.cuda.Event() if self._done is None else self._done
                self._done.record()
        if self.folder is None:
            return
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_on, name="flexprefill figures", daemon=True)
            self._writer.start()
        self._noted.set()

    def to_dict(self) -> dict[str, Any]:
        """The sums as plain numbers, ready for JSON. Waits for the device."""
        with self._lock:
            done = self._done
            layers = {
                str(number): {name: getattr(of, name) for name in ("requests", "chunks", "tokens", "visible", "kept")}
                for number, of in sorted(self._layers.items())
            }
        if done is not None:
            done.synchronize()  # without the lock, which the thread that serves takes
        return {number: sums | {"kept": int(sums["kept"])} for number, sums in layers.items()}

    def write(self) -> None:
        """Writes the sums, and the recorded masks, if there are any new ones."""
        if self.folder is None:
            return
        with self._writing:
            layers = self.to_dict()
            if layers:
                record = {"rank": self.rank, "layers": layers}
                write_json(self.folder / f"figures-{self.rank}-{os.getpid()}.json", record)
            if (recorded := self._recorded) is not None:
                recorded.write(self.rank)
        if self.rank == 0 and layers and time.monotonic() - self._said >= LOG_EVERY:
            self._said = time.monotonic()
            logger.info("flexprefill: %s", line_of(layers))

    def _write_on(self) -> None:
        while True:
            self._noted.wait()
            time.sleep(QUIET)
            self._noted.clear()
            try:
                self.write()
            except Exception as error:  # a full disk must not end the thread, and serving does not depend on it
                logger.warning("flexprefill could not write its figures: %s: %s", type(error).__name__, error)


def line_of(layers: dict[str, dict[str, int]]) -> str:
    """The sums in one line."""
    most = {name: max(of[name] for of in layers.values()) for name in ("requests", "chunks", "tokens")}
    kept, visible = (sum(of[name] for of in layers.values()) for name in ("kept", "visible"))
    return (
        f"{most['requests']} long prompts ({most['chunks']} chunks, {most['tokens']:,} tokens) went through "
        f"the search; {kept / max(visible, 1):.1%} of their blocks were kept"
    )


def figures(rank: int) -> Figures:
    """This process's figures, by its place in the tensor-parallel group and the server's folder."""
    return _figures_in(rank, os.environ.get(FOLDER, ""))


@remembered("what a process has served", most=8)
def _figures_in(rank: int, folder: str) -> Figures:
    if folder:
        os.makedirs(folder, exist_ok=True)
    return Figures(Path(folder) if folder else None, rank)
