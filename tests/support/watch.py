"""What must never happen unseen: FlexAttention run eagerly, where it is dense, and lists that are not contiguous.

conftest.py keeps both watches on in every test that is not marked ``eager_flex``.
"""

import contextlib

import torch
from torch._C import DispatchKey
from torch._higher_order_ops.flex_attention import flex_attention as flex_attention_operator


class RanEagerly(AssertionError):
    pass


class NotContiguous(AssertionError):
    pass


@contextlib.contextmanager
def eager_flex_raises():
    """What runs where FlexAttention is not compiled, torch's ``sdpa_dense``, raises instead."""

    def dense(*arguments):
        raise RanEagerly("flex_attention ran eagerly: it is dense, whatever the block mask says")

    kernels, key = flex_attention_operator.py_kernels, DispatchKey.CompositeExplicitAutograd
    before = kernels[key]
    kernels[key] = dense
    flex_attention_operator._dispatch_cache.clear()
    try:
        yield
    finally:
        kernels[key] = before
        flex_attention_operator._dispatch_cache.clear()


def check_lists(lists):
    """Raises unless they are as the compiled kernels take for granted."""
    for name, tensor in zip(
        ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"), lists, strict=True
    ):
        if not tensor.is_contiguous() or tensor.dtype != torch.int32:
            raise NotContiguous(f"{name} has strides {tensor.stride()} of {list(tensor.shape)}, {tensor.dtype}")
    if lists[1].shape != lists[3].shape:
        raise NotContiguous(f"lists are {list(lists[1].shape)} and {list(lists[3].shape)}")


@contextlib.contextmanager
def lists_are_contiguous():
    """All that goes from the library to FlexAttention: to the compiled function, and into BlockMasks."""
    from flexprefill.attention import log_sum_exp, paged, steps
    from flexprefill.blockmap import map as block_map

    def checked(function, place):
        def call(*arguments, **settings):
            check_lists(arguments[place].lists)
            return function(*arguments, **settings)

        return call

    with contextlib.ExitStack() as stack:
        for module, name, place in (
            (steps, "flex_over", 3),
            (steps, "flash_over", 3),
            (paged, "flex_over", 3),
            (log_sum_exp, "flex_over", 3),
            (block_map, "block_mask_of", 0),
        ):
            before = getattr(module, name)
            setattr(module, name, checked(before, place))
            stack.callback(setattr, module, name, before)
        yield
