"""The settings of the FlashPrefill rule, their checks and the published values."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexprefill.errors import FlexPrefillError

BLOCK_SIZES = (16, 32, 64, 128)
MASK_HEADS = ("query", "kv")
SCORE_ROWS = ("whole", "visible")
FIRST_SETTINGS = ("alpha", "block_size", "sink_blocks", "window_blocks", "last_full_blocks", "min_blocks")

# names of scorers; search/scorers.py has the scorers themselves, and register_scorer adds to both
SCORERS = {"flashprefill", "xattention", "exact"}

LAYERS_FORMAT = "flexprefill layers 1"  # of files with a config for each layer

# FlashPrefill (arXiv 2603.06199), and the last row FlashPrefill-V2 (arXiv 2608.19758)
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {"alpha": 0.18},
    "Qwen2.5-7B": {"alpha": 0.08},
    "Qwen3-30B-A3B": {"alpha": 0.12},
    "Qwen2.5-VL": {"alpha": 0.10},
    "Qwen3-VL": {"alpha": 0.22},
    "FlashPrefill-V2": {"alpha": 0.1, "last_full_blocks": 8},
}


def plain_number(value: Any) -> Any:
    """A number of another kind, such as NumPy's, as Python's own; anything else as it is."""
    if type(value) in (bool, int, float) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


@dataclass(frozen=True)
class PrefillConfig:
    """Which blocks of the attention matrix a prompt keeps (FlashPrefill, arXiv 2603.06199).

    A block (I, J) of query block I and key block J that is causally visible is kept if any of these holds.

    Args:
        alpha: its score reaches ``alpha`` times the best score of query block I; in (0, 1]. Smaller keeps more. A tuple
            is one for each query head; heads that share a mask have the same.
        block_size: edge of a block in tokens; 16, 32, 64 or 128.
        sink_blocks: J is one of the first ``sink_blocks`` key blocks.
        window_blocks: J is at distance 0 … ``window_blocks - 1`` from the key block that holds the last
            row of I. With 0, a row of an offset chunk can be left without any key, and outputs zero.
        last_full_blocks: I is one of the last ``last_full_blocks`` query blocks of the prompt.
        min_blocks: J is among the ``min_blocks`` best scores of I, ties included; 0 turns it off.
        dense_below: prompts of fewer tokens (S_kv) are attended densely by :func:`flexprefill.prefill_attention`, which
            says on which terms; 0 is never, and None the length below which dense was measured to be faster on the
            device, which is 0 where nothing was measured. What a search keeps does not depend on it.
        mask_heads: "query", a mask for each query head; or "kv", one for the query heads that share a key head, from
            the scores of all their rows together (FlashPrefill-V2, arXiv 2608.19758). Maps have H = Hq either way.
        score_rows: which rows of I give a score to J: "whole", those that see all of J; or "visible", those that see
            J's first key, as in FlashPrefill-V2, so that blocks on the causal edge are scored by all their rows. The
            scorers "xattention" and "exact" are "visible" by their own definitions.
        scorer: name of the function that scores the blocks, "flashprefill", "xattention", "exact" or one that was
            registered with :func:`flexprefill.register_scorer`; see docs/explanations/scorers.md.
        mean_correction: dropped blocks that every row of I sees whole answer with their mean key and value
            (FlashPrefill-V2; docs/explanations/mean_correction.md). What a search keeps does not depend on it.
        guard: the share of the attention mass that the kept blocks of each head have to hold, in (0, 1); heads whose
            sampled rows hold less keep all blocks (docs/explanations/guard.md). None is off.

    Raises:
        TypeError: a setting is of the wrong type.
        ValueError: a setting is out of range.
    """

    alpha: float | tuple[float, ...] = 0.1
    block_size: int = 128
    sink_blocks: int = 2
    window_blocks: int = 4
    last_full_blocks: int = 2
    min_blocks: int = 0
    dense_below: int | None = None
    mask_heads: str = "query"
    score_rows: str = "whole"
    scorer: str = "flashprefill"
    mean_correction: bool = False
    guard: float | None = None

    def __post_init__(self) -> None:
        for name, setting in vars(self).items():
            if (plain := plain_number(setting)) is not setting:
                object.__setattr__(self, name, plain)
        if isinstance(self.alpha, (list, tuple)):  # a list as JSON has it
            object.__setattr__(self, "alpha", tuple(map(plain_number, self.alpha)))
        if isinstance(self.alpha, tuple) and not self.alpha:
            raise ValueError("alpha must be a number in (0, 1], or one for each query head, got ()")
        for alpha in self.alpha if isinstance(self.alpha, tuple) else (self.alpha,):
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
                raise TypeError(f"alpha must be a number in (0, 1], or one for each query head, got {alpha!r}")
            if not 0 < alpha <= 1:  # false for NaN as well
                raise ValueError(f"alpha must be in (0, 1], got {alpha!r}")
        for name in (*FIRST_SETTINGS[1:], "dense_below"):
            number = getattr(self, name)
            if number is None and name == "dense_below":
                continue
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{name} must be an int, got {number!r}")
            if not 0 <= number < 2**31:
                raise ValueError(f"{name} must be at least 0 and below 2**31, got {number}")
        for name, known in (("block_size", BLOCK_SIZES), ("mask_heads", MASK_HEADS), ("score_rows", SCORE_ROWS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if not isinstance(self.scorer, str) or not self.scorer.isprintable() or not self.scorer:
            raise TypeError(f"scorer must be the name of a scorer such as 'flashprefill', got {self.scorer!r}")
        if self.scorer not in SCORERS:
            raise ValueError(
                f"scorer must be one of {sorted(SCORERS)}, got {self.scorer!r}; register_scorer makes another one known"
            )
        if not isinstance(self.mean_correction, bool):
            raise TypeError(f"mean_correction must be a bool, got {self.mean_correction!r}")
        if self.guard is not None:
            if isinstance(self.guard, bool) or not isinstance(self.guard, (int, float)):
                raise TypeError(f"guard must be a number in (0, 1) or None, got {self.guard!r}")
            if not 0 < self.guard < 1:
                raise ValueError(f"guard must be in (0, 1), got {self.guard!r}")

    @property
    def log2_alphas(self) -> tuple[float, ...]:
        """The threshold's distance below the best score of a row in log2: one for all query heads, or one for each."""
        return tuple(math.log2(alpha) for alpha in (self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)))

    def to_dict(self) -> dict[str, Any]:
        """The settings as a plain dictionary, ready for JSON; those from ``dense_below`` on only where they are set."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        # mask files and their hashes are as before there was a setting that is not used
        return {
            name: setting
            for name, setting in dataclasses.asdict(self).items()
            if name in FIRST_SETTINGS or setting != defaults[name]
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> PrefillConfig:
        """The config that :meth:`to_dict` gave; settings left out take their defaults.

        Raises:
            TypeError: ``settings`` is no mapping.
            ValueError: a name that is no setting.
        """
        if not isinstance(settings, Mapping):
            raise TypeError(f"settings must be a mapping of names to settings, got {type(settings).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(str(name) for name in set(settings) - set(known))
        if unknown:
            raise ValueError(f"settings has unknown names {unknown}; known are {known}")
        scorer = settings.get("scorer")
        if scorer in SCORERS or not isinstance(scorer, str) or not scorer.isprintable() or not scorer:
            return cls(**settings)
        # a file's scorer need not be registered where the file is read: search_blocks asks for it
        config = cls(**{**settings, "scorer": cls.scorer})
        object.__setattr__(config, "scorer", scorer)
        return config

    @classmethod
    def load_layers(cls, path: str | os.PathLike[str]) -> dict[int, PrefillConfig]:
        """The config of each layer from a file that ``flexprefill calibrate`` or :func:`save_layers` wrote.

        Raises:
            FlexPrefillError: it is no such file.
            OSError: it cannot be read.
        """
        try:
            record = json.loads(Path(path).read_text("utf-8"))
            if record["format"] != LAYERS_FORMAT:
                raise ValueError(f"its format is {record['format']!r}")
            layers = record["layers"]
            if not isinstance(layers, list) or not layers:
                raise ValueError(f"its layers must be a list of settings for one layer or more, got {layers!r:.40}")
            return {layer: cls.from_dict(settings) for layer, settings in enumerate(layers)}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FlexPrefillError(f"{path} is no file of {LAYERS_FORMAT!r}: {error}") from None

    @classmethod
    def published(cls, model: str) -> PrefillConfig:
        """The setting published for a model, by a name such as ``meta-llama/Llama-3.1-8B-Instruct``.

        The names are the keys of ``flexprefill.config.PUBLISHED``; what stands before the name
        (an organisation) or after it (``-Instruct``) is ignored, and case does not matter.
        ``FlashPrefill-V2`` is the second paper's one setting for every model; its options are switched on by name,
        ``replace(config, mask_heads="kv", score_rows="visible", mean_correction=True)``. That paper also leaves the
        first four layers dense, which is the model's matter, not a mask's.

        Raises:
            TypeError: ``model`` is no string.
            ValueError: no published setting has this name.
        """
        if not isinstance(model, str):
            raise TypeError(f"model must be a string such as 'Llama-3.1-8B', got {model!r}")
        name = model.rsplit("/", 1)[-1].lower()
        matches = [known for known in PUBLISHED if f"-{known}-".lower() in f"-{name}-"]
        if not matches:
            raise ValueError(f"model {model!r} has no published setting; known are {sorted(PUBLISHED)}")
        return cls(**PUBLISHED[max(matches, key=len)])


def save_layers(path: str | os.PathLike[str], configs: Sequence[PrefillConfig], **notes: Any) -> None:
    """Writes a JSON file of a config for each layer, which :meth:`PrefillConfig.load_layers` reads.

    Args:
        configs: of layers 0, 1, …
        notes: whatever else the file is to say, for JSON.

    Raises:
        ValueError: there are no configs.
        OSError: the file cannot be written.
    """
    if not configs:
        raise ValueError("configs must be of one layer or more, got none")
    record = {"format": LAYERS_FORMAT, **notes, "layers": [config.to_dict() for config in configs]}
    Path(path).write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def check_config(config: PrefillConfig) -> None:
    """Raises TypeError unless config is a PrefillConfig."""
    if not isinstance(config, PrefillConfig):
        raise TypeError(f"config must be a PrefillConfig, got {type(config).__name__}; PrefillConfig(alpha=0.1) is one")


def check_alphas(config: PrefillConfig, heads: int, kv_heads: int) -> None:
    """Raises ValueError where alphas by head are not one for each, or differ among heads that share a mask."""
    if not isinstance(config.alpha, tuple):
        return
    if len(config.alpha) != heads:
        raise ValueError(
            f"config.alpha must be a number or one for each of the Hq={heads} query heads, got {len(config.alpha)}"
        )
    group = heads // kv_heads
    if config.mask_heads == "kv" and any(
        len(set(config.alpha[first : first + group])) > 1 for first in range(0, heads, group)
    ):
        raise ValueError(
            f'config.alpha must be the same for the {group} query heads that share a mask with mask_heads="kv", got '
            f"{config.alpha}"
        )
