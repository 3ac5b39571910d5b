"""A prompt too long to hold all its queries at once: search and attention chunk by chunk.

The means of the key blocks are kept from chunk to chunk, so that each key is pooled once.

python examples/prefill_in_chunks.py
python examples/prefill_in_chunks.py --device cuda --length 1048576 --chunk 65536 --heads 32 --kv-heads 8 --head-dim 128
"""

import argparse
import time

import torch

from flexprefill import BlockMap, KeyMeans, PrefillConfig, prefill_attention, search_blocks

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", default="cpu")
parser.add_argument("--length", type=int, default=4096, help="tokens of the prompt (default: %(default)s)")
parser.add_argument("--chunk", type=int, default=1024, help="tokens a chunk, whole blocks (default: %(default)s)")
parser.add_argument("--heads", type=int, default=4)
parser.add_argument("--kv-heads", type=int, default=2)
parser.add_argument("--head-dim", type=int, default=64)
parser.add_argument("--compare", action="store_true", help="also search all queries at once and compare the bits")
arguments = parser.parse_args()
length, chunk, device = arguments.length, arguments.chunk, arguments.device
config = PrefillConfig(alpha=0.3)
if chunk < 1 or chunk % config.block_size:
    parser.error(
        f"argument --chunk: must be whole blocks of {config.block_size} tokens, so that the maps join, got {chunk}"
    )
last_rows = length - (length - 1) // chunk * chunk
if arguments.compare and length > chunk and last_rows <= (config.last_full_blocks - 1) * config.block_size:
    parser.error(f"argument --compare: the last chunk, {last_rows} tokens, has fewer blocks than last_full_blocks")
gpu = device != "cpu"
dtype = torch.bfloat16 if gpu else torch.float32

torch.manual_seed(0)
# stretches of 500 keys share a direction, so that blocks differ in what they weigh
directions = torch.randn(1, arguments.kv_heads, length // 500 + 1, arguments.head_dim, device=device, dtype=dtype)
key = directions.repeat_interleave(500, 2)[:, :, :length]
key = key + torch.randn(1, 1, length, arguments.head_dim, device=device, dtype=dtype)
value = torch.randn(1, arguments.kv_heads, length, arguments.head_dim, device=device, dtype=dtype)


def queries(start: int, end: int) -> torch.Tensor:
    """As a model would project them from the hidden states of the chunk."""
    generator = torch.Generator(device).manual_seed(start)
    shape = 1, arguments.heads, end - start, arguments.head_dim
    return 2 * torch.randn(*shape, generator=generator, device=device, dtype=dtype)


maps, means = [], KeyMeans()
if gpu:
    torch.cuda.reset_peak_memory_stats()
begin = time.perf_counter()
for start in range(0, length, chunk):
    end = min(start + chunk, length)
    query = queries(start, end)
    seen = key[:, :, :end], value[:, :, :end]
    block_map = search_blocks(query, seen[0], config, last_chunk=end == length, means=means)
    output = prefill_attention(query, *seen, block_map=block_map)
    assert output.isfinite().all()
    maps.append(block_map.to("cpu"))
    print(f"tokens {start:>8} to {end:>8}: {block_map.density().mean():6.2%} of the causal blocks", flush=True)
if gpu:
    torch.cuda.synchronize()
print(f"{time.perf_counter() - begin:.1f} s, compiling included; block means take {means.nbytes / 2**20:.1f} MiB")
if gpu:
    print(f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB at most, keys and values included")
joined = BlockMap.from_chunks(maps)
print(f"{joined}: {joined.words.nbytes / 2**20:.1f} MiB")

if arguments.compare:
    last_blocks = -(-(length - (length - 1) // chunk * chunk) // config.block_size)
    if last_blocks < min(config.last_full_blocks, joined.shape[2]):
        parser.error(
            f"argument --compare: the last chunk has {last_blocks} block, fewer than the rule's last full ones"
        )
    query = torch.cat([queries(start, min(start + chunk, length)) for start in range(0, length, chunk)], 2)
    assert search_blocks(query, key, config).to("cpu") == joined
    print("the same blocks as in one search over all queries")
