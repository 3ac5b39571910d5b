"""The evaluation's tasks, answered by plain Python that reads the prompts."""

from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexprefill import FlexPrefillError
from flexprefill.evaluation import TASKS, babble, passages, read_text
from flexprefill.evaluation import text as text_module
from flexprefill.evaluation.tasks import common_words, needles, repeats, variables
from flexprefill.evaluation.vocabulary import ASK, BEGIN, COMMON, FIRST_WORD, NEEDLE, REPEAT, SET, SIZE, TRACE

TEXT = babble(50_000)
seeds = st.integers(0, 2**40)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def answer(tokens, position):
    """The words that the question which ends here asks for, from what stands before it."""
    needles_of, value_of, names_of = defaultdict(list), {}, defaultdict(list)
    for place in range(position):
        if tokens[place] == NEEDLE:
            needles_of[tuple(tokens[place + 1 : place + 3])].append(tokens[place + 3])
        elif tokens[place] == SET:
            source, name = tokens[place + 1 : place + 3]
            value_of[name] = value_of.get(source, source)
            names_of[value_of[name]].append(name)
    if tokens[position] == COMMON:
        return [word for word, _ in Counter(tokens[1:position]).most_common(4)]
    if tokens[position - 1] == TRACE:
        return names_of[tokens[position]]
    assert tokens[position - 2] == ASK
    return needles_of[tuple(tokens[position - 1 : position + 1])]


def check(samples):
    assert samples.tokens.dtype == samples.positions.dtype == samples.answers.dtype == torch.int64
    assert samples.tokens.min() >= 0 and samples.tokens.max() < SIZE and (samples.tokens[:, 0] == BEGIN).all()
    for row, positions, answers in zip(*map(torch.Tensor.tolist, vars(samples).values()), strict=True):
        assert len(set(positions)) == len(positions)
        for position, words in zip(positions, answers, strict=True):
            assert sorted(answer(row, position)) == sorted(words) and min(words) >= FIRST_WORD
            assert len(set(words)) == len(words)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [512, 4096])
def test_the_answers_are_right(name, length):
    samples = TASKS[name](seeded(7), TEXT, 3, length)
    assert samples.tokens.shape == (3, length)
    check(samples)
    again, other = (TASKS[name](seeded(seed), TEXT, 3, length) for seed in (7, 8))
    assert torch.equal(samples.tokens, again.tokens) and torch.equal(samples.answers, again.answers)
    assert not torch.equal(samples.tokens, other.tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("name", TASKS)
def test_the_answers_are_right_on_a_gpu(name):
    samples = TASKS[name](torch.Generator("cuda").manual_seed(7), TEXT.cuda(), 3, 4096)
    assert samples.tokens.is_cuda
    check(samples.to("cpu"))


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.integers(0, 30), st.booleans())
def test_needles_fit_however_tight(seed, keys, values, questions, spare, scattered):
    values, questions = (1, questions) if scattered else (values, min(questions, keys))
    length = 1 + 4 * keys * values + (4 if scattered else 3) * questions + spare
    samples = needles(seeded(seed), TEXT, 2, length, keys=keys, values=values, questions=questions, scattered=scattered)
    assert (samples.tokens == NEEDLE).sum(1).tolist() == [keys * values] * 2
    assert (samples.tokens == ASK).sum(1).tolist() == [questions] * 2
    assert samples.answers.shape == (2, questions, values)
    check(samples)
    if not scattered:
        assert samples.positions[0].tolist() == list(range(length - 3 * questions + 2, length, 3))


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(1, 6), st.integers(0, 4), st.integers(1, 6), st.integers(0, 30))
def test_variables_fit_however_tight(seed, chains, hops, questions, spare):
    questions = min(questions, chains)
    length = 1 + 3 * chains * (hops + 1) + 2 * questions + spare
    samples = variables(seeded(seed), TEXT, 2, length, chains=chains, hops=hops, questions=questions)
    assert samples.answers.shape == (2, questions, hops + 1)
    check(samples)


def test_needles_are_everywhere():
    samples = needles(seeded(0), TEXT, 2000, 64)
    places = (samples.tokens == NEEDLE).float().sum(0)[1:58]
    assert places.min() > 10 and places.sum() == 2000  # some 35 at each of 57 places


def test_common_words_stand_out():
    samples = common_words(seeded(0), TEXT, 4, 8192)
    for row, answers in zip(samples.tokens.tolist(), samples.answers[:, 0].tolist(), strict=True):
        counts = Counter(row[1:-1])
        often = [counts.pop(word) for word in answers]
        assert min(often) == max(often) == 159 and max(counts.values()) < 40


def test_repeated_words_follow_as_before():
    samples = repeats(seeded(0), TEXT, 8, 128, questions=20)
    assert (samples.tokens[:, 0] == REPEAT).all()
    for row, positions, answers in zip(*map(torch.Tensor.tolist, vars(samples).values()), strict=True):
        period = next(p for p in range(8, 65) if row[1 + p :] == row[1:-p])
        assert all(
            row[place + 1] == row[place + 1 - period] == right
            for place, (right,) in zip(positions, answers, strict=True)
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: needles(g, TEXT, 1, 100, keys=40), "length must have room for .* 40 of 4 in 96"),
        (lambda g: needles(g, TEXT, 1, 100, values=2, scattered=True), "values must be 1 where .* got 2"),
        (lambda g: needles(g, TEXT, 1, 9, questions=2), "length must have room"),
        (lambda g: variables(g, TEXT, 1, 30), "length must have room"),
        (lambda g: common_words(g, TEXT, 1, 60), "length must be at least 66 for 4 common words, got 60"),
        (lambda g: needles(g, TEXT[:50], 1, 100), "stream must have at least 100 bytes, got 50"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(seeded(0))


def test_held_out_text_is_of_other_files():
    held_out, others = (bytes(read_text(2**22, held_out=part).tolist()) for part in (True, False))
    files, rest = held_out.split(b"\0"), set(others.split(b"\0"))
    assert len(held_out) <= 2**22 and len(files) > 20
    common = [file for file in files if len(file) > 500 and file in rest]
    assert not common
    assert bytes(read_text(1000, held_out=True).tolist()).isascii()


def test_no_text_is_an_error(monkeypatch):
    monkeypatch.setattr(text_module, "SUFFIXES", (".none",))
    with pytest.raises(FlexPrefillError, match="no text was found under"):
        read_text(1000, held_out=False)


def test_babble_is_the_same_everywhere():
    assert bytes(babble(40).tolist()) == bytes(TEXT[:40].tolist()) == b"iosj wjaiezr jntxbqdv btqtwx rg jntxbqdv"
    assert babble(12_345, seed=3).shape == (12_345,)
    assert not torch.equal(babble(1000), babble(1000, seed=1))


def test_passages_are_of_the_text():
    stream = torch.arange(200, dtype=torch.uint8)
    found = passages(stream, seeded(0), 500, 50)
    assert (found.diff(dim=1) == 1).all() and {0, 150} <= set(found[:, 0].tolist())
