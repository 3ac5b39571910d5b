"""Ways to choose blocks, all on one engine: the attention that each gives the model, and what it keeps."""

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
        name: as it is asked for and printed.
        config: of the search; None is dense attention.
        layers: configs of layers that have their own.
        chosen_by: None keeps what the search keeps. Else each query block keeps as many blocks as the search kept, but
            others: those that a scorer of this name finds best, beside the rule's sinks, window and last blocks;
            "exact" is the best of all, and has no such blocks; "random" draws them.
    """

    name: str
    config: PrefillConfig | None
    chosen_by: str | None = None
    layers: Mapping[int, PrefillConfig] = field(default_factory=dict, hash=False)

    def of_layer(self, layer: int) -> Method:
        """The method as one layer has it."""
        return replace(self, config=self.layers[layer]) if layer in self.layers else self

    def choose(self, query: Tensor, key: Tensor) -> BlockMap:
        """The blocks that it keeps: query [B, Hq, S, D], key [B, Hkv, S, D] to a map [B, Hq, M, M].

        Raises:
            ValueError: it is dense, and keeps no blocks; or no scorer has this name.
        """
        if self.config is None:
            raise ValueError(f"{self.name} is dense and chooses no blocks")
        block_map = search_blocks(query, key, self.config)
        return (
            block_map if self.chosen_by is None else choose_as_many(query, key, block_map, self.config, self.chosen_by)
        )


@dataclass
class Attender:
    """One layer's attention by a method, and what it kept at the calls that it was told to watch.

    Attributes:
        rows: of which the recall is measured where ``watch`` is set; one in so many.
        densities, recalls: float32 [B, Hq] of each watched call: the kept share of the causal blocks, and of the mass.
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
# what each kind of method chooses by, and how its config differs
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
    """Dense attention, and each kind of method at each alpha: all keep as many blocks as FlashPrefill does there.

    Args:
        kinds: some of "dense", "flashprefill", "mean-correction", "guard", "xattention", "random" and "exact".
        config: all settings but alpha, mean_correction and guard.
        calibrated: by name, configs by layer, as PrefillConfig.load_layers gives them.

    Raises:
        ValueError: a kind that is none.
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
    """As many blocks in each row as a map keeps there, chosen otherwise; see :class:`Method`.

    Args:
        query: [B, Hq, S, D]; key: [B, Hkv, S, D].
        block_map: [B, Hq, M, N], which keeps at least the config's sinks, window and last blocks.
    """
    device, geometry = query.device, Geometry(query.shape[2], key.shape[2], config.block_size)
    scale = resolve_scale(None, query.shape[3])
    if chosen_by == RANDOM:
        # the same draw wherever the lengths are the same: a map depends on nothing that the model computes
        scores = torch.rand(block_map.shape, generator=Generator().manual_seed(geometry.q_len + geometry.kv_len)).to(
            device
        )
    else:
        scorer = find_scorer(chosen_by)
        first_key = (scorer.score_rows or config.score_rows) == "visible"
        grid = Grid(geometry, scale, first_key)
        scores = scorer.log_scores(query, scorer.pool(key, config.block_size), grid)
    if chosen_by != EXACT:
        always = always_kept(geometry, Rule.of(config, scale=scale, last_chunk=True), device)
        scores = scores.masked_fill(always, torch.inf)
    scores = scores.masked_fill(~causal_blocks(geometry, device), -torch.inf)
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    keep = rank < block_map.counts()[..., None]
    return BlockMap.from_dense(keep, **geometry._asdict())
