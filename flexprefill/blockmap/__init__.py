"""BlockMap, its bits, and what they become: index lists, BlockMasks, pictures."""
