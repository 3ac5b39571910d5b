"""What a mask file says of its maps: the strings in its header, and which tensors follow from them.

Only what is written needs torch, and imports it: a header is read without.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flexprefill._version import __version__
from flexprefill.blockmap.geometry import WORD_BITS, Geometry, ceil_div
from flexprefill.config import PrefillConfig, check_config
from flexprefill.store.container import Entry, is_object, is_text, parse_json, parse_object
from flexprefill.store.tokens import check_token_texts, check_tokens_fit, token_tensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMAT = "flexprefill-masks"
FORMAT_VERSION = 2
SCORING = {"flashprefill": "flashprefill-v1"}  # by scorer; others go by their own names
TABLES = ("density", "crc32", "checksums")  # of version 2, after the layers


@dataclass(frozen=True)
class MaskFileInfo:
    """What a mask file says of itself, read without its masks.

    What version 1 files do not have, and what was not given to :func:`save_masks`, is None or empty.

    Attributes:
        format_version: of the file.
        config: the settings that made the masks.
        layers: per layer its ``q_len``, ``kv_len``, ``block_size`` and ``shape`` (B, H).
        metadata: the caller's own entries.
        model: the model's name.
        config_hash: SHA-256 of ``config``'s canonical JSON, in hexadecimal.
        token_ids_hash: SHA-256 of the prompt's token ids, in hexadecimal.
        tokens: the prompt's text, one string for each key, if it was saved; private, and not in the ``repr``.
        dtype: of the queries and keys, such as "bfloat16".
        scoring: the rule that scored the blocks.
        library: the versions of flexprefill, torch and safetensors that wrote the file.
        density: per layer the kept share of the causally visible blocks, ``density[layer][b][head]``.
    """

    format_version: int
    config: PrefillConfig | None
    layers: dict[int, dict[str, Any]]
    metadata: dict[str, str]
    model: str | None = None
    config_hash: str | None = None
    token_ids_hash: str | None = None
    tokens: tuple[str, ...] | None = field(default=None, repr=False)
    dtype: str | None = None
    scoring: str | None = None
    library: dict[str, str] = field(default_factory=dict)
    density: dict[int, tuple[tuple[float, ...], ...]] = field(default_factory=dict)


def describe(
    config: PrefillConfig | None,
    metadata: Mapping[str, str] | None,
    model: str | None,
    token_ids: Tensor | Sequence[int] | None,
    tokens: Sequence[str] | None,
    dtype: torch.dtype | None,
) -> dict[str, str]:
    """The header's strings, all but the layers, for these arguments of :func:`save_masks`.

    Raises:
        TypeError, ValueError: an argument is not of its kind.
    """
    import safetensors
    import torch

    if config is not None:
        check_config(config)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None, got {dtype!r}")
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a mapping of str to str or None, got {type(metadata).__name__}")
    for name, entry in metadata.items():
        if not isinstance(name, str) or not isinstance(entry, str):
            raise TypeError(f"metadata must map str to str, got {name!r}: {entry!r}")
    scorer = PrefillConfig.scorer if config is None else config.scorer
    library = {"flexprefill": __version__, "torch": torch.__version__, "safetensors": safetensors.__version__}
    return {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps(config and config.to_dict()),
        "config_hash": "" if config is None else hash_config(config),
        "model": "" if model is None else check_model_name(model),
        "token_ids_hash": "" if token_ids is None else hash_token_ids(token_ids),
        "scoring": SCORING.get(scorer, scorer),
        "library": json.dumps(library),
        "dtype": "" if dtype is None else str(dtype).removeprefix("torch."),
        "user": json.dumps(dict(metadata)),
    } | ({} if tokens is None else {"tokens": json.dumps(check_token_texts(tokens))})


def read_description(strings: Mapping[str, str]) -> MaskFileInfo:
    """The inverse of :func:`describe` for the header's strings, layers included and densities left out.

    Raises:
        ValueError, TypeError, RecursionError: they are not those of a mask file of a version known here.
    """
    if strings.get("format") != FORMAT:
        raise ValueError(f"it is a safetensors file, but not one of masks (format {strings.get('format')!r})")
    written = strings.get("format_version", "")
    if not re.fullmatch("[1-9][0-9]{0,8}", written):
        raise ValueError(f"it has no valid format_version: {written!r}")
    version = int(written)
    if version > FORMAT_VERSION:
        raise ValueError(
            f"it has format version {version}, and this version of flexprefill reads 1 to {FORMAT_VERSION}: "
            "a newer one may read it"
        )
    required = {"config", "layers", "user"}
    if version > 1:
        required |= {"config_hash", "model", "token_ids_hash", "scoring", "library", "dtype"}
    if missing := sorted(required - strings.keys()):
        raise ValueError(f"its header lacks {missing}")
    settings = parse_json(strings["config"])
    config = None if settings is None else PrefillConfig.from_dict(settings)
    layers = {
        _checked_layer(layer): _checked_sizes(sizes)
        for layer, sizes in parse_object(strings["layers"], of=is_object).items()
    }
    if not layers or list(layers) != sorted(layers):
        raise ValueError(f"its layers must be at least one and ascending, got {list(layers)}")
    user = parse_object(strings["user"], of=is_text)
    if version == 1:
        return MaskFileInfo(version, config, layers, user)
    if strings["config_hash"] != ("" if config is None else hash_config(config)):
        raise ValueError(f"its config_hash {strings['config_hash']!r} is not that of its config {strings['config']}")
    return MaskFileInfo(
        version,
        config,
        layers,
        user,
        model=strings["model"] or None,
        config_hash=strings["config_hash"] or None,
        token_ids_hash=strings["token_ids_hash"] or None,
        tokens=_read_tokens(strings["tokens"], layers) if "tokens" in strings else None,
        dtype=strings["dtype"] or None,
        scoring=strings["scoring"] or None,
        library=parse_object(strings["library"], of=is_text),
    )


def _read_tokens(text: str, layers: Mapping[int, Mapping[str, Any]]) -> tuple[str, ...]:
    tokens = check_token_texts(parse_json(text))
    for layer, sizes in layers.items():
        check_tokens_fit(len(tokens), layer, sizes)
    return tuple(tokens)


def geometry_of(sizes: Mapping[str, Any]) -> Geometry:
    """Of a layer's entry in :attr:`MaskFileInfo.layers`."""
    return Geometry(sizes["q_len"], sizes["kv_len"], sizes["block_size"])


def tensor_name(layer: int) -> str:
    return f"layer.{layer}"


def words_shape(geometry: Geometry) -> tuple[int, int]:
    """(M, W): rows of a head, and words in a row."""
    return geometry.rows, ceil_div(geometry.columns, WORD_BITS)


def triangle_bits(geometry: Geometry) -> int:
    """The sum of :func:`visible_blocks`, in constant time whatever the sizes are."""
    rows = geometry.rows
    before = ceil_div(geometry.offset, geometry.block_size)  # row I < rows - 1 sees before + I + 1 blocks, the last all
    return (rows - 1) * before + rows * (rows - 1) // 2 + geometry.columns


def triangle_bytes(geometry: Geometry) -> int:
    """Bytes of a head's stream: its visible blocks, row after row, a bit each; zero bits fill the last byte."""
    return ceil_div(triangle_bits(geometry), 8)


def planned_tensors(version: int, layers: Mapping[int, Mapping[str, Any]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor of a file with these layers, in the order of version 2's bytes."""
    plan: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer, sizes in layers.items():
        geometry = geometry_of(sizes)
        if version == 1:
            plan[tensor_name(layer)] = "I32", (*sizes["shape"], *words_shape(geometry))
        else:
            plan[tensor_name(layer)] = "U8", (*sizes["shape"], triangle_bytes(geometry))
    if version > 1:
        heads = sum(math.prod(sizes["shape"]) for sizes in layers.values())
        plan |= dict(zip(TABLES, (("F32", (heads,)), ("U32", (heads,)), ("U32", (2,))), strict=True))
    return plan


def check_entries(info: MaskFileInfo, entries: Mapping[str, Entry]) -> None:
    """Raises ValueError unless the tensors of a file, which fill it, are those that its layers demand."""
    plan = planned_tensors(info.format_version, info.layers)
    for name in [*plan, *(entries.keys() - plan.keys())]:
        found = (entries[name].dtype, entries[name].shape) if name in entries else None
        if found != plan.get(name):
            raise ValueError(f"tensor {name!r} should be {plan.get(name)} by its list of layers, got {found}")
    if info.format_version > 1 and sorted(entries, key=lambda name: entries[name].start) != list(plan):
        raise ValueError(f"its tensors should follow each other as {list(plan)}")


def check_model_name(model: str) -> str:
    """The model's name; raises unless it can stand in a file."""
    if not isinstance(model, str):
        raise TypeError(f"model must be a name or None, got {model!r}")
    if not model or not model.isprintable():
        raise ValueError(f"model must be a name of printable characters, got {model!r}")
    return model


def hash_config(config: PrefillConfig) -> str:
    """SHA-256 of the settings as JSON with sorted names and no spaces, in hexadecimal."""
    canonical = json.dumps(config.to_dict(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def hash_token_ids(token_ids: Tensor | Sequence[int]) -> str:
    """SHA-256 of the token ids as little-endian int64, in hexadecimal; their shape does not count."""
    tokens = token_tensor(token_ids)
    if not tokens.numel():
        raise ValueError("token_ids must hold at least one token, got none")
    import torch

    data = bytearray(8 * tokens.numel())
    torch.frombuffer(data, dtype=torch.int64).copy_(tokens.flatten())
    return hashlib.sha256(data).hexdigest()


def _checked_layer(text: str) -> int:
    if not re.fullmatch("0|[1-9][0-9]{0,9}", text):
        raise ValueError(f"its layers must have numbers, got {text!r}")
    return int(text)


def _checked_sizes(sizes: dict[str, Any]) -> dict[str, Any]:
    if sizes.keys() != {*Geometry._fields, "shape"}:
        raise ValueError(f"a layer must have {Geometry._fields} and shape, got {list(sizes)}")
    shape = sizes["shape"]
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise ValueError(f"a layer's shape must be two numbers from 1 to 2**31 - 1, got {shape!r}")
    geometry = geometry_of(sizes)
    geometry.check()
    return geometry._asdict() | {"shape": tuple(shape)}
