"""What FlexAttention's Triton kernel computes, without a GPU: inductor writes it, and Triton's interpreter runs it.

    TRITON_INTERPRET=1 python tests/support/flex_program.py

Prints a line for each kind of call: its name, the error of its output relative to dense attention under the same mask,
and how many of query, key and value the kernel knows to begin at multiples of 16 bytes.

Private to torch 2.11 to 2.13: all that `pretend` replaces, and the layout of the code that inductor writes.
"""

import contextlib
import re
import sys
import tempfile
import types
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
import torch._dynamo.device_interface as interfaces
import torch._higher_order_ops.flex_attention
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._inductor.fx_passes.post_grad as post_grad
import torch._subclasses.fake_tensor as fake_tensors
from torch._inductor.graph import GraphLowering
from torch._prims_common import make_contiguous_strides_for
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).parents[1]))
from flexprefill.attention import flex
from flexprefill.attention.flex import FlexSettings, flex_over
from flexprefill.blockmap.block_mask import ListedBlocks, list_blocks, offsets_at
from flexprefill.blockmap.index_lists import make_lists
from flexprefill.blockmap.places import names_of
from support.inputs import as_projected, make_qkv, random_map
from support.no_gpu import NoDriver
from support.oracle import masked_attention, relative_error
from support.paged import in_pages, interleaved

BLOCK = 128
H200 = types.SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=140 * 2**30, warp_size=32,
    regs_per_multiprocessor=65_536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block_optin=232_448, shared_memory_per_multiprocessor=233_472, L2_cache_size=50 * 2**20,
    gcnArchName="",
)  # fmt: skip
written = []


class Written(BaseException):
    """Ends a compilation whose code is there."""


def pretend():
    """Lets torch find an H200, as far as making code for it asks, and stop when the code is made."""
    driver.set_active(NoDriver())
    nothing = dict.fromkeys(("_lazy_init", "set_device", "set_rng_state", "synchronize"), lambda *_: None)
    stand_ins = nothing | {
        "is_available": lambda: True,
        "is_initialized": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: H200,
        "_get_device_properties": lambda device=None: H200,
        "get_device_capability": lambda device=None: (9, 0),
        "get_rng_state": lambda *_: torch.zeros(1),
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "_DeviceGuard": lambda index: contextlib.nullcontext(),
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    torch.accelerator.is_available = lambda: False
    interfaces.CudaInterface.Worker.get_device_properties = staticmethod(lambda device=None: H200)
    interfaces.CudaInterface.get_compute_capability = staticmethod(lambda device=None: 90)
    interfaces.CudaInterface.is_available = staticmethod(lambda: True)
    fake_tensors.init_gpu_context = lambda device: None
    # the first copies, and the others run patterns of dense attention to see what they look like
    sys.modules["torch._higher_order_ops.flex_attention"]._permute_strides = lambda out, strides: out.new_empty_strided(
        out.shape, make_contiguous_strides_for(out.shape)
    )
    joint_graph.lazy_init = post_grad.lazy_init = lambda device=None: None
    flex.without_dispatch_modes = contextlib.nullcontext  # the mode of fake tensors is meant to see all
    write = GraphLowering.codegen

    def write_and_stop(graph):
        written.append(write(graph)[0].value)
        raise Written

    GraphLowering.codegen = write_and_stop


def on_gpu(tensor):
    """A tensor of the same layout, without numbers. Call in a FakeTensorMode."""
    if tensor is None:
        return None
    memory = torch.empty(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=tensor.dtype, device="cuda")
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def code_for(tensors, listed, settings):
    """The Python module that inductor makes of a call on a GPU."""
    written.clear()
    with fake_tensors.FakeTensorMode(allow_non_fake_inputs=True), contextlib.suppress(Written):
        lists = tuple(map(on_gpu, listed.lists))
        of_gpu = ListedBlocks(lists, on_gpu(listed.offset), listed.mask_mods, on_gpu(listed.positions))
        flex_over(*map(on_gpu, tensors), of_gpu, settings)
    return written[0]


class Interpreted:
    """A kernel of that module, run by Triton's interpreter."""

    def __init__(self, name, source, folder):
        path = folder / f"{name}.py"
        path.write_text(re.sub(r"^@triton_heuristics\.template\(.*?^\)\n", "", source, flags=re.S | re.M))
        spec = spec_from_file_location(name, path)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        self.kernel = getattr(module, name)

    def run(self, *arguments, stream=None):
        count = len(self.kernel.arg_names)
        self.kernel[arguments[count : count + 3]](*arguments[:count])


def poisoned(size, stride, dtype):
    """New memory: NaN, or a number that no list may hold."""
    return torch.empty_strided(size, stride, dtype=dtype).fill_(torch.nan if dtype.is_floating_point else 2**30)


def run(code, tensors, folder):
    """The output of the module's call. Tensors are its inputs, those of one shape in their order."""
    kernels = re.findall(r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)'''", code, flags=re.S | re.M)
    names = {name: Interpreted(name, source, folder) for name, source in kernels}
    names |= {"torch": torch, "empty_strided_cuda": poisoned, "get_raw_stream": lambda index: 0}
    names |= {"assert_size_stride": lambda *_, **__: None, "copy_if_misaligned": lambda tensor: tensor}
    names["reinterpret_tensor"] = torch._C._dynamo.guards._reinterpret_tensor
    exec("class Module:\n" + code[code.index("    def call(self, args):") : code.index("runner = Runner(")], names)
    left, arguments = list(tensors), []
    for value in re.findall(r"^    arg\d+_1 = (.*)", code[code.index("def get_args():") :], flags=re.M):
        if value.startswith("rand_strided"):
            shape = eval(re.match(r"rand_strided\((\(.*?\)),", value)[1])
            place = next(i for i, tensor in enumerate(left) if tensor.shape == shape)
            arguments.append(left.pop(place))
        else:
            arguments.append(int(value))
    return names["Module"]().call(arguments)[0]


def show(name, qkv, read, kept, listed, piece=None):
    """One line. The call reads the tensors ``read``, which hold ``qkv``."""
    query = read[0]
    whole_tiles = query.shape[2] % BLOCK == read[1].shape[2] % BLOCK == 0
    options = (("BACKEND", "TRITON"), *([("IS_DIVISIBLE", True)] if whole_tiles else []))
    settings = FlexSettings(BLOCK, query.shape[3] ** -0.5, options, None, piece)
    inputs = [tensor for tensor in (*read, *listed.lists, listed.offset, listed.positions) if tensor is not None]
    code = code_for(read, listed, settings)
    with tempfile.TemporaryDirectory() as folder:
        output = run(code, inputs, Path(folder))
    aligned = sum(f"({place},): [['tt.divisibility', 16]]" in code for place in range(3))
    print(name, relative_error(output, masked_attention(*qkv, kept).nan_to_num(0)), aligned, flush=True)


def in_a_cache(query, key, value):
    """The same numbers, keys and values in a cache that has room for more."""
    cache = torch.full((2, *key.shape[:2], key.shape[2] + 64, key.shape[3]), torch.nan)
    cache[:, :, :, : key.shape[2]] = torch.stack((key, value))
    return query, *cache[:, :, :, : key.shape[2]]


def main():
    pretend()
    plain = {
        "whole": (256, 256, None),
        "chunk": (200, 500, None),
        "views": (384, 384, as_projected),
        "cache": (130, 300, in_a_cache),
    }
    for name, (q_len, kv_len, laid) in plain.items():
        qkv = make_qkv(q_len, kv_len, batch=2, heads=4, kv_heads=2)
        kept, _ = random_map(q_len, kv_len, BLOCK, batch=2, heads=4)
        show(name, qkv, laid(*qkv) if laid else qkv, kept, list_blocks(kept.words, kept.geometry))
    for page_size, q_len, kv_len, laid in (
        (128, 256, 512, None), (128, 200, 500, interleaved), (256, 256, 512, None), (384, 100, 700, interleaved),
    ):  # fmt: skip
        query, key, value = make_qkv(q_len, kv_len, batch=2, heads=4, kv_heads=2)
        kept, _ = random_map(q_len, kv_len, BLOCK, batch=2, heads=4)
        paged = in_pages(key, value, page_size)
        read = query, *(laid(paged) if laid else paged).in_a_row()
        places = paged.places(BLOCK)
        lists = make_lists(kept.words, kept.geometry, names=names_of(places, kept.geometry))  # as narrow as on a GPU
        listed = ListedBlocks(lists, offsets_at(kept.words, kept.offset), (), places.positions)
        show(f"pages-{page_size}", (query, key, value), read, kept, listed, places.size)


if __name__ == "__main__":
    main()
