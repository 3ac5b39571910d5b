"""The inputs: the tensors of one length, and the map that the search finds on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexprefill.blockmap.map import BlockMap
from flexprefill.config import PrefillConfig
from flexprefill.search.blocks import search_blocks

STRETCH = 500  # keys that share a direction
MAX_SEARCHES = 20
LEAST_TRIED_LOG2_ALPHA = -30.0
CLOSE_ENOUGH = 0.005  # of the asked density


@dataclass(frozen=True)
class Case:
    """One length's inputs. All contestants share them.

    Attributes:
        query: [1, Hq, S, D].
        key: [1, Hkv, S, D].
        value: [1, Hkv, S, D].
        config: The settings of the search that keeps ``block_map``.
        block_map: [1, Hq, M, M].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    config: PrefillConfig
    block_map: BlockMap

    @property
    def length(self) -> int:
        return self.query.shape[2]

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key head."""
        return self.query.shape[1] != self.key.shape[1]

    def everything(self) -> BlockMap:
        """The map of dense causal attention."""
        return BlockMap.causal(
            *self.query.shape[:2],
            q_len=self.length,
            kv_len=self.length,
            block_size=self.config.block_size,
            device=self.query.device,
        )


def make_qkv(
    length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value. Stretches of keys share a direction, so that blocks differ in mass."""
    generator = torch.Generator(device).manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    query = normal(1, heads, length, head_dim) + normal(1, heads, 1, head_dim)
    key = normal(1, kv_heads, length, head_dim)
    stretches = normal(1, kv_heads, length // STRETCH + 1, head_dim)
    key += stretches.repeat_interleave(STRETCH, 2)[:, :, :length]
    return query, key, normal(1, kv_heads, length, head_dim)


def random_map(heads: int, length: int, density: float, generator: torch.Generator) -> BlockMap:
    """Causal blocks of 128 by chance, and the diagonal, on the generator's device: [1, heads, M, M]."""
    device = generator.device
    causal = BlockMap.causal(1, heads, q_len=length, kv_len=length, block_size=128, device=device)
    blocks = causal.shape[2]
    chosen = torch.rand(1, heads, blocks, blocks, generator=generator, device=device) < density
    chosen |= torch.eye(blocks, dtype=torch.bool, device=device)
    return causal & BlockMap.from_dense(chosen, q_len=length, kv_len=length, block_size=128)


def make_case(qkv: tuple[Tensor, Tensor, Tensor], density: float, settings: PrefillConfig) -> Case:
    """The case whose map is nearest to a density, with ``settings`` except for alpha.

    alpha is bisected, in at most 20 searches. Sinks, window, last blocks and each row's best block are always kept. If
    they alone reach the density, alpha is 1.
    """
    query, key, value = qkv

    def searched(log2_alpha: float) -> tuple[float, PrefillConfig, BlockMap]:
        config = replace(settings, alpha=2.0**log2_alpha)
        block_map = search_blocks(query, key, config)
        return block_map.density().mean().item(), config, block_map

    found, config, block_map = searched(0.0)
    low, high = LEAST_TRIED_LOG2_ALPHA, 0.0
    nearest, best = abs(found - density), Case(query, key, value, config, block_map)
    if found < density:
        for _ in range(MAX_SEARCHES - 1):
            middle = (low + high) / 2
            found, config, block_map = searched(middle)
            if abs(found - density) < nearest:
                nearest, best = abs(found - density), Case(query, key, value, config, block_map)
            if nearest <= CLOSE_ENOUGH * density:
                break
            low, high = (middle, high) if found > density else (low, middle)
    return best
