"""A kernel that is kept is launched again for the same kind of launch alone, with its arguments in their order."""

import pytest
import torch

pytest.importorskip("triton")

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flexprefill.runtime import launching
from flexprefill.runtime.launching import launch
from flexprefill.runtime.state import forget


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launched.append((grid, arguments))


class Kernel:
    """As triton.jit makes one: a launch compiles, launches and returns what it compiled."""

    arg_names = ("x", "y", "n", "scale", "BLOCK")

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def run(*arguments, num_warps=4, maxnreg=None, **named):
            given = {**dict(zip(self.arg_names, arguments, strict=False)), **named}
            assert set(given) == set(self.arg_names)
            self.compiled.append((grid, given, num_warps, maxnreg))
            return Compiled(self)

        return run


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launching.triton, "JITFunction", Kernel)
    forget("compiled kernels, by kind of launch")
    yield Kernel()
    forget("compiled kernels, by kind of launch")


def test_the_same_kind_is_compiled_once_and_given_its_own_arguments(kernel):
    x, y, other = torch.zeros(32), torch.zeros(4), torch.ones(64)
    launch(kernel, (3,), x, n=5, y=y, BLOCK=16, scale=0.5, num_warps=1)
    assert len(kernel.compiled) == 1 and kernel.launched == []
    launch(kernel, (7, 2), other, n=5, y=y, BLOCK=16, scale=0.5, num_warps=1)
    assert len(kernel.compiled) == 1
    [(grid, arguments)] = kernel.launched
    assert grid == (7, 2, 1) and arguments[0] is other and arguments[1] is y and arguments[2:] == (5, 0.5, 16)


def described(base, block_shape=(1, 64), swizzle=64, **settings):
    """Triton's own descriptor, whose settings differ between its versions."""
    layout = gl.NVMMASharedLayout(swizzle, 16, 2)
    return TensorDescriptor(base, [4, 64], [64, 1], list(block_shape), layout, **settings)


def test_whatever_triton_compiles_for_makes_another_kind(kernel):
    x, rows = torch.zeros(64), torch.zeros(4, 64, dtype=torch.float16)
    common = {"x": x, "y": x, "n": 1, "scale": 1.0, "BLOCK": 16, "num_warps": 1}
    others = [
        {"x": torch.zeros(64, dtype=torch.float16)},
        {"x": x.to("meta")},
        {"x": torch.nn.Parameter(x)},
        {"x": x[1:]},
        {"y": x[1:]},
        {"n": 16},
        {"n": 17},
        {"n": True},
        {"n": 1.0},
        {"scale": 2.0},
        {"scale": 1},
        {"BLOCK": 32},
        {"num_warps": 2},
        {"maxnreg": 128},
        {"x": described(rows)},
        {"x": described(rows.bfloat16())},
        {"x": described(rows, block_shape=(1, 32))},
        {"x": described(rows, swizzle=32)},
        {"x": described(rows, padding="nan")},
    ]
    for _ in range(2):
        for changes in ({}, *others):
            launch(kernel, (1,), **{**common, **changes})
    assert len(kernel.compiled) == 1 + len(others) == len(kernel.launched)
    launch(Kernel(), (1,), **common)
    assert len(kernel.launched) == 1 + len(others), "another kernel is another kind"
    # the same numbers under other names
    kept = {name: value for name, value in common.items() if name not in ("n", "BLOCK")}
    launch(kernel, (1,), **kept, n=2, BLOCK=3)
    launch(kernel, (1,), **kept, BLOCK=2, n=3)
    assert [given["n"] for _, given, _, _ in kernel.compiled[-2:]] == [2, 3]


def test_what_does_not_compile_is_not_kept(kernel, monkeypatch):
    def fails(self, grid):
        raise RuntimeError("out of resources")

    x = torch.zeros(4)
    with monkeypatch.context() as patched:
        patched.setattr(Kernel, "__getitem__", fails)
        with pytest.raises(RuntimeError, match="out of resources"):
            launch(kernel, (1,), x, x, 1, 1.0, 16)
    launch(kernel, (1,), x, x, 1, 1.0, 16)
    assert len(kernel.compiled) == 1


def test_the_interpreters_kernels_are_launched_as_they_are(kernel, monkeypatch):
    monkeypatch.setattr(launching.triton, "JITFunction", int)
    x = torch.zeros(4)
    for _ in range(2):
        launch(kernel, (1,), x, x, 1, 1.0, 16)
    assert len(kernel.compiled) == 2 and kernel.launched == []
