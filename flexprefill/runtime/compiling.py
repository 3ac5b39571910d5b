"""torch.compile as the library uses it, with its private parts in one place.

torch 2.11 to 2.13 has no public way to say these things:

- which error a refused compilation raises: torch._dynamo.exc;
- that a size stays a constant, or may change: torch._dynamo.mark_static and maybe_mark_dynamic;
- that a function's result is a constant in graphs, without loading torch._dynamo at import: the attribute that
  torch.compiler.assume_constant_result sets;
- that inductor compiles an operator to nothing: torch._inductor.lowering.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from flexprefill.errors import FlexPrefillError

_numbers = itertools.count()
# Kernels load 16 bytes at once also where a tensor is a view that begins inside its memory: its offset is a symbol, of
# which nothing is known while a graph is compiled. A tensor that does begin elsewhere is copied when it comes.
ALIGNED: dict[str, str | int | bool | Callable[..., Any]] = {"assume_aligned_inputs": True}

Constant = TypeVar("Constant", bound=Callable[..., Any])


def constant_in_graphs(function: Constant) -> Constant:
    """Marks a function of plain constants: a graph takes its result as a constant and does not trace it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def pass_on_when_compiled(name: str) -> bool:
    """Makes inductor compile an operator to nothing: its outputs are then its first arguments."""
    from torch._inductor.lowering import lowerings, register_lowering

    namespace, short = name.split("::")
    overload = getattr(getattr(torch.ops, namespace), short).default
    if overload not in lowerings:
        outputs = len(overload._schema.returns)
        register_lowering(overload, type_promotion_kind=None)(lambda *arguments: arguments[:outputs])
    return True


def keep_size(tensor: Tensor, dim: int) -> None:
    """Keeps a dimension's size a constant in graphs. Each new size then compiles anew."""
    torch._dynamo.mark_static(tensor, dim)


def sizes_may_change(tensor: Tensor, *dims: int) -> None:
    """Says that sizes may change from call to call. Graphs then have symbols for them from the first compile on."""
    torch._dynamo.maybe_mark_dynamic(tensor, dims)


def compile_whole(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function compiled as one graph, with a code object and a name of its own.

    torch.compile counts recompiles by code object. With one each, kinds of calls do not use up each other's count. It
    remembers by name which sizes and strides changed, and compiles those as symbols from then on. With a name each, a
    kind's heads and row strides stay constants.

    Args:
        function: A function of ``*arguments``.
        name: The new name of its variadic arguments. Sizes in the graph are named after it.
    """
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_varnames=(name,), co_name=f"{function.__name__}_{next(_numbers)}")
    of_its_own = types.FunctionType(code, function.__globals__, closure=function.__closure__)
    return torch.compile(of_its_own, fullgraph=True, options=ALIGNED)


@contextlib.contextmanager
def refusals_explained() -> Iterator[None]:
    """Raises FlexPrefillError where torch.compile refuses to run or finds no C++ compiler."""
    try:
        yield
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise FlexPrefillError(
            "torch.compile's recompile limit is hit: this attention was compiled for more than "
            f"{torch._dynamo.config.recompile_limit} variants of batch sizes, strides, or numbers that a "
            "mod closes over. Let mods close over tensors instead, or raise torch._dynamo.config.recompile_limit. "
            'TORCH_LOGS="recompiles" shows what differed.'
        ) from error
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if "InvalidCxxCompiler" not in str(error):  # it comes wrapped in others
            raise
        raise FlexPrefillError(
            "torch.compile found no C++ compiler. Attention on the CPU needs one: install g++ or clang, or name one "
            "in the environment variable CXX"
        ) from error


def mixed_up_sizes(error: Exception) -> bool:
    """Whether compiling failed because torch's C++ attention names sizes by replacing text (torch 2.13)."""
    return isinstance(error, torch._dynamo.exc.BackendCompilerFailed) and bool(
        re.search(r"cur_(q|kv)SplitSize\d", str(error))
    )
