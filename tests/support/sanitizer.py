"""The library's kernels at small sizes under compute-sanitizer, where that is installed:

python tests/support/sanitizer.py            # memcheck and racecheck
python tests/support/sanitizer.py kernels    # the kernels alone, to be run under another tool
"""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests, where support is
TOOLS = ("memcheck", "racecheck")


def find_sanitizer():
    """The program's path, of the CUDA toolkit or of the package nvidia-cuda-sanitizer-api; None without it."""
    places = [shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"]
    for folder in sys.path:
        places += Path(folder).glob("nvidia/**/compute-sanitizer") if folder and "site-packages" in folder else ()
    return next((str(place) for place in places if place and os.access(place, os.X_OK) and os.path.isfile(place)), None)


def run_kernels(device="cuda"):
    """Every Triton and Gluon kernel of the library, odd and even sizes, whole prompts and chunks, each checked."""
    import torch

    from flexprefill import (
        AttentionVariant,
        BlockMap,
        KeyMeans,
        ListBuffers,
        PageMeans,
        PrefillConfig,
        Sequences,
        search_blocks,
    )
    from flexprefill.attention import mean_correction_kernel, tail_kernel
    from flexprefill.attention.mean_correction import merge_means
    from flexprefill.blockmap.places import lists_in_places
    from flexprefill.search.kernels import launch as kernels
    from support.inputs import make_qkv
    from support.paged import in_pages

    make = functools.partial(make_qkv, heads=4, kv_heads=2, device=device)
    ran = 0
    for q_len, kv_len, head_dim, dtype in (
        (512, 512, 128, torch.bfloat16),
        (333, 333, 64, torch.float16),
        (100, 700, 128, torch.bfloat16),
        (1, 300, 64, torch.bfloat16),
        (200, 200, 96, torch.float32),
    ):
        query, key, value = make(q_len, kv_len, head_dim=head_dim, dtype=dtype)
        for changes in ({}, {"block_size": 64, "min_blocks": 2}, {"mask_heads": "kv"}, {"score_rows": "visible"}):
            config = PrefillConfig(**{"alpha": 0.5, "window_blocks": 1, "last_full_blocks": 1} | changes)
            block_map = search_blocks(query, key, config, implementation="triton")
            assert search_blocks(query, key, config, implementation="triton", means=KeyMeans()) == block_map
            takes, kernels.hopper_takes = kernels.hopper_takes, lambda *arguments: False
            search_blocks(query, key, config, implementation="triton")
            kernels.hopper_takes = takes
            assert BlockMap.from_block_mask(block_map.to_block_mask()) == block_map
            buffers = ListBuffers()
            for _ in range(2):
                assert BlockMap.from_block_mask(block_map.to_block_mask(buffers=buffers)) == block_map
            output, lse = torch.zeros_like(query), torch.zeros(query.shape[:3], device=device)
            sizes = config.block_size, head_dim**-0.5, "triton"
            takes = mean_correction_kernel.hopper_merges
            for hopper in (takes, lambda *arguments: False):
                mean_correction_kernel.hopper_merges = hopper
                merged, _ = merge_means(query, key, value, block_map.words, output, lse, *sizes)
                assert merged.isfinite().all()
            mean_correction_kernel.hopper_merges = takes
            ran += 1
        for page_size, means in ((128, PageMeans()), (48, None)):
            paged = in_pages(key, value, page_size)
            for _ in range(2):
                found = search_blocks(query, paged, PrefillConfig(), implementation="triton", means=means)
                assert found == search_blocks(query, key, PrefillConfig(), implementation="triton")
            counts, _, full_counts, _ = lists_in_places(found.words, found.geometry, paged.places(128))
            assert (counts + full_counts >= found.counts()).all()
            ran += 1
        bounds = torch.tensor([0, kv_len // 3, kv_len - 1], device=device)
        terms = {"sliding_window": 100, "soft_cap": 3.0, "alibi_slopes": torch.full((4,), 0.01, device=device)}
        for sequences in (None, Sequences.from_cu_seqlens(bounds, kv_len)):
            variant = AttentionVariant(sequences, **terms)
            found = search_blocks(query, key, PrefillConfig(), variant=variant, implementation="triton")
            assert BlockMap.from_block_mask(found.to_block_mask()) == found
            ran += 1
    words = search_blocks(*make(1024, head_dim=64, dtype=torch.bfloat16)[:2]).words
    others, parts = tail_kernel.split_words(words, 6, 8, 3)
    assert others.shape == words.shape and parts.shape == (1, 12, 2, 1)
    outputs, sums = torch.randn(1, 4, 762, 64, device=device), torch.randn(1, 4, 762, device=device)
    output, lse = torch.zeros(1, 4, 1000, 64, device=device), torch.zeros(1, 4, 1000, device=device)
    tail_kernel.merge_parts(outputs, sums, 3, output, lse, 250)
    if device == "cuda":
        torch.cuda.synchronize()
    assert output[:, :, -250:].isfinite().all() and (output[:, :, :-250] == 0).all()
    print(f"{ran} searches and the tail's kernels ran")


def run_under(tool, sanitizer):
    """The finished process of the kernels under a tool; its exit status is 1 if that found anything."""
    # every allocation by itself, so that reads past its end are seen
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, __file__, "kernels"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)


def main():
    if sys.argv[1:] == ["kernels"]:
        run_kernels()
        return 0
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("compute-sanitizer is not installed (the CUDA toolkit, or the package nvidia-cuda-sanitizer-api)")
        return 2
    status = 0
    for tool in TOOLS:
        result = run_under(tool, sanitizer)
        print(f"--- {tool}: {'clean' if result.returncode == 0 else 'not clean'}")
        print(result.stdout + result.stderr)
        status |= result.returncode != 0
    return status


if __name__ == "__main__":
    sys.exit(main())
