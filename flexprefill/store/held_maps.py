"""The maps that a MaskCache holds, in the order of their use.

Rows of a map can stand for rows of another prompt only if both have the same layer, settings and first block. Such maps
are of one kind. So a prompt looks at the maps of its kind, however many others are held.
"""

from __future__ import annotations

import sys
import zlib
from collections import OrderedDict
from collections.abc import Hashable, ItemsView, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from flexprefill.blockmap.map import BlockMap

FEW = 256  # positions that are compared first


@dataclass(frozen=True)
class Identity:
    """What two prompts are compared by: the caller's key, or their tokens.

    Attributes:
        tokens: For each position ``batch`` numbers of the dtype ``item``.
    """

    key: Hashable | None
    tokens: bytes = field(default=b"", repr=False)
    item: str = "i4"
    batch: int = 1

    @property
    def length(self) -> int:
        return len(self.tokens) // (np.dtype(self.item).itemsize * self.batch)

    def shared(self, other: Identity) -> int:
        """How many positions are the same before the first difference; a huge number if none will ever differ."""
        if (self.key, self.item, self.batch) != (other.key, other.item, other.batch):
            return 0
        if self.key is not None or self.tokens is other.tokens:
            return sys.maxsize
        both = min(self.length, other.length)
        ours, theirs = (np.frombuffer(each.tokens, self.item, both * self.batch) for each in (self, other))
        for end in (min(both, FEW), both):  # most prompts that differ do so early
            different = ours[: end * self.batch] != theirs[: end * self.batch]
            if different.any():
                return int(different.argmax()) // self.batch
        return both

    def beginning(self, positions: int) -> tuple[Hashable, ...]:
        """A short sign of the first positions. It is equal for prompts that share them, and by chance for others."""
        size = np.dtype(self.item).itemsize * self.batch
        return self.key, self.item, self.batch, zlib.crc32(self.tokens[: positions * size])


@dataclass(frozen=True)
class HeldMap:
    """A map of a prompt, and when other streams may read it."""

    identity: Identity
    block_map: BlockMap
    stream: torch.cuda.Stream | None = None  # on CUDA: the stream that made the map
    made: torch.cuda.Event | None = None  # on that stream

    @classmethod
    def of(cls, identity: Identity, block_map: BlockMap) -> HeldMap:
        """The map with the event that other streams have to wait for."""
        if not block_map.words.is_cuda or torch.cuda.is_current_stream_capturing():
            return cls(identity, block_map)
        stream = torch.cuda.current_stream(block_map.device)
        return cls(identity, block_map, stream, stream.record_event())

    def ready(self) -> BlockMap:
        """The map, for work on the current stream."""
        if self.made is not None and not torch.cuda.is_current_stream_capturing():
            stream = torch.cuda.current_stream(self.block_map.device)
            if stream != self.stream:
                stream.wait_event(self.made)
                self.block_map.words.record_stream(stream)
        return self.block_map


class Place(NamedTuple):
    """What a map is found by.

    Attributes:
        kind: The layer, the settings and the beginning of the prompt. Only maps of equal kinds may answer each other's
            rows.
        identity: The prompt.
        q_len: Queries of the search.
        kv_len: Keys of the search.
        last_chunk: Whether the queries ended the prompt.
    """

    kind: tuple[Hashable, ...]
    identity: Identity
    q_len: int
    kv_len: int
    last_chunk: bool


class HeldMaps:
    """Maps by place. One thread at a time may use it.

    Attributes:
        nbytes: Size of the maps, with that of each prompt's tokens once.
    """

    def __init__(self, held: Iterable[tuple[Place, HeldMap]] = ()) -> None:
        self.nbytes = 0
        self._held: OrderedDict[Place, HeldMap] = OrderedDict()  # the most recently used last
        self._by_kind: dict[tuple[Hashable, ...], dict[Place, HeldMap]] = {}
        self._prompts: dict[int, tuple[Identity, int]] = {}  # by id, with the number of their maps
        for place, one in held:
            self.put(place, one)

    def __len__(self) -> int:
        return len(self._held)

    def items(self) -> ItemsView[Place, HeldMap]:
        """All of them, the most recently used last."""
        return self._held.items()

    def identities(self) -> list[Identity]:
        """The identities of all prompts that have maps, each once."""
        return [identity for identity, _ in self._prompts.values()]

    def of_kind(self, kind: tuple[Hashable, ...]) -> ItemsView[Place, HeldMap]:
        """The maps of a kind, the earliest first."""
        return self._by_kind.get(kind, {}).items()

    def newest(self, layer: Hashable) -> HeldMap | None:
        """The most recently used map of a layer."""
        return next((held for place, held in reversed(self._held.items()) if place.kind[0] == layer), None)

    def use(self, place: Place) -> HeldMap | None:
        """The map of a place, if there is one. It now is the most recently used one."""
        held = self._held.get(place)
        if held is not None:
            self._held.move_to_end(place)
        return held

    def put(self, place: Place, held: HeldMap) -> None:
        """Holds a map, in place of another of the same place."""
        self.drop(place)
        identity, maps = self._prompts.get(id(held.identity), (held.identity, 0))
        self._held[place] = self._by_kind.setdefault(place.kind, {})[place] = held
        self._prompts[id(identity)] = identity, maps + 1
        self.nbytes += held.block_map.words.nbytes + (0 if maps else len(identity.tokens))

    def drop(self, place: Place) -> None:
        """Lets a map go, if there is one."""
        held = self._held.pop(place, None)
        if held is None:
            return
        del self._by_kind[place.kind][place]
        if not self._by_kind[place.kind]:
            del self._by_kind[place.kind]
        identity, maps = self._prompts.pop(id(held.identity))
        if maps > 1:
            self._prompts[id(identity)] = identity, maps - 1
        self.nbytes -= held.block_map.words.nbytes + (0 if maps > 1 else len(identity.tokens))

    def drop_oldest(self) -> None:
        """Lets the least recently used map go."""
        self.drop(next(iter(self._held)))
