"""The arguments of one call, checked, and what they ask of a kernel."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask

from flexprefill.attention.backends import Mods, Request
from flexprefill.blockmap.map import BlockMap, check_block_map
from flexprefill.blockmap.masking import MASK_MOD_ARGUMENTS, MaskMod, check_mod
from flexprefill.config import PrefillConfig
from flexprefill.runtime.thread_state import of_one_dtype
from flexprefill.search.defaults import resolve_config
from flexprefill.search.scorers import find_scorer
from flexprefill.variant.inputs import (
    SCORE_MOD_ARGUMENTS,
    check_attention_inputs,
    check_last_chunk,
    resolve_scale,
)
from flexprefill.variant.logits import PlainAttention
from flexprefill.variant.mods import ScoreMod, changing_mods
from flexprefill.variant.paged_kv import PagedKV
from flexprefill.variant.variant import AttentionVariant, check_variant


class Asked(NamedTuple):
    """The arguments of prefill_attention that decide what computes it, as they were given."""

    query: Tensor
    key: Tensor | PagedKV
    value: Tensor | None
    config: PrefillConfig | None
    variant: AttentionVariant | None
    block_map: BlockMap | None
    mask_mod: MaskMod | BlockMask | None
    score_mod: ScoreMod | None
    scale: float | None
    last_chunk: bool
    backend: str
    return_aux: AuxRequest | None


class Call(NamedTuple):
    """The arguments of Asked, checked. What was None has its value. A PagedKV has its stand-ins for key and value."""

    query: Tensor
    key: Tensor
    value: Tensor
    config: PrefillConfig
    variant: AttentionVariant
    block_map: BlockMap | None
    mask_mod: MaskMod | BlockMask | None
    score_mod: ScoreMod | None
    scale: float
    last_chunk: bool
    backend: str
    return_aux: AuxRequest | None
    layout: Hashable | None = None  # names that of query, key and value, if nothing else decides what is done with them

    @property
    def plain(self) -> bool:
        """Whether any attention kernel can compute it: nothing asks for FlexAttention."""
        asked = self.backend != "auto" or self.return_aux is not None
        return not asked and not self.mods and self.variant.sinks is None and self.scale > 0

    @property
    def mods(self) -> Mods:
        """What FlexAttention gets besides the causal mask."""
        if self.mask_mod is not None or self.score_mod is not None:
            return "own"
        if self.variant.alibi_slopes is not None:
            return "scores"
        if self.variant.soft_cap is not None:
            return "cap" if self.variant.sequences is None else "scores"
        return "masks" if self.variant.changes_search else ""

    @property
    def block_size(self) -> int:
        """The block size of the map that is used."""
        return self.config.block_size if self.block_map is None else self.block_map.block_size

    @property
    def attention(self) -> PlainAttention:
        """The same over all blocks, in plain PyTorch. A BlockMask counts by its mask_mod alone."""
        score_mods = () if self.score_mod is None else (self.score_mod,)
        mask_mods = plain_mods(self.mask_mod)
        return PlainAttention(self.query, self.key, self.scale, self.variant, mask_mods, score_mods)

    def score_mods(self) -> tuple[ScoreMod, ...]:
        """The variant's score_mods, then the caller's: they apply in this order."""
        mods = changing_mods(self.variant, self.query, self.key.shape[2] - self.query.shape[2])
        return mods if self.score_mod is None else (*mods, self.score_mod)

    def aux_request(self, *, dense: bool = False) -> AuxRequest | None:
        """What FlexAttention has to return besides the output. Mean correction and sinks need a log-sum-exp.

        FlexAttention gives none on the CPU. Dense attention has nothing to correct.
        """
        needs_lse = self.variant.sinks is not None or (self.config.mean_correction and not dense)
        if not needs_lse or not self.query.is_cuda:
            return self.return_aux
        return AuxRequest(lse=True, max_scores=self.return_aux is not None and self.return_aux.max_scores)

    def request(self) -> Request:
        """What its kernel has to do."""
        return Request.of(
            self.query,
            self.key,
            self.value,
            block_size=self.block_size,
            mods=self.mods,
            scale=self.scale,
            aux=self.aux_request() or AuxRequest(),
        )


def plain_mods(mask_mod: MaskMod | BlockMask | None) -> tuple[MaskMod, ...]:
    """What a PlainAttention takes for a mask_mod or a BlockMask."""
    own = mask_mod.mask_mod if isinstance(mask_mod, BlockMask) else mask_mod
    return () if own is None else (own,)


def tensors_of(query: Tensor, key: Tensor | PagedKV, value: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of one dtype, as autocast casts them; a PagedKV's stand-ins for key and value.

    Raises:
        ValueError: There is a value besides a PagedKV.
    """
    if isinstance(key, PagedKV):
        if value is not None:
            raise ValueError(f"value must be None with a PagedKV, which holds the values, got {type(value).__name__}")
        return query, *key.stand_ins()
    return of_one_dtype(query, key, value)  # type: ignore[arg-type]  # a value that is None is refused by name later


def checked(asked: Asked) -> Call:
    """The call with what is None resolved.

    Raises:
        TypeError, ValueError: The arguments do not fit together, as in prefill_attention.
    """
    block_map = asked.block_map
    query, key, value = tensors_of(asked.query, asked.key, asked.value)
    layout = check_attention_inputs(query, key, value)
    scale = resolve_scale(asked.scale, query.shape[3])
    variant = check_variant(asked.variant, query, key)
    in_a_row = not isinstance(asked.key, PagedKV) and block_map is None
    config = resolve_config(asked.config, variant, in_a_row=in_a_row)
    call = Call(
        query, key, value, config, variant, block_map, asked.mask_mod, asked.score_mod, scale, asked.last_chunk,
        asked.backend, asked.return_aux, layout,
    )  # fmt: skip
    _check(call)
    return call


def _check(call: Call) -> None:
    """Raises unless the other arguments fit the tensors and the variant."""
    check_last_chunk(call.last_chunk)
    if not isinstance(call.mask_mod, BlockMask):
        check_mod("mask_mod", call.mask_mod, MASK_MOD_ARGUMENTS)
    check_mod("score_mod", call.score_mod, SCORE_MOD_ARGUMENTS)
    if not (call.return_aux is None or isinstance(call.return_aux, AuxRequest)):
        raise TypeError(f"return_aux must be an AuxRequest or None, got {type(call.return_aux).__name__}")
    find_scorer(call.config.scorer)
    if call.config.mean_correction:
        asked = [name for name in ("mask_mod", "score_mod") if getattr(call, name) is not None]
        if call.return_aux is not None and call.return_aux.max_scores:
            asked.append("max_scores")
        if asked := [*asked, *call.variant.changes_search]:
            raise ValueError(
                f"{asked[0]} cannot be combined with mean_correction, whose means stand for plain causal attention: "
                "pass a config with mean_correction=False"
            )
    if call.block_map is not None:
        check_block_map(call.block_map, call.query, call.key)
