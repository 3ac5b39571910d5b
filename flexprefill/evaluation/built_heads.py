"""Four attention heads built from real text, for the demo and the benchmarks.

The text is the standard library's own source. The heads are built from random embeddings of its tokens. They show the
patterns that papers on sparse prefill name. They have no trained weights, and so no model's statistics. All four have
one sharpness, which is not fitted to the search: a key that matches fully outweighs some millions of unrelated ones.
The same seed, length and standard library give the same heads.
"""

from __future__ import annotations

import re
import sysconfig
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from flexprefill.errors import FlexPrefillError
from flexprefill.evaluation.text import source_files

HEADS = {
    "local": "nearby positions",
    "sink": "the first token, and half as much nearby positions",
    "induction": "what followed earlier occurrences of this token",
    "topic": "passages with the same words",
}
BUILT_HEAD_DIM = 64
SHARPNESS = 16.0  # logit of a full match, in nats; an unrelated key's is about 0
TOPIC_TOKENS = 256  # a topic is the average over these: some 25 lines
TOKEN = re.compile(r"\n[ \t]*|[^\W\d]+|\d+|[^\w\s]")  # line break with indentation, word, number, other sign


@dataclass(frozen=True)
class Prompt:
    """The text as attention inputs.

    Attributes:
        tokens: int64 [S], numbers of vocabulary entries.
        query: [1, 4, S, 64], a head for each name in HEADS.
        key: [1, 4, S, 64].
        value: [1, 4, S, 64].
    """

    tokens: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


def read_tokens(length: int) -> Tensor:
    """The first ``length`` tokens of the standard library's sources: int64 [length].

    A token is a word, a number, a sign, or a line break with the indentation after it. Tokens are numbered in the order
    of first appearance.

    Raises:
        FlexPrefillError: There are fewer tokens.
    """
    words: list[str] = []
    for path in source_files(sysconfig.get_path("stdlib")):
        words += TOKEN.findall(path.read_text("utf-8", errors="replace"))
        if len(words) >= length:
            vocabulary: dict[str, int] = {}
            return torch.tensor([vocabulary.setdefault(word, len(vocabulary)) for word in words[:length]])
    raise FlexPrefillError(
        f"length must be at most {len(words):,}, the tokens in this Python's standard library, got {length:,}"
    )


def build_prompt(tokens: Tensor, device: torch.device | str, seed: int) -> Prompt:
    """The four heads over a text: float32 on the CPU, bfloat16 on CUDA.

    Queries and keys are about unit vectors, times a factor. It gives a full match a logit of SHARPNESS at the default
    scale. Values are the token embeddings.

    Args:
        tokens: int64 [S].
        device: Where the tensors go.
        seed: Seed of the embeddings.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = normalize(torch.randn(int(tokens.max()) + 1, BUILT_HEAD_DIM, generator=generator), dim=-1)
    embedding = vocabulary[tokens]  # [S, D]
    constant = torch.full((BUILT_HEAD_DIM,), BUILT_HEAD_DIM**-0.5)
    local = rotate(normalize(constant + 0.5 * embedding, dim=-1))
    topic = normalize(trailing_mean(embedding - embedding.mean(0), TOPIC_TOKENS), dim=-1)
    previous = pad(embedding[:-1], (0, 0, 1, 0))  # the first token has no previous one, and matches nothing
    sink = torch.zeros(BUILT_HEAD_DIM)
    sink[-1] = 1  # in the slowest rotary pair, which hardly turns
    sink_key = 0.5**0.5 * local
    sink_query = sink + sink_key
    sink_key[0] = sink

    factor = (SHARPNESS * BUILT_HEAD_DIM**0.5) ** 0.5  # half of it in the query, half in the key
    query = factor * torch.stack([local, sink_query, embedding, topic])
    key = factor * torch.stack([local, sink_key, previous, topic])
    value = embedding.expand(len(HEADS), -1, -1)
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    query, key, value = (x[None].contiguous().to(device, dtype) for x in (query, key, value))
    return Prompt(tokens, query, key, value)


def rotate(vectors: Tensor) -> Tensor:
    """Rotary positions (base 10,000, interleaved pairs) applied to [S, D]."""
    S, D = vectors.shape
    angle = torch.arange(S)[:, None] * 10_000.0 ** (-torch.arange(0, D, 2) / D)  # [S, D / 2]
    pairs = torch.view_as_complex(vectors.unflatten(1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(1)


def trailing_mean(vectors: Tensor, width: int) -> Tensor:
    """The mean of each row of [S, D] and of up to ``width - 1`` rows before it."""
    sums = pad(vectors.double().cumsum(0), (0, 0, 1, 0))  # sums[i] is over the first i rows
    end = torch.arange(1, vectors.shape[0] + 1)
    first = (end - width).clamp(min=0)
    return ((sums[end] - sums[first]) / (end - first)[:, None]).float()
