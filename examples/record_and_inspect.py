"""Which blocks each layer of a transformers model keeps: recorded, saved, and summed up. On the CPU in seconds.

pip install flexprefill[transformers]
python examples/record_and_inspect.py masks.safetensors
flexprefill view masks.safetensors                                   # every head down to single blocks
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from flexprefill import PrefillConfig, read_mask_info, record_masks, save_masks
from flexprefill.integrations.transformers import register

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("file", help="the mask file to write")
parser.add_argument("--length", type=int, default=4096, help="tokens")
parser.add_argument("--alpha", type=float, default=0.5, help="keeps blocks that reach this share of a row's best")
arguments = parser.parse_args()

# the first layer dense, as FlashPrefill-V2 leaves the first four
register(PrefillConfig(alpha=arguments.alpha), layers={0: None})
torch.manual_seed(0)
sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 512}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
config = Qwen3Config(**sizes, **heads, max_position_embeddings=131072)
model = AutoModelForCausalLM.from_config(config, attn_implementation="flexprefill").eval()

# a text whose topic, a few of the tokens, changes every 150 tokens
topics = torch.randint(512, (1, arguments.length // 150 + 1)).repeat_interleave(150, 1)[:, : arguments.length]
tokens = (topics + torch.randint(4, topics.shape)) % 512
with torch.inference_mode(), record_masks(model) as masks:
    model(tokens, logits_to_keep=1)
save_masks(arguments.file, masks, metadata={"model": "a small Qwen3 of random weights"})

info = read_mask_info(arguments.file)
for layer, density in info.density.items():
    shares = " ".join(f"{100 * share:5.1f}%" for share in density[0])
    print(f"layer {layer} ({masks.modules[layer]}): density of its heads {shares}")
