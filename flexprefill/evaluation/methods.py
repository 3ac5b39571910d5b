"""Ways to choose blocks: the attention that each gives the model, and what it keeps. All run on one engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

from flexprefill.attention.prefill import prefill_attention
from flexprefill.blockmap.geometry import Geometry, causal_blocks
from flexprefill.blockmap.map import BlockMap
from flexprefill.config import PrefillConfig
from flexprefill.evaluation.model import causal_sdpa
from flexprefill.inspection import attention_recall
from flexprefill.search.blocks import search_blocks
from flexprefill.search.grid import Grid
from flexprefill.search.reference import always_kept
from flexprefill.search.rule import Rule
from flexprefill.search.scorers import find_scorer
from flexprefill.variant.inputs import resolve_scale

RANDOM = "random"
EXACT = "exact"


@dataclass(frozen=True)
class Method:
    """A way to attend.

    Attributes:
        name: The name on the command line and in tables.
        config: Settings of the search; None is dense attention.
        chosen_by: Default: the blocks that the search keeps. Else each query block keeps as many blocks as the search
            keeps, beside the rule's sinks, window and last blocks those that the scorer of this name finds best.
            "random" draws them. "exact" takes the best blocks of all, without sinks, window and last blocks.
        layers: Configs of layers that have their own.
    """

    name: str
    config: PrefillConfig | None
    chosen_by: str | None = None
    layers: Mapping[int, PrefillConfig] = field(default_factory=dict, hash=False)

    def of_layer(self, layer: int) -> Method:
        """The method as one layer has it."""
        return replace(self, config=self.layers[layer]) if layer in self.layers else self

    def choose(self, query: Tensor, key: Tensor) -> BlockMap:
        """The blocks that it keeps: query [B, Hq, S, D] and key [B, Hkv, S, D] to a map [B, Hq, M, M].

        Raises:
            ValueError: The method is dense, or no scorer has its name.
        """
        if self.config is None:
            raise ValueError(f"{self.name} is dense and chooses no blocks")
        block_map = search_blocks(query, key, self.config)
        if self.chosen_by is None:
            return block_map
        return choose_as_many(query, key, block_map, self.config, self.chosen_by)


@dataclass
class Attender:
    """One layer's attention by a method, and what it kept in the watched calls.

    Attributes:
        method: The way to attend.
        watch: Whether calls are watched.
        rows: One row in so many is measured for the recall.
        densities: float32 [B, Hq] of each watched call, the kept share of the causal blocks.
        recalls: float32 [B, Hq] of each watched call, the kept share of the attention mass.
    """

    method: Method
    watch: bool = False
    rows: int = 101
    densities: list[Tensor] = field(default_factory=list)
    recalls: list[Tensor] = field(default_factory=list)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.method.config is None:
            return causal_sdpa(query, key, value)
        block_map = self.method.choose(query, key)
        if self.watch:
            length = query.shape[2]
            rows = range(min(37, length - 1), length, self.rows)
            self.densities.append(block_map.density().cpu())
            self.recalls.append(attention_recall(query, key, block_map, rows=rows).mean)
        return prefill_attention(query, key, value, self.method.config, block_map=block_map)


DENSE = "dense"
GUARD = 0.95
# each kind of method: what chooses its blocks, and how its config differs
KINDS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "flashprefill": (None, {}),
    "mean-correction": (None, {"mean_correction": True}),
    "guard": (None, {"guard": GUARD}),
    "xattention": ("xattention", {}),
    RANDOM: (RANDOM, {}),
    EXACT: (EXACT, {}),
}


def make_methods(
    alphas: Sequence[float],
    kinds: Sequence[str] = (DENSE, *KINDS),
    config: PrefillConfig = PrefillConfig(),
    calibrated: Mapping[str, Mapping[int, PrefillConfig]] | None = None,
) -> list[Method]:
    """Dense attention, and each kind of method at each alpha. All keep as many blocks as FlashPrefill does there.

    Args:
        alphas: The alphas of the search.
        kinds: Some of "dense", "flashprefill", "mean-correction", "guard", "xattention", "random" and "exact".
        config: All settings but alpha, mean_correction and guard.
        calibrated: Configs by layer, as PrefillConfig.load_layers gives them, by name.

    Raises:
        ValueError: A kind is unknown.
    """
    if unknown := [kind for kind in kinds if kind not in (DENSE, *KINDS)]:
        raise ValueError(f"kinds must be of {', '.join((DENSE, *KINDS))}, got {', '.join(map(repr, unknown))}")
    found = [Method(DENSE, None)] if DENSE in kinds else []
    for alpha in alphas:
        for kind, (chosen_by, changes) in KINDS.items():
            if kind in kinds:
                rule = replace(config, alpha=alpha, **changes)
                found.append(Method(f"{kind} {alpha:g}", rule, chosen_by))
    for name, layers in (calibrated or {}).items():
        found.append(Method(f"calibrated {name}", layers[min(layers)], layers=layers))
    return found


def choose_as_many(query: Tensor, key: Tensor, block_map: BlockMap, config: PrefillConfig, chosen_by: str) -> BlockMap:
    """As many blocks in each row as a map keeps there, chosen in another way; see Method.

    Args:
        query: [B, Hq, S, D].
        key: [B, Hkv, S, D].
        block_map: [B, Hq, M, N]. It keeps at least the config's sinks, window and last blocks.
        config: The settings of the search.
        chosen_by: As in Method.
    """
    device, geometry = query.device, Geometry(query.shape[2], key.shape[2], config.block_size)
    scale = resolve_scale(None, query.shape[3])
    if chosen_by == RANDOM:
        # one draw for the same lengths, whatever the model computes
        generator = Generator().manual_seed(geometry.q_len + geometry.kv_len)
        scores = torch.rand(block_map.shape, generator=generator).to(device)
    else:
        scorer = find_scorer(chosen_by)
        grid = Grid(geometry, scale, (scorer.score_rows or config.score_rows) == "visible")
        scores = scorer.log_scores(query, scorer.pool(key, config.block_size), grid)
    if chosen_by != EXACT:
        always = always_kept(geometry, Rule.of(config, scale=scale, last_chunk=True), device)
        scores = scores.masked_fill(always, torch.inf)
    scores = scores.masked_fill(~causal_blocks(geometry, device), -torch.inf)
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    keep = rank < block_map.counts()[..., None]
    return BlockMap.from_dense(keep, **geometry._asdict())
