"""One prompt over several processes: each holds two chunks of the positions, and all get their part of the attention.

    torchrun --nproc-per-node 2 examples/context_parallel.py

On GPUs of one machine by NCCL, elsewhere on the CPU by gloo. Checks each process's output against the whole.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist

from flexprefill import PrefillConfig, prefill_attention
from flexprefill.integrations.distributed import (
    ContextLayout,
    context_parallel_attention,
    gather_context,
    shard_context,
)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--length", type=int, default=4096, help="tokens (default: %(default)s)")
parser.add_argument("--heads", type=int, default=4, help="(default: %(default)s)")
parser.add_argument("--kv-heads", type=int, default=2, help="(default: %(default)s)")
parser.add_argument("--head-dim", type=int, default=64, help="(default: %(default)s)")
parser.add_argument("--alpha", type=float, default=0.5, help="(default: %(default)s)")
settings = parser.parse_args()
if "RANK" not in os.environ:
    parser.error("start it by torchrun: torchrun --nproc-per-node 2 examples/context_parallel.py")

on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpus else "cpu")
if on_gpus:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if on_gpus else "gloo")
config = PrefillConfig(alpha=settings.alpha, dense_below=0)
generator = torch.Generator().manual_seed(0)  # the same on every process, so that the whole can be checked


def random(heads):
    shape = 1, heads, settings.length, settings.head_dim
    return torch.randn(shape, generator=generator).to(device, torch.bfloat16 if on_gpus else torch.float32)


query, key, value = random(settings.heads), random(settings.kv_heads), random(settings.kv_heads)
layout = ContextLayout.of(settings.length, config)
own = [shard_context(tensor, layout) for tensor in (query, key, value)]
context_parallel_attention(*own, layout, config)  # compiles
dist.barrier()
start = time.perf_counter()
output = context_parallel_attention(*own, layout, config)
if on_gpus:
    torch.cuda.synchronize()
took = 1000 * (time.perf_counter() - start)

expected = prefill_attention(query, key, value, config)
difference = (gather_context(output, layout) - expected).float().norm() / expected.float().norm()
for rank in range(layout.ranks):
    if rank == layout.rank:
        (a, b), (c, d) = layout.spans()
        print(f"process {rank}: positions {a:,} – {b:,} and {c:,} – {d:,}, {took:.1f} ms", flush=True)
    dist.barrier()
if layout.rank == 0:
    print(f"the whole differs from one process's by {difference:.1e}", flush=True)
dist.destroy_process_group()
