"""What a server is asked to do: read from its environment, and written into it for the processes that it starts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexprefill.config import LAYERS_FORMAT, PUBLISHED, PrefillConfig, check_config, check_whole

SWITCH = "FLEXPREFILL"
CONFIG = "FLEXPREFILL_CONFIG"
MIN_KEYS = "FLEXPREFILL_MIN_KEYS"
MIN_QUERIES = "FLEXPREFILL_MIN_QUERIES"
FOLDER = "FLEXPREFILL_FOLDER"
RECOMMENDED = "recommended"  # for CONFIG: the two-sided search
FIRST_PROCESS = "FLEXPREFILL_FIRST_PROCESS"  # set by the plug-in itself: the process that all others come from
TICKET = "record.json"  # in the folder: which recording was asked for last
ON, OFF = ("on", "1", "true", "yes"), ("", "off", "0", "false", "no")

# By the device's clock attention gains from 4,096 tokens on (docs/howto/attention.md). A server's call also copies the
# pages, and takes 1 to 3 ms of the host in each layer (H200, vLLM 0.26). That is hidden behind the device from here on.
DEFAULT_MIN_KEYS = 8192
# The two-sided search takes longer. At 8,192 tokens it kept three quarters of the blocks: 54.1 ms to the first token,
# where vLLM's own attention took 52.6. At 16,384 it gains (docs/howto/serving.md).
TWO_SIDED_MIN_KEYS = 16_384
# Computed, not measured: copying the keys of a long prompt takes as long as attending densely to them from 100 queries
# (0.25 ms at 131,072 keys of 8 heads). The host's time is hidden from about 1,000.
DEFAULT_MIN_QUERIES = 1024


@dataclass(frozen=True)
class Settings:
    """How prompts are served.

    Args:
        config: The settings of every layer. None takes those published for the model's type.
        layers: Settings of single layers, by their index. None keeps a layer dense.
        min_keys: Prompts of fewer tokens so far go to vLLM's own attention. None is ``config.dense_below``. Without it,
            it is ``DEFAULT_MIN_KEYS``, or ``TWO_SIDED_MIN_KEYS`` if a setting is two-sided.
        min_queries: Chunks of fewer tokens go to vLLM's own attention.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A setting is out of range.
    """

    config: PrefillConfig | None = None
    layers: Mapping[int, PrefillConfig | None] = field(default_factory=dict)
    min_keys: int | None = None
    min_queries: int = DEFAULT_MIN_QUERIES

    def __post_init__(self) -> None:
        if self.config is not None:
            check_config(self.config)
        if not isinstance(self.layers, Mapping):
            raise TypeError(f"layers must map a layer's index to its config, got {type(self.layers).__name__}")
        for index, config in self.layers.items():
            check_whole("layers' index", index, 0)
            if not (config is None or isinstance(config, PrefillConfig)):
                raise TypeError(f"layers[{index}] must be a PrefillConfig or None, got {type(config).__name__}")
        if self.min_keys is not None:
            check_whole("min_keys", self.min_keys, 1)
        # a single query is a step of decoding
        check_whole("min_queries", self.min_queries, 2)

    @property
    def keys_from(self) -> int:
        """The number of keys from which a prompt goes to the search."""
        if self.min_keys is not None:
            return self.min_keys
        below = None if self.config is None else self.config.dense_below
        if below is not None:
            return below
        two_sided = any(config is not None and config.two_sided for config in (self.config, *self.layers.values()))
        return TWO_SIDED_MIN_KEYS if two_sided else DEFAULT_MIN_KEYS

    def of_layer(self, index: int, published: PrefillConfig) -> PrefillConfig | None:
        """The settings of one layer, with ``published`` for what nobody said. None: it stays dense."""
        return self.layers.get(index, self.config or published)

    def to_json(self) -> str:
        """As ``FLEXPREFILL_CONFIG`` takes it, without the thresholds."""
        plain = {"config": self.config, "layers": {str(index): config for index, config in self.layers.items()}}
        return json.dumps(plain, default=PrefillConfig.to_dict)

    def write(self, environment: MutableMapping[str, str]) -> None:
        """Sets the variables that `read` reads."""
        environment[SWITCH] = "on"
        environment[MIN_QUERIES] = str(self.min_queries)
        for name, text in ((CONFIG, self.to_json()), (MIN_KEYS, str(self.min_keys or ""))):
            environment[name] = text

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Settings | None:
        """The settings that an environment asks for. None if ``FLEXPREFILL`` is not on.

        Raises:
            ValueError: A variable says nothing that is known. The message names it.
            FlexPrefillError, OSError: ``FLEXPREFILL_CONFIG`` is a file that cannot be read.
        """
        switch = environment.get(SWITCH, "").strip().lower()
        if switch in OFF:
            return None
        if switch not in ON:
            raise ValueError(f"{SWITCH} must be one of {', '.join(ON)}, or off, got {environment[SWITCH]!r}")
        config, layers = _read_config(environment.get(CONFIG, "").strip())
        min_keys = _read_whole(environment, MIN_KEYS, None)
        min_queries = _read_whole(environment, MIN_QUERIES, DEFAULT_MIN_QUERIES)
        return cls(config, layers, min_keys, DEFAULT_MIN_QUERIES if min_queries is None else min_queries)


def _read_config(text: str) -> tuple[PrefillConfig | None, dict[int, PrefillConfig | None]]:
    """The config of all layers and those of single ones, from a preset's name, a file, or JSON itself."""
    if not text:
        return None, {}
    if text.lower() == RECOMMENDED:
        return PrefillConfig.recommended(), {}
    if text.startswith("{"):
        return _of_record(text, CONFIG)
    if os.path.exists(text) or text.endswith(".json"):
        content = Path(text).read_text("utf-8")
        if LAYERS_FORMAT in content:
            return None, dict(PrefillConfig.load_layers(text))
        return _of_record(content, f"{CONFIG} {text}")
    try:
        return PrefillConfig.published(text), {}
    except ValueError:
        raise ValueError(
            f"{CONFIG} must be a file that exists, JSON, {RECOMMENDED!r}, or the name of a published setting, such as "
            f"{', '.join(PUBLISHED)}, got {text!r}"
        ) from None


def _of_record(text: str, name: str) -> tuple[PrefillConfig | None, dict[int, PrefillConfig | None]]:
    try:
        record: Any = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError(f"it is a {type(record).__name__}")
        if not {"config", "layers"} & set(record):
            return PrefillConfig.from_dict(record), {}
        if unknown := set(record) - {"config", "layers"}:
            raise ValueError(f"beside config and layers it has {sorted(unknown)}")
        config, layers = record.get("config"), record.get("layers") or {}
        settings = {int(index): None if of is None else PrefillConfig.from_dict(of) for index, of in layers.items()}
        return None if config is None else PrefillConfig.from_dict(config), settings
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{name} must be the settings of a PrefillConfig as JSON, or {{'config': …, 'layers': {{'0': …}}}}: {error}"
        ) from None


def _read_whole(environment: Mapping[str, str], name: str, default: int | None) -> int | None:
    text = environment.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal():
        raise ValueError(f"{name} must be a number of tokens, got {text!r}")
    return int(text)
