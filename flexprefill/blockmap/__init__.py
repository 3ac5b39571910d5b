"""BlockMap, its bits, and what they become: index lists, BlockMasks, pictures."""

from flexprefill.blockmap.geometry import Geometry
from flexprefill.blockmap.index_lists import ListBuffers
from flexprefill.blockmap.map import BlockMap

__all__ = ["BlockMap", "Geometry", "ListBuffers"]
