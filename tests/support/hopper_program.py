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
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from flexprefill import AttentionVariant, PrefillConfig, Sequences
from flexprefill.attention import mean_correction_kernel
from flexprefill.blockmap.geometry import Geometry
from flexprefill.search.kernels import farthest, launch, two_sided
from flexprefill.search.rule import Rule

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class NoDriver:
    """What Triton asks of a device while it compiles."""

    launcher_cls = staticmethod(lambda *arguments: None)

    class utils:
        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65_536}

        @staticmethod
        def load_binary(*arguments):
            return 0, 0, 0, 0, 1024

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def map_python_to_cpp_type(self, name):
        return name


class OnHopper(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def plain(argument):
    return argument.as_subclass(torch.Tensor) if isinstance(argument, OnHopper) else argument


def compile_only(kernel, grid, *arguments, **named):
    """As runtime.launching.launch, but nothing is launched."""
    named = {name: plain(argument) for name, argument in named.items()}
    compiled = kernel.warmup(*map(plain, arguments), grid=grid, **named)
    path = Path(sys.argv[1]) / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    used = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", used)
    print(f"{kernel.fn.__module__.removeprefix('flexprefill.')}.{kernel.__name__}", stack, flush=True)


def tensor(heads, length):
    return torch.zeros(1, heads, length, 128, dtype=torch.bfloat16).as_subclass(OnHopper)


driver.set_active(NoDriver())
for module in (launch, two_sided, farthest, mean_correction_kernel):
    for name, stand_in in (
        ("launch", compile_only),
        ("is_hopper", lambda device: True),
        ("multiprocessors", lambda device: 132),
    ):
        if hasattr(module, name):
            setattr(module, name, stand_in)

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
