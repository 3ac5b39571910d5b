"""What ``flexprefill inspect --quick`` tells: records of what a file's header says, made without torch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from flexprefill.store import MaskFileInfo

Record = dict[str, Any]


def quick_head_records(info: MaskFileInfo, number: int, head: int | None) -> list[Record]:
    """What the header says of a layer's chosen heads, each in one line; None where it has no densities."""
    batches, heads = info.layers[number]["shape"]
    table = info.density.get(number)
    return [
        {
            "layer": number,
            "batch": batch,
            "head": index,
            "density": None if table is None else table[batch][index],
        }
        for batch in range(batches)
        for index in (range(heads) if head is None else [head])
    ]


def quick_layer_record(heads: Sequence[Record]) -> Record:
    """The records of a layer's heads in one line."""
    return {"layer": heads[0]["layer"], **spread([head["density"] for head in heads])}


def quick_dict(heads: Sequence[Record]) -> Record:
    """The records of a layer's heads, without the layer's number, ready for JSON."""
    return {
        "density": quick_layer_record(heads)["density"],
        "heads": [{name: head[name] for name in ("batch", "head", "density")} for head in heads],
    }


def spread(densities: Sequence[float | None]) -> Record:
    """The mean, the least and the most of the densities that are known."""
    known = [density for density in densities if density is not None]
    if not known:
        return dict.fromkeys(("density", "density_least", "density_most"))
    return {"density": fmean(known), "density_least": min(known), "density_most": max(known)}
