"""A recording's recall as an entry of a mask file's metadata, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flexprefill.store.container import is_object, parse_object
from flexprefill.store.contents import MaskFileInfo

if TYPE_CHECKING:
    from torch import Tensor

    from flexprefill.inspection.recall import Recall

RECALL_ENTRY = "flexprefill.recall"  # the name of the metadata's entry
DIGITS = 5

Figures = dict[str, list[list[float | None]]]  # by name: [b][head]


def recall_entry(recalls: Mapping[int, Recall]) -> dict[str, str]:
    """Metadata with the mean and the least recall of each head: empty if no recall was recorded."""
    if not recalls:
        return {}
    layers = {
        layer: {"mean": _shares(recall.mean, recall.can_lose), "least": _shares(recall.least, recall.can_lose)}
        for layer, recall in recalls.items()
    }
    return {RECALL_ENTRY: json.dumps(layers, separators=(",", ":"))}


def read_recall(info: MaskFileInfo) -> dict[int, Figures]:
    """By layer the ``mean`` and the ``least`` recall of each head, ``[b][head]``; of layers whose file has it.

    None stands for a head that has nothing to lose, or whose attention is not finite. An entry that is not of the
    file's layers and heads is somebody else's, and left out.
    """
    try:
        layers = parse_object(info.metadata.get(RECALL_ENTRY, "{}"), of=is_object)
    except (ValueError, RecursionError):
        return {}
    found = {number: layers[str(number)] for number in info.layers if str(number) in layers}
    return {number: figures for number, figures in found.items() if _fits(figures, info.layers[number]["shape"])}


def _shares(shares: Tensor, can_lose: Tensor) -> list[list[float | None]]:
    known = shares.masked_fill(can_lose == 0, math.nan).tolist()
    return [[None if math.isnan(share) else round(share, DIGITS) for share in heads] for heads in known]


def _fits(figures: Mapping[str, Any], shape: tuple[int, int]) -> bool:
    """Whether it has shares [B][H] by both names."""
    return all(
        isinstance(table := figures.get(name), list)
        and len(table) == shape[0]
        and all(isinstance(heads, list) and len(heads) == shape[1] for heads in table)
        and all(
            share is None or (type(share) in (int, float) and 0 <= share <= 1) for heads in table for share in heads
        )
        for name in ("mean", "least")
    )
