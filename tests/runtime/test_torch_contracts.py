"""What the library takes for granted of torch, and the traps that it goes around, one by one.

Each test says on which versions of torch its outcome was seen. A trap that a newer torch has mended is reported as a
skipped test ("mended"), so that the way around it can be taken out; a contract that no longer holds fails.

Seen on the CPU with torch 2.13.0, 2.14.1 and 2.15.0; what needs a GPU, on an H200 with torch 2.11.
"""

import functools
import io
import pickle
import re
import types

import pytest
import torch
from support.device_calls import kernels_of
from support.inputs import DEVICE, make_qkv
from support.oracle import masked_attention, relative_error
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from flexprefill import BlockMap, PrefillConfig, create_prefill_block_mask, search_blocks
from flexprefill.blockmap.block_mask import causal_mask, causal_mask_at, list_blocks

VERSION = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
NEWEST_SEEN = (2, 15)
BLOCK = 16 if DEVICE == "cpu" else 128  # what FlexAttention's kernel takes without options
LENGTH = 13 * BLOCK
CONFIG = PrefillConfig(block_size=BLOCK, alpha=0.9, window_blocks=1, last_full_blocks=0)


def trap(caught, what):
    """A trap that was seen up to NEWEST_SEEN: it has to be there, and may be gone in a newer torch."""
    if not caught and VERSION > NEWEST_SEEN:
        pytest.skip(f"mended in torch {torch.__version__}: {what}")
    assert caught, f"not so in torch {torch.__version__}: {what}"


def lists_of(block_map):
    return list_blocks(block_map.words, block_map.geometry).lists


@pytest.fixture(scope="module")
def case():
    """query, key, value, a sparse map and attention under it."""
    inputs = make_qkv(LENGTH, batch=2, heads=2, head_dim=16, device=DEVICE)
    block_map = search_blocks(*inputs[:2], CONFIG)
    assert block_map.density().max() < 0.6
    return *inputs, block_map, masked_attention(*inputs, block_map)


@pytest.fixture(scope="module")
def attend():
    """Compiled attention over lists as they are given."""

    @torch.compile(fullgraph=True)
    def attend(query, key, value, *lists):
        mask = BlockMask.from_kv_blocks(
            *lists, BLOCK_SIZE=BLOCK, mask_mod=causal_mask, seq_lengths=(LENGTH, LENGTH), compute_q_blocks=False
        )
        return flex_attention(query, key, value, block_mask=mask, enable_gqa=True)

    return attend


CLOSE = 1e-5 if DEVICE == "cpu" else 5e-3


def test_compiled_flex_attention_reads_contiguous_lists_rightly(case, attend):
    """2.11 (CUDA), 2.13 to 2.15 (CPU)."""
    query, key, value, block_map, expected = case
    assert relative_error(attend(query, key, value, *lists_of(block_map)), expected) <= CLOSE


def test_trap_counts_with_other_strides_are_read_wrongly_without_a_message(case, attend):
    """2.11 (CUDA: a right first head and wrong others), 2.13 to 2.15 (CPU: the same of the partial counts)."""
    query, key, value, block_map, expected = case
    lists = list(lists_of(block_map))
    lists[0] = lists[0].transpose(1, 2).contiguous().transpose(1, 2)
    trap(relative_error(attend(query, key, value, *lists), expected) > 0.05, "strides of kv_num_blocks are not read")


def test_the_library_makes_lists_that_do_not_fall_into_it(case):
    block_map = case[3]
    words = block_map.words.transpose(1, 2).contiguous().transpose(1, 2)
    mask = BlockMap(words, LENGTH, LENGTH, BLOCK).to_block_mask()
    lists = mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices
    assert all(tensor.is_contiguous() for tensor in lists) and lists[1].shape == lists[3].shape


@pytest.mark.skipif(DEVICE == "cuda", reason="of the CPU's kernel")
def test_trap_lists_that_are_narrower_than_the_keys_do_not_compile_on_the_cpu(case, attend):
    """2.13 to 2.15 (CPU); on CUDA they are read (2.11)."""
    query, key, value, block_map, _ = case
    counts, indices, full_counts, full_indices = lists_of(block_map)
    width = int(max(counts.max(), full_counts.max()))
    assert width < indices.shape[3]
    narrow = counts, indices[..., :width].contiguous(), full_counts, full_indices[..., :width].contiguous()
    try:
        attend(query, key, value, *narrow)
    except Exception as error:
        assert "InductorError" in type(error).__name__ or "Inductor" in str(error)
    else:
        trap(False, "narrow lists do not compile on the CPU")


@pytest.mark.eager_flex
def test_trap_eager_flex_attention_ignores_the_lists(case):
    """2.11 to 2.15, every device: only the mask_mod counts, and the warning says nothing of the mask."""
    query, key, value, block_map, expected = case
    everything = BlockMap.causal(2, 2, q_len=LENGTH, kv_len=LENGTH, block_size=BLOCK, device=DEVICE)
    eager = flex_attention(query, key, value, block_mask=block_map.to_block_mask(), enable_gqa=True)
    trap(relative_error(eager, expected) > 0.05, "eager flex_attention is dense")
    assert relative_error(eager, masked_attention(query, key, value, everything)) <= CLOSE


@pytest.mark.eager_flex
def test_past_the_recompile_limit_fullgraph_raises_and_does_not_fall_back():
    """2.11 to 2.15. Without fullgraph the function would run eagerly, and so be dense."""

    def attend(query, scale):
        return query * scale

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            compiled(torch.ones(3, dtype=dtype), 2)
    loose = torch.compile(lambda query: query * 2, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert loose(torch.ones(3, dtype=dtype)).dtype == dtype  # no error


def test_only_this_threads_compilation_counts_as_tracing():
    """2.13 to 2.15: is_compiling() is a flag of the process; is_dynamo_compiling() is False wherever code runs."""
    seen = []

    def backend(graph, inputs):
        seen.append((torch.compiler.is_compiling(), torch.compiler.is_dynamo_compiling()))
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend, fullgraph=True)(torch.ones(2))
    assert seen[0][1] is False and not torch.compiler.is_compiling()
    compiled, _ = count_compilations(lambda x: x + 1 if torch.compiler.is_dynamo_compiling() else x)
    assert compiled(torch.zeros(1)).item() == 1
    if VERSION >= (2, 13):
        trap(seen[0][0], "is_compiling() is True while a graph is compiled")


def count_compilations(function):
    """The function compiled without code for a device, and the graphs that were made."""
    graphs = []
    code = function.__code__.replace()  # torch remembers by code objects what changed
    function = types.FunctionType(code, function.__globals__, closure=function.__closure__)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return torch.compile(function, fullgraph=True, backend=backend), graphs


@pytest.mark.eager_flex
def test_a_new_mask_of_the_same_mask_mod_is_not_compiled_again_and_a_new_length_once():
    """2.11 to 2.15."""

    def attend(query, key, value, mask):
        return flex_attention(query, key, value, block_mask=mask, enable_gqa=True)

    compiled, graphs = count_compilations(attend)
    for turn, (length, most) in enumerate(((208, 1), (208, 1), (304, 2), (400, 2), (512, 2))):
        inputs = make_qkv(length, heads=2, head_dim=16, device=DEVICE, seed=turn)
        compiled(*inputs, search_blocks(*inputs[:2], CONFIG).to_block_mask())
        assert len(graphs) <= most


@pytest.mark.eager_flex
def test_trap_a_mask_mod_that_closes_over_an_int_is_compiled_again_for_another_and_over_a_tensor_once():
    """2.13 to 2.15: why causal_mask_at takes a tensor. From the second value on the int is a symbol."""
    query, key, value = make_qkv(64, 100, heads=2, head_dim=16, device=DEVICE)
    block_map = search_blocks(query, key, CONFIG)
    lists = lists_of(block_map)

    def of_int(offset):
        return lambda b, h, q_idx, kv_idx: q_idx + offset >= kv_idx

    def attend(mask_mod):
        sizes = {"BLOCK_SIZE": BLOCK, "seq_lengths": (64, 100), "compute_q_blocks": False}
        mask = BlockMask.from_kv_blocks(*lists, mask_mod=mask_mod, **sizes)
        return flex_attention(query, key, value, block_mask=mask, enable_gqa=True)

    compiled, graphs = count_compilations(attend)
    for offset in (36, 35, 34):
        compiled(of_int(offset))
    trap(len(graphs) > 1, "a mask_mod is compiled again for another int that it closes over")
    compiled, graphs = count_compilations(attend)
    for offset in (36, 35, 34):
        compiled(causal_mask_at(torch.full((1,), offset, dtype=torch.int32, device=DEVICE)))
    assert len(graphs) == 1


def test_masks_need_no_transposed_lists():
    """2.9 on: compute_q_blocks=False leaves out what only a backward pass reads."""
    mask = BlockMap.causal(1, 1, q_len=64, kv_len=64, block_size=16).to_block_mask()
    assert mask.q_indices is None and mask.full_q_indices is None and mask.q_num_blocks is None


def test_trap_sparsity_counts_blocks_that_no_causal_mask_could_keep():
    """2.11 to 2.15: hence BlockMap.density, of causal blocks."""
    everything = BlockMap.causal(1, 1, q_len=160, kv_len=160, block_size=16)
    trap(everything.to_block_mask().sparsity() > 40, "sparsity() of a full causal mask is not 0")
    assert (everything.density() == 1).all()


@pytest.mark.eager_flex
def test_trap_a_mask_of_other_heads_than_one_or_all_is_not_refused():
    """2.13 to 2.15: nor are its heads those of groups. The library's masks are of every query head."""
    mask = BlockMap.causal(1, 3, q_len=64, kv_len=64, block_size=16, device=DEVICE).to_block_mask()
    query, key, value = make_qkv(64, heads=6, kv_heads=2, head_dim=16, device=DEVICE)
    compiled, _ = count_compilations(lambda q, k, v, mask: flex_attention(q, k, v, block_mask=mask, enable_gqa=True))
    try:
        compiled(query, key, value, mask)
    except Exception as error:
        trap(False, f"a mask of 3 heads is not refused for 6 query heads, but {type(error).__name__}")
    assert search_blocks(query, key, CONFIG).shape[1] == 6
    assert search_blocks(query, key, PrefillConfig(block_size=16, mask_heads="kv")).shape[1] == 6


@pytest.mark.gpu
def test_trap_lists_that_are_expanded_over_heads(case, attend):
    """2.11 (CUDA), pytorch issue 172225: wrong with B > 1; right on the CPU (2.13 to 2.15). Either is no failure."""
    query, key, value, block_map, _ = case
    lists = [tensor[:, :1].expand(-1, 2, *tensor.shape[2:]) for tensor in lists_of(block_map)]
    one = BlockMap(block_map.words[:, :1].expand(-1, 2, -1, -1).contiguous(), LENGTH, LENGTH, BLOCK)
    error = relative_error(attend(query, key, value, *lists), masked_attention(query, key, value, one))
    assert error <= CLOSE or error > 0.05
    # the library's lists of an expanded map are not expanded
    assert all(tensor.is_contiguous() for tensor in lists_of(BlockMap(one.words, LENGTH, LENGTH, BLOCK)))


@pytest.mark.skipif(DEVICE == "cuda", reason="of the CPU's kernel")
@pytest.mark.parametrize("lack", ["float64", "log-sum-exp", "a gradient"])
def test_what_flex_attention_does_not_do_on_the_cpu(lack):
    """2.13 to 2.15: hence float32 at most, no return_aux and no requires_grad on the CPU."""
    query, key, value = make_qkv(64, heads=1, head_dim=16)
    settings = {"return_aux": AuxRequest(lse=True)} if lack == "log-sum-exp" else {}
    if lack == "float64":
        query, key, value = query.double(), key.double(), value.double()
    if lack == "a gradient":
        query = query.requires_grad_()
    try:
        torch.compile(functools.partial(flex_attention, **settings), fullgraph=True)(query, key, value)
    except Exception:
        return
    trap(False, f"flex_attention has no {lack} on the CPU")


def test_a_block_mask_in_a_compiled_function_may_come_from_a_custom_operators_outputs():
    """2.11 to 2.15: how create_prefill_block_mask works inside a model."""

    def indices(query, key):
        return create_prefill_block_mask(query, key, CONFIG).kv_indices

    compiled, graphs = count_compilations(indices)
    query, key, _ = make_qkv(LENGTH, heads=2, head_dim=16, device=DEVICE)
    expected = search_blocks(query, key, CONFIG).to_block_mask().kv_indices
    assert torch.equal(compiled(query, key), expected) and len(graphs) == 1


def test_trap_a_pickled_block_mask_needs_its_mask_mods_code():
    """2.11 to 2.15: hence files of data, and the names of mask_mods."""
    block_map = BlockMap.causal(1, 1, q_len=20, kv_len=64, block_size=16)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(block_map.to_block_mask())  # its mask_mod is of one offset
    whole = BlockMap.causal(1, 1, q_len=64, kv_len=64, block_size=16).to_block_mask()
    buffer = io.BytesIO()
    torch.save(whole, buffer)
    buffer.seek(0)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(buffer, weights_only=True)


def test_full_blocks_of_pytorchs_own_masks_are_those_of_the_library():
    """2.11 to 2.15: partial lists have the blocks that the causal edge crosses."""
    theirs = create_block_mask(causal_mask, 1, 1, 512, 512, device=DEVICE, BLOCK_SIZE=128)
    ours = BlockMap.causal(1, 1, q_len=512, kv_len=512, block_size=128, device=DEVICE).to_block_mask()
    assert torch.equal(theirs.kv_num_blocks, ours.kv_num_blocks)
    assert torch.equal(theirs.full_kv_num_blocks, ours.full_kv_num_blocks)


def test_custom_operators_take_their_arguments_by_a_schema_and_run_on_any_device():
    """2.11 to 2.15: torch.library.define and impl with the key "default", and fake implementations."""
    import flexprefill.blockmap.index_lists  # noqa: F401  # makes it

    index_lists = torch.ops.flexprefill.index_lists.default
    assert str(index_lists._schema).startswith("flexprefill::index_lists(Tensor words, SymInt q_len")
    words = torch.full((1, 1, 4, 1), 1, dtype=torch.int32, device="meta")
    assert index_lists(words, 64, 64, 16, False)[1].shape == (1, 1, 4, 4)


@pytest.mark.gpu
@pytest.mark.usefixtures("flash")
def test_flash_reads_lists_under_the_librarys_mask_mods_and_may_not_under_a_trivial_one():
    """The library's: 2.11. A no-op: lists ignored in 2.13 (pytorch issue 188322); the library never has one."""
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 128, "dtype": torch.bfloat16, "device": "cuda"}
    query, key, value = make_qkv(1024, **shape)
    block_map = search_blocks(query, key, PrefillConfig(alpha=1.0, window_blocks=1, sink_blocks=0, last_full_blocks=0))
    attend = torch.compile(functools.partial(flex_attention, enable_gqa=True, kernel_options={"BACKEND": "FLASH"}))
    expected = masked_attention(query, key, value, block_map, dtype=torch.float32)
    with torch.no_grad():
        output = attend(query, key, value, block_mask=block_map.to_block_mask())
    assert relative_error(output, expected) <= 2e-2


@pytest.mark.gpu
def test_short_queries_get_another_kernel_unless_triton_is_named():
    """2.11: fewer than 128 queries get FlexAttention's kernel for decoding; BACKEND="TRITON" names the other."""
    query, key, value = make_qkv(64, 1024, heads=4, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda")
    mask = search_blocks(query, key, PrefillConfig()).to_block_mask()
    named = torch.compile(functools.partial(flex_attention, enable_gqa=True, kernel_options={"BACKEND": "TRITON"}))
    with torch.no_grad():
        names = kernels_of(lambda: named(query, key, value, block_mask=mask))
    assert any("flex_attention" in name for name in names) and not any("flex_decoding" in name for name in names)


@pytest.mark.gpu
def test_a_mask_survives_a_cuda_graph():
    """2.11: nothing on the way from query to lists waits for the device or has a shape that depends on data."""
    query, key, _ = make_qkv(1024, heads=4, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda")
    expected = search_blocks(query, key)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = search_blocks(query, key).to_block_mask()
    graph.replay()
    assert BlockMap.from_block_mask(mask) == expected


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter runs without a GPU")
def test_trap_the_interpreters_product_of_bfloat16_is_wrong():
    """Triton 3.7 to 3.9: why the kernels get float32 there."""
    import triton
    import triton.language as tl

    @triton.jit
    def product(a_ptr, b_ptr, out_ptr):
        i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
        a, b = tl.load(a_ptr + 16 * i + j), tl.load(b_ptr + 16 * i + j)
        tl.store(out_ptr + 16 * i + j, tl.dot(a, b))

    a, b = torch.randn(16, 16), torch.randn(16, 16)
    out = torch.empty(16, 16)
    product[(1,)](a, b, out)
    assert torch.allclose(out, a @ b, atol=1e-5)
    product[(1,)](a.bfloat16(), b.bfloat16(), out)
    wrong = not torch.allclose(out, a.bfloat16().float() @ b.bfloat16().float(), atol=1e-3)
    if not wrong:
        pytest.skip(f"mended in triton {triton.__version__}")


# what runtime/ takes that is private to torch, one by one


def test_a_mode_is_counted_and_can_be_left_for_a_while():
    """2.11 to 2.13: runtime/thread_state.py."""
    from torch.utils._python_dispatch import TorchDispatchMode, _len_torch_dispatch_stack

    from flexprefill.runtime.thread_state import without_dispatch_modes

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watch():
        assert _len_torch_dispatch_stack() == 1
        with without_dispatch_modes():
            assert _len_torch_dispatch_stack() == 0
            torch.ones(2) + 1
        assert seen == [] and _len_torch_dispatch_stack() == 1
        torch.ones(2)
    assert len(seen) == 1 and _len_torch_dispatch_stack() == 0


def test_fake_and_batched_tensors_are_told_from_others():
    """2.11 to 2.13: runtime/thread_state.py."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from flexprefill.runtime.thread_state import is_fake, is_in_vmap

    seen = []
    torch.vmap(lambda tensor: seen.append(is_in_vmap(tensor)) or tensor)(torch.ones(2, 3))
    with FakeTensorMode():
        fake = torch.ones(2)
    assert seen == [True] and is_fake(fake)
    assert not is_in_vmap(torch.ones(2)) and not is_fake(torch.ones(2)) and not is_fake(torch.ones(2, device="meta"))


def test_a_marked_function_is_a_constant_of_a_graph():
    """2.11 to 2.13: runtime/compiling.py sets what torch.compiler.assume_constant_result sets."""
    from flexprefill.runtime.compiling import constant_in_graphs

    calls = []

    @constant_in_graphs
    def untraceable(number):
        calls.append(number)
        return len(repr(object())) * 0 + number

    compiled, graphs = count_compilations(lambda tensor: tensor + untraceable(3))
    assert compiled(torch.ones(2)).tolist() == compiled(torch.ones(2)).tolist() == [4.0, 4.0]
    assert calls == [3] and len(graphs) == 1


def test_a_size_that_is_kept_does_not_become_a_symbol():
    """2.11 to 2.13: runtime/compiling.py."""
    from flexprefill.runtime.compiling import keep_size

    sizes = []

    def note(graph, inputs):
        sizes.append([size for tensor in inputs if isinstance(tensor, torch.Tensor) for size in tensor.shape])
        return graph.forward

    compiled = torch.compile(lambda tensor: tensor * 2, backend=note, fullgraph=True)
    for length in (5, 6, 7):
        tensor = torch.ones(length)
        keep_size(tensor, 0)
        compiled(tensor)
    assert sizes == [[5], [6], [7]]


def test_an_operator_is_nothing_where_inductor_compiles_it():
    """2.11 to 2.13: runtime/compiling.py."""
    from flexprefill.attention.steps import over_kept_blocks
    from flexprefill.runtime.compiling import pass_on_when_compiled

    pass_on_when_compiled("flexprefill::over_kept_blocks")
    empty, words = torch.empty(0), torch.ones(1, 1, 1, 1, dtype=torch.int32)

    def graph(output):
        tensor = output.view(1, 1, 8, 16)
        # own_mods: it would raise if it ran
        return over_kept_blocks(output + 1, empty, tensor, tensor, tensor, words, 16, 1.0, True)[0] * 2

    output = torch.rand(8, 16)
    assert torch.equal(torch.compile(graph, fullgraph=True)(output), (output + 1) * 2)
    with pytest.raises(ValueError, match="need a graph that is compiled by inductor"):
        torch.compile(graph, fullgraph=True, backend="eager")(output)


def test_what_a_symbol_is_known_to_be_is_asked_without_a_guard():
    """2.11 to 2.13: runtime/tracing.py."""
    from flexprefill.runtime.tracing import one_if_known

    class Sizes(torch.nn.Module):
        def forward(self, tensor):
            rows = (tensor.shape[0] + 511) // 512  # 1 for all lengths of the range
            return tensor.new_zeros(one_if_known(rows)) + tensor.shape[0]

    length = torch.export.Dim("length", min=2, max=500)
    program = torch.export.export(Sizes(), (torch.ones(9),), dynamic_shapes=({0: length},))
    assert program.module()(torch.ones(77)).tolist() == [77.0]
    assert one_if_known(1) == 1 and one_if_known(5) == 5


def test_a_condition_in_a_graph_raises_where_it_runs():
    """2.11 to 2.13: runtime/tracing.py; on a GPU the assertion ends the process."""
    from flexprefill.runtime.tracing import assert_in_graph

    assert_in_graph(torch.tensor(True), "not this")
    with pytest.raises(RuntimeError, match="this one"):
        assert_in_graph(torch.tensor(False), "this one")


def test_classes_are_nodes_with_named_children():
    """2.11 to 2.13: runtime/pytrees.py."""
    from torch.utils import _pytree as pytree

    block_map = BlockMap.causal(1, 1, q_len=64, kv_len=64, block_size=16)
    ((path, leaf),), spec = pytree.tree_flatten_with_path(block_map)
    assert pytree.keystr(path) == ".words" and leaf is block_map.words
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)).unflatten([leaf]) == block_map


def test_errors_of_refused_compilations_are_there():
    """2.11 to 2.13: runtime/compiling.py."""
    from flexprefill.runtime.compiling import mixed_up_sizes

    failed = torch._dynamo.exc.BackendCompilerFailed(types.SimpleNamespace(__name__="x"), RuntimeError("y"), None)
    assert issubclass(torch._dynamo.exc.FailOnRecompileLimitHit, Exception) and not mixed_up_sizes(failed)
