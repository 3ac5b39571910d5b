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

# names of the same sizes in older configs
GPT2_SIZES = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": None}
BART_SIZES = {
    "vocab_size": 96,
    "d_model": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FULL_HEADS = {**SIZES, "num_key_value_heads": 4}
OPT_SIZES = {**FULL_HEADS, "ffn_dim": 96, "word_embed_proj_dim": 64}
EXPERTS_OF_HYBRIDS = {"num_experts": 2, "num_experts_per_tok": 2}
# tried besides, in the table of docs/howto/transformers.md alone
MORE_FAMILIES = {
    "gemma": lambda: hf.GemmaConfig(**SIZES, head_dim=HEAD_DIM),
    "gemma4": lambda: hf.Gemma4TextConfig(
        **SIZES,
        **WINDOWED,
        head_dim=32,
        global_head_dim=512,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=16,
        num_kv_shared_layers=0,
    ),
    "cohere2": lambda: hf.Cohere2Config(**SIZES, **WINDOWED),
    "granite": lambda: hf.GraniteConfig(**SIZES),
    "olmo2": lambda: hf.Olmo2Config(**SIZES),
    "glm4": lambda: hf.Glm4Config(**SIZES, head_dim=HEAD_DIM),
    "phi": lambda: hf.PhiConfig(**FULL_HEADS),
    "stablelm": lambda: hf.StableLmConfig(**FULL_HEADS),
    "starcoder2": lambda: hf.Starcoder2Config(**SIZES),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**FULL_HEADS),
    "gpt2": lambda: hf.GPT2Config(**GPT2_SIZES),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**GPT2_SIZES),
    "opt": lambda: hf.OPTConfig(**OPT_SIZES),
    "biogpt": lambda: hf.BioGptConfig(**FULL_HEADS),
    "bart": lambda: hf.BartConfig(**BART_SIZES, is_decoder=True, is_encoder_decoder=False),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **FULL_HEADS,
        moe_intermediate_size=32,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
    ),
    "jamba": lambda: hf.JambaConfig(
        **SIZES,
        **EXPERTS_OF_HYBRIDS,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        mamba_dt_rank=8,
    ),
    "lfm2": lambda: hf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
    "recurrent_gemma": lambda: hf.RecurrentGemmaConfig(
        **{**SIZES, "num_hidden_layers": 3}, head_dim=HEAD_DIM, attention_window_size=WINDOW
    ),
}
# whose classes compute their attention themselves, by what their small config is made of
OWN_ATTENTION = {
    "bloom": lambda: hf.BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4),
    "gptj": lambda: hf.GPTJConfig(**GPT2_SIZES, rotary_dim=16),
    "falcon": lambda: hf.FalconConfig(**SIZES),
    "codegen": lambda: hf.CodeGenConfig(**GPT2_SIZES, rotary_dim=16),
    "mpt": lambda: hf.MptConfig(vocab_size=96, d_model=64, n_layers=2, n_heads=4),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        vocab_size=96, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),
    "xglm": lambda: hf.XGLMConfig(vocab_size=96, d_model=64, num_layers=2, attention_heads=4, ffn_dim=96),
    "gpt_neox_japanese": lambda: hf.GPTNeoXJapaneseConfig(**FULL_HEADS),
    "trocr": lambda: hf.TrOCRConfig(**BART_SIZES),
    "git": lambda: hf.GitConfig(**SIZES),
    "rembert": lambda: hf.RemBertConfig(**SIZES, is_decoder=True, input_embedding_size=32, output_embedding_size=32),
}

# whose attention sdpa does not compute
EAGER = {"gemma2", "gpt_oss"}
# whose first layer has a window and whose second has none
ALTERNATING = {"gemma2", "gemma3", "gpt_oss"}


def make_model(family, implementation, dtype=torch.float32, **sizes):
    """A model of its family's config, with some of the config's sizes replaced."""
    torch.manual_seed(0)
    config = {**FAMILIES, **MORE_FAMILIES, **OWN_ATTENTION}[family]()
    for name, size in sizes.items():
        setattr(config, name, size)
    if len(getattr(config, "layer_types", None) or ()) > config.num_hidden_layers:
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
    return "eager" if family in EAGER or family not in FAMILIES else "sdpa"
