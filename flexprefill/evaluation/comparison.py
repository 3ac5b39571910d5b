"""The comparison: every task, length and method on one model. An interrupted run goes on from its file."""

from __future__ import annotations

import dataclasses
import json
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from flexprefill.errors import FlexPrefillError
from flexprefill.evaluation.methods import Attender, Method
from flexprefill.evaluation.model import Decoder
from flexprefill.evaluation.scoring import Share, ask, text_loss
from flexprefill.evaluation.tasks import TASKS, Samples
from flexprefill.evaluation.text import passages
from flexprefill.runtime.files import whole_file, write_at
from flexprefill.runtime.machine import describe_machine, versions
from flexprefill.runtime.progress import Advance

TEXT = "text"  # next-token loss, beside the tasks


@dataclass(frozen=True)
class Cell:
    """What one method did at one task and length.

    Attributes:
        length: Tokens of a prompt.
        task: The task's name, or "text".
        method: The method's name.
        right: How many samples were answered exactly; None for text.
        samples: How many samples there were.
        loss: Nats a byte of text; None for tasks.
        density: Kept share of one sample's causal blocks, averaged over layers and heads; 1 for dense attention.
        recall: Kept share of its exact attention mass, averaged likewise; 1 for dense attention.
        lowest_recall: The least recall of any layer and head.
        seconds: For a prompt through the whole model, averaged, without the first prompt.
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

    @property
    def share(self) -> Share | None:
        return None if self.right is None else Share(self.right, self.samples)


@dataclass(frozen=True)
class Plan:
    """What is to be compared.

    Attributes:
        lengths: Tokens of a prompt.
        tasks: Names in TASKS, or "text".
        methods: Ways to attend.
        samples: Prompts of each task and length, at least 2, the same for every method.
        seed: Seed of the prompts.
    """

    lengths: Sequence[int]
    tasks: Sequence[str]
    methods: Sequence[Method]
    samples: int
    seed: int

    @property
    def cells(self) -> list[tuple[int, str, Method]]:
        return [(length, task, method) for length in self.lengths for task in self.tasks for method in self.methods]


def compare(model: Decoder, model_digest: int, text: Tensor, plan: Plan, path: Path, advance: Advance) -> list[Cell]:
    """Measures the plan's cells that the file does not hold yet, and adds them to it.

    Args:
        model: The model that is asked.
        model_digest: A checksum of the model's file.
        text: uint8 [bytes] on the CPU, held out from the model's training.
        plan: What to compare.
        path: A JSON file, written whole after each cell.
        advance: Called with 1 after each cell.

    Returns:
        All cells of the plan.

    Raises:
        FlexPrefillError: The file's cells were made with another model, text, seed or number of samples, or with other
            configs of a calibrated method's name.
        OSError: The file cannot be read or written.
    """
    identity = {
        "model": f"{model_digest:08x}",
        "text": f"{zlib.crc32(text.numpy().data):08x}",
        "seed": plan.seed,
        "samples": plan.samples,
        "device": next(model.parameters()).device.type,
    }
    digests = {method.name: _digest(method) for method in plan.methods if method.layers}
    cells, digests_before = _read(path, identity, digests)
    machine = describe_machine(next(model.parameters()).device)
    for length, task, method in plan.cells:
        if (length, task, method.name) not in cells:
            cell = measure(model, text, plan, length, task, method)
            cells[length, task, method.name] = cell
            record: dict[str, Any] = {"identity": identity, "configs": digests_before | digests}
            record |= {"machine": machine, "versions": versions()}
            record["cells"] = [dataclasses.asdict(cell) for cell in cells.values()]
            with whole_file(path) as file:
                write_at(file, (json.dumps(record, indent=1) + "\n").encode(), 0)
        advance(1)
    return [cells[length, task, method.name] for length, task, method in plan.cells]


def measure(model: Decoder, text: Tensor, plan: Plan, length: int, task: str, method: Method) -> Cell:
    """One cell. Density and recall are those of a first prompt; then all prompts are asked and timed."""
    device = next(model.parameters()).device
    attenders = [Attender(method.of_layer(layer), watch=True) for layer in range(len(model.layers))]
    right, losses, seconds = Share(0, 0), [], 0.0
    for number in range(-1, plan.samples):
        # a prompt depends only on its number, so every method gets the same prompts
        prompt = make_prompt(text, plan.seed, length, task, max(number, 0), device)
        start = _now(device)
        if isinstance(prompt, Samples):
            share, loss = ask(model, prompt, attenders), None
        else:
            share, loss = None, text_loss(model, prompt, attenders).mean().item()
        if number < 0:
            for attender in attenders:
                attender.watch = False
            continue
        seconds += _now(device) - start
        right = right + share if share else right
        losses += [] if loss is None else [loss]
    dense = method.config is None
    densities = torch.ones(1) if dense else torch.cat([attender.densities[0] for attender in attenders])
    recalls = torch.ones(1) if dense else torch.cat([attender.recalls[0] for attender in attenders])
    return Cell(
        length=length,
        task=task,
        method=method.name,
        right=None if task == TEXT else right.right,
        samples=plan.samples,
        loss=sum(losses) / len(losses) if losses else None,
        density=densities.mean().item(),
        recall=recalls.mean().item(),
        lowest_recall=recalls.min().item(),
        seconds=seconds / plan.samples,
    )


def make_prompt(text: Tensor, seed: int, length: int, task: str, number: int, device: torch.device) -> Samples | Tensor:
    """The prompt of a number: a task's samples, or text as int64 [1, length]. It is the same on every device."""
    generator = Generator().manual_seed(zlib.crc32(f"{seed} {length} {task} {number}".encode()))
    if task == TEXT:
        return passages(text, generator, 1, length).to(device)
    return TASKS[task](generator, text, 1, length).to(device)


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
