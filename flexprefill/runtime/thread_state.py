"""Keeps the thread's state out of what is computed. Results depend on arguments alone (docs/reference/robustness.md).

Private to torch 2.11 to 2.13: _len_torch_dispatch_stack, _len_torch_function_stack and _disable_current_modes (no
public way asks for modes or runs without them), FakeTensor and is_batchedtensor (no public way asks what made a
tensor).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch._C import _len_torch_function_stack
from torch.utils._python_dispatch import _disable_current_modes, _len_torch_dispatch_stack

from flexprefill.runtime.tracing import is_tracing


def without_autocast() -> AbstractContextManager[object]:
    """Inside, float32 products stay float32 and tensors keep their dtypes."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return _without_autocast()
    return contextlib.nullcontext()


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def of_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Casts tensors of several dtypes to autocast's, where it is on, as scaled_dot_product_attention does."""
    tensors = query, key, value
    if not all(isinstance(tensor, Tensor) for tensor in tensors) or query.dtype == key.dtype == value.dtype:
        return tensors
    kind = query.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def without_dispatch_modes() -> AbstractContextManager[object]:
    """No TorchDispatchMode, such as a FlopCounterMode, sees what is called inside. Not for use while a graph is traced.

    torch.compile runs a function eagerly under such a mode, and goes on to do so after the mode is gone.
    """
    if _len_torch_dispatch_stack() > 0:
        return _disable_current_modes()
    return contextlib.nullcontext()


def what_graphs_guard() -> tuple[object, ...]:
    """The thread's state for which torch.compile compiles anew, besides the arguments (torch 2.13)."""
    return (
        torch.get_default_dtype(),
        # only a function mode sets another, and asking for it takes longer than all the rest
        torch.get_default_device() if _len_torch_function_stack() > 0 else None,
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.is_inference_mode_enabled(),
    )


def is_in_vmap(tensor: Tensor) -> bool:
    """Whether torch.vmap hides a dimension of a tensor."""
    return not is_tracing() and torch._C._functorch.is_batchedtensor(tensor)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor is of a FakeTensorMode, with a shape and no numbers. False while a graph is traced."""
    return type(tensor).__name__ == "FakeTensor" and not is_tracing()
