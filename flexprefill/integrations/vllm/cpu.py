"""The backend on the CPU: vLLM's own, with long prompts through the search."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from flexprefill.integrations.vllm.backend import PlanningBuilder, SparsePrefill
from flexprefill.integrations.vllm.pages import gather_pages_of_cpu


class FlexPrefillCPUBuilder(PlanningBuilder, CPUAttentionMetadataBuilder):
    """Plans each batch."""


class FlexPrefillCPUImpl(SparsePrefill, CPUAttentionBackendImpl):
    """vLLM's CPU attention for all but long prompts."""

    def against_cache(self, layer: Any) -> str | None:
        if layer.isa == "vec" and layer.kv_cache.dtype == torch.float32:
            return None
        return f"the CPU's cache is packed for {layer.isa} and {layer.kv_cache.dtype}: --dtype float32 has it plain"

    gather = staticmethod(gather_pages_of_cpu)


class FlexPrefillCPUBackend(CPUAttentionBackend):
    """What vLLM takes on a CPU while the plug-in is on. Its name stays CPU_ATTN, which is all that the CPU knows."""

    @staticmethod
    def get_impl_cls() -> type[FlexPrefillCPUImpl]:
        return FlexPrefillCPUImpl

    @staticmethod
    def get_builder_cls() -> type[FlexPrefillCPUBuilder]:
        return FlexPrefillCPUBuilder
