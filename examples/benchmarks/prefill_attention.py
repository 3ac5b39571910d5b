"""Times prefill_attention against dense attention, side by side on the same inputs in one run.

    python examples/benchmarks/prefill_attention.py
    python examples/benchmarks/prefill_attention.py --device cpu --sink-blocks 1 --window-blocks 1 --last-full-blocks 0

Each length is searched with the alpha that gives the asked density on these inputs, if sinks, window and last
blocks alone do not exceed it. Printed are medians in milliseconds with the fastest and the slowest repeat; the
JSON has every repeat.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flexprefill
from flexprefill import BlockMap, PrefillConfig, prefill_attention, search_blocks

# lengths and the densities of the published runs (see the measured table of FlashPrefill v1)
GPU_RUNS = {4096: 0.46, 32768: 0.07, 131072: 0.025}
CPU_RUNS = {8192: 0.10}
SETTINGS = ("sink_blocks", "window_blocks", "last_full_blocks")


def make_qkv(length, heads, kv_heads, head_dim, dtype, device):
    """Random tensors in which stretches of 500 keys share a direction, so that blocks differ in mass."""
    generator = torch.Generator(device).manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    query = normal(1, heads, length, head_dim) + normal(1, heads, 1, head_dim)
    key = normal(1, kv_heads, length, head_dim)
    key += normal(1, kv_heads, length // 500 + 1, head_dim).repeat_interleave(500, 2)[:, :, :length]
    return query, key, normal(1, kv_heads, length, head_dim)


def config_of_density(query, key, density, **settings):
    """The config whose alpha comes nearest to a density, by bisection."""
    low, high = -30.0, 0.0
    for _ in range(20):
        middle = (low + high) / 2
        config = PrefillConfig(alpha=2**middle, **settings)
        if search_blocks(query, key, config).density().mean().item() > density:
            low = middle
        else:
            high = middle
    return config


def time_ms(functions, device, repeats):
    """Milliseconds of each function in each repeat, the functions taking turns."""
    times = {name: [] for name in functions}
    for function in functions.values():
        function()  # compiles
    for _ in range(repeats):
        for name, function in functions.items():
            if device == "cuda":
                torch.cuda.synchronize()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end))
            else:
                begin = time.perf_counter()
                function()
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def measure(length, density, arguments):
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    sizes = arguments.heads, arguments.kv_heads, arguments.head_dim
    query, key, value = make_qkv(length, *sizes, dtype, arguments.device)
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    config = config_of_density(query, key, density, **settings)
    block_map = search_blocks(query, key, config)
    everything = BlockMap.causal(
        1, arguments.heads, q_len=length, kv_len=length, block_size=config.block_size, device=query.device
    )
    grouped = arguments.heads != arguments.kv_heads

    def flash_attention_2():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)

    functions = {
        "search": lambda: search_blocks(query, key, config),
        "lists": block_map.to_block_mask,
        "prefill_attention": lambda: prefill_attention(query, key, value, config),
        "same mask, no search": lambda: prefill_attention(query, key, value, block_map=block_map),
        "flex dense": lambda: prefill_attention(query, key, value, block_map=everything),
        "SDPA flash": flash_attention_2,
    }
    times = time_ms(functions, arguments.device, arguments.repeats)
    return {
        "length": length,
        "config": config.to_dict(),
        "density": block_map.density().mean().item(),
        "median_ms": {name: statistics.median(series) for name, series in times.items()},
        "repeats_ms": times,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens")
    parser.add_argument("--densities", type=float, nargs="+", help="one for each length")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--repeats", type=int)
    for name in SETTINGS:
        default = getattr(PrefillConfig(), name)
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default, help=f"default {default}")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    gpu = arguments.device == "cuda"
    for name, on_gpu, on_cpu in (
        ("heads", 32, 4),
        ("kv_heads", 8, 4),
        ("head_dim", 128, 64),
        ("repeats", 20, 5),
    ):
        if getattr(arguments, name) is None:
            setattr(arguments, name, on_gpu if gpu else on_cpu)
    runs = GPU_RUNS if gpu else CPU_RUNS
    lengths = arguments.lengths or list(runs)
    densities = arguments.densities or [runs.get(length, 0.1) for length in lengths]
    if len(lengths) != len(densities):
        parser.error(f"--densities must give one for each of {lengths}, got {densities}")

    machine = torch.cuda.get_device_name() if gpu else f"{platform.processor() or platform.machine()}, CPU"
    results = {
        "command": "python " + " ".join(sys.argv),
        "machine": machine,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "flexprefill": flexprefill.__version__,
        "heads": arguments.heads,
        "kv_heads": arguments.kv_heads,
        "head_dim": arguments.head_dim,
        "runs": [],
    }
    print(f"{machine}, torch {torch.__version__}; median ms of {arguments.repeats}")
    with torch.no_grad():
        for length, density in zip(lengths, densities, strict=True):
            run = measure(length, density, arguments)
            results["runs"].append(run)
            print(f"{length} tokens, density {run['density']:.3f} (alpha {run['config']['alpha']:.3g})")
            ours = run["median_ms"]["prefill_attention"]
            for name, median in run["median_ms"].items():
                series = run["repeats_ms"][name]
                print(f"  {name:22}{median:10.3f}  {min(series):.3f} … {max(series):.3f}  {median / ours:7.2f}× ours")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
