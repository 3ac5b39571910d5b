"""The setting of calls that name none."""

from __future__ import annotations

from flexprefill.config import PrefillConfig, check_config
from flexprefill.variant.variant import AttentionVariant

RECOMMENDED = PrefillConfig.recommended()
FLASHPREFILL = PrefillConfig()


def resolve_config(config: PrefillConfig | None, variant: AttentionVariant, *, in_a_row: bool = True) -> PrefillConfig:
    """A call's config, checked. None is `PrefillConfig.recommended()`.

    The two-sided search attends plainly and causally to keys in a row. None is therefore FlashPrefill's own setting,
    `PrefillConfig()`, with sequences, a sliding window, a soft cap or ALiBi, and where keys are not ``in_a_row``.
    """
    if config is None:
        return RECOMMENDED if in_a_row and not variant.changes_search else FLASHPREFILL
    check_config(config)
    return config
