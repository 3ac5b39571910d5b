"""What maps hold, how they differ, and what they do to attention, in numbers."""

from flexprefill.inspection.difference import MapDifference, compare_maps, head_similarity
from flexprefill.inspection.distance import DistanceMass, mass_by_distance
from flexprefill.inspection.patterns import PATTERNS, block_patterns
from flexprefill.inspection.recall import Recall, attention_recall
from flexprefill.inspection.summary import HeadSummary, summarize_heads

__all__ = [
    "PATTERNS",
    "DistanceMass",
    "HeadSummary",
    "MapDifference",
    "Recall",
    "attention_recall",
    "block_patterns",
    "compare_maps",
    "head_similarity",
    "mass_by_distance",
    "summarize_heads",
]
