"""Attention over the kept blocks of a map: the choice of a kernel, and FlexAttention itself."""

from flexprefill.attention.backends import BackendChoice
from flexprefill.attention.prefill import create_prefill_block_mask, explain_backend, prefill_attention

__all__ = ["BackendChoice", "create_prefill_block_mask", "explain_backend", "prefill_attention"]
