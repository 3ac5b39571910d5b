"""The setting of calls that name none."""

from __future__ import annotations

from flexprefill.config import PrefillConfig, check_config
from flexprefill.variant.variant import AttentionVariant

RECOMMENDED = PrefillConfig.recommended()
FLASHPREFILL = PrefillConfig()


def default_config(
    variant: AttentionVariant, *, in_a_row: bool = True, elsewhere: PrefillConfig = FLASHPREFILL
) -> PrefillConfig:
    """`PrefillConfig.recommended()`, or the setting for ``elsewhere`` where the two-sided search cannot look.

    It attends plainly and causally to keys in a row. So it takes no sequences, sliding window, soft cap or ALiBi, and
    no keys that are not ``in_a_row``.
    """
    return RECOMMENDED if in_a_row and not variant.changes_search else elsewhere


def resolve_config(config: PrefillConfig | None, variant: AttentionVariant, *, in_a_row: bool = True) -> PrefillConfig:
    """A call's config, checked. None is `default_config`."""
    if config is None:
        return default_config(variant, in_a_row=in_a_row)
    check_config(config)
    return config
