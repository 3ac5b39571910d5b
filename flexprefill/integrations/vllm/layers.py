"""What each layer of a served model keeps: the server's settings, put together with what vLLM says of the layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flexprefill.config import PrefillConfig
from flexprefill.integrations.vllm.attend import ServedLayer
from flexprefill.integrations.vllm.settings import Settings
from flexprefill.search.blocks import against_variant
from flexprefill.variant.variant import AttentionVariant


@dataclass(frozen=True)
class Model:
    """What all layers of a served model share.

    Attributes:
        settings: The server's.
        published: The setting published for the model's type.
        most_keys: Tokens of the longest prompt.
        rank: This process's place in its tensor-parallel group.
    """

    settings: Settings
    published: PrefillConfig
    most_keys: int
    rank: int = 0

    def layer(self, index: int, arguments: Mapping[str, Any]) -> ServedLayer | None:
        """How a layer serves long prompts. None: it stays dense.

        Args:
            index: Its number in the model.
            arguments: What vLLM made its attention with, by the names of its AttentionImpl.

        Raises:
            ValueError: The settings have a number for each head of another model.
        """
        config = self.settings.of_layer(index, self.published)
        if config is None or self.against(index, arguments) is not None:
            return None
        own = own_heads(config, arguments["num_heads"], self.rank)
        return ServedLayer(own, float(arguments["scale"]), _variant(arguments))

    def against(self, index: int, arguments: Mapping[str, Any]) -> str | None:
        """Why a layer's setting cannot search it. None if it can, or if the layer stays dense anyway."""
        config = self.settings.of_layer(index, self.published)
        return None if config is None else against_variant(config, _variant(arguments))

    def kinds(self, arguments: Mapping[str, Any]) -> set[ServedLayer]:
        """Layers that together need all that has to be compiled. Settings that differ in thresholds need the same.

        They are none where no layer goes through the search.
        """
        indices = range(max(self.settings.layers, default=-1) + 2)  # the last one has the settings of all others
        layers = (self.layer(index, arguments) for index in indices)
        return {replace(layer, config=_without_thresholds(layer.config)) for layer in layers if layer is not None}


def _variant(arguments: Mapping[str, Any]) -> AttentionVariant:
    return AttentionVariant(soft_cap=arguments.get("logits_soft_cap") or None)  # 0 is none too


def _without_thresholds(config: PrefillConfig) -> PrefillConfig:
    """The same kind of search. An alpha of None stays so, because other kernels run then."""
    alpha = config.alpha and ((0.5,) * len(config.alpha) if isinstance(config.alpha, tuple) else 0.5)
    return replace(config, alpha=alpha, probe_share=0.5, outlier_share=0.5)


def own_heads(config: PrefillConfig, heads: int, rank: int) -> PrefillConfig:
    """The settings of the heads of one process of a tensor-parallel group.

    Raises:
        ValueError: ``config.alpha`` has a number for each head of something else.
    """
    if not isinstance(config.alpha, tuple) or len(config.alpha) == heads:
        return config
    if len(config.alpha) < (rank + 1) * heads or len(config.alpha) % heads:
        raise ValueError(
            f"config.alpha must be a number or one for each query head of the model, {heads} of them in each process, "
            f"got {len(config.alpha)}"
        )
    return replace(config, alpha=config.alpha[rank * heads : (rank + 1) * heads])


def layer_number(name: str) -> int:
    """The number of a layer in a name such as ``model.layers.3.self_attn.attn``. 0 where there is none."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else 0
