"""The rule's settings as the implementations read them."""

from typing import NamedTuple


class Rule(NamedTuple):
    """A PrefillConfig with its threshold in log2 and all that depends on the call resolved. Numbers only."""

    scale: float
    log2_alpha: float
    block_size: int
    sink_blocks: int
    window_blocks: int
    last_full_blocks: int  # 0 if a later chunk of queries follows
    min_blocks: int
