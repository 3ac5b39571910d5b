"""The search's BlockMask in your own flex_attention call. Runs on the CPU in about half a minute.

python examples/use_block_mask.py
"""

import argparse

import torch
from torch.nn.attention.flex_attention import flex_attention

from flexprefill import BlockMap, PrefillConfig, create_prefill_block_mask

argparse.ArgumentParser(description=__doc__).parse_args()

# outside torch.compile, flex_attention ignores the block lists and is dense
attend = torch.compile(flex_attention, fullgraph=True)

torch.manual_seed(0)
length, heads, kv_heads, head_dim = 4096, 4, 2, 64
# eight passages of 512 tokens on six topics: a query should find the earlier passage on its own
topics = torch.randn(1, kv_heads, 6, head_dim)[:, :, [0, 1, 2, 0, 3, 4, 1, 5]].repeat_interleave(512, 2)
key = topics + 0.5 * torch.randn(1, kv_heads, length, head_dim)
query = topics.repeat_interleave(heads // kv_heads, 1) + 0.5 * torch.randn(1, heads, length, head_dim)
value = torch.randn(1, kv_heads, length, head_dim)

block_mask = create_prefill_block_mask(query, key, PrefillConfig(alpha=0.1))
output = attend(query, key, value, block_mask=block_mask, enable_gqa=True)

dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
density = BlockMap.from_block_mask(block_mask).density()[0]
error = (output - dense)[0].flatten(1).norm(dim=1) / dense[0].flatten(1).norm(dim=1)
for head in range(heads):
    print(f"head {head}: {density[head]:.0%} of the causal blocks, output error {error[head]:.4f} against dense")
