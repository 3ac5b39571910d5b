"""What goes to vLLM's own attention whole, and why. Each reason is a sentence that a user reads once in the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexprefill.variant.inputs import HEAD_DIMS

CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32")


def against_layer(arguments: Mapping[str, Any]) -> str | None:
    """Why a layer stays with vLLM's own attention. None if it can go through the search.

    Args:
        arguments: What vLLM made the layer's attention with, by the names of its AttentionImpl.
    """
    if (kind := str(getattr(arguments.get("attn_type"), "value", arguments.get("attn_type", "decoder")))) != "decoder":
        return f"attention of the type {kind} is not causal attention over a cache"
    if arguments.get("sliding_window") is not None:
        return "a sliding window leaves little to search"
    for name, said in (("alibi_slopes", "ALiBi"), ("sinks", "attention sinks")):
        if arguments.get(name) is not None:
            return f"{said} have not been tried here"
    if arguments.get("kv_sharing_target_layer_name") is not None:
        return "a layer that shares another one's cache has not been tried here"
    if (dtype := str(arguments.get("kv_cache_dtype", "auto"))) not in CACHE_DTYPES:
        return f"a cache of {dtype} would have to be converted"
    if (head_dim := arguments["head_size"]) not in HEAD_DIMS:
        return f"the search takes head dimensions that are multiples of 8 from 16 to 256, got {head_dim}"
    return None


def against_parallelism(impl: Any) -> str | None:
    """Why a process group's layout keeps attention with vLLM. None if it does not."""
    for name, said in (
        ("dcp_world_size", "decode context parallelism"),
        ("pcp_world_size", "prefill context parallelism"),
    ):
        if getattr(impl, name, 1) > 1:
            return f"{said} spreads the keys over processes"
    return None


def against_batch(common: Any, common_prefix_len: int) -> str | None:
    """Why a batch stays with vLLM's own attention. None if its long prompts can go through the search.

    Args:
        common: vLLM's CommonAttentionMetadata.
        common_prefix_len: The tokens that cascade attention shares.
    """
    if common_prefix_len > 0:
        return "cascade attention shares a prefix among the requests"
    if common.causal is not True:
        return "a batch is not causal"
    if getattr(common, "mm_req_doc_ranges", None):
        return "the tokens of an image see each other"
    if getattr(common, "rswa_prefix_lens", None) is not None:
        return "reference sliding-window attention hides keys"
    if common.seq_lens_cpu_upper_bound is None:
        return "the host does not know the requests' lengths"
    return None
