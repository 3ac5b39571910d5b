"""The scorers at equal density: which share of the exact attention mass the blocks hold that each would keep.

    python examples/benchmarks/scorers.py

On the demo's heads, each searched at the alpha at which it keeps the density that is asked for. Some minutes on two
CPU cores. Prints a table. --output keeps the figures.
"""

import argparse
import json
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from flexprefill import PrefillConfig, attention_recall, search_blocks
from flexprefill.bench.inputs import make_case
from flexprefill.evaluation.built_heads import HEADS, build_prompt, read_tokens
from flexprefill.runtime.machine import describe_machine, versions

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
parser.add_argument("--length", type=int, default=16_384, help="tokens of the demo's text (default: %(default)s)")
parser.add_argument("--density", type=float, default=0.15, help="of each head (default: %(default)s)")
parser.add_argument("--every", type=int, default=101, help="one row in so many is looked at (default: %(default)s)")
parser.add_argument("--output", type=Path, help="a JSON file for every repeat (default: none)")
settings = parser.parse_args()
device = torch.device(settings.device)

prompt = build_prompt(read_tokens(settings.length), device, 0)
rows = range(37, settings.length, settings.every)
print(f"{settings.length:,} tokens, {len(rows)} rows of each head\n")
print("scorer        head       density  exact mass kept      alpha   one search")
found = []
for scorer in ("flashprefill", "xattention", "exact"):
    rule = PrefillConfig(scorer=scorer, score_rows="visible")  # as the other two are by definition
    for number, head in enumerate(HEADS):
        qkv = tuple(tensor[:, number : number + 1] for tensor in (prompt.query, prompt.key, prompt.value))
        case = make_case(qkv, settings.density, rule)
        start = time.perf_counter()
        density = search_blocks(*qkv[:2], case.config).density().item()
        seconds = time.perf_counter() - start
        mass = attention_recall(*qkv[:2], case.block_map, rows=rows).mean.item()
        alpha = case.config.alpha
        print(f"{scorer:<12}  {head:<9}  {density:7.1%}  {mass:15.2%}  {alpha:9.2g}  {seconds:9.3f} s", flush=True)
        found.append(
            {"scorer": scorer, "head": head, "density": density, "mass": mass, "alpha": alpha, "seconds": seconds}
        )
record = {
    "command": "python examples/benchmarks/scorers.py",
    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    "machine": describe_machine(device),
    "versions": versions(),
    "settings": {name: getattr(settings, name) for name in ("length", "density", "every")},
    "scorers": found,
}
if settings.output:
    settings.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nfigures  {settings.output}")
