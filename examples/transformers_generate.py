"""A transformers model whose prompts are attended sparsely: a padded batch, generated from. On the CPU in a minute.

pip install flexprefill[transformers]
python examples/transformers_generate.py                             # a small Llama of random weights
python examples/transformers_generate.py --model Qwen/Qwen2.5-7B-Instruct --device cuda --alpha 0.08 prompt.txt

The prompts of the small model are random tokens; with --model they are the files named on the command line.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from flexprefill import PrefillConfig
from flexprefill.integrations.transformers import register

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("files", nargs="*", type=Path, help="prompts for --model")
parser.add_argument("--model", help="a name or folder that from_pretrained takes")
parser.add_argument("--device", default="cpu")
parser.add_argument("--length", type=int, default=2048, help="tokens of the small model's longer prompt")
parser.add_argument("--alpha", type=float, help="FlashPrefill's search at this alpha; default: the two-sided search")
arguments = parser.parse_args()
if bool(arguments.model) != bool(arguments.files):
    parser.error("--model and files go together")

# the two lines: register, then attn_implementation="flexprefill"
register(None if arguments.alpha is None else PrefillConfig(alpha=arguments.alpha))
if arguments.model:
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto", attn_implementation="flexprefill")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    texts = [path.read_text(encoding="utf-8") for path in arguments.files]
    inputs = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1)
else:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=131072, pad_token_id=0, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="flexprefill")
    lengths = arguments.length, arguments.length * 3 // 4
    inputs = {
        "input_ids": torch.stack(
            [torch.nn.functional.pad(torch.randint(1, 512, (n,)), (lengths[0] - n, 0)) for n in lengths]
        ),
        "attention_mask": torch.stack([torch.arange(lengths[0]) >= lengths[0] - n for n in lengths]).long(),
    }

model = model.to(arguments.device).eval()
inputs = {name: tensor.to(arguments.device) for name, tensor in inputs.items()}
generated = model.generate(**inputs, max_new_tokens=16, do_sample=False)
for prompt, row in zip(inputs["attention_mask"], generated, strict=True):
    new = row[len(prompt) :]
    print(f"{int(prompt.sum())} tokens →", tokenizer.decode(new) if arguments.model else new.tolist())
