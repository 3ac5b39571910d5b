"""The sparsest setting by layer and head that costs a pretrained model at most so much loss.

Mass says which heads differ, tokens say how much is enough. Each head's kept mass is measured over a grid of alphas
first. One number, the recall that every head has to keep, then sets the alphas of all heads, and the model's own loss
over dense attention sets that number. One alpha for all heads is tried beside it, and so is the two-sided search with
one probe share. The sparsest of the three is taken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexprefill.config import PrefillConfig
from flexprefill.errors import FlexPrefillError, UnsupportedError
from flexprefill.evaluation.comparison import Cell, Plan, Subject, measure
from flexprefill.evaluation.methods import DENSE, Method, attend_densely
from flexprefill.evaluation.scoring import Difference
from flexprefill.inspection import attention_recall
from flexprefill.runtime.progress import Advance, ignore
from flexprefill.search.blocks import search_blocks
from flexprefill.variant.variant import PLAIN, AttentionVariant

LOG2_ALPHAS = tuple(-step / 2 for step in range(33))  # 1 to 2^-16
RECALLS = tuple(1 - 2.0 ** (-step / 2) for step in range(1, 25))  # 0.29 to 0.9998
PROBE_SHARES = tuple(2.0 ** (-step / 2) for step in range(4, 25))  # 0.25 to 2^-12
ROWS = 64  # of each head, evenly placed among those that may drop blocks


@dataclass
class RecallCurve:
    """One layer's dense attention, and what its heads keep at each alpha of a grid.

    Attributes:
        config: All settings but alpha.
        shares: float32 [len(LOG2_ALPHAS), Hq], the kept share of the mass, the least over the texts seen.
        group: Query heads that share a key head.
    """

    config: PrefillConfig
    shares: Tensor | None = None
    group: int = 1

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        variant: AttentionVariant = PLAIN,
    ) -> Tensor:
        if variant.sliding_window is None:
            self.group = query.shape[1] // key.shape[1]
            found = torch.stack([self._recall(query, key, scale, variant, alpha) for alpha in LOG2_ALPHAS])
            self.shares = found if self.shares is None else torch.minimum(self.shares, found)
        return attend_densely(query, key, value, scale, variant)

    def _recall(
        self, query: Tensor, key: Tensor, scale: float | None, variant: AttentionVariant, log2_alpha: float
    ) -> Tensor:
        config = replace(self.config, alpha=2.0**log2_alpha)
        block_map = search_blocks(query, key, config, variant=variant, scale=scale)
        # the same rows at each alpha: the recall then falls with alpha
        sparse = max(1, query.shape[2] - config.last_full_blocks * config.block_size)
        rows = range(0, sparse, max(1, sparse // ROWS))
        return attention_recall(query, key, block_map, variant=variant, scale=scale, rows=rows).mean[0]

    def config_for(self, recall: float) -> PrefillConfig:
        """The largest alpha of each head that keeps the recall, the least of the grid where none does."""
        if self.shares is None:  # a layer with a window, which is not searched
            return self.config
        enough = self.shares >= recall
        # of the largest alphas that keep enough with all smaller ones
        chosen = (~enough).flip(0).cumsum(0).flip(0).eq(0).int().argmax(0)
        chosen = torch.where(enough[-1], chosen, len(LOG2_ALPHAS) - 1)
        if self.config.mask_heads == "kv":
            chosen = chosen.unflatten(0, (-1, self.group)).amax(1).repeat_interleave(self.group)
        return replace(self.config, alpha=tuple(2.0 ** LOG2_ALPHAS[index] for index in chosen.tolist()))


@dataclass(frozen=True)
class Tried:
    """One setting and what it costs.

    Attributes:
        name: What sets the alphas or probe shares.
        configs: By layer.
        over_dense: By task, nats a graded token over dense attention.
        density: Kept share of the causal blocks, the mean of the tasks.
    """

    name: str
    configs: dict[int, PrefillConfig]
    over_dense: dict[str, Difference]
    density: float

    @property
    def worst(self) -> float:
        """The loss over dense attention on the task that loses most."""
        return max(difference.mean for difference in self.over_dense.values())


@dataclass(frozen=True)
class Calibrator:
    """What settings are tried on.

    Attributes:
        subject: The model with its prompts.
        plan: One length, the tasks and how many prompts of each; no methods.
        config: All settings but alpha. The two-sided search takes block size and mask_heads of it.
        advance: Called with 1 after each task of each setting.
    """

    subject: Subject
    plan: Plan
    config: PrefillConfig
    advance: Advance = ignore

    def curves(self) -> list[RecallCurve]:
        """What each layer's heads keep, on the first prompt of each task."""
        curves = [RecallCurve(self.config) for _ in range(self.subject.layers)]
        for task in self.plan.tasks:
            self.subject.answer(self.subject.prompt(self.plan.lengths[0], task, 0), curves)
            self.advance(1)
        return curves

    def dense(self) -> dict[str, Cell]:
        """Dense attention on each task."""
        return {task: self._cell(task, Method(DENSE, None)) for task in self.plan.tasks}

    def tried(self, name: str, configs: Sequence[PrefillConfig], dense: Mapping[str, Cell]) -> Tried:
        """One setting on each task, beside dense attention."""
        layers = dict(enumerate(configs))
        method = Method(name, self.config, layers=layers)
        cells = {task: self._cell(task, method) for task in self.plan.tasks}
        over = {task: Difference.of(cell.losses, dense[task].losses) for task, cell in cells.items()}
        density = sum(cell.density for cell in cells.values()) / len(cells)
        return Tried(name, layers, over, density)

    def _cell(self, task: str, method: Method) -> Cell:
        cell = measure(self.subject, self.plan, self.plan.lengths[0], task, method)
        self.advance(1)
        return cell


def calibrate_by_loss(
    calibrator: Calibrator, dense: Mapping[str, Cell], most: float, told: Callable[[Tried], object]
) -> Tried:
    """The sparsest setting found whose loss over dense attention is at most ``most`` on every task.

    Args:
        calibrator: The model, its prompts and the settings that stay.
        dense: What dense attention does on each task, of ``calibrator.dense``.
        most: Nats a graded token.
        told: Called with each setting that was tried.

    Raises:
        FlexPrefillError: Even the smallest alphas cost more.
    """
    curves = calibrator.curves()

    def by_recall(step: int) -> Tried:
        recall = RECALLS[step]
        return calibrator.tried(f"recall {recall:.4f}", [curve.config_for(recall) for curve in curves], dense)

    def by_alpha(step: int) -> Tried:
        config = replace(calibrator.config, alpha=2.0 ** LOG2_ALPHAS[step])
        return calibrator.tried(f"alpha {config.alpha:.3g}", [config] * len(curves), dense)

    def by_share(step: int) -> Tried:
        config = replace(
            PrefillConfig.recommended(),
            block_size=calibrator.config.block_size,
            mask_heads=calibrator.config.mask_heads,
            probe_share=PROBE_SHARES[step],
        )
        return calibrator.tried(f"two-sided, share {config.probe_share:.3g}", [config] * len(curves), dense)

    found = [
        _sparsest(most, len(steps), setting, told) for steps, setting in ((RECALLS, by_recall), (LOG2_ALPHAS, by_alpha))
    ]
    with contextlib.suppress(UnsupportedError):  # the model's attention is of a kind that only alphas know
        found.append(_sparsest(most, len(PROBE_SHARES), by_share, told))
    within = [tried for tried in found if tried.worst <= most]
    if not within:
        least = min(found, key=lambda tried: tried.worst)
        raise FlexPrefillError(
            f"--loss must be at least {1000 * least.worst:.1f} milli-nats for these prompts, got {1000 * most:g}: "
            f"so much costs {least.name}, the densest setting that was tried"
        )
    return min(within, key=lambda tried: tried.density)


def tries(plan: Plan) -> int:
    """How often ``advance`` is called at most."""
    bisections = sum(len(steps).bit_length() for steps in (RECALLS, LOG2_ALPHAS, PROBE_SHARES))
    return len(plan.tasks) * (4 + bisections)  # dense attention and the result on both sets of prompts, and the curves


def _sparsest(most: float, count: int, setting: Callable[[int], Tried], told: Callable[[Tried], object]) -> Tried:
    """The first of ``count`` settings, sparse to dense, that costs at most ``most``; the densest where none does."""
    low, high = 0, count
    within: Tried | None = None
    while low < high:
        middle = (low + high) // 2
        tried = setting(middle)
        told(tried)
        if tried.worst <= most:
            high, within = middle, tried
        else:
            low = middle + 1
    return within or tried
