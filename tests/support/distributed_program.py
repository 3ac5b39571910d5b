"""What each process of test_distributed runs, started by torchrun: compares with one process that has everything."""

import argparse
import os
import tempfile
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from flexprefill import AttentionVariant, PrefillConfig, Sequences, prefill_attention, record_masks, search_blocks
from flexprefill.integrations.distributed import (
    ContextLayout,
    context_parallel_attention,
    context_parallel_search,
    gather_context,
    shard_context,
    tensor_parallel_attention,
)
from support.inputs import make_qkv
from support.oracle import relative_error


class Machine(NamedTuple):
    """What the processes run on, and inputs that are long enough to take its kernels."""

    device: torch.device
    dtype: torch.dtype
    config: PrefillConfig
    head_dim: int
    lengths: tuple[int, ...]  # the first one is attended
    model: dict[str, int]  # its config's sizes

    @classmethod
    def here(cls, backend, ranks):
        rule = {"alpha": 0.5, "sink_blocks": 1, "window_blocks": 1, "last_full_blocks": 2, "dense_below": 0}
        if backend == "gloo":
            config = PrefillConfig(**rule, block_size=32)
            return cls(torch.device("cpu"), torch.float32, config, 64, (700, 512, 32 * (2 * ranks + 1)), {})
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        model = {"hidden_size": 512, "head_dim": 128, "intermediate_size": 512, "max_position_embeddings": 8192}
        lengths = 20_000, 16_384, 128 * (2 * ranks + 1)
        return cls(device, torch.bfloat16, PrefillConfig(**rule), 128, lengths, model)

    def qkv(self, length, heads=4, kv_heads=2):
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": self.head_dim}
        return make_qkv(length, **sizes, dtype=self.dtype, device=self.device, seed=length)

    def assert_close(self, found, expected, exact):
        """Like one process's: in float32 within rounding, else within twice its error, exact() being in float32."""
        if self.dtype == torch.float32:
            assert relative_error(found, expected) <= 1e-5
        else:
            reference = exact()
            error, allowed = relative_error(found, reference), 2 * relative_error(expected, reference)
            assert error <= allowed, (error, allowed)


def check_layout(layout, length, config, device):
    whole = torch.arange(length, device=device)
    own = shard_context(whole, layout, dim=0)
    assert torch.equal(own, layout.positions(device))
    assert torch.equal(gather_context(own, layout, dim=0), whole)
    wide = torch.arange(3 * length, device=device).view(1, 3, length)
    assert torch.equal(gather_context(shard_context(wide, layout), layout), wide)
    counts = [sum((end - start) * (start + end) for start, end in layout.spans(r)) for r in range(layout.ranks)]
    # of like work, but for chunks that differ by a block
    slack = 4 * 2 * (config.block_size + config.last_full_blocks * config.block_size) * length
    assert max(counts) - min(counts) <= slack


def exact_attention(query, key, value, config, variant=None):
    """In float32, over the blocks that are found in the given dtype."""
    block_map = search_blocks(query, key, config, variant=variant)
    inputs = query.float(), key.float(), value.float()
    return prefill_attention(*inputs, config, variant=variant, block_map=block_map)


def check_context_parallel(machine, attend):
    config, size = machine.config, machine.config.block_size
    for length in machine.lengths:
        query, key, value = machine.qkv(length)
        layout = ContextLayout.of(length, config)
        check_layout(layout, length, config, machine.device)
        own = [shard_context(tensor, layout) for tensor in (query, key, value)]
        for variant in (None, variant_of(query)):
            whole = search_blocks(query, key, config, variant=variant)
            maps = context_parallel_search(*own[:2], layout, config, variant=variant)
            for block_map, (start, end) in zip(maps, layout.spans(), strict=True):
                assert (block_map.q_len, block_map.kv_len) == (end - start, end)
                rows = slice(start // size, start // size + block_map.shape[2])
                assert torch.equal(block_map.to_dense(), whole.to_dense()[:, :, rows, : block_map.shape[3]])
        whole = search_blocks(query, key, config)
        if length > 1000 or length == machine.lengths[0]:
            assert whole.density().max() < 0.9
        if attend and length == machine.lengths[0]:
            output = gather_context(context_parallel_attention(*own, layout, config), layout)
            expected = prefill_attention(query, key, value, config)
            machine.assert_close(output, expected, lambda: exact_attention(query, key, value, config))  # noqa: B023
            variant = variant_of(query)
            output = gather_context(context_parallel_attention(*own, layout, config, variant=variant), layout)
            expected = prefill_attention(query, key, value, config, variant=variant)
            machine.assert_close(
                output,
                expected,
                lambda: exact_attention(query, key, value, config, variant),  # noqa: B023
            )
            refused = AttentionVariant(Sequences.from_lengths(torch.tensor([length], device=query.device), length))
            try:
                context_parallel_search(*own[:2], layout, config, variant=refused)
            except ValueError as error:
                assert "variant must be without sequences" in str(error)
            else:
                raise AssertionError("sequences were not refused")


def variant_of(query):
    """A variant with a number for each head."""
    heads = torch.arange(1, query.shape[1] + 1, device=query.device, dtype=torch.float32)
    return AttentionVariant(
        sliding_window=query.shape[2] // 3, soft_cap=5.0, alibi_slopes=0.02 / heads, sinks=heads / 4
    )


def check_tensor_parallel(machine, mesh):
    inputs = machine.qkv(machine.lengths[0], heads=2 * mesh.size(), kv_heads=mesh.size())
    sharded = [distribute_tensor(tensor, mesh, (Shard(1),)) for tensor in inputs]
    for variant in (None, variant_of(inputs[0])):
        output = tensor_parallel_attention(*sharded, machine.config, variant=variant)
        assert output.placements == (Shard(1),) and output.shape == inputs[0].shape
        expected = prefill_attention(*inputs, machine.config, variant=variant)
        machine.assert_close(
            output.full_tensor(),
            expected,
            lambda: exact_attention(*inputs, machine.config, variant),  # noqa: B023
        )


def check_model(machine, mesh, family):
    """A model of transformers, saved and loaded in parts by transformers' own tensor parallelism."""
    import transformers as hf
    from transformers.distributed import DistributedConfig

    from flexprefill.integrations.transformers import register
    from support.families import make_model

    register(machine.config, name="sparse")
    attend, seen = hf.AttentionInterface()["sparse"], []

    def watched(module, query, key, *others, **settings):
        seen.append((query, key, settings["scaling"]))
        return attend(module, query, key, *others, **settings)

    hf.AttentionInterface.register("sparse", watched)
    whole = make_model(family, "sparse", machine.dtype, **machine.model).to(machine.device)
    with tempfile.TemporaryDirectory() as own_folder:
        folder = [own_folder]
        dist.broadcast_object_list(folder)
        whole.save_pretrained(folder[0])  # of several processes transformers lets the first one write
        dist.barrier()
        plan = DistributedConfig(tp_plan="auto")
        settings = {"dtype": machine.dtype, "attn_implementation": "sparse", "distributed_config": plan}
        model = hf.AutoModelForCausalLM.from_pretrained(folder[0], **settings).eval()
        dist.barrier()
    generator = torch.Generator().manual_seed(0)
    length = min(machine.lengths[0], 6000)
    topics = torch.randint(whole.config.vocab_size, (1, length // 60 + 1), generator=generator)  # of noise all is kept
    tokens = topics.repeat_interleave(60, 1)[:, :length].to(machine.device)
    with record_masks(whole) as expected_masks:
        expected = whole(tokens).logits
    seen.clear()
    with record_masks(model) as masks:
        logits = model(tokens).logits
    assert len(masks) == len(expected_masks) == len(seen) == whole.config.num_hidden_layers
    for layer, (query, key, scale) in enumerate(list(seen)):
        # a process has its own heads, and finds of them what one process with all heads finds
        heads = query.shape[1]
        assert heads * mesh.size() == whole.config.num_attention_heads
        all_heads = (gather_heads(tensor, mesh) for tensor in (query, key))
        own = slice(mesh.get_local_rank() * heads, (mesh.get_local_rank() + 1) * heads)
        assert 0.1 < masks[layer].density().mean() < 0.9
        assert torch.equal(masks[layer].words, search_blocks(*all_heads, machine.config, scale=scale).words[:, own])
        if machine.dtype == torch.float32:  # in 16 bits what goes in is rounded otherwise
            assert torch.equal(masks[layer].words, expected_masks[layer].words[:, own])
    machine.assert_close(logits, expected, lambda: whole.float()(tokens).logits)


def gather_heads(tensor, mesh):
    return DTensor.from_local(tensor.contiguous(), mesh, (Shard(1),)).full_tensor()


def compile_in_turns(machine):
    """Each process finds compiled on disk what the one before it left there; at once, all would compile the same."""
    for turn in range(dist.get_world_size()):
        if turn == dist.get_rank():
            query, key, value = machine.qkv(700)
            prefill_attention(query, key, value, machine.config)
            for start in (128, 256):  # with the second one lengths become dynamic
                prefill_attention(query[:, :, start:], key, value, machine.config)
        dist.barrier()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=["gloo", "nccl"], default="gloo")
    parser.add_argument("--attend", action="store_true")
    parser.add_argument("--models", action="store_true", help="of transformers; for two processes")
    settings = parser.parse_args()
    ranks = int(os.environ["WORLD_SIZE"])
    machine = Machine.here(settings.backend, ranks)
    bound = {}
    if machine.device.type == "cuda":
        torch.cuda.set_device(machine.device)
        bound = {"device_id": machine.device}
    dist.init_process_group(settings.backend, **bound)
    mesh = init_device_mesh(machine.device.type, (ranks,))
    if settings.attend and machine.device.type == "cpu":
        compile_in_turns(machine)
    check_context_parallel(machine, settings.attend)
    if settings.attend:
        check_tensor_parallel(machine, mesh)
    if settings.models:
        for family in ("llama", "qwen3"):
            # in float32: in 16 bits other roundings keep other blocks, and logits differ by more than rounding
            check_model(machine._replace(dtype=torch.float32), mesh, family)
    dist.barrier()
    print(f"process {dist.get_rank()} of {ranks} is right", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with torch.no_grad():
        main()
