"""What ``flexprefill inspect`` tells of a file's layers and heads, as records: its table and CSV are made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from flexprefill.blockmap.map import BlockMap
from flexprefill.cli.masks import read_layer
from flexprefill.cli.quick import Record, spread
from flexprefill.inspection import PATTERNS, HeadSummary, compare_maps, head_similarity, summarize_heads
from flexprefill.runtime.progress import terminal_stage
from flexprefill.store import MaskFileInfo


@dataclass(frozen=True, eq=False)
class LayerSummary:
    """What the command tells of one layer.

    Attributes:
        heads: a summary of each chosen head, under its own number.
        similarity: IoU of each chosen head with each other, float64 [B, H, H].
        before: number of the layer above it in the file, and IoU of the heads of equal number, float64 [B, H];
            None for the first, and where shapes differ.
    """

    number: int
    heads: list[HeadSummary]
    similarity: Tensor
    before: tuple[int, Tensor] | None

    def nearest(self, index: int) -> tuple[int, float] | None:
        """Which other head is most like the one at this place in ``heads``, and their IoU; None if it is alone."""
        batch, own = divmod(index, self.similarity.shape[1])
        others = self.similarity[batch, own].clone()
        others[own] = -1
        best = int(others.argmax())
        return None if best == own else (best, float(others[best]))

    def to_dict(self) -> Record:
        """Everything but the sizes, ready for JSON."""
        return {
            "density": fmean(summary.density for summary in self.heads),
            "similarity": self.similarity.tolist(),
            "layer_before": self.before and {"layer": self.before[0], "iou": self.before[1].tolist()},
            "heads": [summary.to_dict() for summary in self.heads],
        }


def read_layers(path: Path, info: MaskFileInfo, numbers: Sequence[int], head: int | None) -> list[LayerSummary]:
    """The chosen layers, of which two are held at a time."""
    layers: list[LayerSummary] = []
    before: tuple[int, BlockMap] | None = None
    with terminal_stage("inspecting layers", len(numbers)) as advance:
        for number in numbers:
            block_map = read_layer(path, number, head)
            summaries = summarize_heads(block_map, config=info.config)
            if head is not None:
                summaries = [dataclasses.replace(summary, head=head) for summary in summaries]
            like_before = None
            if before is not None and info.layers[before[0]] == info.layers[number]:
                like_before = (before[0], compare_maps(before[1], block_map).iou)
            layers.append(LayerSummary(number, summaries, head_similarity(block_map), like_before))
            before = (number, block_map)
            advance(1)
    return layers


def layer_record(layer: LayerSummary) -> Record:
    """A layer in one line; the patterns are shares of the blocks that heads keep which are not dense."""
    densities = [summary.density for summary in layer.heads]
    others = [summary for summary in layer.heads if not summary.dense]
    kept = max(1, sum(summary.kept for summary in others))
    heads = layer.similarity.shape[1]
    off_diagonal = layer.similarity[:, ~torch.eye(heads, dtype=torch.bool)]
    return {
        "layer": layer.number,
        **spread(densities),
        "dense_heads": len(layer.heads) - len(others),
        **{name: sum(summary.patterns[name] for summary in others) / kept if others else None for name in PATTERNS},
        "iou_of_heads": float(off_diagonal.mean()) if heads > 1 else None,
        "iou_above": float(layer.before[1].mean()) if layer.before else None,
    }


def head_records(layer: LayerSummary) -> Iterator[Record]:
    """Each of a layer's heads in one line; a dense one has no patterns."""
    for index, summary in enumerate(layer.heads):
        nearest, nearest_iou = layer.nearest(index) or (None, None)
        counts = summary.counts
        yield {
            "layer": layer.number,
            "batch": summary.batch,
            "head": summary.head,
            "density": summary.density,
            "blocks_least": int(counts.min()),
            "blocks_median": int(counts.median()),
            "blocks_most": int(counts.max()),
            "dense": summary.dense,
            **{name: None if summary.dense else share for name, share in summary.shares.items()},
            "nearest": nearest,
            "nearest_iou": nearest_iou,
            "iou_above": float(layer.before[1].flatten()[index]) if layer.before else None,
        }
