"""Inputs that the tests share: query and key whose block scores really differ."""

import torch

from flexprefill import AttentionVariant, BlockMap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_qkv(
    q_len,
    kv_len=None,
    *,
    batch=1,
    heads=2,
    kv_heads=1,
    head_dim=64,
    dtype=torch.float32,
    device="cpu",
    seed=0,
):
    """query, key, value with a common direction in each stretch of 100 keys, so that some blocks stand out."""
    kv_len = q_len if kv_len is None else kv_len
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    query = normal(batch, heads, q_len, head_dim) + 2 * normal(batch, heads, 1, head_dim)
    key = normal(batch, kv_heads, kv_len, head_dim)
    stretches = normal(batch, kv_heads, kv_len // 100 + 1, head_dim)
    key = key + stretches.repeat_interleave(100, 2)[:, :, :kv_len]
    value = normal(batch, kv_heads, kv_len, head_dim)
    return tuple(tensor.to(device, dtype) for tensor in (query, key, value))


def at_an_odd_address(tensor):
    """The same numbers, contiguous, one element behind where memory begins."""
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)


def as_projected(query, key, value):
    """The same numbers as views of a fused projection, [B, S, H, D] in memory."""
    fused = torch.cat([query, key, value], 1).transpose(1, 2).contiguous().transpose(1, 2)
    return fused.split([query.shape[1], key.shape[1], value.shape[1]], 1)


def random_map(q_len, kv_len, block_size, *, batch=1, heads=2, share=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, -(-q_len // block_size), -(-kv_len // block_size))
    dense = torch.rand(shape, generator=generator) < share
    return BlockMap.from_dense(dense, q_len=q_len, kv_len=kv_len, block_size=block_size), dense


def as_variant(**call):
    """A call's arguments, those of an AttentionVariant put into one."""
    names = ("sequences", "sliding_window", "soft_cap", "alibi_slopes", "sinks")
    parts = {name: call.pop(name) for name in names if name in call}
    return call | {"variant": AttentionVariant(**parts)} if parts else call
