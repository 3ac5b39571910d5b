"""Maps kept: in memory (cache), of a model's run (recording), and in safetensors files (docs/reference/format.md)."""

from flexprefill.store.contents import MaskFileInfo
from flexprefill.store.reading import load_masks, read_mask_info
from flexprefill.store.writing import save_masks

__all__ = ["MaskFileInfo", "load_masks", "read_mask_info", "save_masks"]
