"""What the plug-in adds to a backend of vLLM: a plan for each batch, and attention that follows it."""

from __future__ import annotations

import inspect
import logging
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank

from flexprefill.integrations.published import published_for
from flexprefill.integrations.vllm.attend import Gather, ServedLayer, Sizes, attend_prompt, warm_up
from flexprefill.integrations.vllm.figures import figures
from flexprefill.integrations.vllm.layers import Model, layer_number
from flexprefill.integrations.vllm.parts import part_of
from flexprefill.integrations.vllm.planner import Plan, plan_batch
from flexprefill.integrations.vllm.recording import Served
from flexprefill.integrations.vllm.refusals import against_batch, against_layer, against_parallelism
from flexprefill.integrations.vllm.settings import FOLDER, Settings
from flexprefill.runtime.state import remembered

logger = logging.getLogger("vllm.flexprefill")  # vLLM shows what loggers below its own say


@remembered("what a server's log has said", most=256)
def say_once(message: str) -> bool:
    """Writes a line into vLLM's log, unless it is there."""
    logger.info(message)
    return True


def settings_in_force() -> Settings:
    """The settings of a process in which the plug-in is on."""
    settings = Settings.read()
    assert settings is not None, "vLLM knows of this backend only if the plug-in is on"
    return settings


class Planned(NamedTuple):
    """A batch's plan, and vLLM's own metadata of each run."""

    plan: Plan
    runs: tuple[Any, ...]


class PlanningBuilder:
    """Stands before a backend's AttentionMetadataBuilder. Its metadata gets one more attribute, ``flexprefill``.

    That is a `Planned`, or None where the batch goes to vLLM's own attention whole. All other attributes stay as they
    are. So a layer that cannot go through the search finds what it would find without the plug-in.
    """

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        settings = settings_in_force()
        self._min_keys, self._min_queries = settings.keys_from, settings.min_queries

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """As the backend's own: called once for each batch and group of layers."""
        metadata = self._build_own(common_prefix_len, common_attn_metadata, fast_build)
        metadata.flexprefill = None
        # steps of decoding, and drafts of them, pass quickly
        if not fast_build and common_attn_metadata.max_query_len >= self._min_queries:
            metadata.flexprefill = self._planned(common_prefix_len, common_attn_metadata)
        return metadata

    def _planned(self, common_prefix_len: int, common: Any) -> Planned | None:
        if (reason := against_batch(common, common_prefix_len)) is not None:
            say_once(f"flexprefill leaves batches to vLLM's own attention where {reason}")
            return None
        starts, lengths = common.query_start_loc_cpu, common.seq_lens_cpu_upper_bound
        plan = plan_batch(
            starts[: common.num_reqs + 1].tolist(),
            lengths[: common.num_reqs].tolist(),
            min_keys=self._min_keys,
            min_queries=self._min_queries,
        )
        if plan is None:
            return None
        # fast: a schedule made ahead lies in one buffer, which holds the whole batch's
        return Planned(plan, tuple(self._build_own(0, part_of(common, run), True) for run in plan.runs))

    def _build_own(self, common_prefix_len: int, common: Any, fast_build: bool) -> Any:
        build = super().build  # type: ignore[misc]
        return build(common_prefix_len=common_prefix_len, common_attn_metadata=common, fast_build=fast_build)

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """As the backend's own. Only steps of decoding are captured."""
        metadata = super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        metadata.flexprefill = None
        return metadata

    def update_block_table(self, metadata: Any, blk_table: Tensor, slot_mapping: Tensor) -> Any:
        """As the backend's own: the same batch over another group's pages."""
        update = super().update_block_table  # type: ignore[misc]
        updated, planned = update(metadata, blk_table, slot_mapping), metadata.flexprefill
        if planned is not None:
            runs = (
                update(own, blk_table[slice(*run.rows)], slot_mapping[slice(*run.tokens)])
                for run, own in zip(planned.plan.runs, planned.runs, strict=True)
            )
            updated.flexprefill = Planned(planned.plan, tuple(runs))
        return updated


class SparsePrefill:
    """Stands before a backend's AttentionImpl. Long prompts of a planned batch go through the search."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._arguments = inspect.signature(super().__init__).bind(*arguments, **named).arguments
        super().__init__(*arguments, **named)
        vllm_config = get_current_vllm_config()
        model = vllm_config.model_config
        published = published_for(getattr(model.hf_text_config, "model_type", ""))
        self._rank = get_tensor_model_parallel_rank()
        self._model = Model(settings_in_force(), published, model.max_model_len, self._rank)
        self._against = against_layer(self._arguments) or against_parallelism(self)
        self._served: tuple[int, ServedLayer | None] | None = None

    def against_cache(self, layer: Any) -> str | None:
        """Why a layer's cache cannot be read. None if it can."""
        return None

    @staticmethod
    def gather(cache: Tensor, pages: Tensor, kv_len: int) -> tuple[Tensor, Tensor]:
        """A request's key and value, [1, Hkv, kv_len, D] both."""
        raise NotImplementedError

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """As the backend's own. And compiles what the layer needs, so that no request waits for it."""
        super().process_weights_after_loading(act_dtype)  # type: ignore[misc]
        given = self._arguments
        kinds = self._kinds()
        if not kinds:
            return
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        heads = given["num_heads"], given["num_kv_heads"], given["head_size"]
        # not where the plug-in is loaded: a server's log is not set up there yet
        say_once(
            f"flexprefill: prompts from {self._model.settings.keys_from:,} tokens on go through the search, which "
            f"compiles now. Its reports are in {os.environ.get(FOLDER)}"
        )
        for kind in kinds:
            warm_once(kind, Sizes(*heads, act_dtype, device, self._model.most_keys), type(self).gather)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        **quantized: Any,
    ) -> Tensor:
        """As the backend's own: query [tokens, Hq, D], output likewise, keys and values in the cache already."""
        own = super().forward  # type: ignore[misc]
        if attn_metadata is None:
            self._take_room(query)
        planned = getattr(attn_metadata, "flexprefill", None)  # some of vLLM's wrappers copy the fields alone
        served = None if planned is None else self._served_by(layer)
        if planned is None or served is None:
            return own(layer, query, key, value, kv_cache, attn_metadata, output, **quantized)
        for run, metadata in zip(planned.plan.runs, planned.runs, strict=True):
            part = slice(*run.tokens)
            own(layer, query[part], key[part], value[part], kv_cache, metadata, output[part], **quantized)
        for prompt in planned.plan.prompts:
            pages = attn_metadata.block_table[prompt.row]
            part = slice(prompt.first, prompt.first + prompt.q_len)
            attended, kept = attend_prompt(served, query[part], *self.gather(kv_cache, pages, prompt.kv_len))
            output[part] = attended.reshape_as(output[part])
            figures(self._rank).note(Served(layer_number(layer.layer_name), prompt, pages), kept, served.config)
        return output

    def _take_room(self, query: Tensor) -> None:
        """Takes what a call needs for the longest prompt, and gives it back, while vLLM measures what to leave free."""
        given = self._arguments
        kinds = self._kinds()
        if not kinds:
            return
        gathered = self._model.most_keys, given["num_kv_heads"], 2 * given["head_size"]
        taken = [query.new_empty(gathered), torch.empty_like(query), torch.empty_like(query)]
        if query.is_cuda and any(kind.config.two_sided for kind in kinds):
            from flexprefill.search.kernels.two_sided import SCRATCH_BYTES  # imports triton

            taken.append(query.new_empty(SCRATCH_BYTES, dtype=torch.uint8))

    def _kinds(self) -> set[ServedLayer]:
        """The kinds of search of the model's layers. There are none where all stay with vLLM's own attention."""
        return set() if self._against is not None else self._model.kinds(self._arguments)

    def _served_by(self, layer: Any) -> ServedLayer | None:
        """How this layer serves long prompts. None: vLLM's own attention does, and the log says why."""
        if self._served is None:
            number = layer_number(layer.layer_name)
            reason = self._against or self.against_cache(layer) or self._model.against(number, self._arguments)
            found = None if reason else self._model.layer(number, self._arguments)
            if reason:
                say_once(f"flexprefill leaves layers to vLLM's own attention: {reason}")
            elif found is None:
                say_once("flexprefill leaves layers to vLLM's own attention, as its settings say")
            self._served = number, found
        return self._served[1]


@remembered("kinds of attention that a server has compiled", most=256)
def warm_once(kind: ServedLayer, sizes: Sizes, gather: Gather) -> bool:
    """`warm_up` in the state in which a worker serves: torch compiles anew for another one."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.inference_mode():
            warm_up(kind, sizes, gather)
    finally:
        torch.set_default_dtype(before)
    return True
