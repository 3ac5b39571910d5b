"""report and record_request: what a user asks of the processes that serve, by the server's folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexprefill.errors import FlexPrefillError
from flexprefill.integrations.vllm.settings import FOLDER
from flexprefill.runtime.files import check_path


@dataclass(frozen=True)
class Report:
    """What went through the search since the server started.

    Attributes:
        requests: Prompts. A chunk counts as a new one unless it begins where another one ended.
        chunks: Pieces in which they came. Each one was searched.
        tokens: Their tokens, without those of a cached prefix.
        density: The kept share of the blocks that the chunks' queries see, by layer.
    """

    requests: int
    chunks: int
    tokens: int
    density: dict[int, float]

    def __str__(self) -> str:
        if not self.requests:
            return "no prompt went through the search"
        lines = [f"{self.requests} prompts, {self.chunks} chunks, {self.tokens:,} tokens went through the search"]
        lines += [f"layer {layer}: {share:.1%} of the blocks kept" for layer, share in self.density.items()]
        return "\n".join(lines)


def report(folder: str | os.PathLike[str] | None = None) -> Report:
    """How many requests went through the search, and what each layer kept.

    The processes that serve write it into the server's folder, a fifth of a second after each step.

    Args:
        folder: The server's folder, which its log names. None: that of the server that this process started.

    Raises:
        FlexPrefillError: No server of this process is known.
    """
    path = folder_of(folder)
    by_rank: dict[int, dict[str, dict[str, int]]] = {}
    for file in sorted(path.glob("figures-*.json")):
        record: dict[str, Any] = json.loads(file.read_text("utf-8"))
        layers = by_rank.setdefault(record["rank"], {})
        for number, sums in record["layers"].items():  # of several engines or pipeline stages
            before = layers.get(number, {})
            layers[number] = {name: before.get(name, 0) + count for name, count in sums.items()}
    kept, visible = dict[int, int](), dict[int, int]()
    for layers in by_rank.values():  # each rank has its own heads
        for number, sums in layers.items():
            kept[int(number)] = kept.get(int(number), 0) + sums["kept"]
            visible[int(number)] = visible.get(int(number), 0) + sums["visible"]
    every = [sums for layers in by_rank.values() for sums in layers.values()]
    most = {name: max((sums[name] for sums in every), default=0) for name in ("requests", "chunks", "tokens")}
    density = {number: kept[number] / max(visible[number], 1) for number in sorted(kept)}
    return Report(density=density, **most)


def record_request(path: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None) -> Path:
    """Asks the server to record the masks of the next long prompt. ``flexprefill view`` opens the file.

    Ask, then send the request. The file appears with the prompt's first chunk and grows with each further one. With
    tensor parallelism each process writes its own heads: ``masks.safetensors``, ``masks-rank1.safetensors``, …

    Args:
        path: The file, on the server's machine. One that exists is replaced.
        folder: As in `report`.

    Returns:
        The file's absolute path.

    Raises:
        TypeError: ``path`` is no file name.
        FlexPrefillError: No server of this process is known.
    """
    from flexprefill.integrations.vllm.recording import ask  # imports torch

    check_path(path)
    target = Path(path).absolute()
    ask(folder_of(folder), target)
    return target


def folder_of(folder: str | os.PathLike[str] | None) -> Path:
    """The server's folder. Raises unless it is there."""
    named = os.environ.get(FOLDER) if folder is None else os.fspath(folder)
    if not named:
        raise FlexPrefillError(
            f"no server is known: pass the folder that its log names, or set {FOLDER} for the server and here"
        )
    if not os.path.isdir(named):
        raise FlexPrefillError(f"the server's folder {named} is not there")
    return Path(named)
