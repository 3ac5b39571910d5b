"""The attention mass by distance, against float64 over all rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.inputs import make_qkv
from support.oracle import attention_weights

from flexprefill import AttentionVariant, Sequences, mass_by_distance
from flexprefill.inspection import rows as inspection_rows


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_mass_lies_where_float64_finds_it(data):
    kv_len = data.draw(st.integers(1, 150))
    q_len = data.draw(st.integers(1, kv_len))
    batch, window = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([None, 1, 20, 60]))
    edges = sorted(data.draw(st.sets(st.integers(1, 160), min_size=1, max_size=5)))
    query, key, _ = make_qkv(q_len, kv_len, batch=batch, heads=4, kv_heads=2, head_dim=16, seed=kv_len)
    ends = [data.draw(st.integers(1, kv_len)) for _ in range(batch)]
    sequences = Sequences.from_lengths(torch.tensor(ends), kv_len)
    starts = [[0] * end + [kv_len] * (kv_len - end) for end in ends]
    weights = attention_weights(query, key, scale=0.2, window=window, starts=starts)
    distance = torch.arange(kv_len - q_len, kv_len)[:, None] - torch.arange(kv_len)
    sees = weights.sum(-1) > 0.5  # [B, Hq, S_q]
    sink, others = weights * (torch.arange(kv_len) < 4), weights * (torch.arange(kv_len) >= 4)

    steps = []
    variant = AttentionVariant(sequences, window)
    found = mass_by_distance(query, key, edges=edges, variant=variant, scale=0.2, rows=None, progress=steps.append)

    assert found.edges == (0, *edges) and sum(steps) == 4 * batch
    for b in range(batch):
        rows = sees[b].sum(-1).clamp(min=1)
        for place, (low, high) in enumerate(zip(found.edges, (*edges, 10**9), strict=True)):
            inside = (others[b] * ((distance >= low) & (distance < high))).sum((-1, -2)) / rows
            torch.testing.assert_close(found.mass[b, :, place].double(), inside, rtol=1e-5, atol=2e-6)
            far = ((weights[b] > 0) & (distance >= low)).any(-1)  # [Hq, S_q], the same in every head
            assert found.reach[b, place] == far[0].sum()
            beyond = (others[b] * (distance >= low) * far[..., None]).sum((-1, -2)) / far.sum(-1).clamp(min=1)
            torch.testing.assert_close(found.beyond(low)[b].double(), beyond, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.sink[b].double(), sink[b].sum((-1, -2)) / rows, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(found.mass[b].sum(-1) + found.sink[b], sees[b].any(-1).float())
        total = others[b].sum((-1, -2))
        mean = torch.where(total > 0, (others[b] * distance).sum((-1, -2)) / total.clamp(min=1e-300), 0)
        torch.testing.assert_close(found.mean_distance[b].double(), mean, rtol=1e-5, atol=1e-4)


def test_sampled_and_named_rows_and_pieces(monkeypatch):
    query, key, _ = make_qkv(700, heads=2)
    every = mass_by_distance(query, key, rows=None)
    assert every.edges == (0, 128, 512) and mass_by_distance(query, key, rows=700).mass.equal(every.mass)
    named = mass_by_distance(query, key, rows=range(700))
    assert named.mass.equal(every.mass) and named.reach.tolist() == [[700, 700 - 128, 700 - 512]]
    sampled, same, other = (mass_by_distance(query, key, rows=64, seed=seed) for seed in (3, 3, 4))
    assert sampled.mass.equal(same.mass) and not sampled.mass.equal(other.mass)
    torch.testing.assert_close(sampled.mass, every.mass, atol=0.05, rtol=0)
    monkeypatch.setattr(inspection_rows, "PIECE", 5000)  # elements: seven rows at a time
    in_pieces = mass_by_distance(query, key, rows=None)
    torch.testing.assert_close(in_pieces.mass, every.mass, atol=1e-6, rtol=1e-5)


def test_a_head_that_looks_back_comes_first():
    query, key, _ = make_qkv(600, heads=2, kv_heads=2)
    key[:, 0] *= 0
    slopes = torch.tensor([1.0, 0.0])  # head 0 sees its own token and a few before
    found = mass_by_distance(query, key, edges=[16, 128], variant=AttentionVariant(alibi_slopes=slopes))
    assert found.beyond(16)[0, 0] < 0.001 and found.beyond(16)[0, 1] > 0.5
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["head", "1", "0"]
    assert [list(head) for head in found.to_dicts()] == [
        ["batch", "head", "sink", "mean_distance", "beyond_16", "beyond_128"]
    ] * 2
    assert repr(found) == "DistanceMass(B=1, H=2, edges=(0, 16, 128))"
    with pytest.raises(ValueError, match=r"tokens must be one of the edges \(0, 16, 128\), got 64"):
        found.beyond(64)
