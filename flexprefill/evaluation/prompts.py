"""Prompts for pretrained models: text, passages to copy and needles to recall, of the tokens that the model knows."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from flexprefill.errors import FlexPrefillError
from flexprefill.evaluation.text import source_files

PROSE, CODE, COPY, NEEDLES, SINGLE, MULTI_KEY = "prose", "code", "copy", "needles", "single", "multi-key"
TASKS = (PROSE, CODE, COPY, NEEDLES, SINGLE, MULTI_KEY)
MIN_LENGTH = 1024

PASSAGE, CUE = 192, 32  # tokens of a copied passage, and how many of them show that it is one
TAIL = 256  # tokens behind the answers inside a prompt: the last query blocks see all keys
GRADED = 2048  # tokens of a text at most, the last ones
INSIDE, MANY = 9, 24  # needles that are asked inside a prompt, and those of multi-key
TEXT_SIZE = 2**21  # characters of prose and of code at most

NAMES = (
    "Oslo Cairo Lima Kyoto Turin Perth Quito Dakar Hanoi Delhi Accra Basel Leeds Porto Malmo Osaka Tunis Miami Izmir "
    "Davos Riga Bonn Cork Graz Nice Bern Lyon Kiev Baku Doha Rome Pune"
).split()

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Prompt:
    """Tokens, and which of them are graded.

    Attributes:
        tokens: int64 [1, S].
        answers: (start, stop) of each graded stretch; it is right if every token of it is the likeliest one.
        asked: whether exact answers count; of text only the loss does.
    """

    tokens: Tensor
    answers: tuple[tuple[int, int], ...]
    asked: bool


@dataclass(frozen=True)
class Corpus:
    """What prompts are made of: the tokens of prose and of code, int64 [n] each, and those of what begins a text."""

    prose: Tensor
    code: Tensor
    begin: tuple[int, ...]
    tokenize: Tokenize


def read_corpus(tokenize: Tokenize, begin: Sequence[int], texts: Sequence[Path] = ()) -> Corpus:
    """Tokens of the user's texts, or of what every Python has: its manual's topics are prose, its library is code.

    Args:
        tokenize: a string to tokens, without special ones.
        begin: special tokens in front of every text.
        texts: files in UTF-8 that take the place of the prose.

    Raises:
        FlexPrefillError: a file is no text, or too short.
        OSError: a file cannot be read.
    """
    prose = [_read(path) for path in texts] or _manual()
    code = (path.read_text("utf-8", errors="replace") for path in source_files(sysconfig.get_path("stdlib")))
    found = [_tokens(tokenize, _join(parts)) for parts in (prose, code)]
    for name, tokens in zip(("--text", "the standard library"), found, strict=True):
        if tokens.numel() < MIN_LENGTH:
            raise FlexPrefillError(f"{name} must have at least {MIN_LENGTH} tokens of text, got {tokens.numel()}")
    return Corpus(found[0], found[1], tuple(begin), tokenize)


def make_prompt(corpus: Corpus, task: str, length: int, generator: Generator) -> Prompt:
    """A prompt of exactly ``length`` tokens.

    Args:
        task: one of TASKS.
        length: at least MIN_LENGTH.
        generator: on the CPU; the same state gives the same prompt.

    Raises:
        ValueError: the task is none, or the length is too short.
        FlexPrefillError: The text is shorter than the prompt, or what the task states takes too much of the length in
            this model's tokens.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if length < MIN_LENGTH:
        raise ValueError(f"length must be at least {MIN_LENGTH}, got {length}")
    room = length - len(corpus.begin)
    if task in (PROSE, CODE):
        body = _stretch(corpus.prose if task == PROSE else corpus.code, room, generator)
        return _prompt(corpus, [body], [(room - min(room // 2, GRADED), room)], asked=False)
    if task == COPY:
        return _copy(corpus, room, generator)
    return _needles(corpus, task, room, generator)


def _copy(corpus: Corpus, room: int, generator: Generator) -> Prompt:
    """A passage in the first quarter stands again near the end; every token behind its cue is an answer."""
    passage = _stretch(corpus.prose, PASSAGE, generator)
    filler = _stretch(corpus.prose, room - 2 * PASSAGE, generator)
    first = int(torch.randint(room // 8, room // 4, (), generator=generator))
    again = filler.numel() - TAIL
    parts = [filler[:first], passage, filler[first:again], passage, filler[again:]]
    start = sum(part.numel() for part in parts[:3]) + CUE
    return _prompt(corpus, parts, [(at, at + 1) for at in range(start, start + PASSAGE - CUE)], asked=True)


def _needles(corpus: Corpus, task: str, room: int, generator: Generator) -> Prompt:
    """Statements at random places of prose, and later the same words up to the number, which is the answer."""
    count = {NEEDLES: INSIDE, SINGLE: 1, MULTI_KEY: MANY}[task]
    names = [NAMES[i] for i in torch.randperm(len(NAMES), generator=generator)[:count].tolist()]
    codes = [str(number) for number in torch.randint(1000, 10000, (count,), generator=generator).tolist()]
    opening = [_tokens(corpus.tokenize, f"\nThe secret code of {name} is") for name in names]
    answer = [_tokens(corpus.tokenize, f" {code}") for code in codes]
    end = _tokens(corpus.tokenize, ".\n")
    # of the same parts as the questions: a word has other tokens in other company
    stated = [torch.cat([words, code, end]) for words, code in zip(opening, answer, strict=True)]
    asked = range(count) if task == NEEDLES else [int(torch.randint(count, (), generator=generator))]
    asked_tokens = sum(opening[i].numel() + answer[i].numel() for i in asked)
    between = room - sum(part.numel() for part in stated) - asked_tokens
    # statements in the first half; questions inside the second, or one at the end
    half, last = between // 2, between - TAIL
    if last <= half:
        raise FlexPrefillError(
            f"lengths must be longer for {task!r}: of {room} tokens its statements and questions take {room - between}"
        )
    filler = _stretch(corpus.prose, between, generator)
    places = _places(0, half, count, generator)
    questions = _places(half, last, count, generator) if task == NEEDLES else [filler.numel()]
    order = [int(i) for i in torch.randperm(len(questions), generator=generator)]
    parts: list[Tensor] = []
    answers: list[tuple[int, int]] = []
    inserted: list[tuple[int, Tensor, Tensor | None]] = [(place, stated[i], None) for i, place in enumerate(places)]
    inserted += [(place, opening[asked[i]], answer[asked[i]]) for place, i in zip(questions, order, strict=True)]
    at = 0
    for place, words, right in inserted:
        parts += [filler[at:place], words]
        at = place
        if right is not None:
            start = sum(part.numel() for part in parts)
            answers.append((start, start + right.numel()))
            parts.append(right)
    return _prompt(corpus, [*parts, filler[at:]], answers, asked=True)


def _prompt(corpus: Corpus, parts: Iterable[Tensor], answers: Iterable[tuple[int, int]], asked: bool) -> Prompt:
    begin = torch.tensor(corpus.begin, dtype=torch.int64)
    shifted = tuple((start + begin.numel(), stop + begin.numel()) for start, stop in answers)
    return Prompt(torch.cat([begin, *parts])[None], shifted, asked)


def _places(first: int, last: int, count: int, generator: Generator) -> list[int]:
    return sorted(torch.randint(first, last, (count,), generator=generator).tolist())


def _stretch(tokens: Tensor, length: int, generator: Generator) -> Tensor:
    """A random stretch."""
    if tokens.numel() < length:  # repeated, it would be a copy of itself
        raise FlexPrefillError(f"--text must have at least {length:,} tokens for such prompts, got {tokens.numel():,}")
    start = int(torch.randint(tokens.numel() - length + 1, (), generator=generator))
    return tokens[start : start + length]


def _tokens(tokenize: Tokenize, text: str) -> Tensor:
    return torch.tensor(tokenize(text), dtype=torch.int64)


def _join(parts: Iterable[str]) -> str:
    """Texts one after the other, read until there is enough."""
    taken, size = [], 0
    for part in parts:
        taken.append(part)
        size += len(part)
        if size >= TEXT_SIZE:
            break
    return "\n\n".join(taken)[:TEXT_SIZE]


def _manual() -> list[str]:
    """Python's own manual, as help() prints it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FlexPrefillError("--text must be given: this Python is without its manual (pydoc_data)") from None
    return list(topics.values())


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise FlexPrefillError(f"--text must be files in UTF-8, got {str(path)!r}: {error}") from None
