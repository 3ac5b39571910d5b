"""A pretrained model of transformers as the subject of a comparison: its tokens judge which blocks are missed."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flexprefill.errors import FlexPrefillError, UnsupportedError
from flexprefill.evaluation.comparison import Answered
from flexprefill.evaluation.decoder_subject import prompt_generator
from flexprefill.evaluation.prompts import Corpus, Prompt, make_prompt

NAME = "flexprefill-eval"  # of the attention, in transformers' registry
ROWS = 512  # whose logits are held in float32 at a time

_attenders: ContextVar[Sequence[Callable[..., Tensor]] | None] = ContextVar("attenders", default=None)


@dataclass(frozen=True)
class PretrainedSubject:
    """A causal language model, asked by its tokens.

    Attributes:
        model: as :func:`load_pretrained` gives it.
        corpus: what prompts are made of.
        seed: of the prompts.
        name: of the model, which names it in the file of figures.
    """

    model: Any
    corpus: Corpus
    seed: int
    name: str

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def layers(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def heads(self) -> tuple[int, int]:
        config = self.model.config.get_text_config()
        return config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads

    @property
    def context(self) -> int:
        """Tokens that the model was made for."""
        return self.model.config.get_text_config().max_position_embeddings

    def identity(self) -> dict[str, str]:
        checksum = 0
        for weight in self.model.parameters():  # the beginning of each: reading all would take long
            beginning = weight.detach().flatten()[:4096].cpu().contiguous().view(torch.uint8)
            checksum = zlib.crc32(beginning.numpy().data, checksum)
        text = torch.cat([self.corpus.prose, self.corpus.code]).numpy().data
        return {
            "model": f"{checksum:08x} {self.name}",
            "text": f"{zlib.crc32(text):08x}",
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def prompt(self, length: int, task: str, number: int) -> Prompt:
        prompt = make_prompt(self.corpus, task, length, prompt_generator(self.seed, length, task, number))
        return Prompt(prompt.tokens.to(self.device), prompt.answers, prompt.asked)

    def answer(self, prompt: Prompt, attenders: Sequence[Callable[..., Tensor]]) -> Answered:
        """The loss is the mean over the graded tokens; an answer is exact if each of its tokens is the likeliest."""
        at = torch.cat([torch.arange(start, stop) for start, stop in prompt.answers])
        losses, hits = self._grade(prompt.tokens, at.to(self.device), attenders)
        if not prompt.asked:
            return Answered(0, 0, losses.mean().item())
        right = hits.split([stop - start for start, stop in prompt.answers])
        return Answered(sum(bool(part.all()) for part in right), len(right), losses.mean().item())

    @torch.inference_mode()
    def _grade(self, tokens: Tensor, at: Tensor, attenders: Sequence[Callable[..., Tensor]]) -> tuple[Tensor, Tensor]:
        """Of the tokens at these positions the loss in nats, float32, and whether each is the likeliest."""
        # by the model itself: some cap or scale their logits
        with _attending(attenders):
            logits = self.model(input_ids=tokens, use_cache=False, logits_to_keep=at - 1).logits[0]
        pieces = list(zip(logits.split(ROWS), tokens[0, at].split(ROWS), strict=True))
        losses = [cross_entropy(rows.float(), right, reduction="none") for rows, right in pieces]
        return torch.cat(losses), torch.cat([rows.argmax(-1) == right for rows, right in pieces])


def load_pretrained(name: str, device: torch.device, dtype: str) -> tuple[Any, Any]:
    """A causal language model whose attention a comparison chooses, and its tokenizer.

    Args:
        name: A folder or a name that transformers' from_pretrained takes, or a GGUF file.
        device: Where the model is put.
        dtype: Name of its dtype, such as "bfloat16".

    Raises:
        FlexPrefillError: transformers is not installed, or does not load it.
        UnsupportedError: the model attends by itself.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer

        from flexprefill.integrations.model_classes import check_model
        from flexprefill.integrations.transformers_masks import prompt_mask
    except ImportError as error:
        raise FlexPrefillError(
            f"a pretrained model needs transformers (pip install 'flexprefill[transformers]'): {error}"
        ) from None
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, prompt_mask)
    where, options = name, {}
    if name.endswith(".gguf"):
        where, options = str(Path(name).parent), {"gguf_file": Path(name).name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, dtype), **options)
    except (OSError, ValueError, ImportError) as error:
        raise FlexPrefillError(f"transformers cannot load the model {name!r}: {error}") from None
    check_model(model, NAME)
    model.set_attn_implementation(NAME)
    nn.Module.to(model, device)
    return model.requires_grad_(False).eval(), tokenizer


@contextlib.contextmanager
def _attending(attenders: Sequence[Callable[..., Tensor]]) -> Iterator[None]:
    token = _attenders.set(attenders)
    try:
        yield
    finally:
        _attenders.reset(token)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
) -> tuple[Tensor, None]:
    """query [1, Hq, S, D], key and value [1, Hkv, S, D] → ([1, S, Hq, Dv], None), by the attender of the layer."""
    attenders = _attenders.get()
    if attenders is None:
        raise UnsupportedError(f"attn_implementation {NAME!r} is for flexprefill's own evaluation")
    from flexprefill.integrations.transformers import AskedAttention, prompts_of

    # a window or chunks may be in the mask alone
    asked = AskedAttention.of(given)
    variant = asked.variant(prompts_of(module, query, key, attention_mask, asked)).over(key.shape[2])
    output = attenders[module.layer_idx](query, key, value, asked.scaling, variant)
    return output.transpose(1, 2), None
