"""record_masks: the maps that a model's layers use during a forward pass."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from flexprefill.blockmap.map import BlockMap
from flexprefill.errors import FlexPrefillError
from flexprefill.runtime.listeners import listen
from flexprefill.search.guard import GuardReport


class Recording(Mapping[int, BlockMap]):
    """Maps by layer, in the order in which the layers were first called. Save it with save_masks.

    Attributes:
        modules: per layer the name of the innermost submodule that used the map, as in ``named_modules``.
    """

    def __init__(self) -> None:
        self.modules: list[str] = []
        self._maps: dict[str, BlockMap] = {}
        self._guards: dict[str, GuardReport] = {}
        self._stack = threading.local()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: what was recorded, without the threads that did."""
        return {name: part for name, part in self.__dict__.items() if name not in ("_stack", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _stack=threading.local(), _lock=threading.Lock())

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
        return {layer: self._guards[name] for layer, name in enumerate(self.modules) if name in self._guards}

    def _names(self) -> list[str]:
        """The submodules that are running in this thread, the outermost first."""
        if not hasattr(self._stack, "names"):
            self._stack.names = []
        return self._stack.names

    def _leave(self) -> None:
        """As a forward hook it gives None: anything else would become the submodule's output."""
        self._names().pop()

    def hear_guard(self, report: GuardReport) -> None:
        if names := self._names():
            with self._lock:
                self._guards[names[-1]] = report

    def hear_map(self, block_map: BlockMap) -> None:
        names = self._names()
        if not names:
            return
        with self._lock:
            name = names[-1]
            before = self._maps.get(name)
            if before is None:
                self.modules.append(name)
            elif before.kv_len == block_map.offset > 0 and before.words.shape[:2] == block_map.words.shape[:2]:
                block_map = BlockMap.from_chunks([before, block_map])
            self._maps[name] = block_map


def record_masks(model: nn.Module) -> AbstractContextManager[Recording]:
    """Collects the map of every attention layer of a model while it runs.

        with torch.no_grad(), record_masks(model) as masks:
            model(tokens)
        save_masks("masks.safetensors", masks)

    Every map that becomes a BlockMask inside a submodule's forward is recorded under that submodule, whichever of
    the library's functions made it. Chunks of a prompt that follow each other are joined; any other later map of
    a submodule replaces its earlier one. Maps stay on the device that they were made on.

    Raises:
        TypeError: ``model`` is no module.
        FlexPrefillError: at the end, if no map was recorded: the model's attention does not go through the
            library, or runs inside torch.compile, where Python is not called for each layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return _record(model)


@contextlib.contextmanager
def _record(model: nn.Module) -> Iterator[Recording]:
    recording = Recording()
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
