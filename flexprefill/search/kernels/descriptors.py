"""Tensors as a Hopper GPU's tensor memory accelerator copies them, block by block."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout, float16
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flexprefill.runtime.arguments import with_tensor, without_tensor
from flexprefill.runtime.state import Remembered

_settings: Remembered[dict[str, Any]] = Remembered("tensor descriptors without their tensors", most=4096)


def described(tensor: Tensor, *block: int) -> TensorDescriptor:
    """A tensor of 16 bits an entry, to be copied by blocks of a shape. Rows behind the end come as zeros.

    Triton checks a descriptor once for a kind.
    """

    def checked() -> dict[str, Any]:
        layout = NVMMASharedLayout.get_default_for(block, float16)
        return without_tensor(TensorDescriptor.from_tensor(tensor, list(block), layout))

    kind = tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16, block
    return with_tensor(TensorDescriptor, _settings.get(kind, checked), tensor)
