"""What ``flexprefill inspect --quick`` tells: records of what a file's header says, made without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from flexprefill.store import MaskFileInfo
from flexprefill.store.figures import Figures

Record = dict[str, Any]


def with_recall(records: Sequence[Record], figures: Mapping[int, Figures]) -> list[Record]:
    """Records of heads, or of layers, with what the file says of their recall: None where it says nothing.

    A layer's is the mean of its heads that can lose mass, and that of the head that loses most.
    """
    told = []
    for record in records:
        tables = figures.get(record["layer"], {})
        mean, least = (tables.get(name) for name in ("mean", "least"))
        if "head" in record:
            batch, head = record["batch"], record["head"]
            own = {"recall": mean and mean[batch][head], "recall_least": least and least[batch][head]}
        else:
            known = [share for heads in mean or [] for share in heads if share is not None]
            own = {"recall": fmean(known) if known else None, "recall_least_head": min(known, default=None)}
        told.append(record | own)
    return told


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
