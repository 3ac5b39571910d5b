"""FlashPrefill block search for long prompts, as BlockMasks for PyTorch's FlexAttention."""

from flexprefill._version import __version__
from flexprefill.attention import explain_backend, prefill_attention
from flexprefill.backends import BackendChoice
from flexprefill.blockmap import BlockMap
from flexprefill.cache import CachedPrompt, CacheStats, MaskCache
from flexprefill.config import PrefillConfig
from flexprefill.errors import FlexPrefillError, MaskFileError, NotEnoughMemoryError
from flexprefill.flex import create_prefill_block_mask
from flexprefill.guard import GuardReport, guard_blocks
from flexprefill.inspection import attention_recall
from flexprefill.lists import ListBuffers
from flexprefill.recording import Recording, record_masks
from flexprefill.search import KeyMeans, search_blocks
from flexprefill.search.scorers import Scorer, register_scorer
from flexprefill.sequences import Sequences
from flexprefill.store import MaskFileInfo, load_masks, read_mask_info, save_masks

__all__ = [
    "BackendChoice",
    "BlockMap",
    "CacheStats",
    "CachedPrompt",
    "FlexPrefillError",
    "GuardReport",
    "KeyMeans",
    "ListBuffers",
    "MaskCache",
    "MaskFileError",
    "MaskFileInfo",
    "NotEnoughMemoryError",
    "PrefillConfig",
    "Recording",
    "Scorer",
    "Sequences",
    "__version__",
    "attention_recall",
    "create_prefill_block_mask",
    "explain_backend",
    "guard_blocks",
    "load_masks",
    "prefill_attention",
    "read_mask_info",
    "record_masks",
    "register_scorer",
    "save_masks",
    "search_blocks",
]
