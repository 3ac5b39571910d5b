"""A small decoder whose attention is the library's, for tests of torch.compile."""

import torch
from torch import nn

from flexprefill import prefill_attention


class Layer(nn.Module):
    def __init__(self, width, heads, kv_heads, head_dim, config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.config = heads, kv_heads, head_dim, config
        self.project = nn.Linear(width, (heads + 2 * kv_heads) * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.norm = nn.RMSNorm(width)

    def forward(self, x):
        heads = self.project(self.norm(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)  # [B, H, S, D]
        attended = prefill_attention(query, key, value, self.config)
        return x + self.out(attended.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    def __init__(self, config, *, vocabulary=64, width=128, layers=2, heads=4, kv_heads=2, head_dim=64):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads, kv_heads, head_dim, config) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, -1])


def make_decoder(config, *, device="cpu", dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    return Decoder(config, **sizes).to(device, dtype).eval()
