"""Which heads need long range? Every head of a model in one table. On the CPU in under a minute.

python examples/long_range_heads.py [heads.png]

The model is the small one of examples/needle_model. A transformers model is recorded alike: see record_and_inspect.py.
"""

import argparse
from pathlib import Path

import torch

from flexprefill import PrefillConfig, prefill_attention, record_masks
from flexprefill.evaluation import TASKS, babble, load_model
from flexprefill.plotting import plot_layers

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("picture", nargs="?", help="a file to draw the heads into (default: none)")
picture = parser.parse_args().picture

model = load_model(Path(__file__).parent / "needle_model" / "model.safetensors")
tokens = TASKS["multi-key"](torch.Generator().manual_seed(0), babble(100_000), 1, 4096).tokens


def attend(query, key, value):
    return prefill_attention(query, key, value, PrefillConfig(alpha=0.2))


with torch.inference_mode(), record_masks(model, inputs=True) as masks:
    model(tokens, attend)
table = masks.table()  # a dict for each head; pandas.DataFrame(table) takes it
for head in sorted(table, key=lambda head: -head["beyond_2048"])[:8]:
    print("layer {layer} head {head}: {beyond_2048:.3f} of its mass is 2,048 tokens back or more".format(**head))

if picture:  # a heat map, layers down and heads to the right
    shares = {layer: torch.tensor([h["beyond_2048"] for h in table if h["layer"] == layer]) for layer in masks}
    plot_layers(shares, picture, label="mass at least 2,048 tokens back")
