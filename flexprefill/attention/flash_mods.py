"""What FlashAttention-4 is told besides its tensors, in its own language (CuTe). Needs the package flash-attn-4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op
from flash_attn.cute.utils import scalar_to_ssa

from flexprefill.runtime.state import remembered

Mod = Callable[..., Any]


@remembered("FlashAttention-4's masks", most=64)
def causal_within(sliding_window: int | None) -> Mod:
    """mask_mod of queries at the last positions: a query sees its own key and, in a window, some before it."""

    @cute.jit
    def causal(b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
        position = q_idx + scalar_to_ssa(seqlen_info.seqlen_k - seqlen_info.seqlen_q, cutlass.Int32)
        if cutlass.const_expr(sliding_window is None):
            return position >= kv_idx
        return (position >= kv_idx) & (position - sliding_window < kv_idx)

    return causal


@dsl_user_op
def _tanh(number, *, loc=None, ip=None):
    """One instruction, to 2**-11 of the result: less than the rounding of 16-bit scores. CuTe's own takes thirty."""
    given = cutlass.Float32(number).ir_value(loc=loc, ip=ip)
    return cutlass.Float32(llvm.inline_asm(T.f32(), [given], "tanh.approx.f32 $0, $1;", "=f,f", loc=loc, ip=ip))


@remembered("FlashAttention-4's soft caps", most=64)
def soft_capped(soft_cap: float | None) -> Mod | None:
    """score_mod of scores that are divided by the cap already: soft_cap · tanh(score)."""
    if soft_cap is None:
        return None

    @cute.jit
    def capped(score, b, h, q_idx, kv_idx, seqlen_info, aux_tensors):
        numbers = cute.make_rmem_tensor(score.shape, cutlass.Float32)
        numbers.store(score)
        for place in cutlass.range_constexpr(cute.size(score.shape)):
            numbers[place] = soft_cap * _tanh(numbers[place])
        return numbers.load()

    return capped
