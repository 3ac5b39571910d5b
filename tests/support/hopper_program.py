"""Compiles the kernels that searches and mean correction launch on a Hopper GPU, where there is none. Nothing runs.

    TRITON_INTERPRET=0 python tests/support/hopper_program.py FOLDER

Prints a line for each kernel: its module and name, and how many bytes a thread keeps outside its registers.
"""

import re
import subprocess
import sys
from pathlib import Path

import torch
import triton
from no_gpu import OnHopper, compile_instead, compiled

from flexprefill import AttentionVariant, PrefillConfig, Sequences
from flexprefill.attention import mean_correction_kernel
from flexprefill.blockmap.geometry import Geometry
from flexprefill.search.kernels import farthest, launch, two_sided
from flexprefill.search.rule import Rule

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def compile_only(kernel, grid, *arguments, **named):
    """As runtime.launching.launch, but nothing is launched."""
    path = Path(sys.argv[1]) / "kernel.cubin"
    path.write_bytes(compiled(kernel, grid, *arguments, **named).asm["cubin"])
    used = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", used)
    print(f"{kernel.fn.__module__.removeprefix('flexprefill.')}.{kernel.__name__}", stack, flush=True)


def tensor(heads, length):
    return torch.zeros(1, heads, length, 128, dtype=torch.bfloat16).as_subclass(OnHopper)


compile_instead(compile_only, launch, two_sided, farthest, mean_correction_kernel)

LENGTH = 4096
query, key = tensor(8, LENGTH), tensor(2, LENGTH)
for variant in (
    AttentionVariant(),
    AttentionVariant(soft_cap=20.0),
    AttentionVariant(sliding_window=1000),
    AttentionVariant(sequences=Sequences.from_lengths(torch.tensor([LENGTH - 5]), LENGTH)),
):
    rule = Rule.of(PrefillConfig(), scale=0.1, last_chunk=True)
    means = launch.pool_keys(key, 128, variant.sequences)
    launch.score_words(query, means.as_subclass(OnHopper), LENGTH, rule, variant)
for config in (PrefillConfig.recommended(), PrefillConfig(probe_rows=16, outlier_keys=2)):
    rule = Rule.of(config, scale=0.1, last_chunk=True)
    outliers = farthest.farthest(key, 128, rule.outlier_keys, vectors=True).as_subclass(OnHopper)
    two_sided.keep_more(query, key, outliers, None, rule, measured=True)
blocks = tensor(2, LENGTH // 128)
words, lse = torch.zeros(1, 8, 32, 1, dtype=torch.int32), torch.zeros(1, 8, LENGTH)
for scale in (0.1, -0.1):
    mean_correction_kernel.merge(query, blocks, blocks, Geometry(LENGTH, LENGTH, 128), scale, words, query, lse)
