"""A call's arguments apart from its tensors, to be filled in for other tensors of the same layout.

Triton's tensor descriptors are taken apart too, because it takes Triton 8 µs to make and check one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

Tensors = Sequence[Tensor | None]


class Arguments(NamedTuple):
    """Arguments of a call.

    Attributes:
        constants: All arguments, with None where something is filled in.
        places: Which argument is which tensor.
        made: Which argument is made of tensors, and how: descriptors and tuples.
    """

    constants: tuple[Any, ...]
    places: tuple[tuple[int, int], ...]
    made: tuple[tuple[int, Callable[[Tensors], Any]], ...]

    @classmethod
    def of(cls, arguments: Sequence[Any], which: Callable[[Tensor], int]) -> Arguments:
        """The arguments without their tensors. ``which`` counts a tensor, and raises LookupError for an unknown one."""
        constants, places = list(arguments), []
        made: list[tuple[int, Callable[[Tensors], Any]]] = []
        for at, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                places.append((at, which(argument)))
            elif hasattr(argument, "base"):
                settings = without_tensor(argument)
                made.append((at, partial(_descriptor, type(argument), settings, which(argument.base))))
            elif isinstance(argument, (tuple, list)):
                made.append((at, cls.of(argument, which).filled))
            else:
                continue
            constants[at] = None
        return cls(tuple(constants), tuple(places), tuple(made))

    def filled(self, tensors: Tensors) -> tuple[Any, ...]:
        """The arguments with these tensors."""
        arguments = list(self.constants)
        for at, which in self.places:
            arguments[at] = tensors[which]
        for at, make in self.made:
            arguments[at] = make(tensors)
        return tuple(arguments)


def _descriptor(kind: type, settings: dict[str, Any], which: int, tensors: Tensors) -> Any:
    return with_tensor(kind, settings, tensors[which])


def without_tensor(descriptor: Any) -> dict[str, Any]:
    """A descriptor's settings. With its tensor they would keep that one's memory."""
    return {name: setting for name, setting in vars(descriptor).items() if name != "base"}


def with_tensor(kind: type, settings: dict[str, Any], tensor: Tensor | None) -> Any:
    """A descriptor of a tensor by checked settings, of a tensor of the same layout."""
    descriptor: Any = object.__new__(kind)
    vars(descriptor).update(settings, base=tensor)
    return descriptor
