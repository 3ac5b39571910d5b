"""Operators: what stands between a call and its function gets to see the operator, and otherwise nothing does."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flexprefill.blockmap.index_lists import index_lists
from flexprefill.runtime.operators import stands_between

WORDS = torch.full((1, 1, 4, 1), 1, dtype=torch.int32)
ARGUMENTS = 64, 64, 16, False
NAME = "flexprefill.index_lists.default"


class Subclass(torch.Tensor):
    pass


TENSORS = {
    "a subclass": lambda t: t.as_subclass(Subclass),
    "a parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "meta": lambda t: t.to("meta"),
    "negated": lambda t: torch._neg_view(t),
    "conjugated": lambda t: torch.complex(t.float(), t.float()).conj(),
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "functional": lambda t: torch._to_functional_tensor(t),
    "nested": lambda t: torch.nested.nested_tensor([t[0, 0]]),
    "jagged": lambda t: torch.nested.nested_tensor([t[0, 0]], layout=torch.jagged),
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t[0, 0].to_sparse_csr(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 1.0, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_not_plain_stand_between(kind):
    assert not stands_between((WORDS, *ARGUMENTS))
    assert stands_between((WORDS, *ARGUMENTS, TENSORS[kind](WORDS)))


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), str(function)]
        return function(*args, **(kwargs or {}))


class SeesOperators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), str(function)]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [SeesFunctions, SeesOperators])
def test_a_users_mode_sees_the_operator(mode):
    expected = index_lists(WORDS, *ARGUMENTS)
    with mode() as watching:
        found = index_lists(WORDS, *ARGUMENTS)
    assert NAME in watching.seen
    assert all(map(torch.equal, found, expected))


def test_tracers_and_profilers_see_the_operator():
    def counts(words):
        return index_lists(words, *ARGUMENTS)[0]

    assert [str(node.target) for node in make_fx(counts)(WORDS).graph.nodes].count(NAME) == 1
    assert "flexprefill::index_lists" in str(torch.jit.trace(counts, (WORDS,), check_trace=False).graph)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        counts(WORDS)
    assert "flexprefill::index_lists" in {event.key for event in profile.key_averages()}
    functional = torch.func.functionalize(counts)(WORDS)
    assert torch.equal(functional, counts(WORDS))


def test_transforms_stand_between_though_their_tensors_may_be_plain():
    seen = []

    def look(tensor):
        seen.append(stands_between((WORDS,)))
        return tensor.sum()

    torch.vmap(look)(torch.ones(2, 3))
    torch.func.grad(look)(torch.ones(3))
    torch.func.functionalize(look)(torch.ones(3))
    assert seen == [True] * 3 and not stands_between((WORDS,))


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_thread_s_plain_states_do_not_stand_between(around):
    expected = index_lists(WORDS, *ARGUMENTS)
    with around():
        assert not stands_between((WORDS, torch.ones(2), WORDS.clone()))
        assert all(map(torch.equal, index_lists(WORDS, *ARGUMENTS), expected))


def test_named_arguments_are_taken_either_way():
    expected = index_lists(WORDS, *ARGUMENTS, uncut=WORDS)
    with SeesOperators() as watching:
        assert all(map(torch.equal, index_lists(WORDS, *ARGUMENTS, uncut=WORDS), expected))
    assert NAME in watching.seen
    assert stands_between((WORDS, WORDS.to("meta")))


def test_a_callers_compiled_function_with_breaks_traces_no_operators_inside():
    def lists(words):
        torch._dynamo.graph_break()
        return index_lists(words, *ARGUMENTS)

    compiled = torch.compile(lists, backend="eager")
    assert all(map(torch.equal, compiled(WORDS), index_lists(WORDS, *ARGUMENTS)))
