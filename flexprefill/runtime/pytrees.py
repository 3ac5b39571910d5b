"""Classes of tensors and numbers as pytree nodes, so they go in and out of compiled functions.

torch.utils._pytree is private. torch has no public way to register a class with keys for torch.export (2.11 to 2.13).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def register_node(kind: type, tensors: tuple[str, ...], numbers: tuple[str, ...]) -> None:
    """Makes a frozen data class a pytree node. The attributes ``tensors`` are its children, ``numbers`` its context."""
    missing = {field.name: field.default for field in dataclasses.fields(kind)}  # None where a tensor may be missing

    def flatten(node: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(node, name) for name in tensors], tuple(getattr(node, name) for name in numbers)

    def flatten_with_keys(node: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        children, context = flatten(node)
        keyed = [(pytree.GetAttrKey(name), child) for name, child in zip(tensors, children, strict=True)]
        return keyed, context

    def unflatten(children: Any, context: Any) -> Any:
        parts = dict(zip((*tensors, *numbers), (*children, *context), strict=True))
        if all(isinstance(parts[name], (Tensor, *_nodes)) or parts[name] is missing[name] for name in tensors):
            return kind(**parts)
        # pytree functions put other things in a leaf's place for a while
        node: Any = object.__new__(kind)
        for name, part in parts.items():
            object.__setattr__(node, name, part)
        return node

    pytree.register_pytree_node(
        kind,
        flatten,
        unflatten,
        flatten_with_keys_fn=flatten_with_keys,
        serialized_type_name=f"flexprefill.{kind.__name__}",
        to_dumpable_context=list,
        from_dumpable_context=tuple,
    )
    _nodes.append(kind)


_nodes: list[type] = []
