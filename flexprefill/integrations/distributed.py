"""prefill_attention over several processes, on torch.distributed.

Tensor parallel: heads are sharded. Each process searches and attends its own heads, and nothing is exchanged.
``tensor_parallel_attention`` takes and gives DTensors.

Context parallel: positions are sharded. Each process holds two chunks of the sequence, one from its start and one from
its end, so that a causal mask gives all processes about the same work. The search gathers block means, 1/128 of the
keys. The attention gathers keys and values. Maps are bit for bit those of one process.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import pad

from flexprefill.attention.prefill import prefill_attention
from flexprefill.blockmap.geometry import ceil_div
from flexprefill.blockmap.map import BlockMap
from flexprefill.config import PrefillConfig, check_alphas, check_config
from flexprefill.runtime.layout import layout_hint
from flexprefill.search import operator
from flexprefill.search.blocks import resolve_implementation
from flexprefill.search.rule import Rule
from flexprefill.search.scorers import MEANS_SCORER
from flexprefill.variant.inputs import check_attention_inputs, check_per_head, resolve_scale
from flexprefill.variant.variant import AttentionVariant, check_variant


@dataclass(frozen=True)
class ContextLayout:
    """Which positions of a sequence each process of a group holds: chunk ``rank`` and chunk ``2 · ranks - 1 - rank``.

    Attributes:
        edges: Where the 2 · ranks chunks start, multiples of the block size, and where the last chunk ends.
        rank: This process's rank in the group.
        group: The group. None is the default group.
    """

    edges: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(
        cls, length: int, config: PrefillConfig = PrefillConfig(), *, group: dist.ProcessGroup | None = None
    ) -> ContextLayout:
        """The layout of a sequence over a group, in chunks of about equally many blocks.

        Args:
            length: Tokens of the whole sequence.
            config: The settings of the search.
            group: The processes. None is the default group.

        Returns:
            The layout, as this process sees it.

        Raises:
            RuntimeError: torch.distributed is not initialised.
            TypeError: ``length`` is no int.
            ValueError: The sequence is too short: each chunk needs a block, and the last one ``last_full_blocks``.
        """
        check_config(config)
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("call torch.distributed.init_process_group before making a ContextLayout")
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"length must be an int, got {length!r}")
        ranks = dist.get_world_size(group)
        chunks, blocks = 2 * ranks, ceil_div(length, config.block_size)
        # the last chunk must hold all rows that keep everything, and each chunk has a block
        of_last = max(1, config.last_full_blocks)
        if blocks < chunks - 1 + of_last:
            raise ValueError(
                f"length must give each of {chunks} chunks a block of {config.block_size} tokens, and the last one "
                f"{of_last}, got {length} tokens: use fewer processes"
            )
        latest = blocks - of_last - chunks + 1
        starts = [min(ceil_div(chunk * blocks, chunks), latest + chunk) for chunk in range(chunks)]
        return cls((*(start * config.block_size for start in starts), length), dist.get_rank(group), group)

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.edges[-1]

    @property
    def ranks(self) -> int:
        return len(self.edges) // 2

    def spans(self, rank: int | None = None) -> tuple[tuple[int, int], tuple[int, int]]:
        """The (start, end) of a process's two chunks. Default: this process's."""
        rank = self.rank if rank is None else rank
        chunks = list(pairwise(self.edges))
        return chunks[rank], chunks[-1 - rank]

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """The positions that this process holds, ascending: int64 [S_local]. Rotary embeddings need them."""
        return torch.cat([torch.arange(*span, device=device) for span in self.spans()])


def shard_context(tensor: Tensor, layout: ContextLayout, *, dim: int = 2) -> Tensor:
    """This process's part of a tensor that every process has whole: its two chunks along ``dim``, one after the other.

    Args:
        tensor: The whole tensor.
        layout: Which positions this process holds.
        dim: The dimension of the positions.

    Returns:
        The part of this process.

    Raises:
        ValueError: ``dim`` does not have the layout's length.
    """
    if tensor.shape[dim] != layout.length:
        raise ValueError(f"tensor must have {layout.length} positions along dim {dim}, got {list(tensor.shape)}")
    return torch.cat([tensor.narrow(dim, start, end - start) for start, end in layout.spans()], dim)


def gather_context(local: Tensor, layout: ContextLayout, *, dim: int = 2) -> Tensor:
    """The whole tensor, on every process, from the parts that ``shard_context`` gives.

    All processes of the group have to call it.

    Args:
        local: This process's part.
        layout: Which positions this process holds.
        dim: The dimension of the positions.

    Returns:
        The whole tensor.

    Raises:
        ValueError: ``dim`` does not have the length of this process's chunks.
    """
    return _gather(local, dim, [[end - start for start, end in layout.spans(r)] for r in range(layout.ranks)], layout)


def context_parallel_search(
    query: Tensor,
    key: Tensor,
    layout: ContextLayout,
    config: PrefillConfig = PrefillConfig(),
    *,
    variant: AttentionVariant | None = None,
    scale: float | None = None,
) -> tuple[BlockMap, BlockMap]:
    """The maps of this process's two chunks of queries, each over all keys up to the chunk's end.

    All processes of the group have to call it. The rows are bit for bit those that one process finds in the whole
    prompt.

    Args:
        query: [B, Hq, S_local, D], this process's part; see ``shard_context``.
        key: [B, Hkv, S_local, D], this process's part.
        layout: Which positions this process holds.
        config: FlashPrefill's settings, with its own scorer. The two-sided search is refused.
        variant: As in ``flexprefill.search_blocks``, without sequences.
        scale: As in ``flexprefill.search_blocks``.

    Returns:
        The map of the chunk from the sequence's start, and the map of the chunk from its end.

    Raises:
        TypeError, ValueError: An argument does not fit. The message names it.
    """
    check_attention_inputs(query, key)
    check_config(config)
    _check_local("query", query, layout)
    _check_local("key", key, layout)
    if config.scorer != MEANS_SCORER:
        raise ValueError(
            f"config.scorer must be {MEANS_SCORER!r}, because it takes means of the keys, got {config.scorer!r}"
        )
    check_alphas(config, query.shape[1], key.shape[1])
    if config.guard is not None:
        raise ValueError(f"config.guard must be None, because each process sees a part of the rows, got {config.guard}")
    scale = resolve_scale(scale, query.shape[3])
    if isinstance(variant, AttentionVariant) and variant.sequences is not None:
        raise ValueError(
            "variant must be without sequences, because each process would need their means, got variant.sequences: "
            "shard prompts of one sequence"
        )
    variant = check_variant(variant, query, key)
    if config.two_sided:
        raise ValueError(
            "config must be without probe_rows and outlier_keys, because probes need all keys and only block means are "
            f"gathered, got {config.probe_rows} and {config.outlier_keys}"
        )
    implementation = resolve_implementation("auto", query.device, config.scorer)
    means = _gather_means(key, layout, config.block_size, implementation)
    maps = []
    for rows, (_, end) in zip(_chunks(query, layout), layout.spans(), strict=True):
        rule = Rule.of(config, scale=scale, last_chunk=end == layout.length)
        seen = means[:, :, : ceil_div(end, config.block_size)].contiguous()
        words = operator.score_words(rows, seen, end, rule, implementation, variant)
        maps.append(BlockMap(words, rows.shape[2], end, config.block_size))
    return maps[0], maps[1]


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: ContextLayout,
    config: PrefillConfig = PrefillConfig(),
    *,
    variant: AttentionVariant | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """prefill_attention of a sequence whose positions are sharded.

    All processes of the group have to call it. Keys and values are gathered: each process holds all of them during the
    call. The output equals that of one process within rounding.

    Args:
        query: [B, Hq, S_local, D], this process's part; see ``shard_context``.
        key: [B, Hkv, S_local, D], this process's part.
        value: [B, Hkv, S_local, Dv], this process's part.
        layout: Which positions this process holds.
        config: As in ``context_parallel_search``.
        variant: As in ``flexprefill.prefill_attention``, without sequences.
        scale: As in ``flexprefill.prefill_attention``.
        backend: As in ``flexprefill.prefill_attention``.

    Returns:
        The output of this process's queries, [B, Hq, S_local, Dv].

    Raises:
        TypeError, ValueError, FlexPrefillError: As ``flexprefill.prefill_attention``.
    """
    check_attention_inputs(query, key, value)
    _check_local("value", value, layout)
    maps = context_parallel_search(query, key, layout, config, variant=variant, scale=scale)
    keys, values = gather_context(key, layout), gather_context(value, layout)
    outputs = []
    for rows, block_map in zip(_chunks(query, layout), maps, strict=True):
        output = prefill_attention(
            rows,
            keys[:, :, : block_map.kv_len],
            values[:, :, : block_map.kv_len],
            config,
            variant=variant,
            block_map=block_map,
            scale=scale,
            last_chunk=block_map.kv_len == layout.length,
            backend=backend,
        )
        outputs.append(output)
    return torch.cat(outputs, 2)


def tensor_parallel_attention(
    query: DTensor,
    key: DTensor,
    value: DTensor,
    config: PrefillConfig | None = None,
    *,
    variant: AttentionVariant | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> DTensor:
    """prefill_attention of DTensors whose heads are sharded. Nothing is exchanged.

    All three are on one mesh of one dimension, sharded along heads. Hq and Hkv are multiples of the mesh's size.

    Args:
        query: [B, Hq, S_q, D].
        key: [B, Hkv, S_kv, D].
        value: [B, Hkv, S_kv, Dv].
        config: As in ``flexprefill.prefill_attention``.
        variant: As in ``flexprefill.prefill_attention``. Its slopes and sinks are of all heads, [Hq]. Each process
            takes its own.
        scale: As in ``flexprefill.prefill_attention``.
        backend: As in ``flexprefill.prefill_attention``.

    Returns:
        The output, [B, Hq, S_q, Dv], sharded in the same way.

    Raises:
        TypeError, ValueError: An argument is no DTensor, or is sharded in another way. The message names it.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, DTensor):
            raise TypeError(f"{name} must be a DTensor, got {type(tensor).__name__}")
        if tensor.device_mesh != query.device_mesh or tensor.placements != (Shard(1),):
            raise ValueError(
                f"{name} must be sharded along its heads, placements (Shard(1),), on query's mesh, got "
                f"{tensor.placements} on {tensor.device_mesh}"
            )
        if tensor.dim() != 4 or tensor.shape[1] % tensor.device_mesh.size():
            raise ValueError(
                f"{name} must be [B, H, S, D] with a multiple of {tensor.device_mesh.size()} heads, "
                f"got {list(tensor.shape)}"
            )
    own = None if variant is None else _own_heads(variant, query)
    output = prefill_attention(
        query.to_local(), key.to_local(), value.to_local(), config, variant=own, scale=scale, backend=backend
    )
    return DTensor.from_local(output, query.device_mesh, query.placements, run_check=False)


def _own_heads(variant: AttentionVariant, query: DTensor) -> AttentionVariant:
    """The variant of this process's heads."""
    if not isinstance(variant, AttentionVariant):
        raise TypeError(f"variant must be an AttentionVariant or None, got {type(variant).__name__}")
    heads = query.shape[1] // query.device_mesh.size()
    first = query.device_mesh.get_local_rank() * heads
    own: list[Tensor | None] = []
    for name, tensor in (("alibi_slopes", variant.alibi_slopes), ("sinks", variant.sinks)):
        if tensor is not None:
            check_per_head(f"variant.{name}", tensor, query)
        own.append(None if tensor is None else tensor[first : first + heads])
    return replace(variant, alibi_slopes=own[0], sinks=own[1])


def _chunks(tensor: Tensor, layout: ContextLayout) -> tuple[Tensor, Tensor]:
    """This process's two chunks of a tensor [B, H, S_local, …]."""
    (start, end), _ = layout.spans()
    return tensor[:, :, : end - start], tensor[:, :, end - start :]


def _gather_means(key: Tensor, layout: ContextLayout, block_size: int, implementation: str) -> Tensor:
    """The means of all blocks of the sequence: [B, Hkv, N, D]. Each process pools its own."""
    own = torch.cat([operator.pool_keys(chunk, block_size, implementation) for chunk in _chunks(key, layout)], 2)
    counts = [[ceil_div(end - start, block_size) for start, end in layout.spans(r)] for r in range(layout.ranks)]
    return _gather(own, 2, counts, layout)


def _gather(local: Tensor, dim: int, counts: list[list[int]], layout: ContextLayout) -> Tensor:
    """All processes' parts along ``dim``, in the order of positions.

    Args:
        counts: For each process, the lengths of its chunks along ``dim``.
    """
    if local.shape[dim] != sum(counts[layout.rank]):
        raise ValueError(
            f"local must have the {sum(counts[layout.rank])} entries of this process's chunks along dim {dim}, "
            f"got {list(local.shape)}"
        )
    most = max(map(sum, counts))
    first = local.movedim(dim, 0)
    # collectives take parts of one size
    filled = pad(first, (0, 0) * (first.dim() - 1) + (0, most - first.shape[0])).contiguous()
    parts = filled.new_empty(layout.ranks * most, *filled.shape[1:])
    dist.all_gather_into_tensor(parts, filled, group=layout.group)
    of_ranks = [part[: sum(count)].split(count) for part, count in zip(parts.split(most), counts, strict=True)]
    ordered = [chunks[0] for chunks in of_ranks] + [chunks[1] for chunks in reversed(of_ranks)]
    return torch.cat(ordered).movedim(0, dim)


def _check_local(name: str, tensor: Tensor, layout: ContextLayout) -> None:
    own = sum(end - start for start, end in layout.spans())
    if tensor.shape[2] != own:
        raise ValueError(
            f"{name} must have the {own} positions of this process's chunks {layout.spans()}, "
            f"got {tensor.shape[2]}: shard_context takes them out of a whole tensor{layout_hint(**{name: tensor})}"
        )
