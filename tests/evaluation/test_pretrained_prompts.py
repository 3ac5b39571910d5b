"""Prompts for pretrained models: what is graded stands in them before, and their lengths are as asked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexprefill import FlexPrefillError
from flexprefill.evaluation.prompts import TAIL, TASKS, Corpus, make_prompt, read_corpus


def tokenize(text):
    return list(text.encode())


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def corpus():
    return read_corpus(tokenize, [7, 9])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(TASKS), st.integers(1600, 5000), st.integers(0, 10_000))
def test_a_prompt_is_as_long_as_asked_and_depends_on_its_seed_alone(corpus, task, length, seed):
    prompt = make_prompt(corpus, task, length, seeded(seed))
    assert prompt.tokens.shape == (1, length) and prompt.tokens.dtype == torch.int64
    assert prompt.tokens[0, :2].tolist() == [7, 9]
    assert torch.equal(prompt.tokens, make_prompt(corpus, task, length, seeded(seed)).tokens)
    assert not torch.equal(prompt.tokens, make_prompt(corpus, task, length, seeded(seed + 1)).tokens)
    stops = [stop for _, stop in prompt.answers]
    assert stops == sorted(stops) and stops[-1] <= length and all(start < stop for start, stop in prompt.answers)
    assert prompt.asked == (task not in ("prose", "code"))


@settings(max_examples=40, deadline=None)
@given(st.integers(1024, 5000), st.integers(0, 10_000))
def test_a_copied_passage_stood_before_and_ends_before_the_last_blocks(corpus, length, seed):
    prompt = make_prompt(corpus, "copy", length, seeded(seed))
    text = bytes(prompt.tokens[0].tolist())
    first, last = prompt.answers[0][0], prompt.answers[-1][1]
    assert [stop - start for start, stop in prompt.answers] == [1] * (last - first)
    assert last == length - TAIL
    # with its cue
    assert 0 < text.find(text[first - 32 : last]) < length // 2


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["needles", "single", "multi-key"]), st.integers(1600, 5000), st.integers(0, 10_000))
def test_a_needle_is_stated_once_before_it_is_asked(corpus, task, length, seed):
    prompt = make_prompt(corpus, task, length, seeded(seed))
    text = bytes(prompt.tokens[0].tolist())
    names = set()
    for start, stop in prompt.answers:
        question = text[text.rfind(b"\nThe secret code of ", 0, start) : stop]
        names.add(question)
        assert text.count(question) == 2 and 0 <= text.find(question + b".\n") < start - 20
        assert question[-5:-4] == b" " and question[-4:].isdigit()
    assert len(names) == len(prompt.answers) == (9 if task == "needles" else 1)
    assert prompt.answers[-1][1] == length if task != "needles" else prompt.answers[-1][1] <= length - TAIL
    stated = text.count(b"\nThe secret code of ") - len(prompt.answers)
    assert stated == {"needles": 9, "single": 1, "multi-key": 24}[task]


def test_texts_take_the_place_of_the_prose(tmp_path):
    (tmp_path / "one.txt").write_text("Ein Satz. " * 200, "utf-8")
    (tmp_path / "two.txt").write_text("Noch einer. " * 200, "utf-8")
    corpus = read_corpus(tokenize, [], [tmp_path / "one.txt", tmp_path / "two.txt"])
    assert bytes(corpus.prose.tolist()) == b"Ein Satz. " * 200 + b"\n\n" + b"Noch einer. " * 200
    prompt = make_prompt(corpus, "prose", 2048, seeded(0))
    assert b"Satz" in bytes(prompt.tokens[0].tolist()) or b"einer" in bytes(prompt.tokens[0].tolist())


def test_texts_that_do_not_do(tmp_path):
    (tmp_path / "short.txt").write_text("Kurz.")
    with pytest.raises(FlexPrefillError, match=r"--text must have at least 1024 tokens of text, got 5"):
        read_corpus(tokenize, [], [tmp_path / "short.txt"])
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(FlexPrefillError, match=r"--text must be files in UTF-8, got '.*picture.png'"):
        read_corpus(tokenize, [], [tmp_path / "picture.png"])


def test_a_task_or_length_that_is_none():
    corpus = Corpus(torch.arange(2000), torch.arange(2000), (), tokenize)
    with pytest.raises(FlexPrefillError, match="--text must have at least 2,048 tokens for such prompts, got 2,000"):
        make_prompt(corpus, "code", 2048, seeded(0))
    with pytest.raises(ValueError, match=r"task must be one of prose, .*, got 'poem'"):
        make_prompt(corpus, "poem", 2048, seeded(0))
    with pytest.raises(FlexPrefillError, match="lengths must be longer for 'multi-key': of 1024 tokens .* take [78]"):
        make_prompt(corpus, "multi-key", 1024, seeded(0))
    with pytest.raises(ValueError, match="length must be at least 1024, got 512"):
        make_prompt(corpus, "copy", 512, seeded(0))
