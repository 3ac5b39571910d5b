import pytest
import torch
from inputs import make_qkv

from flexprefill import BlockMap, PrefillConfig, attention_recall, search_blocks


@pytest.mark.parametrize("q_len, kv_len", [(300, 300), (100, 333), (1, 50)])
def test_recall_is_the_mass_of_the_kept_blocks(q_len, kv_len):
    query, key, _ = make_qkv(q_len, kv_len, batch=2, heads=4, kv_heads=2)
    config = PrefillConfig(block_size=16, alpha=0.8, sink_blocks=0, window_blocks=1, last_full_blocks=0)
    block_map = search_blocks(query, key, config)

    steps = []
    recall = attention_recall(query, key, block_map, scale=0.2, progress=steps.append)

    logits = 0.2 * query.double() @ key.double().repeat_interleave(2, 1).transpose(2, 3)
    future = torch.arange(kv_len) > torch.arange(q_len)[:, None] + kv_len - q_len
    mass = logits.masked_fill(future, -torch.inf).softmax(-1)
    kept = block_map.to_dense().repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :q_len, :kv_len]
    torch.testing.assert_close(recall.double(), (mass * kept).sum((-1, -2)) / q_len, rtol=1e-5, atol=1e-6)
    assert sum(steps) == 2 * 2 * -(-q_len // 16)


def test_all_blocks_hold_all_mass_and_none_hold_none():
    query, key, _ = make_qkv(200)
    for share, expected in ((True, 1.0), (False, 0.0)):
        dense = torch.full((1, 2, 2, 2), share)
        block_map = BlockMap.from_dense(dense, q_len=200, kv_len=200, block_size=128)
        torch.testing.assert_close(attention_recall(query, key, block_map), torch.full((1, 2), expected))


def test_a_map_that_does_not_fit_is_refused():
    query, key, _ = make_qkv(200)
    other = search_blocks(*make_qkv(201)[:2])
    with pytest.raises(ValueError, match="block_map must be of q_len=200 and kv_len=200, got q_len=201"):
        attention_recall(query, key, other)
    with pytest.raises(TypeError, match="block_map must be a BlockMap, got NoneType"):
        attention_recall(query, key, None)
