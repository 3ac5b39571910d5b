"""Mask files: the maps of a model's layers in one safetensors file. docs/format.md is the format, byte by byte."""

from flexprefill.store.contents import MaskFileInfo
from flexprefill.store.reading import load_masks, read_mask_info
from flexprefill.store.writing import save_masks

__all__ = ["MaskFileInfo", "load_masks", "read_mask_info", "save_masks"]
