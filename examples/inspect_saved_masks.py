"""Masks as data: saved by layer, read back by layer and head, compared. Runs on the CPU in seconds.

    python examples/inspect_saved_masks.py [FILE]

With a FILE (``flexprefill demo`` makes flexprefill-demo/masks.safetensors) it shows that file's masks.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from flexprefill import PrefillConfig, load_masks, read_mask_info, save_masks, search_blocks


def make_file(path: Path) -> None:
    """Two layers of random attention, with some structure in the keys."""
    torch.manual_seed(0)
    config = PrefillConfig(alpha=0.5)
    masks = {}
    for layer in range(2):
        query = torch.randn(1, 4, 3000, 64) + torch.randn(1, 4, 1, 64)
        key = torch.randn(1, 2, 3000, 64) + torch.randn(1, 2, 10, 64).repeat_interleave(300, 2)
        masks[layer] = search_blocks(query, key, config)
    save_masks(path, masks, config=config, metadata={"text": "random"})


def show(path: Path) -> None:
    info = read_mask_info(path)
    print(f"{path.name}: format {info.format_version}, {info.config}, {info.metadata}")
    for layer, block_map in load_masks(path).items():
        print(f"layer {layer}: {block_map}")
        for head, density in enumerate(block_map.density()[0].tolist()):
            widest = block_map.counts()[0, head].max().item()
            print(f"  head {head}: density {density:.1%}, at most {widest} key blocks in a row of blocks")
        first = load_masks(path, layers=[layer], heads=[0])[layer]
        for head in range(1, block_map.shape[1]):
            other = load_masks(path, layers=[layer], heads=[head])[layer]
            shared = (first & other).counts().sum() / (first | other).counts().sum()
            print(f"  heads 0 and {head} share {shared:.1%} of the blocks that either keeps")


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("file", type=Path, nargs="?", help="a file that save_masks wrote (default: one made for this)")
file = parser.parse_args().file
if file:
    show(file)
else:
    with tempfile.TemporaryDirectory() as folder:
        make_file(Path(folder, "masks.safetensors"))
        show(Path(folder, "masks.safetensors"))
