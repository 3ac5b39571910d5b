"""Whether the caller's own thread traces it into a graph; and conditions inside a graph.

Private to torch 2.11 to 2.13: _len_torch_dispatch_stack (no public way says whether a mode traces),
statically_known_true (none asks what is known of a symbol) and _assert_async (none asserts without a wait).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _len_torch_dispatch_stack


def is_tracing() -> bool:
    """Whether this call is part of a graph that torch.compile or torch.export makes.

    ``torch.compiler.is_compiling()`` alone is not enough. Since torch 2.13 it is also True in every thread that runs
    while another one compiles. FlexAttention would then be called as if in a graph, and be dense.
    """
    # torch.compile makes a constant of the first; torch.export traces by a mode, and each thread has its own modes
    return torch.compiler.is_dynamo_compiling() or (torch.compiler.is_compiling() and _len_torch_dispatch_stack() > 0)


def is_exporting() -> bool:
    """Whether the graph is torch.export's. Its lengths may not be compared with numbers."""
    return torch.compiler.is_exporting()


def one_if_known(size: int) -> int:
    """1 for a symbolic size that is 1 for all lengths of a graph, else the size. Asking makes no guard."""
    if isinstance(size, torch.SymInt):
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return 1 if statically_known_true(size == 1) else size
    return size


def assert_in_graph(condition: Tensor, message: str) -> None:
    """Raises RuntimeError if the condition, a bool without dimensions, does not hold when the graph runs."""
    torch._assert_async(condition, message)
