"""The small model of our own as the subject of a comparison."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from flexprefill.evaluation.comparison import Answered
from flexprefill.evaluation.model import Decoder
from flexprefill.evaluation.scoring import ask, text_loss
from flexprefill.evaluation.tasks import TASKS, Samples
from flexprefill.evaluation.text import passages

TEXT = "text"  # next-token loss, beside the tasks


@dataclass(frozen=True)
class DecoderSubject:
    """A decoder, asked the tasks of bytes and words.

    Attributes:
        digest: a checksum of the model's file.
        text: uint8 [bytes] on the CPU, held out from the model's training.
        seed: of the prompts.
    """

    model: Decoder
    digest: int
    text: Tensor
    seed: int

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def layers(self) -> int:
        return len(self.model.layers)

    @property
    def heads(self) -> tuple[int, int]:
        return self.model.sizes.heads, self.model.sizes.kv_heads

    def identity(self) -> dict[str, str]:
        return {"model": f"{self.digest:08x}", "text": f"{zlib.crc32(self.text.numpy().data):08x}"}

    def prompt(self, length: int, task: str, number: int) -> Samples | Tensor:
        """A task's, or of text int64 [1, length]; the same on every device."""
        generator = prompt_generator(self.seed, length, task, number)
        if task == TEXT:
            return passages(self.text, generator, 1, length).to(self.device)
        return TASKS[task](generator, self.text, 1, length).to(self.device)

    def answer(self, prompt: Samples | Tensor, attenders: Sequence[Callable[..., Tensor]]) -> Answered:
        if isinstance(prompt, Samples):
            share = ask(self.model, prompt, attenders)
            return Answered(share.right, share.count, None)
        return Answered(0, 0, text_loss(self.model, prompt, attenders).mean().item())


def prompt_generator(seed: int, length: int, task: str, number: int) -> Generator:
    """What a prompt is drawn with: it depends on its own number alone, so that every method gets the same ones."""
    return Generator().manual_seed(zlib.crc32(f"{seed} {length} {task} {number}".encode()))
