"""Which of a model's answers are right, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flexprefill.evaluation.model import Attend, Decoder, causal_sdpa
from flexprefill.evaluation.tasks import Samples
from flexprefill.evaluation.vocabulary import FIRST_WORD

NORMAL_95 = 1.959963984540054  # the standard normal distribution's 97.5 % quantile


@dataclass(frozen=True)
class Share:
    """A share of samples that were right."""

    right: int
    count: int

    @property
    def value(self) -> float:
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % confidence interval."""
        n, p, z2 = self.count, self.value, NORMAL_95**2
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = NORMAL_95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))  # never crossing p by rounding

    def __add__(self, other: Share) -> Share:
        return Share(self.right + other.right, self.count + other.count)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % ({100 * low:.1f} – {100 * high:.1f})"


@dataclass(frozen=True)
class Difference:
    """A mean difference over the same prompts, and half of its 95 % confidence interval.

    Attributes:
        half: by Student's t; None of fewer than three prompts.
    """

    mean: float
    half: float | None

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Difference:
        """Ours less theirs, prompt by prompt."""
        each = [a - b for a, b in zip(ours, theirs, strict=True)]
        mean = sum(each) / len(each)
        if len(each) < 3:
            return cls(mean, None)
        spread = math.sqrt(sum((one - mean) ** 2 for one in each) / (len(each) - 1))
        return cls(mean, student_95(len(each) - 1) * spread / math.sqrt(len(each)))


def student_95(freedom: int) -> float:
    """Student's 97.5 % quantile from 2 degrees of freedom on, to 1 % (Abramowitz and Stegun, 26.7.5)."""
    z, n = NORMAL_95, freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n ** (power + 1) for power, term in enumerate(terms))


def states_at(states: Tensor, positions: Tensor) -> Tensor:
    """[B, S, width] and int64 [B, Q] to [B, Q, width]."""
    return states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))


def right_answers(logits: Tensor, answers: Tensor) -> Tensor:
    """Whether the likeliest words are those of the answer.

    Args:
        logits: [B, Q, vocabulary]. Tokens that are no words are left out.
        answers: int64 [B, Q, n].

    Returns:
        Bool [B, Q]. Logits that are not finite are wrong.
    """
    words = logits[..., FIRST_WORD:]
    likeliest = words.topk(answers.shape[-1], -1).indices + FIRST_WORD
    same = likeliest.sort(-1).values == answers.sort(-1).values
    return same.all(-1) & words.isfinite().all(-1)


def precision(device: torch.device) -> torch.autocast:
    """How the model is trained and asked: bfloat16 products over float32 states on CUDA, float32 on the CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.inference_mode()
def ask(model: Decoder, samples: Samples, attend: Attend | Sequence[Attend] = causal_sdpa) -> Share:
    """How many samples the model answers exactly, with every word of every question right."""
    with precision(samples.tokens.device):
        logits = model.logits(states_at(model(samples.tokens, attend), samples.positions))
    right = right_answers(logits, samples.answers).all(1)
    return Share(int(right.sum()), right.numel())


@torch.inference_mode()
def text_loss(model: Decoder, tokens: Tensor, attend: Attend | Sequence[Attend] = causal_sdpa) -> Tensor:
    """The mean next-token loss of each text in nats: int64 [B, S] to float32 [B]."""
    with precision(tokens.device):
        states = model(tokens, attend)
    rows = [cross_entropy(model.logits(row[:-1]), following[1:]) for row, following in zip(states, tokens, strict=True)]
    return torch.stack(rows)
