"""When a custom operator has to be called as one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_traced(*tensors: Tensor) -> bool:
    """Whether torch.compile, a dispatch mode or a tensor subclass traces these tensors and must see one operator.

    Everyone else calls what is inside it: dispatching takes the host three times as long as the device needs to
    search 4K tokens.
    """
    plain = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
    return torch.compiler.is_compiling() or not plain or is_in_torch_dispatch_mode()
