"""torch.compile as the library uses it, with what is private to torch in one place.

Seen with torch 2.11 to 2.13. The public ways that are missing: which error a refused compilation raises
(torch._dynamo.exc), a size that stays a constant (torch._dynamo.mark_static), a function whose result a graph takes as
a constant without loading torch._dynamo at import (the attribute that torch.compiler.assume_constant_result sets),
and an operator that inductor compiles to nothing (torch._inductor.lowering).
"""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from flexprefill.errors import FlexPrefillError

Constant = TypeVar("Constant", bound=Callable[..., Any])


def constant_in_graphs(function: Constant) -> Constant:
    """A function of plain constants whose result a graph takes as one, without a look at how it comes about."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def pass_on_when_compiled(name: str) -> bool:
    """Makes an operator nothing where inductor compiles it: its outputs are its first arguments, as many as it has."""
    from torch._inductor.lowering import lowerings, register_lowering

    namespace, short = name.split("::")
    overload = getattr(getattr(torch.ops, namespace), short).default
    if overload not in lowerings:
        outputs = len(overload._schema.returns)
        register_lowering(overload, type_promotion_kind=None)(lambda *arguments: arguments[:outputs])
    return True


def keep_size(tensor: Tensor, dim: int) -> None:
    """Says that a dimension's size is not to become a symbol: each number compiles anew."""
    torch._dynamo.mark_static(tensor, dim)


def compile_whole(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function compiled as one graph, with a code object of its own.

    torch.compile counts recompiles by code object: one each, so that kinds of calls do not use up each other's.

    Args:
        name: of its variadic arguments; sizes in the graph are named after it.
    """
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_varnames=(name,))
    return torch.compile(types.FunctionType(code, function.__globals__, closure=function.__closure__), fullgraph=True)


@contextlib.contextmanager
def refusals_explained() -> Iterator[None]:
    """Raises FlexPrefillError where torch.compile would not run, or finds no C++ compiler."""
    try:
        yield
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise FlexPrefillError(
            "torch.compile's recompile limit is hit: this attention was compiled for more than "
            f"{torch._dynamo.config.recompile_limit} variants of lengths, batch sizes, strides, or numbers that a "
            "mod closes over. Let mods close over tensors, or raise torch._dynamo.config.recompile_limit. "
            'TORCH_LOGS="recompiles" shows what differed.'
        ) from error
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if "InvalidCxxCompiler" not in str(error):  # it comes wrapped in others
            raise
        raise FlexPrefillError(
            "torch.compile found no C++ compiler, which attention on the CPU needs: install g++ or clang, or "
            "name one in the environment variable CXX"
        ) from error


def mixed_up_sizes(error: Exception) -> bool:
    """Whether compiling failed for a name: torch's C++ attention names two sizes by replacing text (torch 2.13)."""
    return isinstance(error, torch._dynamo.exc.BackendCompilerFailed) and bool(
        re.search(r"cur_(q|kv)SplitSize\d", str(error))
    )
