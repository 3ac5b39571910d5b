"""All public names; ``flexprefill`` hands them out."""

from flexprefill._version import __version__
from flexprefill.attention.backends import BackendChoice
from flexprefill.attention.prefill import create_prefill_block_mask, explain_backend, prefill_attention
from flexprefill.blockmap.index_lists import ListBuffers
from flexprefill.blockmap.map import BlockMap
from flexprefill.config import PrefillConfig
from flexprefill.errors import (
    FlexPrefillError,
    MaskFileError,
    RanEagerlyError,
    UnsupportedError,
)
from flexprefill.inspection import DistanceMass, Recall, attention_recall, mass_by_distance
from flexprefill.runtime.memory import NotEnoughMemoryError
from flexprefill.search.blocks import search_blocks
from flexprefill.search.guard import GuardReport, guard_blocks
from flexprefill.search.key_means import KeyMeans
from flexprefill.search.page_means import PageMeans
from flexprefill.search.scorers import Scorer, register_scorer
from flexprefill.store import MaskFileInfo, read_mask_info
from flexprefill.store.cache import CachedPrompt, CacheStats, MaskCache
from flexprefill.store.reading import load_masks
from flexprefill.store.recording import Recording, record_masks
from flexprefill.store.writing import save_masks
from flexprefill.variant.paged_kv import PagedKV
from flexprefill.variant.sequences import Sequences
from flexprefill.variant.variant import AttentionVariant

__all__ = [
    "AttentionVariant", "BackendChoice", "BlockMap", "CacheStats", "CachedPrompt", "DistanceMass", "FlexPrefillError",
    "GuardReport", "KeyMeans", "ListBuffers", "MaskCache", "MaskFileError", "MaskFileInfo", "NotEnoughMemoryError",
    "PageMeans", "PagedKV", "PrefillConfig", "RanEagerlyError", "Recall", "Recording", "Scorer", "Sequences",
    "UnsupportedError", "__version__", "attention_recall", "create_prefill_block_mask", "explain_backend",
    "guard_blocks", "load_masks", "mass_by_distance", "prefill_attention", "read_mask_info", "record_masks",
    "register_scorer", "save_masks", "search_blocks",
]  # fmt: skip
