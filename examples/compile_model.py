"""A small decoder compiled into one graph, which builds its block masks inside. Runs on the CPU in a minute.

python examples/compile_model.py
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from flexprefill import PrefillConfig, create_prefill_block_mask


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, config: PrefillConfig):
        super().__init__()
        self.heads, self.kv_heads, self.config = heads, kv_heads, config
        self.head_dim = width // heads
        self.project = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)  # [B, H, S, D]
        block_mask = create_prefill_block_mask(query, key, self.config)
        attended = flex_attention(query, key, value, block_mask=block_mask, enable_gqa=True)
        return self.out(attended.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int, **attention):
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, **attention)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))


class Decoder(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int, **attention):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, **attention) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, -1])


argparse.ArgumentParser(description=__doc__).parse_args()

torch.manual_seed(0)
model = Decoder(256, width=256, layers=2, heads=4, kv_heads=2, config=PrefillConfig(alpha=0.2)).eval()
compiled = torch.compile(model, fullgraph=True)

with torch.inference_mode():
    for length in (2048, 3000):
        print(f"{length} tokens: next-token logits {tuple(compiled(torch.randint(256, (1, length))).shape)}")
    # one graph for the first length, one for all others: from here on a recompile would raise
    torch.compiler.set_stance("fail_on_recompile")
    for length in (4000, 2500):
        print(f"{length} tokens: next-token logits {tuple(compiled(torch.randint(256, (1, length))).shape)}")
