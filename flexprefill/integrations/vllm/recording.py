"""The masks of one served request, in a file that the viewer opens."""

from __future__ import annotations

import json
import logging
import secrets
import threading
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from flexprefill.blockmap.map import BlockMap
from flexprefill.config import PrefillConfig
from flexprefill.integrations.vllm.planner import Prompt
from flexprefill.integrations.vllm.settings import TICKET
from flexprefill.runtime.files import write_json
from flexprefill.store.writing import save_masks

logger = logging.getLogger("vllm.flexprefill")


def ask(folder: Path, path: Path) -> None:
    """Asks the processes that serve from a folder to record the next long prompt."""
    write_json(folder / TICKET, {"path": str(path), "ticket": secrets.token_hex(8)})


class Served(NamedTuple):
    """A prompt, or a chunk of one, in a layer.

    Attributes:
        layer: The layer's number.
        prompt: Its sizes.
        pages: Its pages of the cache, on the device.
    """

    layer: int
    prompt: Prompt
    pages: Tensor


class RecordedPrompt:
    """The masks of one prompt: of the first long one that comes, and of its further chunks.

    A chunk is the same prompt's if it begins where the one before ended, in the same pages. Its masks are joined if
    that is a block's edge. Where they cannot be joined, the recording ends before it.
    """

    def __init__(self, ticket: str, path: str) -> None:
        self.ticket, self.path = ticket, path
        self._first: Prompt | None = None
        self._maps: dict[int, BlockMap] = {}
        self._configs: dict[int, PrefillConfig] = {}
        self._pages: dict[int, int] = {}
        self._ended = self._changed = False
        self._lock = threading.Lock()

    @classmethod
    def asked_for(cls, folder: Path, current: RecordedPrompt | None) -> RecordedPrompt | None:
        """The prompt to record now: a new one if that was asked for, else the current one."""
        try:
            ticket = json.loads((folder / TICKET).read_text("utf-8"))
        except (OSError, ValueError):
            return current
        if current is not None and current.ticket == ticket["ticket"]:
            return current
        return cls(ticket["ticket"], ticket["path"])

    def note(self, served: Served, kept: BlockMap, config: PrefillConfig) -> None:
        """Takes a layer's masks if they are of the recorded prompt. Waits for the device if they may be."""
        layer, prompt = served.layer, served.prompt
        with self._lock:
            before = self._maps.get(layer)
            if before is None:
                self._first = prompt if self._first is None else self._first
                if prompt != self._first:
                    return
                self._maps[layer], self._configs[layer], self._pages[layer] = kept, config, int(served.pages[0])
            # in this order: reading a page's number waits, and most chunks are of other prompts
            elif self._ended or before.kv_len != kept.offset or self._pages[layer] != int(served.pages[0]):
                return
            elif before.q_len % kept.block_size:
                self._ended = True
                logger.warning(
                    "flexprefill: the recording of %s ends at token %d, where a chunk does not begin on a block's "
                    "edge; record a prompt while no other request is served",
                    self.path,
                    before.kv_len,
                )
                return
            else:
                self._maps[layer] = BlockMap.from_chunks([before, kept])
            self._changed = True

    def write(self, rank: int) -> None:
        """Writes the masks so far, if there are new ones. Each tensor-parallel process writes those of its heads.

        Raises:
            OSError: The file cannot be written.
        """
        with self._lock:
            if not self._changed:
                return
            maps, configs, self._changed = dict(self._maps), set(self._configs.values()), False
        path = Path(self.path)
        if rank > 0:
            path = path.with_name(f"{path.stem}-rank{rank}{path.suffix}")
        save_masks(path, maps, config=configs.pop() if len(configs) == 1 else None)
