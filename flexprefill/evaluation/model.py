"""The small decoder that is asked. It has rotary positions and grouped heads, and the caller chooses its attention."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad, rms_norm, scaled_dot_product_attention, silu

from flexprefill.errors import FlexPrefillError
from flexprefill.evaluation.vocabulary import SIZE

HEAD_DIM = 64
ROTARY_DIMS = 32  # of a head; the other dimensions know no positions, and match over any distance
ROTARY_BASE = 1000.0  # the slowest pair turns once in some 4,000 tokens: no angle is new behind a trained 8,192
BEFORE = 0.75  # share of the previous token in a key, before training
GAIN = 8.0  # the logit of a state's own token before training
MIMETIC = 0.7  # correlation of a query head's weights with its key head's before training
SHARP_FROM = 256  # attention is sharper behind this position, in proportion to the position's logarithm
MODEL_FORMAT = "flexprefill needle model 1"

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # [B, Hq, S, 64], [B, Hkv, S, 64] twice → [B, Hq, S, 64]


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a decoder. The defaults are those of the shipped model.

    Attributes:
        width: Width of the residual stream.
        layers: Number of layers.
        heads: Query heads, a multiple of ``kv_heads``.
        kv_heads: Key heads.
        hidden: Width inside the gated MLP.
    """

    width: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    hidden: int = 704

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {size!r}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")


def causal_sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Dense causal attention with a backward pass."""
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)


class Norm(nn.RMSNorm):
    """RMSNorm in float32 for every dtype. The result has its input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.float(), x.shape[-1:], self.weight.float()).to(x.dtype)


class Attention(nn.Module):
    """Attention whose query and key are normalised, turned in half of their dimensions, and sharpened with length.

    A key mixes a token's own state with the state of the token before it, by a learnt share of each channel. So a word
    can find what stands behind it in a single layer. An induction head needs two layers, and small models take long to
    find it (the "smeared key" of Olsson et al., arXiv 2209.11895).
    """

    def __init__(self, sizes: ModelSizes):
        super().__init__()
        self.before = nn.Parameter(torch.full((sizes.width,), BEFORE))
        self.query = nn.Linear(sizes.width, sizes.heads * HEAD_DIM, bias=False)
        self.key = nn.Linear(sizes.width, sizes.kv_heads * HEAD_DIM, bias=False)
        self.value = nn.Linear(sizes.width, sizes.kv_heads * HEAD_DIM, bias=False)
        self.out = nn.Linear(sizes.heads * HEAD_DIM, sizes.width, bias=False)
        self.query_norm, self.key_norm = Norm(HEAD_DIM), Norm(HEAD_DIM)

    def forward(self, x: Tensor, turns: Tensor, sharpness: Tensor, attend: Attend) -> Tensor:
        smeared = torch.lerp(x, pad(x[:, :-1], (0, 0, 1, 0)), self.before)
        states = ((self.query, x), (self.key, smeared), (self.value, x))
        query, key, value = (project(y).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for project, y in states)
        query = turn(self.query_norm(query) * sharpness[:, None], turns).to(value.dtype)
        key = turn(self.key_norm(key), turns).to(value.dtype)
        return self.out(attend(query, key, value).transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    def __init__(self, sizes: ModelSizes):
        super().__init__()
        self.attention_norm, self.mlp_norm = Norm(sizes.width), Norm(sizes.width)
        self.attention = Attention(sizes)
        self.up = nn.Linear(sizes.width, 2 * sizes.hidden, bias=False)
        self.down = nn.Linear(sizes.hidden, sizes.width, bias=False)

    def forward(self, x: Tensor, turns: Tensor, sharpness: Tensor, attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turns, sharpness, attend)
        gate, up = self.up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(silu(gate) * up)


class Decoder(nn.Module):
    """Tokens to states. ``logits`` makes predictions from the few states that matter.

    The weights are drawn from PyTorch's own generator.

    Args:
        sizes: The sizes of the model.
    """

    def __init__(self, sizes: ModelSizes = ModelSizes()):
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(SIZE, sizes.width)
        layers = [DecoderLayer(sizes) for _ in range(sizes.layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = Norm(sizes.width)
        self.head = nn.Linear(sizes.width, SIZE, bias=False)
        self._draw_weights(layers)

    def forward(self, tokens: Tensor, attend: Attend | Sequence[Attend] = causal_sdpa) -> Tensor:
        """Tokens to the last layer's states.

        Args:
            tokens: int64 [B, S].
            attend: Causal attention over (query, key, value): one for all layers, or one for each.

        Returns:
            The states, [B, S, width].

        Raises:
            ValueError: There are not as many attentions as layers.
        """
        attends = [attend] * len(self.layers) if callable(attend) else list(attend)
        if len(attends) != len(self.layers):
            raise ValueError(
                f"attend must be one function or one for each of {len(self.layers)} layers, got {len(attends)}"
            )
        positions = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
        turns, sharpness = turns_at(positions), sharpness_at(positions)
        x = self.embedding(tokens)
        for layer, attend_here in zip(self.layers, attends, strict=True):
            x = layer(x, turns, sharpness, attend_here)
        return self.norm(x)

    @torch.no_grad()
    def _draw_weights(self, layers: Sequence[DecoderLayer]) -> None:
        """Weights from which the model learns quickly to copy what matches (mimetic initialisation, arXiv 2305.09828).

        Queries are like the keys that they read. Outputs undo values. A state predicts its own token. MLPs are silent.
        """
        width, group = self.sizes.width, self.sizes.heads // self.sizes.kv_heads
        nn.init.normal_(self.embedding.weight)
        self.head.weight.copy_(self.embedding.weight)
        for layer in layers:
            attention = layer.attention
            for matrix in (attention.query, attention.key, attention.value, layer.up):
                nn.init.normal_(matrix.weight, std=width**-0.5)
            of_group = attention.key.weight.unflatten(0, (-1, HEAD_DIM)).repeat_interleave(group, 0).flatten(0, 1)
            attention.query.weight.copy_(MIMETIC * of_group + (1 - MIMETIC**2) ** 0.5 * attention.query.weight)
            of_group = attention.value.weight.unflatten(0, (-1, HEAD_DIM)).repeat_interleave(group, 0).flatten(0, 1)
            attention.out.weight.copy_(of_group.T / group)
            nn.init.zeros_(layer.down.weight)

    def logits(self, states: Tensor) -> Tensor:
        """States [..., width] to float32 [..., SIZE], the unnormalised log-probabilities of the next token."""
        with torch.autocast(states.device.type, enabled=False):  # in bfloat16 different answers would tie
            return self.head(states.float()) * (GAIN / self.sizes.width)


def turns_at(positions: Tensor) -> Tensor:
    """Cosines and sines of rotary positions: float32 [2, S, ROTARY_DIMS / 2]."""
    pairs = torch.arange(ROTARY_DIMS // 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None] * ROTARY_BASE ** (-2 / ROTARY_DIMS * pairs)
    return torch.stack([angles.cos(), angles.sin()])


def sharpness_at(positions: Tensor) -> Tensor:
    """The factor on queries that keeps a match visible among more keys (arXiv 2501.19399): float32 [S]."""
    return (positions + 1).clamp(min=SHARP_FROM).log() / math.log(SHARP_FROM)


def turn(heads: Tensor, turns: Tensor) -> Tensor:
    """[B, H, S, 64] with its first dimensions turned by the position, in pairs of i and i + ROTARY_DIMS / 2."""
    first, second, rest = heads.split([ROTARY_DIMS // 2, ROTARY_DIMS // 2, HEAD_DIM - ROTARY_DIMS], -1)
    cosines, sines = turns
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines, rest], -1)


def save_model(
    model: Decoder, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.bfloat16, **notes: str
) -> None:
    """Writes a safetensors file with the weights, the sizes and the notes.

    Args:
        model: The model.
        path: The file.
        dtype: The weights' dtype in the file.
        notes: Facts about the training.

    Raises:
        OSError: The file cannot be written.
    """
    weights = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in model.state_dict().items()}
    sizes = json.dumps(dataclasses.asdict(model.sizes))
    save_file(weights, path, metadata={"format": MODEL_FORMAT, "sizes": sizes, **notes})


def load_model(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Decoder:
    """The model of a file that ``save_model`` wrote, ready to be asked. Its weights are float32.

    Args:
        path: The file.
        device: Where the model goes.

    Returns:
        The model.

    Raises:
        FlexPrefillError: It is no such file, or its tensors do not fit its sizes.
        OSError: The file cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path must be a file, got {str(path)!r}, which does not exist")
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise FlexPrefillError(f"{path} is no safetensors file: {error}") from None
    if notes.get("format") != MODEL_FORMAT:
        raise FlexPrefillError(f"{path} is no {MODEL_FORMAT!r}: its format is {notes.get('format')!r}")
    with torch.device("meta"):
        model = Decoder(ModelSizes(**json.loads(notes["sizes"])))
    try:
        model.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    except RuntimeError as error:
        raise FlexPrefillError(f"{path} does not hold the weights of its sizes: {error}") from None
    return model.to(device).requires_grad_(False).eval()
