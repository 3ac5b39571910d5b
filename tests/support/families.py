"""transformers' models made small: random weights, shapes shared so that attention is compiled for few of them."""

import torch
import transformers as hf

WINDOW = 48
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
HEAD_DIM = 16
WINDOWED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2}

FAMILIES = {
    "llama": lambda: hf.LlamaConfig(**SIZES),
    "qwen2": lambda: hf.Qwen2Config(**SIZES),
    "qwen3": lambda: hf.Qwen3Config(**SIZES, head_dim=HEAD_DIM),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **SIZES, **EXPERTS, head_dim=HEAD_DIM, num_experts=4, moe_intermediate_size=32
    ),
    "mistral": lambda: hf.MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma2": lambda: hf.Gemma2Config(**SIZES, **WINDOWED, head_dim=HEAD_DIM, query_pre_attn_scalar=HEAD_DIM),
    "gemma3": lambda: hf.Gemma3TextConfig(**SIZES, **WINDOWED, head_dim=HEAD_DIM, query_pre_attn_scalar=HEAD_DIM),
    "gpt_oss": lambda: hf.GptOssConfig(**SIZES, **WINDOWED, **EXPERTS, head_dim=HEAD_DIM, num_local_experts=4),
    "phi3": lambda: hf.Phi3Config(**SIZES),
}
# whose attention sdpa does not compute
EAGER = {"gemma2", "gpt_oss"}
# whose first layer has a window and whose second has none
ALTERNATING = {"gemma2", "gemma3", "gpt_oss"}


def make_model(family, implementation, dtype=torch.float32, **sizes):
    """A model of its family's config, with some of the config's sizes replaced."""
    torch.manual_seed(0)
    config = FAMILIES[family]()
    for name, size in sizes.items():
        setattr(config, name, size)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    config._experts_implementation = "eager"  # in every dtype
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # larger than trained ones: scores that differ, sinks that matter
            if parameter.dim() > 1 or "sinks" in name:
                parameter.normal_(std=1.0 if "sinks" in name else 2.5 / parameter.shape[-1] ** 0.5)
    return model.to(dtype).eval()


def reference_of(family):
    return "eager" if family in EAGER else "sdpa"
