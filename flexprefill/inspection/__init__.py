"""What maps hold, how they differ, and what they do to attention, in numbers."""

from flexprefill.inspection.difference import MapDifference, compare_maps, head_similarity
from flexprefill.inspection.patterns import PATTERNS, block_patterns
from flexprefill.inspection.recall import attention_recall
from flexprefill.inspection.summary import HeadSummary, summarize_heads

__all__ = [
    "PATTERNS",
    "HeadSummary",
    "MapDifference",
    "attention_recall",
    "block_patterns",
    "compare_maps",
    "head_similarity",
    "summarize_heads",
]
