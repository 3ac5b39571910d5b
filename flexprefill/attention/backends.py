"""Which kernel computes an attention call: the choice, and the reasons against the other kernels."""

from __future__ import annotations

import importlib
import importlib.util
import operator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest

from flexprefill.blockmap.geometry import ceil_div
from flexprefill.errors import UnsupportedError
from flexprefill.runtime.compiling import constant_in_graphs
from flexprefill.runtime.state import remembered
from flexprefill.runtime.tracing import is_exporting, is_tracing

Options = tuple[tuple[str, Any], ...]  # a tuple, which torch.compile takes as a constant
# none, a variant's masks alone (sequences, a window), its soft cap without sequences, its score_mods otherwise, or a
# caller's own mods
Mods = Literal["", "masks", "cap", "scores", "own"]
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
BACKENDS = ("auto", "triton", "flash")
HOPPER = (9, 0)
SIXTEEN_BIT = (torch.float16, torch.bfloat16)
FLEX_TILE = 128  # queries and keys of a kernel's tile; FlashAttention-4 has the same up to D 128
FLASH_HEAD_DIMS = (64, 96, 128)  # compared with a float32 evaluation
MAX_ELEMENTS = 2**31  # where 32-bit offsets end

# Kernel options that beat FlexAttention's defaults, by compute capability, head dimension and block size. They hold for
# float16 and bfloat16, and for lengths known to be multiples of FLEX_TILE. Measured on an H200: 4 to 6 % faster there,
# and 13 % slower where the bounds of tiles are checked. All other cases keep the defaults.
TRITON_OPTIONS: dict[tuple[tuple[int, int], int, int], Options] = {
    (HOPPER, 128, 128): (("BLOCK_M", 128), ("BLOCK_N", 128), ("num_warps", 8), ("num_stages", 3)),
}

# Tokens (S_kv) below which dense attention is faster than search, lists and sparse attention together. By compute
# capability, the kernel, and whether the search is two-sided. For float16 and bfloat16, D and Dv of 128. By the wall
# clock on an H200, one call on an idle GPU and calls in a row (docs/howto/attention.md). Device times alone would give
# 4,096 and 6,144 tokens without the two-sided search, and on prompts of text 5,120 and 8,192 with it.
DENSE_BELOW: dict[tuple[tuple[int, int], str, bool], int] = {
    (HOPPER, "flash", False): 6144,
    (HOPPER, "triton", False): 10_240,
    (HOPPER, "flash", True): 12_288,
    (HOPPER, "triton", True): 20_480,
}


@dataclass(frozen=True)
class BackendChoice:
    """What computes an attention call, and why.

    Attributes:
        name: The kernel: "flash" (FlashAttention-4), or FlexAttention's "triton" (CUDA) or "cpp" (CPU). Dense and
            without a search: "dense-flash" (FlashAttention-4) or "dense-sdpa" (scaled_dot_product_attention).
        reason: Why this kernel was chosen.
        dense: Whether every query attends to all keys before it, instead of the kept blocks.
        kernel_options: FlexAttention's options, as pairs of name and setting.
        passed_over: Pairs of name and reason: why a better kernel was not chosen.
        tail_parts: The last query blocks keep all keys. Their keys are split into this many parts; 1 means that these
            blocks are computed with the others.
        by_itself: Whether FlashAttention-4 is called without FlexAttention, whose entry takes longer on the host.
        gathers: Why the pages of a `PagedKV` are first gathered into tensors of their own. None: they are read where
            they lie, or the call has none.
    """

    name: str
    reason: str
    dense: bool = False
    kernel_options: Options = ()
    passed_over: tuple[tuple[str, str], ...] = ()
    tail_parts: int = 1
    by_itself: bool = False
    gathers: str | None = None


class Request(NamedTuple):
    """What the choice depends on. It holds no lengths, so one choice serves all of them."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    block_size: int
    at_offset: bool  # S_q < S_kv
    mods: Mods  # what FlexAttention gets besides the causal mask
    positive_scale: bool
    lse: bool
    max_scores: bool
    aligned: bool  # last stride 1 and all others multiples of 16 bytes
    whole_tiles: bool  # both lengths are known to be multiples of 128
    small: bool  # no tensor or index list reaches MAX_ELEMENTS
    compiling: bool  # inside a caller's torch.compile

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, *, block_size: int, mods: Mods, scale: float, aux: AuxRequest
    ) -> Request:
        """What FlexAttention of these tensors has to do, over blocks of this size."""
        batch, heads, q_len, head_dim = query.shape
        kv_len = key.shape[2]
        aligned = _is_aligned(query) and _is_aligned(key) and _is_aligned(value)
        entries = batch * heads * ceil_div(q_len, block_size) * ceil_div(kv_len, block_size)
        compiling = is_tracing()
        # lengths are symbols while compiling: each question about them costs a compilation
        whole_tiles = not compiling and q_len % FLEX_TILE == 0 and kv_len % FLEX_TILE == 0
        # an exported program has to take every length, also large ones; another thread's export does not count
        small = (
            not (compiling and is_exporting())
            and max(query.numel(), key.numel(), value.numel(), entries) < MAX_ELEMENTS
        )
        return cls(
            query.device,
            query.dtype,
            operator.index(head_dim),
            operator.index(value.shape[3]),
            block_size,
            # spelt out: comparisons of symbolic sizes are no plain bools
            True if q_len != kv_len else False,  # noqa: SIM210
            mods,
            True if scale > 0 else False,  # noqa: SIM210
            aux.lse,
            aux.max_scores,
            True if aligned else False,  # noqa: SIM210
            whole_tiles,
            True if small else False,  # noqa: SIM210
            compiling,
        )


def choose_backend(backend: str, request: Request) -> BackendChoice:
    """FlexAttention's kernel for a request.

    Args:
        backend: "auto" chooses the best kernel that can do the request. A name demands that kernel.

    Raises:
        ValueError: The backend's name is unknown.
        UnsupportedError: The named backend cannot do the request, or no backend here gives what return_aux asks for.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if request.compiling:
        return _choose_in_graph(backend, *request)
    return choose_once(backend, request)


@constant_in_graphs
def _choose_in_graph(backend: str, *facts: Any) -> BackendChoice:
    """As choose_backend. The request is flat, because a graph passes plain constants alone."""
    return choose_once(backend, Request(*facts))


@remembered("choices of a backend", most=4096)
def choose_once(backend: str, request: Request) -> BackendChoice:
    """As choose_backend, for a known name."""
    if request.device.type != "cuda":
        if backend != "auto":
            raise UnsupportedError(f"backend {backend!r} needs tensors on a CUDA device, got {request.device}")
        if request.lse or request.max_scores:
            raise UnsupportedError(
                f"return_aux is not supported by FlexAttention on {request.device}: pass tensors on a CUDA device"
            )
        return BackendChoice("cpp", f"FlexAttention's only kernel on {request.device.type}")
    if request.block_size < 16 or request.block_size & (request.block_size - 1):
        raise UnsupportedError(
            f"block_map must be of blocks of 16, 32, 64, 128, … tokens on {request.device.type}, whose kernels have "
            f"such tiles, got block_size={request.block_size}"
        )
    if backend == "triton":
        return BackendChoice("triton", "named by the caller", kernel_options=triton_options(request))
    against = against_flash(request, named=backend == "flash")
    if against is None:
        reason = "named by the caller" if backend == "flash" else "the fastest that can do the request"
        by_itself = request.mods in ("", "cap") and not request.compiling
        return BackendChoice("flash", reason, kernel_options=(("BACKEND", "FLASH"),), by_itself=by_itself)
    if backend == "flash":
        raise UnsupportedError(f"backend 'flash' cannot do this: {against}; 'triton' can")
    return BackendChoice(
        "triton", "does every request", kernel_options=triton_options(request), passed_over=(("flash", against),)
    )


def choose_dense(request: Request, reason: str) -> BackendChoice:
    """The kernel for dense causal attention: FlashAttention-4 where it can, else PyTorch's own choice."""
    if request.compiling:
        against = "it cannot be traced by torch.compile"
        return BackendChoice("dense-sdpa", reason, dense=True, passed_over=(("dense-flash", against),))
    return _choose_dense_once(request, reason)


@remembered("choices of a dense kernel", most=4096)
def _choose_dense_once(request: Request, reason: str) -> BackendChoice:
    if request.device.type != "cuda":
        return BackendChoice("dense-sdpa", reason, dense=True)
    # the other limits are those of FlashAttention-4 inside FlexAttention
    plain = request._replace(block_size=FLEX_TILE, at_offset=False, mods="", lse=False, max_scores=False)
    against = against_flash(plain, named=True)
    if against is None:
        return BackendChoice("dense-flash", reason, dense=True)
    return BackendChoice("dense-sdpa", reason, dense=True, passed_over=(("dense-flash", against),))


def measured_dense_below(request: Request, sparse: BackendChoice, two_sided: bool) -> int:
    """The length below which dense attention was measured to be faster than this sparse choice; 0 if never.

    It is 0 inside a caller's torch.compile too: branching on a length costs a compilation.
    """
    dims = request.head_dim, request.value_dim
    if request.compiling or request.device.type != "cuda" or request.dtype not in SIXTEEN_BIT or dims != (128, 128):
        return 0
    return DENSE_BELOW.get((torch.cuda.get_device_capability(request.device), sparse.name, two_sided), 0)


def triton_options(request: Request) -> Options:
    """The options of FlexAttention's Triton kernel: measured ones where there are any, else its defaults."""
    options: Options = ()
    block, dim = request.block_size, max(request.head_dim, request.value_dim)
    row_bytes = (1 << (dim - 1).bit_length()) * request.dtype.itemsize  # padded to a power of two
    if block < 128 or row_bytes > 512:
        # a kernel tile must divide the mask's blocks, and several tiles have to fit the shared memory. Long rows get
        # FlexAttention's own default tiles (it has none for float32 with D 192)
        queries = block if row_bytes <= 512 else min(block, 32)
        keys = block if row_bytes <= 256 else min(block, 32)
        options = ("BLOCK_M", queries), ("BLOCK_N", keys), ("num_warps", 4)
    if request.whole_tiles:
        if request.dtype in SIXTEEN_BIT and request.head_dim == request.value_dim:
            capability = torch.cuda.get_device_capability(request.device)
            options = TRITON_OPTIONS.get((capability, request.head_dim, request.block_size), options)
        # without this FlexAttention checks the bounds of every tile, because it is compiled for all lengths
        options = *options, ("IS_DIVISIBLE", True)
    # named, because short queries would get FlexAttention's decoding kernel
    return (("BACKEND", "TRITON"), *options)


def against_flash(request: Request, *, named: bool) -> str | None:
    """Why FlashAttention-4 cannot do a request, or should not where it is not named; None if it can.

    Its limits were found on an H200 with torch 2.11 and flash-attn-4 4.0.0b10.
    """
    capability, dims = torch.cuda.get_device_capability(request.device), (request.head_dim, request.value_dim)
    if capability != HOPPER:
        return "it takes blocks of 128 on compute capability 9.0 alone, got {}.{}".format(*capability)
    if request.dtype not in SIXTEEN_BIT:
        return f"it takes float16 or bfloat16, got {request.dtype}"
    if request.block_size != FLEX_TILE:
        return f"it takes blocks of {FLEX_TILE}, got block_size={request.block_size}"
    if not set(dims) <= set(FLASH_HEAD_DIMS):
        return "it was tested with D and Dv of {}, got D={}, Dv={}".format(FLASH_HEAD_DIMS, *dims)
    if not request.positive_scale:
        return "it takes a positive scale"
    if not request.aligned:
        return "it takes tensors whose last stride is 1, the others multiples of 16 bytes"
    if not request.small:
        return "its offsets are 32-bit, and a tensor or an index list has 2**31 elements or more"
    if request.max_scores:
        return "it gives no max_scores"
    if request.lse and request.compiling:
        return "its log-sum-exp is checked at the first use (see flash_lse_factor), which torch.compile cannot trace"
    if request.at_offset and request.compiling and TORCH < (2, 13):
        return f"torch {torch.__version__} does not hand it an offset that is computed in a compiled graph"
    if not named and (against := _against_mods(request)):
        return against
    return flash_attention_4_fault()


def _against_mods(request: Request) -> str | None:
    """Why FlashAttention-4 should not compute a request's mods unless it is named.

    With masks it takes 0.60 to 0.73 of the Triton kernel's time, and with ALiBi 1.02 to 1.06 times. With a soft cap it
    takes 0.51 by itself and 1.6 times through FlexAttention (H200, 32,768 and 131,072 tokens;
    examples/benchmarks/windows_and_sequences.py).
    """
    if request.mods == "own":
        return "whether it can do a caller's mask_mod or score_mod shows only when it is compiled: name it to try"
    if request.mods == "scores":
        return "it is slower with ALiBi, and with a soft cap over sequences: name it to try"
    if request.mods == "cap" and request.compiling:
        return "it is slower with a soft cap inside torch.compile: name it to try"
    if request.mods == "masks" and request.compiling:
        return "its masks were measured outside torch.compile alone: name it to try"
    return None


@remembered("whether flash-attn-4 is there", most=1)
def flash_attention_4_fault() -> str | None:
    """Why the package flash-attn-4 cannot be used here; None if it can."""
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        return "it needs the package flash-attn-4, which is not installed"
    try:
        importlib.import_module("flash_attn.cute")
    except Exception as error:  # a package built for another version may raise anything
        return f"the package flash-attn-4 does not load: {type(error).__name__}: {error}"
    return None


def _is_aligned(tensor: Tensor) -> bool:
    batch, head, token, last = tensor.stride()
    entries = 16 // tensor.element_size()
    return last == 1 and token % entries == 0 and head % entries == 0 and batch % entries == 0
