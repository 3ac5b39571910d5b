"""Maps kept: in memory (cache), of a model's run (recording), and in safetensors files (docs/reference/format.md)."""

from flexprefill.store.contents import MaskFileInfo
from flexprefill.store.header import read_mask_info

__all__ = ["MaskFileInfo", "read_mask_info"]
