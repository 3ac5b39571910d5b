"""The backend on CUDA: vLLM's FlashAttention, with long prompts through the search."""

from __future__ import annotations

from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from flexprefill.integrations.vllm.backend import PlanningBuilder, SparsePrefill
from flexprefill.integrations.vllm.pages import gather_pages


class FlexPrefillBuilder(PlanningBuilder, FlashAttentionMetadataBuilder):
    """Only steps of decoding are captured in a CUDA graph: a prompt's plan is another one each time."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH


class FlexPrefillImpl(SparsePrefill, FlashAttentionImpl):
    """FlashAttention for all but long prompts."""

    gather = staticmethod(gather_pages)


class FlexPrefillBackend(FlashAttentionBackend):
    """What ``--attention-backend CUSTOM`` stands for while the plug-in is on."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # it has to be a member of vLLM's enumeration

    @staticmethod
    def get_impl_cls() -> type[FlexPrefillImpl]:
        return FlexPrefillImpl

    @staticmethod
    def get_builder_cls() -> type[FlexPrefillBuilder]:
        return FlexPrefillBuilder
