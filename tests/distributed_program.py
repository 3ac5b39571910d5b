"""What each process of test_distributed runs, started by torchrun: compares with one process that has everything."""

import argparse
import os

import torch
import torch.distributed as dist
from inputs import make_qkv
from oracle import relative_error
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from flexprefill import PrefillConfig, prefill_attention, search_blocks
from flexprefill.integrations.distributed import (
    ContextLayout,
    context_parallel_attention,
    context_parallel_search,
    gather_context,
    shard_context,
    tensor_parallel_attention,
)

CONFIG = PrefillConfig(alpha=0.5, block_size=32, sink_blocks=1, window_blocks=1, last_full_blocks=2, dense_below=0)


def check_layout(layout, length):
    whole = torch.arange(length)
    own = shard_context(whole, layout, dim=0)
    assert torch.equal(own, layout.positions())
    assert torch.equal(gather_context(own, layout, dim=0), whole)
    wide = torch.arange(3 * length).view(1, 3, length)
    assert torch.equal(gather_context(shard_context(wide, layout), layout), wide)
    counts = [sum((end - start) * (start + end) for start, end in layout.spans(r)) for r in range(layout.ranks)]
    # of like work, but for chunks that differ by a block
    slack = 4 * 2 * (CONFIG.block_size + CONFIG.last_full_blocks * CONFIG.block_size) * length
    assert max(counts) - min(counts) <= slack


def check_context_parallel(device, dtype, tolerance, attend, lengths):
    for length in lengths:
        query, key, value = make_qkv(length, heads=4, kv_heads=2, dtype=dtype, device=device, seed=length)
        layout = ContextLayout.of(length, CONFIG)
        check_layout(layout, length)
        own = [shard_context(tensor, layout) for tensor in (query, key, value)]
        whole = search_blocks(query, key, CONFIG)
        for block_map, (start, end) in zip(
            context_parallel_search(*own[:2], layout, CONFIG), layout.spans(), strict=True
        ):
            assert (block_map.q_len, block_map.kv_len) == (end - start, end)
            rows = slice(start // 32, start // 32 + block_map.shape[2])
            assert torch.equal(block_map.to_dense(), whole.to_dense()[:, :, rows, : block_map.shape[3]])
        if attend and length == lengths[0]:
            output = context_parallel_attention(*own, layout, CONFIG)
            expected = prefill_attention(query, key, value, CONFIG)
            assert relative_error(gather_context(output, layout), expected) <= tolerance


def check_tensor_parallel(mesh, device, dtype, tolerance):
    heads = 2 * mesh.size()
    inputs = make_qkv(700, heads=heads, kv_heads=mesh.size(), dtype=dtype, device=device)
    sharded = (distribute_tensor(tensor, mesh, (Shard(1),)) for tensor in inputs)
    output = tensor_parallel_attention(*sharded, CONFIG)
    assert output.placements == (Shard(1),) and output.shape == inputs[0].shape
    assert relative_error(output.full_tensor(), prefill_attention(*inputs, CONFIG)) <= tolerance


def compile_in_turns(device, dtype):
    """Each process finds compiled on disk what the one before it left there; at once, all would compile the same."""
    for turn in range(dist.get_world_size()):
        if turn == dist.get_rank():
            query, key, value = make_qkv(700, heads=4, kv_heads=2, dtype=dtype, device=device)
            prefill_attention(query, key, value, CONFIG)
            for start in (128, 256):  # with the second one lengths become dynamic
                prefill_attention(query[:, :, start:], key, value, CONFIG)
        dist.barrier()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="gloo")
    parser.add_argument("--attend", action="store_true")
    settings = parser.parse_args()
    dist.init_process_group(settings.backend)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device, dtype, tolerance = "cpu", torch.float32, 1e-5
    if settings.backend == "nccl":
        device, dtype, tolerance = f"cuda:{os.environ['LOCAL_RANK']}", torch.bfloat16, 4e-3
        torch.cuda.set_device(device)
    mesh = init_device_mesh(torch.device(device).type, (ranks,))
    if settings.attend:
        compile_in_turns(device, dtype)
    check_context_parallel(device, dtype, tolerance, settings.attend, (700, 512, 32 * (2 * ranks + 1)))
    if settings.attend:
        check_tensor_parallel(mesh, device, dtype, tolerance)
    dist.barrier()
    print(f"process {rank} of {ranks} is right", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with torch.no_grad():
        main()
