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
from flexprefill.errors import UnsupportedError
from flexprefill.evaluation.model import causal_sdpa
from flexprefill.evaluation.selections import SELECTIONS
from flexprefill.inspection import attention_recall
from flexprefill.integrations.exact import attend_exactly
from flexprefill.search.blocks import search_blocks
from flexprefill.search.grid import Grid
from flexprefill.search.reference import always_kept
from flexprefill.search.rule import Rule
from flexprefill.search.scorers import find_scorer
from flexprefill.variant.inputs import resolve_scale
from flexprefill.variant.variant import PLAIN, AttentionVariant

RANDOM = "random"
EXACT = "exact"


@dataclass(frozen=True)
class Method:
    """A way to attend.

    Attributes:
        name: The name on the command line and in tables.
        config: Settings of the search; None is dense attention.
        chosen_by: Default: the blocks that the search keeps. Else each query block keeps as many blocks as the search
            keeps, beside the rule's sinks, window and last blocks those that the selection or scorer of this name finds
            best. "random" draws them. "exact" takes the best blocks of all, without sinks, window and last blocks.
        layers: Configs of layers that have their own.
        own_rule: Keeps what that selection keeps by its own rule, however many blocks these are.
    """

    name: str
    config: PrefillConfig | None
    chosen_by: str | None = None
    layers: Mapping[int, PrefillConfig] = field(default_factory=dict, hash=False)
    own_rule: bool = False

    def of_layer(self, layer: int) -> Method:
        """The method as one layer has it."""
        return replace(self, config=self.layers[layer]) if layer in self.layers else self

    def choose(
        self, query: Tensor, key: Tensor, scale: float | None = None, variant: AttentionVariant = PLAIN
    ) -> BlockMap:
        """The blocks that it keeps: query [B, Hq, S, D], key [B, Hkv, S, D] to a map [B, Hq, M, M].

        Raises:
            ValueError: The method is dense, or no selection or scorer has its name.
            UnsupportedError: The selection does not know what the attention is besides causal.
        """
        if self.config is None:
            raise ValueError(f"{self.name} is dense and chooses no blocks")
        grid = Grid(
            Geometry(query.shape[2], key.shape[2], self.config.block_size),
            resolve_scale(scale, query.shape[3]),
            first_key=True,
            variant=variant,
        )
        unknown = self.chosen_by if self.chosen_by not in (None, RANDOM, EXACT) and variant != PLAIN else None
        if variant.changes_search:
            unknown = unknown or ("the two-sided search" if self.config.two_sided else None)
            unknown = unknown or ("mean correction" if self.config.mean_correction else None)
            unknown = unknown or ("the guard" if self.config.guard is not None else None)
        if unknown:
            raise UnsupportedError(
                f"methods must be without {self.name} for this model, whose soft caps or sinks {unknown} does not know"
            )
        if self.own_rule:
            keep = SELECTIONS[str(self.chosen_by)].keep(query, key, grid)
            return BlockMap.from_dense(keep, **grid.geometry._asdict())
        block_map = search_blocks(query, key, self.config, variant=variant, scale=scale)
        return block_map if self.chosen_by is None else as_many(query, key, block_map, grid, self)


def attend_densely(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, variant: AttentionVariant = PLAIN
) -> Tensor:
    """Attention over all keys that the variant shows: by SDPA where it is plain."""
    if variant == PLAIN:
        return causal_sdpa(query, key, value, scale)
    return attend_exactly(query, key, value, resolve_scale(scale, query.shape[3]), variant)


@dataclass
class Attender:
    """One layer's attention by a method, and what it kept in the watched calls.

    A layer with a sliding window is attended exactly by every method.

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

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        variant: AttentionVariant = PLAIN,
    ) -> Tensor:
        if self.method.config is None or variant.sliding_window is not None:
            return attend_densely(query, key, value, scale, variant)
        block_map = self.method.choose(query, key, scale, variant)
        if self.watch:
            length = query.shape[2]
            rows = range(min(37, length - 1), length, self.rows)
            self.densities.append(block_map.density().cpu())
            recall = attention_recall(query, key, block_map, rows=rows, scale=scale, variant=variant)
            self.recalls.append(recall.mean)
        return prefill_attention(
            query, key, value, self.method.config, variant=variant, block_map=block_map, scale=scale
        )


DENSE = "dense"
GUARD = 0.95
# each kind of method: what chooses its blocks, and how its config differs
KINDS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "flashprefill": (None, {}),
    "mean-correction": (None, {"mean_correction": True}),
    "guard": (None, {"guard": GUARD}),
    RANDOM: (RANDOM, {}),
    **{name: (name, {}) for name in SELECTIONS},
}
OWN = "-own"  # behind a selection's name: by its own rule
OWN_KINDS = {name + OWN: name for name in SELECTIONS}
TWO_SIDED = "two-sided"  # at each probe share
# what is compared unless other methods are named
USUAL = (DENSE, TWO_SIDED, "flashprefill", "mean-correction", "guard", "xattention", RANDOM, EXACT)


def make_methods(
    alphas: Sequence[float],
    kinds: Sequence[str] = USUAL,
    config: PrefillConfig = PrefillConfig(),
    calibrated: Mapping[str, Mapping[int, PrefillConfig]] | None = None,
    shares: Sequence[float] = (PrefillConfig.recommended().probe_share,),
) -> list[Method]:
    """Dense attention, each selection by its own rule, and each kind of method at each alpha.

    All methods of an alpha keep as many blocks as FlashPrefill does there.

    Args:
        alphas: The alphas of the search.
        kinds: "dense", "two-sided", names in KINDS, or names in OWN_KINDS.
        config: All settings but alpha, mean_correction and guard.
        calibrated: Configs by layer, as PrefillConfig.load_layers gives them, by name.
        shares: The probe shares of "two-sided", which is PrefillConfig.recommended() otherwise.

    Raises:
        ValueError: A kind is unknown.
    """
    known = (DENSE, TWO_SIDED, *KINDS, *OWN_KINDS)
    if unknown := [kind for kind in kinds if kind not in known]:
        raise ValueError(f"kinds must be of {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    found = [Method(DENSE, None)] if DENSE in kinds else []
    found += [Method(kind, config, OWN_KINDS[kind], own_rule=True) for kind in OWN_KINDS if kind in kinds]
    if TWO_SIDED in kinds:
        recommended = PrefillConfig.recommended()
        found += [Method(f"{TWO_SIDED} {share:g}", replace(recommended, probe_share=share)) for share in shares]
    for alpha in alphas:
        for kind, (chosen_by, changes) in KINDS.items():
            if kind in kinds:
                rule = replace(config, alpha=alpha, **changes)
                found.append(Method(f"{kind} {alpha:g}", rule, chosen_by))
    for name, layers in (calibrated or {}).items():
        found.append(Method(f"calibrated {name}", layers[min(layers)], layers=layers))
    return found


def as_many(query: Tensor, key: Tensor, block_map: BlockMap, grid: Grid, method: Method) -> BlockMap:
    """As many blocks in each row as a map keeps there, chosen otherwise; see :class:`Method`.

    Args:
        query: [B, Hq, S, D]; key: [B, Hkv, S, D].
        block_map: [B, Hq, M, N], which keeps at least the sinks, window and last blocks of the method's config.
    """
    assert method.config is not None and method.chosen_by is not None
    device, geometry = query.device, grid.geometry
    if method.chosen_by == RANDOM:
        # the same draw wherever the lengths are the same: a map depends on nothing that the model computes
        drawn = Generator().manual_seed(geometry.q_len + geometry.kv_len)
        scores = torch.rand(block_map.shape, generator=drawn).to(device)
    else:
        scores = _scores(query, key, grid, method.chosen_by, method.config)
    if method.chosen_by != EXACT:
        always = always_kept(geometry, Rule.of(method.config, scale=grid.scale, last_chunk=True), device)
        scores = scores.masked_fill(always, torch.inf)
    scores = scores.masked_fill(~causal_blocks(geometry, device), -torch.inf)
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    keep = rank < block_map.counts()[..., None]
    return BlockMap.from_dense(keep, **geometry._asdict())


def _scores(query: Tensor, key: Tensor, grid: Grid, name: str, config: PrefillConfig) -> Tensor:
    if name in SELECTIONS:
        return SELECTIONS[name].scores(query, key, grid)
    scorer = find_scorer(name)
    grid = replace(grid, first_key=(scorer.score_rows or config.score_rows) == "visible")
    return scorer.log_scores(query, scorer.pool(key, config.block_size), grid)
