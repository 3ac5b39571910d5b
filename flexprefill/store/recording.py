"""record_masks: the maps that a model's layers use during a forward pass."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from flexprefill.blockmap.map import BlockMap
from flexprefill.blockmap.masking import MaskMod
from flexprefill.config import PrefillConfig
from flexprefill.errors import FlexPrefillError
from flexprefill.inspection.distance import default_edges, distances_of
from flexprefill.inspection.recall import Recall, join_recalls, recall_of
from flexprefill.inspection.rows import SAMPLED_ROWS, Rows
from flexprefill.runtime.listeners import listen
from flexprefill.runtime.progress import Advance, asked_stage
from flexprefill.search.guard import GuardReport
from flexprefill.variant.logits import PlainAttention


class Recording(Mapping[int, BlockMap]):
    """Maps by layer, in the order in which the layers were first called. Save it with save_masks.

    Attributes:
        modules: per layer the name of the innermost submodule that used the map, as in ``named_modules``.
    """

    def __init__(self, *, recall: bool = False, inputs: bool = False) -> None:
        self.modules: list[str] = []
        self._recall, self._inputs = recall, inputs
        self._maps: dict[str, BlockMap] = {}
        self._guards: dict[str, GuardReport] = {}
        self._configs: dict[str, PrefillConfig] = {}
        self._recalls: dict[str, Recall] = {}
        self._attentions: dict[str, PlainAttention] = {}
        self._searched: dict[str, BlockMap] = {}  # the maps of these, before masks emptied blocks of them
        self._thread = threading.local()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: what was recorded, without the threads that did."""
        return {name: part for name, part in self.__dict__.items() if name not in ("_thread", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _thread=threading.local(), _lock=threading.Lock())

    def __getitem__(self, layer: int) -> BlockMap:
        if layer not in range(len(self.modules)):
            raise KeyError(f"layer {layer!r}: {len(self.modules)} layers were recorded")
        return self._maps[self.modules[layer]]

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.modules)))

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def guards(self) -> dict[int, GuardReport]:
        """What the guard saw and did, by layer, where ``PrefillConfig.guard`` is set; of chunks the last one's."""
        return self._by_layer(self._guards)

    @property
    def configs(self) -> dict[int, PrefillConfig]:
        """The settings of each layer's search, by layer, where a search of the library made the map."""
        return self._by_layer(self._configs)

    @property
    def config(self) -> PrefillConfig | None:
        """The settings that all searched layers share, which :func:`save_masks` writes; None if they differ."""
        different = set(self._configs.values())
        return different.pop() if len(different) == 1 else None

    @property
    def recalls(self) -> dict[int, Recall]:
        """What share of the exact attention mass each map keeps, by layer, where ``record_masks(recall=True)`` asked.

        Of a prompt in chunks, rows of all chunks are sampled equally closely.
        """
        return self._by_layer(self._recalls)

    @property
    def inputs(self) -> dict[int, PlainAttention]:
        """What each layer attended, by layer, where ``record_masks(inputs=True)`` asked.

        Each has ``query`` [B, Hq, S_q, D] and ``key`` [B, Hkv, S_kv, D] of the layer's dtype and device, ``scale``
        and ``variant``: the arguments of :func:`attention_recall` and :func:`mass_by_distance`.
        """
        return self._by_layer(self._attentions)

    def table(
        self,
        *,
        edges: Iterable[int] | None = None,
        rows: Rows = SAMPLED_ROWS,
        seed: int = 0,
        progress: bool | Advance | None = None,
    ) -> list[dict[str, Any]]:
        """A list with a dict for each head of each layer. ``pandas.DataFrame(masks.table())`` makes a data frame of it.

        It is a list whether or not pandas is installed. The names in a dict:

        - always: layer, module, batch, head, and density (the kept share of the causal blocks);
        - with ``inputs=True``: sink (the share of attention mass on the sequence's first four tokens), mean_distance
          (of the other mass, in tokens), and beyond_E for each edge E (the share of mass at least E tokens back,
          without sink, of the queries that see so far);
        - with ``inputs=True`` or ``recall=True``: recall, recall_p05, recall_median, recall_least, least_row,
          measured_rows and rows_that_can_lose, as in :meth:`Recall.to_dicts`. What ``recall=True`` measured is not
          measured again.

        Args:
            edges: as in :func:`mass_by_distance`; the default ones are those of the longest layer.
            rows, seed: as in :func:`mass_by_distance` and :func:`attention_recall`.
            progress: True shows a bar on stderr (with tqdm, else a line); a function is called with 1 after each layer.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        attentions, recalls = self.inputs, self.recalls
        if edges is None and attentions:
            edges = default_edges(max(attention.key.shape[2] for attention in attentions.values()))
        # each layer reads them
        edges = list(edges) if isinstance(edges, Iterator) else edges
        rows = list(rows) if isinstance(rows, Iterator) else rows
        table = []
        with asked_stage(progress, "attention mass", len(self)) as advance:
            for layer, block_map in self.items():
                heads = [
                    {"layer": layer, "module": self.modules[layer], "batch": batch, "head": head, "density": density}
                    for batch, densities in enumerate(block_map.density().tolist())
                    for head, density in enumerate(densities)
                ]
                figures = []
                if (attention := attentions.get(layer)) is not None:
                    figures.append(distances_of(attention, edges=edges, rows=rows, seed=seed).to_dicts())
                    if layer not in recalls:
                        searched = self._searched[self.modules[layer]]
                        recalls[layer] = recall_of(attention, searched, rows=rows, seed=seed)
                if layer in recalls:
                    figures.append(recalls[layer].to_dicts())
                for of_heads in figures:
                    heads = [head | own for head, own in zip(heads, of_heads, strict=True)]
                table += heads
                advance(1)
        return table

    def _by_layer(self, parts: Mapping[str, Any]) -> dict[int, Any]:
        return {layer: parts[name] for layer, name in enumerate(self.modules) if name in parts}

    def _names(self) -> list[str]:
        """The submodules that are running in this thread, the outermost first."""
        if not hasattr(self._thread, "names"):
            self._thread.names, self._thread.attention, self._thread.config = [], None, None
        return self._thread.names

    def _leave(self) -> None:
        """As a forward hook it gives None: anything else would become the submodule's output."""
        self._names().pop()
        self._thread.attention = self._thread.config = None

    def hear_attention(self, attention: PlainAttention, config: PrefillConfig | None) -> None:
        if not self._names():
            return
        before = self._thread.attention
        if before is not None and before.query is attention.query and before.key is attention.key:
            # a padded batch is searched with its sequences and attended without
            attention = replace(attention, variant=before.variant)
            config = config or self._thread.config
        self._thread.attention, self._thread.config = attention, config

    def hear_guard(self, report: GuardReport) -> None:
        if names := self._names():
            with self._lock:
                self._guards[names[-1]] = report

    def hear_map(self, block_map: BlockMap, searched: BlockMap, mask_mods: tuple[MaskMod, ...]) -> None:
        names = self._names()
        if not names:
            return
        attention, self._thread.attention = self._thread.attention, None
        config, self._thread.config = self._thread.config, None
        if attention is not None and not _fits(attention, block_map):
            attention = config = None
        if attention is not None and mask_mods:  # what they hide is no mass that the map lost
            attention = replace(attention, mask_mods=(*attention.mask_mods, *mask_mods))
        # of the map before masks emptied blocks of it: these are nothing that its queries could lose
        recall = recall_of(attention, searched) if self._recall and attention is not None else None
        with self._lock:
            name = names[-1]
            before = self._maps.get(name)
            goes_on = (
                before is not None
                and before.kv_len == block_map.offset > 0
                and before.words.shape[:2] == block_map.words.shape[:2]
            )
            if before is None:
                self.modules.append(name)
            elif goes_on:
                if recall is not None and name in self._recalls:
                    recall = join_recalls(self._recalls[name], recall, before.q_len)
                block_map = BlockMap.from_chunks([before, block_map])
            self._maps[name] = block_map
            _put(self._configs, name, config)
            _put(self._recalls, name, recall)
            if self._inputs:
                _put(self._attentions, name, _kept(attention, self._attentions.get(name) if goes_on else None))
                self._searched[name] = BlockMap.from_chunks([self._searched[name], searched]) if goes_on else searched


def _put(parts: dict[str, Any], name: str, part: Any) -> None:
    """Of a map without it, none stays that is of the map before."""
    parts.pop(name, None)
    if part is not None:
        parts[name] = part


def _fits(attention: PlainAttention, block_map: BlockMap) -> bool:
    """Whether a map is of this attention's sizes."""
    query, key = attention.query, attention.key
    return (*query.shape[:3], key.shape[2]) == (*block_map.shape[:2], block_map.q_len, block_map.kv_len)


def _kept(attention: PlainAttention | None, before: PlainAttention | None) -> PlainAttention | None:
    """A copy, which nobody overwrites; the queries follow those of the chunk before, whose keys are part of it."""
    if attention is None:
        return None
    query = attention.query.detach()
    query = query.clone() if before is None else torch.cat([before.query, query], 2)
    return replace(attention, query=query, key=attention.key.detach().clone())


def record_masks(model: nn.Module, *, recall: bool = False, inputs: bool = False) -> AbstractContextManager[Recording]:
    """Collects the map of every attention layer of a model while it runs.

        with torch.no_grad(), record_masks(model) as masks:
            model(tokens)
        save_masks("masks.safetensors", masks)

    Every map that becomes a BlockMask inside a submodule's forward is recorded under that submodule, whichever of
    the library's functions made it. Chunks of a prompt that follow each other are joined; any other later map of
    a submodule replaces its earlier one. Maps stay on the device that they were made on.

    Args:
        recall: measures while the model runs what share of the exact attention mass each layer's map keeps:
            :attr:`Recording.recalls`, as :func:`attention_recall` with its defaults. Saved files keep the figures.
        inputs: keeps a copy of each layer's queries and keys, on their device: :attr:`Recording.inputs`, of which
            :meth:`Recording.table` is made. A layer takes (Hq + Hkv) · S · D elements: 32 layers of 32 + 8 heads,
            D = 128, in bfloat16 at 65,536 tokens take 20 GiB.

    Raises:
        TypeError: ``model`` is no module, or ``recall`` or ``inputs`` no bool.
        FlexPrefillError: at the end, if no map was recorded: the model's attention does not go through the
            library, or runs inside torch.compile, where Python is not called for each layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, asked in (("recall", recall), ("inputs", inputs)):
        if not isinstance(asked, bool):
            raise TypeError(f"{name} must be a bool, got {asked!r}")
    return _record(model, Recording(recall=recall, inputs=inputs))


@contextlib.contextmanager
def _record(model: nn.Module, recording: Recording) -> Iterator[Recording]:
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            before = module.register_forward_pre_hook(lambda *_, name=name: recording._names().append(name))
            # always: also after an exception in the module
            after = module.register_forward_hook(lambda *_: recording._leave(), always_call=True)
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        hooks.enter_context(listen(recording))
        yield recording
    if not recording:
        raise FlexPrefillError(
            "record_masks saw no mask: the model did not run, or only steps of decoding, its attention does not go "
            "through flexprefill, or it is compiled as a whole (record with the uncompiled model)"
        )
