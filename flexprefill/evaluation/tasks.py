"""RULER-like tasks (arXiv 2404.06654), generated: a long prompt hides statements, and questions ask about them.

The statements stand in a text. A question ends with a token at which the model must answer. Its answer is the words
that it finds likeliest there: as many as the right answer has, in any order. All tensors are made on the generator's
device. The same seed gives the same samples on the same kind of device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor

from flexprefill.evaluation.text import passages
from flexprefill.evaluation.vocabulary import ASK, BEGIN, COMMON, FIRST_WORD, NEEDLE, REPEAT, SET, TRACE, WORDS

STATEMENT = 4  # tokens of a needle: mark, two of a key, value
QUESTION = 3  # mark, two of a key
ASSIGNMENT = 3  # mark, source, name
TRACING = 2  # mark, value
RATIO = 16  # a common word occurs this many times as often as another word


@dataclass(frozen=True)
class Samples:
    """Prompts, where they ask, and what is right.

    Attributes:
        tokens: int64 [B, S].
        positions: int64 [B, Q]. The model's next token at these positions is the answer.
        answers: int64 [B, Q, n], the n right words of each question, all different.
    """

    tokens: Tensor
    positions: Tensor
    answers: Tensor

    def to(self, device: torch.device | str) -> Samples:
        """The same samples on a device."""
        return Samples(self.tokens.to(device), self.positions.to(device), self.answers.to(device))


Task = Callable[[Generator, Tensor, int, int], Samples]  # generator, text uint8 [bytes], batch, length


def needles(
    generator: Generator,
    text: Tensor,
    batch: int,
    length: int,
    *,
    keys: int = 1,
    values: int = 1,
    questions: int = 1,
    scattered: bool = False,
) -> Samples:
    """``NEEDLE k1 k2 value`` at random places of a text. ``ASK k1 k2`` asks for the values of a key.

    Args:
        generator: Draws the samples.
        text: uint8 [bytes], the text around the needles.
        batch: Number of prompts.
        length: Tokens of a prompt.
        keys: Number of different keys.
        values: Needles of each key, with different values.
        questions: Number of questions at the end of the prompt, about different keys.
        scattered: Questions stand anywhere behind their needles instead. A key may be asked for again. ``values`` is 1.

    Raises:
        ValueError: They do not fit into the length, or together.
    """
    if scattered and values != 1:
        raise ValueError(f"values must be 1 where questions are scattered, got {values}")
    key_tokens = _distinct(generator, (batch,), keys, WORDS**2)
    key_tokens = torch.stack([key_tokens // WORDS, key_tokens % WORDS], -1) + FIRST_WORD  # [B, K, 2]
    value_tokens = _distinct(generator, (batch, keys), values, WORDS) + FIRST_WORD  # [B, K, V]
    tokens = _begin(passages(text, generator, batch, length))
    if scattered:
        places, asking, asked = _scatter(generator, batch, keys, questions, length)
    else:
        end = length - questions * QUESTION
        places = 1 + _shuffled(generator, _spaced(generator, (batch,), keys * values, end - 1, STATEMENT))
        asking = torch.arange(end, length, QUESTION, device=tokens.device).expand(batch, -1)  # [B, Q]
        asked = _distinct(generator, (batch,), questions, keys)
    asked_keys = _rows(key_tokens, asked)  # [B, Q, 2]
    pairs = key_tokens[:, :, None].expand(-1, -1, values, -1).flatten(1, 2)  # [B, K · V, 2]
    _write(tokens, places, NEEDLE, torch.cat([pairs, value_tokens.flatten(1)[..., None]], -1))
    _write(tokens, asking, ASK, asked_keys)
    return Samples(tokens, asking + QUESTION - 1, _rows(value_tokens, asked))


def variables(
    generator: Generator, text: Tensor, batch: int, length: int, *, chains: int = 4, hops: int = 2, questions: int = 1
) -> Samples:
    """``SET value a``, later ``SET a b`` and so on. ``TRACE value`` asks for all names that hold the value.

    Args:
        generator: Draws the samples.
        text: uint8 [bytes], the text around the statements.
        batch: Number of prompts.
        length: Tokens of a prompt.
        chains: Number of values, each with its own names.
        hops: Names of a chain that are set from another name.
        questions: Number of questions at the end of the prompt, about different values.

    Raises:
        ValueError: They do not fit into the length.
    """
    names = hops + 1
    words = _distinct(generator, (batch,), chains * (names + 1), WORDS).unflatten(1, (chains, -1)) + FIRST_WORD
    sources, targets = words[..., :-1], words[..., 1:]  # [B, chains, names]; a value, then its names
    end = length - questions * TRACING
    places = _spaced(generator, (batch,), chains * names, end - 1, ASSIGNMENT) + 1
    places = _shuffled(generator, places).unflatten(1, (chains, names)).sort(-1).values
    asking = torch.arange(end, length, TRACING, device=words.device).expand(batch, -1)  # [B, Q]
    asked = _distinct(generator, (batch,), questions, chains)
    tokens = _begin(passages(text, generator, batch, length))
    _write(tokens, places.flatten(1), SET, torch.stack([sources, targets], -1).flatten(1, 2))
    _write(tokens, asking, TRACE, _rows(sources[..., :1], asked))
    return Samples(tokens, asking + TRACING - 1, _rows(targets, asked))


def common_words(generator: Generator, text: Tensor, batch: int, length: int, *, common: int = 4) -> Samples:
    """Which words are common? ``common`` words of a prompt occur 16 times as often as the others on average.

    Args:
        generator: Draws the samples.
        text: Not used: the prompt consists of words alone.
        batch: Number of prompts.
        length: Tokens of a prompt.
        common: Number of common words.

    Raises:
        ValueError: The length is too short.
    """
    body = length - 2
    times = max(RATIO, RATIO * body // (WORDS + (RATIO - 1) * common))
    if common * times > body:
        raise ValueError(f"length must be at least {common * times + 2} for {common} common words, got {length}")
    words = _distinct(generator, (batch,), WORDS, WORDS) + FIRST_WORD
    often, others = words[:, :common], words[:, common:]
    drawn = torch.randint(WORDS - common, (batch, body - common * times), generator=generator, device=words.device)
    mixed = torch.cat([often.repeat(1, times), others.gather(1, drawn)], 1)
    begin, ask = (torch.full((batch, 1), mark, device=words.device) for mark in (BEGIN, COMMON))
    tokens = torch.cat([begin, _shuffled(generator, mixed), ask], 1)
    return Samples(tokens, torch.full_like(tokens[:, :1], length - 1), often[:, None])


def repeats(generator: Generator, text: Tensor, batch: int, length: int, *, questions: int = 16) -> Samples:
    """Random words that begin again after a while, for training induction heads.

    The words of each row repeat with a period of its own. The questions are about words that stood before.

    Args:
        generator: Draws the samples.
        text: Not used: the prompt consists of words alone.
        batch: Number of prompts.
        length: Tokens of a prompt.
        questions: Number of tokens whose next token is asked for.
    """
    device = generator.device
    words = torch.randint(WORDS, (batch, length), generator=generator, device=device) + FIRST_WORD
    # questions stand in the second half, so a period may be half the length
    period = torch.randint(min(8, length // 2), length // 2 + 1, (batch, 1), generator=generator, device=device)
    tokens = words.gather(1, torch.arange(length, device=device) % period)
    tokens[:, 0] = REPEAT
    # a row's first token is REPEAT and not its word: no question asks for its first copy
    positions = length // 2 + 1 + _distinct(generator, (batch,), questions, length - length // 2 - 2)
    return Samples(tokens, positions, tokens.gather(1, positions + 1)[..., None])


TASKS: dict[str, Task] = {
    "single": needles,
    "multi-key": lambda generator, text, batch, length: needles(generator, text, batch, length, keys=length // 64),
    "multi-value": partial(needles, keys=4, values=4),
    "multi-query": partial(needles, keys=8, questions=4),
    "scattered": partial(needles, keys=16, questions=4, scattered=True),
    "variables": variables,
    "common words": common_words,
}


def _scatter(generator: Generator, batch: int, keys: int, questions: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places of needles [B, K], places of questions [B, Q] behind their needles, and the needles asked for [B, Q]."""
    count, device = keys + questions, generator.device
    places = _spaced(generator, (batch,), count, length - 1, STATEMENT) + 1  # [B, K + Q], ascending
    is_question = torch.arange(count, device=device).expand(batch, -1) >= keys
    # the first place is a needle, so that every question has one to ask for
    is_question = torch.cat([is_question[:, :1], _shuffled(generator, is_question[:, 1:])], 1)
    order = is_question.long().argsort(dim=1, stable=True)
    before = (~is_question).cumsum(1).gather(1, order[:, keys:])  # needles in front of each question
    asked = (torch.rand(before.shape, generator=generator, device=device) * before).long()
    placed = places.gather(1, order)
    return placed[:, :keys], placed[:, keys:], asked.minimum(before - 1)


def _spaced(generator: Generator, shape: Sequence[int], count: int, room: int, width: int) -> Tensor:
    """Ascending starts of ``count`` stretches of ``width`` in ``room`` that do not overlap: int64 [*shape, count]."""
    free = room - count * width
    if count < 1 or free < 0:
        raise ValueError(f"length must have room for at least one statement and for all: {count} of {width} in {room}")
    starts = torch.randint(free + 1, (*shape, count), generator=generator, device=generator.device)
    return starts.sort(-1).values + width * torch.arange(count, device=generator.device)


def _distinct(generator: Generator, shape: Sequence[int], count: int, choices: int) -> Tensor:
    """Different numbers below ``choices`` in random order: int64 [*shape, count]."""
    return _shuffled(generator, _spaced(generator, shape, count, choices, 1))


def _shuffled(generator: Generator, tensor: Tensor) -> Tensor:
    """The last dimension in random order, each row in its own."""
    return tensor.gather(-1, torch.rand(tensor.shape, generator=generator, device=tensor.device).argsort(-1))


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """[B, K, ...] and int64 [B, Q] to [B, Q, ...]."""
    return table[torch.arange(table.shape[0], device=table.device)[:, None], index]


def _write(tokens: Tensor, places: Tensor, mark: int, words: Tensor) -> None:
    """Writes a mark and the words [B, T, w] behind it into tokens [B, S], at each of the places [B, T]."""
    statements = torch.cat([torch.full_like(words[..., :1], mark), words], -1)
    index = places[..., None] + torch.arange(statements.shape[-1], device=tokens.device)
    tokens.scatter_(1, index.flatten(1), statements.flatten(1))


def _begin(tokens: Tensor) -> Tensor:
    tokens[:, 0] = BEGIN
    return tokens
