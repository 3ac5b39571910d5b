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

CHOICES = {
    "block_size": (16, 32, 64, 128),
    "mask_heads": ("query", "kv"),
    "score_rows": ("whole", "visible"),
    "probe_rows": (0, 1, 2, 4, 8, 16),
    "outlier_keys": (0, 1, 2),
}
FIRST_SETTINGS = ("alpha", "block_size", "sink_blocks", "window_blocks", "last_full_blocks", "min_blocks")

# by name; search/scorers.py puts the functions in, and register_scorer adds to it
SCORERS: dict[str, Any] = dict.fromkeys(("flashprefill", "xattention", "exact"))

LAYERS_FORMAT = "flexprefill layers 1"  # of files with a config for each layer

# FlashPrefill (arXiv 2603.06199). The last row is from FlashPrefill-V2 (arXiv 2608.19758).
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {"alpha": 0.18},
    "Qwen2.5-7B": {"alpha": 0.08},
    "Qwen3-30B-A3B": {"alpha": 0.12},
    "Qwen2.5-VL": {"alpha": 0.10},
    "Qwen3-VL": {"alpha": 0.22},
    "FlashPrefill-V2": {"alpha": 0.1, "last_full_blocks": 8},
}


def plain_number(value: Any) -> Any:
    """A number of another kind, such as NumPy's, as Python's own. Anything else is returned as it is."""
    if type(value) in (bool, int, float) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_whole(name: str, number: object, least: int, wanted: str = "an int") -> None:
    """Raises unless it is a whole number from ``least`` on that fits into 32 bits."""
    if type(number) is not int:
        import torch  # not at the top: a mask file's header is read without

        if isinstance(number, bool) or not isinstance(number, (int, torch.SymInt)):
            raise TypeError(f"{name} must be {wanted}, got {number!r}")
    if not least <= number < 2**31:
        raise ValueError(f"{name} must be at least {least} and below 2**31, got {number}")


def check_number(name: str, number: object, wanted: str) -> None:
    """Raises TypeError unless it is an int or a float."""
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} must be {wanted}, got {number!r}")


def check_name(name: str, string: object) -> None:
    """Raises TypeError unless it is a string that can name a scorer."""
    if not isinstance(string, str) or not string.isprintable() or not string:
        raise TypeError(f"{name} must be a string that names a scorer, such as 'flashprefill', got {string!r}")


@dataclass(frozen=True)
class PrefillConfig:
    """Which blocks of the attention matrix a prompt keeps (FlashPrefill, arXiv 2603.06199).

    A block (I, J) is query block I against key block J. A causally visible block is kept if it is a sink, in the
    window, in one of the last query blocks, among the ``min_blocks`` best of its row, or if its score is high enough.
    Probes and outliers, where they are asked for, keep more (docs/explanations/two_sided.md).

    Args:
        alpha: The least score that keeps a block, as a share of the best score of query block I. In (0, 1]. Smaller
            keeps more. A tuple has one number for each query head. Heads that share a mask must have the same number.
            None scores no means: probes or outliers then decide alone.
        block_size: Edge of a block in tokens: 16, 32, 64 or 128.
        sink_blocks: Every query block keeps the first ``sink_blocks`` key blocks.
        window_blocks: Every query block keeps its nearest ``window_blocks`` key blocks. They are counted back from the
            key block of its last row. With 0, a row of an offset chunk can be left without keys. It then outputs
            zeros.
        last_full_blocks: The last ``last_full_blocks`` query blocks of the prompt keep everything.
        min_blocks: Every query block keeps its ``min_blocks`` best scores, ties included. 0 turns this off.
        dense_below: `prefill_attention` attends densely to prompts of fewer tokens (S_kv), with the exceptions that it
            lists. 0 means never. None takes the length from which the sparse path was measured to be faster on this
            device, or 0 where nothing was measured. It does not change what a search keeps.
        mask_heads: "query" makes a mask for each query head. "kv" makes one mask for the query heads that share a key
            head, from the scores of all their rows together (FlashPrefill-V2, arXiv 2608.19758). Maps have H = Hq
            either way.
        score_rows: Which rows of I give a score to J. "whole": those that see all of J. "visible": those that see J's
            first key, as in FlashPrefill-V2, so all rows score the blocks on the causal edge. The scorers "xattention"
            and "exact" are "visible" by their own definitions.
        scorer: Name of the function that scores the blocks: "flashprefill", "xattention", "exact", or one that was
            registered with `register_scorer`. See docs/explanations/scorers.md.
        mean_correction: Dropped blocks answer with their mean key and value where every row of I sees the whole block
            (FlashPrefill-V2; docs/explanations/mean_correction.md). It does not change what a search keeps.
        guard: The least share of the attention mass that the kept blocks of each head must hold, in (0, 1). It is
            measured on sampled rows. A head that holds less keeps all blocks (docs/explanations/guard.md). None turns
            it off. With ``probe_rows`` it is measured on the probes.
        probe_rows: So many rows of each query block attend exactly to all keys: 0, 1, 2, 4, 8 or 16. Half of them are
            spread evenly, half are the rows farthest from the block's mean. Rows of blocks that see more than 64 key
            blocks have fewer probes.
        probe_share: The least mean share of its probes' attention for which a query block keeps a key block, in (0, 1].
        outlier_keys: So many keys of each key block, the farthest from its mean, are scored by themselves: 0, 1 or 2.
        outlier_share: The least estimated share of one row's attention for which an outlier keeps its block, in (0, 1].

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A setting is out of range.
    """

    alpha: float | tuple[float, ...] | None = 0.1
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
    probe_rows: int = 0
    probe_share: float = 0.01
    outlier_keys: int = 0
    outlier_share: float = 0.3

    def __post_init__(self) -> None:
        for name, setting in vars(self).items():
            if (plain := plain_number(setting)) is not setting:
                object.__setattr__(self, name, plain)
        if isinstance(self.alpha, (list, tuple)):  # a list as JSON has it
            object.__setattr__(self, "alpha", tuple(map(plain_number, self.alpha)))
        if self.alpha == ():
            raise ValueError("alpha must be a number in (0, 1], or one for each query head, got ()")
        for alpha in self._alphas:
            check_number("alpha", alpha, "a number in (0, 1], or one for each query head, or None")
            if not 0 < alpha <= 1:  # false for NaN as well
                raise ValueError(f"alpha must be in (0, 1], got {alpha!r}")
        for name in FIRST_SETTINGS[1:]:
            check_whole(name, getattr(self, name), 0)
        if self.dense_below is not None:
            check_whole("dense_below", self.dense_below, 0)
        for name in ("probe_rows", "outlier_keys"):
            check_whole(name, getattr(self, name), 0)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        check_name("scorer", self.scorer)
        if self.scorer not in SCORERS:
            raise ValueError(
                f"scorer must be one of {sorted(SCORERS)}, got {self.scorer!r}; register_scorer makes another one known"
            )
        if not isinstance(self.mean_correction, bool):
            raise TypeError(f"mean_correction must be a bool, got {self.mean_correction!r}")
        if self.guard is not None:
            check_number("guard", self.guard, "a number in (0, 1) or None")
            if not 0 < self.guard < 1:
                raise ValueError(f"guard must be in (0, 1), got {self.guard!r}")
        for name in ("probe_share", "outlier_share"):
            check_number(name, getattr(self, name), "a number in (0, 1]")
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {getattr(self, name)!r}")
        self._check_together()

    def _check_together(self) -> None:
        """Raises ValueError where settings do not go together."""
        if self.alpha is None and not self.two_sided:
            raise ValueError("alpha must be a number where probe_rows and outlier_keys are 0, got None")
        if self.alpha is None and self.min_blocks:
            raise ValueError(
                f"min_blocks must be 0 where alpha is None, because no scores are compared, got {self.min_blocks}"
            )
        if self.two_sided and self.scorer != "flashprefill":
            raise ValueError(
                "probe_rows and outlier_keys go with the scorer 'flashprefill', "
                f"got {self.probe_rows} and {self.outlier_keys} with {self.scorer!r}"
            )
        if self.probe_rows > self.block_size:
            raise ValueError(
                f"probe_rows must be at most block_size, got {self.probe_rows} with block_size={self.block_size}"
            )

    @property
    def two_sided(self) -> bool:
        """Whether probes or outliers look for blocks too."""
        return bool(self.probe_rows or self.outlier_keys)

    @property
    def log2_alphas(self) -> tuple[float, ...]:
        """The distance from a row's best score to its threshold, in log2: one for all query heads, or one for each.

        Infinity where no means are scored.
        """
        return tuple(map(math.log2, self._alphas)) or (math.inf,)

    @property
    def _alphas(self) -> tuple[float, ...]:
        if self.alpha is None:
            return ()
        return self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)

    def to_dict(self) -> dict[str, Any]:
        """The settings as a plain dictionary, ready for JSON. Those from ``dense_below`` on are left out at default."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        # so the hash of a mask file does not change when the library gets a new setting
        return {
            name: setting
            for name, setting in dataclasses.asdict(self).items()
            if name in FIRST_SETTINGS or setting != defaults[name]
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> PrefillConfig:
        """The config that `to_dict` gave. Settings that are left out take their defaults.

        Raises:
            TypeError: ``settings`` is no mapping.
            ValueError: A name is no setting.
        """
        if not isinstance(settings, Mapping):
            raise TypeError(f"settings must be a mapping of names to settings, got {type(settings).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(str(name) for name in set(settings) - set(known))
        if unknown:
            raise ValueError(f"settings has unknown names {unknown}; known are {known}")
        scorer = settings.get("scorer", cls.scorer)
        check_name("scorer", scorer)
        # a file can be read where its scorer is not registered: search_blocks asks for it
        config = cls(**{**settings, "scorer": cls.scorer})
        object.__setattr__(config, "scorer", scorer)
        return config

    @classmethod
    def load_layers(cls, path: str | os.PathLike[str]) -> dict[int, PrefillConfig]:
        """The config of each layer, from a file that ``flexprefill calibrate`` or `save_layers` wrote.

        Raises:
            FlexPrefillError: It is no such file.
            OSError: It cannot be read.
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
    def recommended(cls) -> PrefillConfig:
        """The setting that loses least of a pretrained model's tokens at equal time (docs/explanations/two_sided.md).

        It is the default of calls that name no setting. Blocks are found by eight probes of each query block and by one
        outlier of each key block. Means are not scored. It finds what a single key holds, which FlashPrefill's score
        does not. Its search takes longer.
        """
        return cls(
            alpha=None,
            sink_blocks=1,
            window_blocks=2,
            last_full_blocks=1,
            probe_rows=8,
            probe_share=0.015,
            outlier_keys=1,
            outlier_share=0.5,
        )

    @classmethod
    def published(cls, model: str) -> PrefillConfig:
        """The setting published for a model, by a name such as ``meta-llama/Llama-3.1-8B-Instruct``.

        The names are the keys of ``flexprefill.config.PUBLISHED``. An organisation before the name and an ending such
        as ``-Instruct`` are ignored. Case does not matter.

        ``FlashPrefill-V2`` is the second paper's one setting for every model. Its options are switched on by name:
        ``replace(config, mask_heads="kv", score_rows="visible", mean_correction=True)``. That paper also leaves the
        first four layers dense. A mask cannot say that: the model has to.

        Raises:
            TypeError: ``model`` is no string.
            ValueError: No published setting has this name.
        """
        if not isinstance(model, str):
            raise TypeError(f"model must be a string such as 'Llama-3.1-8B', got {model!r}")
        name = model.rsplit("/", 1)[-1].lower()
        matches = [known for known in PUBLISHED if f"-{known}-".lower() in f"-{name}-"]
        if not matches:
            raise ValueError(
                f"model {model!r} has no published setting; known are {sorted(PUBLISHED)}. Others take "
                "PrefillConfig.recommended()"
            )
        return cls(**PUBLISHED[max(matches, key=len)])


def save_layers(path: str | os.PathLike[str], configs: Sequence[PrefillConfig], **notes: Any) -> None:
    """Writes a JSON file with a config for each layer. `PrefillConfig.load_layers` reads it.

    Args:
        path: The file to write.
        configs: Those of layers 0, 1, …
        **notes: Whatever else the file is to say, ready for JSON.

    Raises:
        ValueError: There are no configs.
        OSError: The file cannot be written.
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
