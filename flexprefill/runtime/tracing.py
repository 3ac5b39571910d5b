"""Whether the code that asks is being traced into a graph, by its own thread."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _len_torch_dispatch_stack


def is_tracing() -> bool:
    """Whether this call is part of a graph that torch.compile or torch.export makes.

    ``torch.compiler.is_compiling()`` alone is also True, since torch 2.13, in every thread that runs while another one
    compiles. FlexAttention called as if in a graph, but outside of one, is dense.
    """
    # torch.compile makes a constant of the first; torch.export traces by a mode, of which each thread has its own
    return torch.compiler.is_dynamo_compiling() or (torch.compiler.is_compiling() and _len_torch_dispatch_stack() > 0)
