"""Triton for a Hopper GPU where there is none: kernels are compiled, and nothing runs.

For programs that start with TRITON_INTERPRET=0.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class NoDriver:
    """What Triton asks of a device while it compiles."""

    launcher_cls = staticmethod(lambda *arguments: None)

    class utils:
        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65_536}

        @staticmethod
        def load_binary(*arguments):
            return 0, 0, 0, 0, 1024

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def map_python_to_cpp_type(self, name):
        return name


class OnHopper(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def plain(argument):
    return argument.as_subclass(torch.Tensor) if isinstance(argument, OnHopper) else argument


def compile_instead(compile_only, *modules):
    """Lets modules of kernels find a Hopper GPU, and compile what they would launch."""
    driver.set_active(NoDriver())
    stand_ins = {"launch": compile_only, "is_hopper": lambda device: True, "multiprocessors": lambda device: 132}
    for module in modules:
        for name, stand_in in stand_ins.items():
            if hasattr(module, name):
                setattr(module, name, stand_in)


def compiled(kernel, grid, *arguments, **named):
    """What Triton makes of a launch."""
    return kernel.warmup(*map(plain, arguments), grid=grid, **{name: plain(value) for name, value in named.items()})
