"""A user's program over the public names, for mypy --strict: what the calls return depends on their arguments."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask

import flexprefill
from flexprefill import (
    AttentionVariant,
    BlockMap,
    KeyMeans,
    ListBuffers,
    MaskCache,
    PagedKV,
    PageMeans,
    PrefillConfig,
    Sequences,
)


def main(path: Path) -> None:
    query, key, value = torch.randn(1, 4, 256, 64), torch.randn(1, 2, 256, 64), torch.randn(1, 2, 256, 64)
    config = PrefillConfig(alpha=0.1, block_size=64)
    window = AttentionVariant(sliding_window=128, soft_cap=30.0)
    padded = AttentionVariant(Sequences.from_lengths(torch.tensor([200]), 256, padding="left"))

    kept: BlockMap = flexprefill.search_blocks(query, key, config, variant=window, means=KeyMeans())
    both: BlockMap = kept & flexprefill.search_blocks(query, key, config)
    mask: BlockMask = both & flexprefill.create_prefill_block_mask(query, key, config, variant=padded)
    other: BlockMap = (BlockMap.from_block_mask(mask) | kept) ^ both
    dense: Tensor = other.to_dense()
    rebuilt: BlockMap = BlockMap.from_dense(dense, q_len=256, kv_len=256, block_size=64)
    documents: BlockMask = rebuilt.with_mask(lambda b, h, q_idx, kv_idx: q_idx // 100 == kv_idx // 100)
    shape: tuple[int, int, int, int] = rebuilt.shape

    output: Tensor = flexprefill.prefill_attention(query, key, value, config, mask_mod=documents)
    again: tuple[Tensor, AuxOutput] = flexprefill.prefill_attention(
        query, key, value, config, block_map=kept, return_aux=AuxRequest(lse=True), buffers=ListBuffers()
    )
    paged = PagedKV(torch.randn(4, 2, 64, 64), torch.randn(4, 2, 64, 64), torch.tensor([[2, 0, 3, 1]]), 256)
    in_place: Tensor = flexprefill.prefill_attention(query, paged, config=config, means=PageMeans())
    gathered: tuple[Tensor, Tensor] = paged.gather()
    same: BlockMap = flexprefill.search_blocks(query, paged, config) & flexprefill.search_blocks(
        query, gathered[0], config
    )

    choice: flexprefill.BackendChoice = flexprefill.explain_backend(query, key, value, config, variant=window)
    found: BlockMap = MaskCache().prompt([1, 2, 3] * 90).search_blocks(0, query, key, config)
    guarded, report = flexprefill.guard_blocks(query, key, found, PrefillConfig(block_size=64, guard=0.9))
    flexprefill.save_masks(path, {0: guarded}, config=config, metadata={"by": choice.name})
    info: flexprefill.MaskFileInfo = flexprefill.read_mask_info(path)
    loaded: dict[int, BlockMap] = flexprefill.load_masks(path, layers=[0])
    recall: flexprefill.Recall = flexprefill.attention_recall(query, key, loaded[0])
    mass: flexprefill.DistanceMass = flexprefill.mass_by_distance(query, key, edges=[64], variant=window)
    print(in_place.shape, same.shape)
    print(shape, output.shape, again[1].lse, report.widened, info.layers, recall.mean, mass.beyond(64))


if __name__ == "__main__":
    main(Path("masks.safetensors"))
