"""The search: which blocks of the attention matrix matter. It reads only query and key."""

from flexprefill.search.blocks import search_blocks
from flexprefill.search.guard import GuardReport, guard_blocks
from flexprefill.search.key_means import KeyMeans
from flexprefill.search.scorers import Scorer, register_scorer

__all__ = ["GuardReport", "KeyMeans", "Scorer", "guard_blocks", "register_scorer", "search_blocks"]
