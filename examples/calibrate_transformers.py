"""Alphas for each layer and head of a transformers model, from texts of yours; then used. On the CPU in a minute.

pip install flexprefill[transformers]
python examples/calibrate_transformers.py calibrated.json                  # a small Llama of random weights
python examples/calibrate_transformers.py calibrated.json --model Qwen/Qwen2.5-7B-Instruct --device cuda prompt.txt

The texts of the small model are random tokens; with --model they are the files named on the command line. Queries and
keys of all layers are held until the end: 7.5 GB a text of 32,768 tokens for Qwen2.5-7B.
"""

import argparse
from pathlib import Path

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from flexprefill import PrefillConfig
from flexprefill.config import save_layers
from flexprefill.evaluation import calibrate
from flexprefill.integrations.transformers import register

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("output", type=Path, help="a JSON file to write")
parser.add_argument("files", nargs="*", type=Path, help="texts for --model")
parser.add_argument("--model", help="a name or folder that from_pretrained takes")
parser.add_argument("--device", default="cpu")
parser.add_argument("--length", type=int, default=2048, help="tokens of the small model's texts")
parser.add_argument("--recall", type=float, default=0.9, help="of the attention mass that each head is to keep")
arguments = parser.parse_args()
if bool(arguments.model) != bool(arguments.files):
    parser.error("--model and files go together")

seen = {}  # by layer, query [1, Hq, S, D] and key [1, Hkv, S, D] of each text


def watched(module, query, key, value, attention_mask, **others):
    """Dense attention that keeps what it is given; its scaling must be the usual 1 / sqrt(D)."""
    seen.setdefault(module.layer_idx, []).append((query, key))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **others)


AttentionInterface.register("watched", watched)
AttentionMaskInterface.register("watched", sdpa_mask)
if arguments.model:
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto", attn_implementation="watched")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = [tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt").input_ids for path in arguments.files]
else:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads), attn_implementation="watched")
    texts = torch.randint(1, 512, (2, 1, arguments.length))
model = model.to(arguments.device).eval()
texts = [text.to(arguments.device) for text in texts]

with torch.inference_mode():
    for text in texts:
        model(text, use_cache=False, logits_to_keep=1)
    configs = calibrate([seen[layer] for layer in sorted(seen)], arguments.recall)
save_layers(arguments.output, configs, recall=arguments.recall)
for layer, config in enumerate(configs):
    print(f"layer {layer}: alphas", " ".join(f"{alpha:.2g}" for alpha in config.alpha))

register(layers=PrefillConfig.load_layers(arguments.output))
model.set_attn_implementation("flexprefill")
with torch.inference_mode():
    logits = model(texts[0], use_cache=False, logits_to_keep=1).logits
print(f"next-token logits {tuple(logits.shape)} with sparse attention")
