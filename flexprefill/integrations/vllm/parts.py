"""vLLM's metadata of some requests of a batch."""

from __future__ import annotations

import copy
from typing import Any

from flexprefill.integrations.vllm.planner import Run

# of vLLM's CommonAttentionMetadata (0.26 and 0.32): what has an entry for each request, and for each token
OF_REQUESTS = (
    *("seq_lens", "block_table_tensor", "seq_lens_cpu_upper_bound", "is_prefilling", "req_idx"),
    *("encoder_seq_lens", "encoder_seq_lens_cpu", "_seq_lens_cpu", "_num_computed_tokens_cpu"),
)
OF_TOKENS = ("slot_mapping", "positions")  # positions may have several rows
OF_WHOLE_BATCH = ("_num_computed_tokens_cache", "_token_to_req_indices_cache")  # vLLM makes them anew


def part_of(common: Any, run: Run) -> Any:
    """vLLM's CommonAttentionMetadata of a run. Waits for nothing.

    Args:
        common: That of the whole batch. It stays as it is.
        run: Which requests.
    """
    part = copy.copy(common)
    first, end = run.rows
    for name in ("query_start_loc", "query_start_loc_cpu"):
        setattr(part, name, getattr(common, name)[first : end + 1] - run.tokens[0])
    for name in OF_REQUESTS:
        if (every := getattr(common, name, None)) is not None:
            setattr(part, name, every[first:end])
    for name in OF_TOKENS:
        if (every := getattr(common, name, None)) is not None:
            setattr(part, name, every[..., slice(*run.tokens)])
    for name in OF_WHOLE_BATCH:
        if hasattr(common, name):
            setattr(part, name, None)
    part.num_reqs, part.num_actual_tokens = end - first, run.tokens[1] - run.tokens[0]
    part.max_query_len, part.max_seq_len = run.most_queries, run.most_keys
    return part
