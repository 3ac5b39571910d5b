"""Whether a server's warm-up meets every kind of launch that a prompt may come to, without a GPU.

    TRITON_INTERPRET=0 python tests/support/served_program.py

Prints a line for each kernel of which a served prompt makes Triton compile one that the warm-up did not.
"""

import torch
from no_gpu import OnHopper, compile_instead, compiled

from flexprefill import PrefillConfig
from flexprefill.attention import tail_kernel
from flexprefill.attention.tail import TAIL_SPLIT_FROM
from flexprefill.blockmap import index_lists_kernel
from flexprefill.blockmap.geometry import Geometry
from flexprefill.integrations.vllm.attend import lengths_to_warm
from flexprefill.search.kernels import farthest, launch, two_sided
from flexprefill.search.rule import Rule

HEADS, KV_HEADS, DIM, PARTS = 8, 2, 128, 16
SERVED = [(1024, 9216), (2000, 2000), (8192, 8192), (8192, 40_960), (8192, 65_536), (8192, 131_072), (1237, 32_005)]
SERVED += [(16_384, 16_384), (20_000, 20_000), (7232, 32_000), (4000, 69_536), (8192, 73_728), (3000, 100_000)]
fresh = set()


def note(kernel, grid, *arguments, **named):
    fresh.add((kernel.__name__, compiled(kernel, grid, *arguments, **named).hash))


def serve(q_len, kv_len):
    """What attend_prompt launches by itself, besides FlexAttention, for each of two settings."""
    query = torch.empty(1, q_len, HEADS, DIM, dtype=torch.bfloat16).transpose(1, 2).as_subclass(OnHopper)
    key = torch.empty(1, KV_HEADS, kv_len, DIM, dtype=torch.bfloat16).as_subclass(OnHopper)
    rule = Rule.of(PrefillConfig(), scale=0.1, last_chunk=True)
    launch.score_words(query, launch.pool_keys(key, 128, None).as_subclass(OnHopper), kv_len, rule)
    rule = Rule.of(PrefillConfig.recommended(), scale=0.1, last_chunk=True)
    outliers = farthest.farthest(key, 128, rule.outlier_keys, vectors=True).as_subclass(OnHopper)
    two_sided.keep_more(query, key, outliers, None, rule, measured=False)
    geometry = Geometry(q_len, kv_len, 128)
    words = torch.zeros(1, HEADS, geometry.rows, -(-geometry.columns // 32), dtype=torch.int32)
    fill(words, geometry)
    if kv_len >= TAIL_SPLIT_FROM:
        _, by_part = tail_kernel.split_words(words, geometry.rows - 2, geometry.columns, PARTS)
        fill(by_part, geometry._replace(q_len=256))
        output = torch.empty(1, HEADS, q_len, DIM, dtype=torch.bfloat16)
        length = (PARTS - 1) * 256 + 200
        outputs = torch.empty(1, HEADS, length, DIM, dtype=torch.bfloat16)
        tail_kernel.merge_parts(outputs, torch.empty(1, HEADS, length), PARTS, output, None, 200)


def fill(words, geometry):
    counts = torch.empty(words.shape[:3], dtype=torch.int32)
    indices = torch.empty(*words.shape[:3], geometry.columns, dtype=torch.int32)
    index_lists_kernel.fill_lists((counts, indices, counts, indices), words, geometry)


compile_instead(note, launch, farthest, two_sided, index_lists_kernel, tail_kernel)
for lengths in lengths_to_warm(True, 131_072):
    serve(*lengths)
seen, fresh = fresh, set()
for lengths in SERVED:
    serve(*lengths)
    for name, _ in fresh - seen:
        print(name, *lengths)
    seen |= fresh
print(len({name for name, _ in seen}), "kernels")
