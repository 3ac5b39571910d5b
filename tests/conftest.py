import contextlib
import functools
import os

# before anything imports torch or numpy: sizes are so small that threads would wait for each other more than they work,
# and tests run in several processes, which start others
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

# before anything imports triton: without a GPU its kernels run in the interpreter
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):  # Triton is not everywhere
        from support.interpreter import leave_out_needless_work

        leave_out_needless_work()


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items):
    for item in items:
        if "release" in item.keywords:
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def the_same_random_numbers():
    """Every test draws the same numbers each time, from torch's own generator too."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_recorded():
    """Every test works its launches out anew: what it patches takes part, and is not found by the next one."""
    from flexprefill.runtime import replaying  # noqa: F401  # makes the name known
    from flexprefill.runtime.state import forget

    forget("launches of whole steps")


@pytest.fixture(autouse=True)
def nothing_silent(request):
    """Every test fails where FlexAttention runs eagerly, unless it is marked for that, or gets other lists."""
    from support.watch import eager_flex_raises, lists_are_contiguous

    with contextlib.ExitStack() as watches:
        watches.enter_context(lists_are_contiguous())
        # an error inside a compiled function leaves its grad mode behind
        watches.callback(torch.set_grad_enabled, torch.is_grad_enabled())
        if "eager_flex" not in request.keywords:
            watches.enter_context(eager_flex_raises())
        yield


@pytest.fixture
def machine(monkeypatch):
    """Lets a test say which GPU and whether flash-attn-4 is there."""
    from support.machines import forget_choices, pretend

    yield functools.partial(pretend, monkeypatch)
    monkeypatch.undo()
    forget_choices()


@pytest.fixture
def compile_with(monkeypatch):
    """Lets a test say what torch.compile makes of a graph. What was made of one is forgotten before and behind."""
    from flexprefill.runtime.state import forget

    compiled = "compiled attention, by kind of call"

    def say(backend):
        compile_once = torch.compile

        def compile_by(function, *, options=None, **settings):  # options are inductor's
            return compile_once(function, backend=backend, **settings)

        monkeypatch.setattr(torch, "compile", compile_by)
        forget(compiled)

    yield say
    forget(compiled)


@pytest.fixture
def flash():
    """Skips a test where FlashAttention-4 cannot be used."""
    from flexprefill.attention.backends import HOPPER

    pytest.importorskip("flash_attn.cute", reason="needs the package flash-attn-4")
    if torch.cuda.get_device_capability() != HOPPER:
        pytest.skip("needs a Hopper GPU")


@pytest.fixture
def poisoned_memory():
    """Fills fresh memory with NaN (integers: their maximum), so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)
