"""The heads that are built from text: each attends as its name says."""

import pytest
import torch

from flexprefill.evaluation import built_heads

LENGTH, SEED = 2000, 3


@pytest.fixture(scope="module")
def prompt():
    return built_heads.build_prompt(built_heads.read_tokens(LENGTH), "cpu", SEED)


@pytest.fixture(scope="module")
def attention(prompt):
    """The exact causal attention of the four heads: [4, S, S]."""
    logits = prompt.query[0] @ prompt.key[0].mT * built_heads.BUILT_HEAD_DIM**-0.5
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return dict(zip(built_heads.HEADS, logits.masked_fill(future, -torch.inf).softmax(-1), strict=True))


def test_the_text_is_the_same_each_time_and_grows_at_the_end():
    tokens = built_heads.read_tokens(3000)
    assert tokens.shape == (3000,) and tokens[0] == 0
    assert torch.equal(built_heads.read_tokens(1000), tokens[:1000])


def test_the_local_head_falls_with_distance(attention):
    local = attention["local"][500:]
    shares = [
        torch.stack([local[i, i + 500 - far : i + 501 - near].sum() for i in range(len(local))]).mean().item()
        for near, far in [(0, 15), (16, 127), (128, 500)]
    ]
    assert shares[0] > 0.5 and shares[0] > 2 * shares[1] > 4 * shares[2]


def test_the_sink_heads_mass_is_on_the_first_token(attention):
    assert attention["sink"][:, 0].mean() > 0.95


def test_the_induction_head_looks_behind_an_earlier_occurrence(attention, prompt):
    tokens, top = prompt.tokens, attention["induction"].argmax(-1)
    occurred = torch.tensor([bool((tokens[:i] == tokens[i]).any()) for i in range(LENGTH)])
    assert occurred.sum() > 1000
    found = top[occurred]
    # the token right before the key is the query's own
    assert torch.equal(tokens[found - 1], tokens[occurred])


def test_the_topic_head_prefers_alike_passages(attention, prompt):
    words = torch.nn.functional.one_hot(prompt.tokens).double()
    passages = torch.nn.functional.normalize(
        built_heads.trailing_mean(words - words.mean(0), built_heads.TOPIC_TOKENS), dim=-1
    )
    likeness = passages @ passages.T
    rows = range(1000, LENGTH, 50)
    weighted = torch.stack([(attention["topic"][i] * likeness[i]).sum() for i in rows])
    plain = torch.stack([likeness[i, : i + 1].mean() for i in rows])
    assert (weighted > plain + 0.2).all()


def test_a_trailing_mean_is_over_the_rows_up_to_each(prompt):
    vectors = torch.arange(10.0)[:, None]
    expected = [sum(range(max(0, i - 3), i + 1)) / (i + 1 - max(0, i - 3)) for i in range(10)]
    assert built_heads.trailing_mean(vectors, 4).flatten().tolist() == pytest.approx(expected)


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    vector = torch.randn(64, generator=torch.Generator().manual_seed(0))
    turned = built_heads.rotate(vector.expand(300, 64))
    torch.testing.assert_close(turned.norm(dim=1), vector.norm().expand(300))
    torch.testing.assert_close(turned[0], vector)
    torch.testing.assert_close(turned[250] @ turned[200], turned[60] @ turned[10], rtol=1e-4, atol=1e-4)
