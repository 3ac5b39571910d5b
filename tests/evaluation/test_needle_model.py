"""The decoder that the evaluation asks, and the scores of its answers."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexprefill import FlexPrefillError
from flexprefill.evaluation import (
    TASKS,
    Decoder,
    ModelSizes,
    Share,
    ask,
    babble,
    load_model,
    right_answers,
    save_model,
    text_loss,
)
from flexprefill.evaluation.model import HEAD_DIM, causal_sdpa, sharpness_at, turn, turns_at
from flexprefill.evaluation.vocabulary import FIRST_WORD, SIZE

SIZES = ModelSizes(width=32, layers=2, heads=4, kv_heads=2, hidden=48)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Decoder(SIZES)
    with torch.no_grad():  # at first the layers are the identity
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    return model


def test_states_are_causal_and_attention_is_the_callers(model):
    tokens = torch.randint(SIZE, (2, 40))
    states = model(tokens)
    assert states.shape == (2, 40, 32) and model.logits(states).shape == (2, 40, SIZE)
    changed = tokens.clone()
    changed[:, 30:] = 5
    torch.testing.assert_close(model(changed)[:, :30], states[:, :30])
    shapes = []

    def attend(query, key, value):
        shapes.append([list(tensor.shape) for tensor in (query, key, value)])
        return causal_sdpa(query, key, value)

    assert torch.equal(model(tokens, attend), states)
    assert shapes == [[[2, 4, 40, HEAD_DIM], [2, 2, 40, HEAD_DIM], [2, 2, 40, HEAD_DIM]]] * 2
    assert not torch.equal(model(tokens, [causal_sdpa, lambda query, key, value: 0 * query]), states)
    with pytest.raises(ValueError, match="attend must be one function or one for each of 2 layers, got 1"):
        model(tokens, [causal_sdpa])


def test_turned_heads_know_their_distance_alone():
    torch.manual_seed(0)
    query, key = torch.randn(2, HEAD_DIM, dtype=torch.float64)
    products = turn(query.expand(1, 1, 300, -1), turns_at(torch.arange(300.0)))[0, 0] @ (
        turn(key.expand(1, 1, 300, -1), turns_at(torch.arange(300.0)))[0, 0].T
    )
    for distance in (0, 1, 70):
        along = products.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-4)
    assert products[0, 0] == pytest.approx((query @ key).item())
    assert abs(products[1, 0] - products[0, 0]) > 1e-3


def test_attention_is_sharper_far_behind():
    sharpness = sharpness_at(torch.tensor([0.0, 255.0, 65535.0]))
    assert sharpness.tolist() == pytest.approx([1, 1, 2])


def test_a_file_holds_the_model(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(model, path, dtype=torch.float32, trained="{}")
    loaded = load_model(path)
    tokens = torch.randint(SIZE, (1, 20))
    assert loaded.sizes == SIZES and not loaded.training
    torch.testing.assert_close(loaded(tokens), model(tokens))
    assert not any(weight.requires_grad for weight in loaded.parameters())
    save_model(model, path)
    assert {weight.dtype for weight in load_file(path).values()} == {torch.bfloat16}
    assert load_model(path)(tokens).dtype == torch.float32


def test_other_files_are_refused(model, tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="path must be a file"):
        load_model(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(FlexPrefillError, match="is no safetensors file"):
        load_model(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(FlexPrefillError, match="its format is None"):
        load_model(path)
    save_model(model, path, sizes='{"width": 32, "layers": 3}')
    with pytest.raises(FlexPrefillError, match="does not hold the weights of its sizes"):
        load_model(path)


@pytest.mark.parametrize(
    ("sizes", "message"), [({"heads": 3}, "heads must be a multiple of kv_heads, got 3 and 2"), ({"width": 0}, "width")]
)
def test_sizes_are_checked(sizes, message):
    with pytest.raises(ValueError, match=message):
        ModelSizes(**sizes)


def test_answers_are_sets_of_words():
    logits = torch.zeros(1, 4, SIZE)
    logits[0, :, 3] = 100  # a byte is no answer
    logits[0, :, FIRST_WORD + 5], logits[0, :, FIRST_WORD + 9] = 2, 1
    logits[0, 3] = torch.nan
    answers = FIRST_WORD + torch.tensor([[[5, 9], [9, 5], [5, 6], [5, 9]]])
    assert right_answers(logits, answers).tolist() == [[True, True, False, False]]
    assert right_answers(logits, answers[..., :1]).tolist() == [[True, False, True, False]]


def test_shares_say_how_sure_they_are():
    # Wilson's interval as in Brown, Cai and DasGupta (2001): the p at which (p' - p)² = z² p (1 - p) / n
    for right, count in ((0, 10), (10, 10), (7, 20), (198, 200)):
        share = Share(right, count)
        low, high = share.interval
        assert 0 <= low <= share.value <= high <= 1
        for p in (low, high):
            if 0 < p < 1:
                assert (share.value - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / count, rel=1e-4)
    assert Share(0, 10).interval[0] == pytest.approx(0) and Share(10, 10).interval[1] == pytest.approx(1)
    assert Share(1, 4) + Share(2, 4) == Share(3, 8)
    assert str(Share(19, 20)) == "95.0 % (76.4 – 99.1)"


def test_who_knows_nothing_loses_as_much_as_chance(model):
    torch.nn.init.zeros_(model.head.weight)
    generator, text = torch.Generator().manual_seed(0), babble(5000)
    assert text_loss(model, text[:400].long().view(2, 200)).tolist() == pytest.approx([math.log(SIZE)] * 2)
    share = ask(model, TASKS["multi-query"](generator, text, 20, 256))
    assert share == Share(0, 20)


def test_a_sample_is_right_if_all_its_questions_are(model):
    samples = TASKS["multi-query"](torch.Generator().manual_seed(0), babble(5000), 4, 256)

    class Oracle(Decoder):
        def forward(self, tokens, attend):
            return tokens

        def logits(self, states):
            right = torch.nn.functional.one_hot(samples.answers[..., 0], SIZE).float()
            right[3, 2] = 0  # one of the last sample's answers is unknown
            return right

    oracle = Oracle(SIZES)
    oracle.forward = lambda tokens, attend: tokens[..., None].float()
    assert ask(oracle, samples) == Share(3, 4)
