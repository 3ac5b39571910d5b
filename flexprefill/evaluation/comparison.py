"""The comparison: every task, length and method on one model. An interrupted run goes on from its file."""

from __future__ import annotations

import dataclasses
import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flexprefill.errors import FlexPrefillError, UnsupportedError
from flexprefill.evaluation.methods import DENSE, Attender, Method
from flexprefill.evaluation.scoring import Share
from flexprefill.runtime.files import write_json
from flexprefill.runtime.machine import describe_machine, versions
from flexprefill.runtime.progress import Advance


@dataclass(frozen=True)
class Answered:
    """What a model did with one prompt.

    Attributes:
        right: How many answers were exact.
        asked: How many answers there were; 0 where nothing is asked.
        loss: Nats a graded token; None where none is measured.
    """

    right: int
    asked: int
    loss: float | None


class Subject(Protocol):
    """A model and the prompts that it is asked."""

    @property
    def device(self) -> torch.device: ...

    @property
    def layers(self) -> int:
        """How many layers attend."""
        ...

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and key heads of a layer."""
        ...

    def identity(self) -> dict[str, str]:
        """Checksums by name of what figures depend on besides the plan. A file of others is refused."""
        ...

    def prompt(self, length: int, task: str, number: int) -> Any:
        """A prompt on the model's device, by its number: the same for every method."""
        ...

    def answer(self, prompt: Any, attenders: Sequence[Callable[..., Tensor]]) -> Answered:
        """Asks the model with one attention for each layer."""
        ...


@dataclass(frozen=True)
class Cell:
    """What one method did at one task and length.

    Attributes:
        length: Tokens of a prompt.
        task: The task's name.
        method: The method's name.
        right: How many answers were exact; None where nothing is asked.
        samples: How many answers there were, or prompts where nothing is asked.
        loss: Nats a graded token, the mean over the prompts; None where none is measured.
        density: Kept share of one prompt's causal blocks, averaged over layers and heads; 1 for dense attention.
        recall: Kept share of its exact attention mass, averaged likewise; 1 for dense attention.
        lowest_recall: The least recall of any layer and head.
        seconds: For a prompt through the whole model, averaged, without the first prompt.
        losses: The loss of each prompt; empty where none is measured.
        shares: The share of exact answers of each prompt; empty where nothing is asked.
    """

    length: int
    task: str
    method: str
    right: int | None
    samples: int
    loss: float | None
    density: float
    recall: float
    lowest_recall: float
    seconds: float
    losses: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("losses", "shares"):  # lists as JSON has them
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def share(self) -> Share | None:
        return None if self.right is None else Share(self.right, self.samples)


@dataclass(frozen=True)
class Plan:
    """What is to be compared.

    Attributes:
        lengths: Tokens of a prompt.
        tasks: Names that the subject knows.
        methods: Ways to attend.
        samples: Prompts of each task and length, at least 1, the same for every method.
        seed: Seed of the prompts.
        least_share: A task is left to dense attention at a length where fewer of its answers are exact.
    """

    lengths: Sequence[int]
    tasks: Sequence[str]
    methods: Sequence[Method]
    samples: int
    seed: int
    least_share: float = 0.0

    @property
    def cells(self) -> list[tuple[int, str, Method]]:
        return [(length, task, method) for length in self.lengths for task in self.tasks for method in self.methods]


def compare(
    subject: Subject,
    plan: Plan,
    path: Path,
    advance: Advance,
    told: Callable[[Cell], object] = lambda cell: None,
    refused: Callable[[str], object] = lambda reason: None,
) -> list[Cell]:
    """Measures the plan's cells that the file does not hold yet, and adds them to it.

    Args:
        subject: The model that is asked, with its prompts.
        plan: What to compare.
        path: A JSON file, written whole after each cell.
        advance: Called with 1 after each cell.
        told: Called with each dense cell below the plan's least share. Its task and length have no other cells.
        refused: Called with the reason for each method that does not know this model's attention.

    Returns:
        All cells of the plan.

    Raises:
        FlexPrefillError: The file's cells were made with another model, text, seed or number of samples, or with other
            configs of a calibrated method's name.
        OSError: The file cannot be read or written.
    """
    identity = {
        **subject.identity(),
        "seed": plan.seed,
        "samples": plan.samples,
        "device": subject.device.type,
    }
    digests = {method.name: _digest(method) for method in plan.methods if method.layers}
    cells, digests_before = _read(path, identity, digests)
    machine = describe_machine(subject.device)
    beyond: set[tuple[int, str]] = set()
    without: set[str] = set()
    found = []
    for length, task, method in plan.cells:
        advance(1)
        if (length, task) in beyond or method.name in without:
            continue
        if (length, task, method.name) not in cells:
            try:
                cells[length, task, method.name] = measure(subject, plan, length, task, method)
            except UnsupportedError as error:  # of this model's attention: the others go on
                without.add(method.name)
                refused(str(error))
                continue
            record: dict[str, Any] = {"identity": identity, "configs": digests_before | digests}
            record |= {"machine": machine, "versions": versions()}
            record["cells"] = [dataclasses.asdict(cell) for cell in cells.values()]
            write_json(path, record)
        cell = cells[length, task, method.name]
        found.append(cell)
        if method.name == DENSE and cell.share is not None and cell.share.value < plan.least_share:
            beyond.add((length, task))
            told(cell)
    return found


def measure(subject: Subject, plan: Plan, length: int, task: str, method: Method) -> Cell:
    """One cell. Density and recall are those of a first prompt; then all prompts are asked and timed."""
    attenders = [Attender(method.of_layer(layer), watch=True) for layer in range(subject.layers)]
    answers: list[Answered] = []
    seconds = 0.0
    for number in range(-1, plan.samples):
        prompt = subject.prompt(length, task, max(number, 0))
        start = _now(subject.device)
        answered = subject.answer(prompt, attenders)
        if number < 0:
            for attender in attenders:
                attender.watch = False
            continue
        seconds += _now(subject.device) - start
        answers.append(answered)
    # dense attention, and layers that all methods attend exactly, keep everything
    densities = torch.cat([part.flatten() for attender in attenders for part in attender.densities] or [torch.ones(1)])
    recalls = torch.cat([part.flatten() for attender in attenders for part in attender.recalls] or [torch.ones(1)])
    asked = sum(answered.asked for answered in answers)
    losses = tuple(answered.loss for answered in answers if answered.loss is not None)
    return Cell(
        length=length,
        task=task,
        method=method.name,
        right=sum(answered.right for answered in answers) if asked else None,
        samples=asked or plan.samples,
        loss=sum(losses) / len(losses) if losses else None,
        density=densities.mean().item(),
        recall=recalls.mean().item(),
        lowest_recall=recalls.min().item(),
        seconds=seconds / plan.samples,
        losses=losses,
        shares=tuple(answered.right / answered.asked for answered in answers if answered.asked),
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _digest(method: Method) -> str:
    """A checksum of a calibrated method's configs."""
    settings = [(layer, config.to_dict()) for layer, config in sorted(method.layers.items())]
    return f"{zlib.crc32(json.dumps(settings).encode()):08x}"


def _read(
    path: Path, identity: dict[str, Any], digests: dict[str, str]
) -> tuple[dict[tuple[int, str, str], Cell], dict[str, str]]:
    """A file's cells, and the digests of its calibrated methods by name."""
    if not path.exists():
        return {}, {}
    try:
        record = json.loads(path.read_text("utf-8"))
        found = record["identity"]
        cells = [Cell(**cell) for cell in record["cells"]]
        before = dict(record.get("configs", {}))
    except (ValueError, KeyError, TypeError) as error:
        raise FlexPrefillError(f"{path} is no file of this comparison: {error!r}") from None
    if changed := [name for name in identity if found.get(name) != identity[name]]:
        raise FlexPrefillError(
            f"{path} was made with another {' and '.join(changed)}; give another folder, or delete the file"
        )
    measured = {cell.method for cell in cells}
    if stale := [name for name in digests if name in measured and before.get(name) != digests[name]]:
        raise FlexPrefillError(
            f"{path} has figures of {', '.join(stale)} from other configs; give another folder, or rename the config"
        )
    return {(cell.length, cell.task, cell.method): cell for cell in cells}, before
