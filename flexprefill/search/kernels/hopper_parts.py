"""What the kernels for Hopper share. It is written in Gluon, as they are."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its name before and since triton 3.7


@gluon.jit
def fast_exp2(x):
    """2^x. What is too small for a normal number is 0, which saves three instructions."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def fast_log2(x):
    """log2 of a sum that fast_exp2 made, so no number below the normal ones."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)
