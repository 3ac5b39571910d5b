"""Mask files: a safetensors file with one tensor of words a layer, and the sizes and settings as metadata."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flexprefill.blockmap import BlockMap, causal_blocks, pack_bits
from flexprefill.config import PrefillConfig
from flexprefill.errors import MaskFileError

FORMAT = "flexprefill-masks"
FORMAT_VERSION = 1
SIZES = ("q_len", "kv_len", "block_size")


@dataclass(frozen=True)
class MaskFileInfo:
    """What a mask file says of itself, read without its masks.

    Attributes:
        format_version: of the file.
        config: the settings that made the masks, or None if they were not given.
        layers: per layer its ``q_len``, ``kv_len``, ``block_size`` and ``shape`` (B, H).
        metadata: the caller's own entries.
    """

    format_version: int
    config: PrefillConfig | None
    layers: dict[int, dict[str, Any]]
    metadata: dict[str, str]


def save_masks(
    path: str | os.PathLike[str],
    masks: Mapping[int, BlockMap],
    *,
    config: PrefillConfig | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Saves maps by layer into one safetensors file, which appears whole or not at all.

    Args:
        path: the file; one that exists is replaced.
        masks: layer number to map; maps may differ in lengths, heads and device.
        config: the settings that made the masks, kept in the file.
        metadata: the caller's own entries, str to str, kept in the file.

    Raises:
        TypeError, ValueError: ``masks``, ``config`` or ``metadata`` are not of these kinds.
        OSError: the file cannot be written.
    """
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks must be a mapping of layer numbers to BlockMaps, got {type(masks).__name__}")
    if not masks:
        raise ValueError("masks must hold at least one layer, got none")
    for layer, block_map in masks.items():
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"masks must have layer numbers as keys, got {layer!r}")
        if layer < 0:
            raise ValueError(f"masks must have layer numbers from 0 up as keys, got {layer}")
        if not isinstance(block_map, BlockMap):
            raise TypeError(f"masks[{layer}] must be a BlockMap, got {type(block_map).__name__}")
    if config is not None and not isinstance(config, PrefillConfig):
        raise TypeError(f"config must be a PrefillConfig or None, got {type(config).__name__}")
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a mapping of str to str or None, got {type(metadata).__name__}")
    for name, entry in metadata.items():
        if not isinstance(name, str) or not isinstance(entry, str):
            raise TypeError(f"metadata must map str to str, got {name!r}: {entry!r}")

    layers = {
        str(layer): {size: int(getattr(block_map, size)) for size in SIZES} | {"shape": block_map.shape[:2]}
        for layer, block_map in sorted(masks.items())
    }
    header = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps(config and config.to_dict()),
        "layers": json.dumps(layers),
        "user": json.dumps(dict(metadata)),
    }
    # copies: a map may stand in two layers, and safetensors refuses tensors that share memory
    tensors = {
        _tensor_name(layer): block_map.words.to("cpu", copy=True).contiguous() for layer, block_map in masks.items()
    }
    path = Path(os.path.realpath(_checked_path(path)))  # a link stays one, and its target is replaced
    if path.exists() and not path.is_file():
        raise ValueError(f"path must be a file or not exist yet, got {path}")
    with tempfile.TemporaryDirectory(prefix=".flexprefill-", dir=path.parent) as folder:
        whole, plain = Path(folder, "masks"), Path(folder, "plain")
        save_file(tensors, whole, header)
        plain.touch()
        whole.chmod(plain.stat().st_mode)  # safetensors writes for the owner alone; this is what the umask says
        os.replace(whole, path)


def load_masks(
    path: str | os.PathLike[str],
    *,
    layers: Iterable[int] | None = None,
    heads: Iterable[int] | None = None,
    device: torch.device | str = "cpu",
) -> dict[int, BlockMap]:
    """The maps of a file by layer.

    Args:
        path: a file that :func:`save_masks` wrote.
        layers: only these layers; the others are not read.
        heads: only these heads of each layer, in this order.
        device: where to put the maps.

    Raises:
        MaskFileError: the file is missing, truncated, of another kind or of a newer format, or inconsistent.
        TypeError: ``layers`` or ``heads`` is no list of ints.
        ValueError: the file has no such layer or head.
    """
    layers, heads = _number_list("layers", layers), _number_list("heads", heads)
    with _opened(path) as file:
        info = _read_info(path, file)
        chosen = list(info.layers) if layers is None else layers
        missing = [layer for layer in chosen if layer not in info.layers]
        if missing:
            raise ValueError(f"layers has {missing}, but {path} holds {list(info.layers)}")
        return {layer: _load_layer(path, file, info, layer, heads).to(device) for layer in chosen}


def read_mask_info(path: str | os.PathLike[str]) -> MaskFileInfo:
    """What a mask file says of itself: format version, settings, sizes by layer, the caller's metadata.

    Raises:
        MaskFileError: as :func:`load_masks`.
    """
    with _opened(path) as file:
        return _read_info(path, file)


def _tensor_name(layer: int) -> str:
    return f"layer.{layer}"


def _number_list(name: str, numbers: Iterable[int] | None) -> list[int] | None:
    if numbers is None:
        return None
    listed = list(numbers) if isinstance(numbers, Iterable) and not isinstance(numbers, (str, bytes)) else [None]
    if not all(type(number) is int for number in listed):
        raise TypeError(f"{name} must be a list of ints or None, got {numbers!r}")
    if not listed or len(set(listed)) < len(listed):
        raise ValueError(f"{name} must name at least one and none twice, got {listed}")
    return listed


def _checked_path(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a file name, got {type(path).__name__}")
    return path


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    try:
        with safe_open(_checked_path(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise MaskFileError(f"{path} is no readable mask file: {error}") from error


def _read_info(path: str | os.PathLike[str], file: Any) -> MaskFileInfo:
    header = file.metadata() or {}
    if header.get("format") != FORMAT:
        raise MaskFileError(f"{path} is a safetensors file, but not one of masks (format {header.get('format')!r})")
    try:
        version = int(header["format_version"])
    except (KeyError, ValueError):
        raise MaskFileError(f"{path} has no valid format_version: {header.get('format_version')!r}") from None
    if not 1 <= version <= FORMAT_VERSION:
        raise MaskFileError(
            f"{path} has format version {version}, and this version of flexprefill reads 1 to {FORMAT_VERSION}: "
            "a newer one may read it"
        )
    try:
        settings = json.loads(header["config"])
        config = None if settings is None else PrefillConfig.from_dict(settings)
        layers = {int(layer): _checked_sizes(sizes) for layer, sizes in json.loads(header["layers"]).items()}
        user = json.loads(header["user"])
        if not isinstance(user, dict) or not all(isinstance(entry, str) for entry in user.values()):
            raise ValueError(f"user metadata must map str to str, got {user!r}")
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise MaskFileError(f"{path} has a damaged header: {error!r}") from error
    if {_tensor_name(layer) for layer in layers} != set(file.keys()):
        raise MaskFileError(f"{path} lists layers {list(layers)}, but holds the tensors {sorted(file.keys())}")
    return MaskFileInfo(version, config, layers, user)


def _checked_sizes(sizes: dict[str, Any]) -> dict[str, Any]:
    batch, heads = sizes["shape"]
    numbers = [sizes[name] for name in SIZES] + [batch, heads]
    if not all(type(number) is int and 0 < number < 2**31 for number in numbers):
        raise ValueError(f"sizes must be positive integers, got {sizes}")
    return {name: sizes[name] for name in SIZES} | {"shape": (batch, heads)}


def _load_layer(
    path: str | os.PathLike[str], file: Any, info: MaskFileInfo, layer: int, heads: list[int] | None
) -> BlockMap:
    sizes = info.layers[layer]
    lengths = {name: sizes[name] for name in SIZES}
    stored = file.get_slice(_tensor_name(layer))
    if stored.get_dtype() != "I32" or tuple(stored.get_shape()[:2]) != sizes["shape"]:
        raise MaskFileError(
            f"{path}: layer {layer} should be int32 of shape {sizes['shape']} and two block sizes, "
            f"got {stored.get_dtype()} {stored.get_shape()}"
        )
    if heads is None:
        words = file.get_tensor(_tensor_name(layer))
    else:
        outside = [head for head in heads if not 0 <= head < sizes["shape"][1]]
        if outside:
            raise ValueError(
                f"heads must be some of 0 … {sizes['shape'][1] - 1} for layer {layer} of {path}, got {heads}"
            )
        words = torch.cat([stored[:, head : head + 1] for head in heads], dim=1)
    try:
        block_map = BlockMap(words, **lengths)
    except (TypeError, ValueError) as error:
        raise MaskFileError(f"{path}: layer {layer} does not fit its sizes: {error}") from error
    allowed = pack_bits(causal_blocks(**lengths, device="cpu"))
    if (words & ~allowed).any():
        raise MaskFileError(f"{path}: layer {layer} keeps blocks in the causal future or past the end")
    return block_map
