"""A small model of random weights with a tokenizer of bytes, saved as transformers loads it."""

from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}


def save_model(folder: Path, config: hf.PretrainedConfig | None = None) -> Path:
    """Writes the model of a config (a Llama's unless another is given) and its tokenizer; returns the folder."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config or hf.LlamaConfig(**SIZES))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> hf.PreTrainedTokenizerFast:
    """One token for each byte, without special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
