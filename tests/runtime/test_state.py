"""What the process remembers is in one list, bounded, and can be forgotten."""

import ast
from pathlib import Path

import torch

import flexprefill
from flexprefill.runtime import state
from flexprefill.runtime.devices import multiprocessors
from flexprefill.runtime.state import forget, remembered

PACKAGE = Path(flexprefill.__file__).parent


def test_results_are_kept_up_to_a_number_and_forgotten_by_name(monkeypatch):
    monkeypatch.setattr(state, "_forgetting", {})
    calls = []

    @remembered("squares", most=2)
    def square(number):
        calls.append(number)
        return number**2

    assert list(state._forgetting) == ["squares"]
    assert [square(n) for n in (1, 1, 2, 3, 1)] == [1, 1, 4, 9, 1] and calls == [1, 2, 3, 1]
    forget("squares")
    assert square(1) == 1 and calls[-1] == 1 and len(calls) == 5
    forget()
    assert square(1) == 1 and len(calls) == 6


def test_nothing_else_in_the_library_remembers():
    """functools' caches, and containers or locks of a module that functions write into."""
    known = {
        ("runtime/state.py", "_forgetting"),
        ("runtime/state.py", "_registries"),
        ("runtime/listeners.py", "_listening"),  # emptied by the end of record_masks
        ("runtime/pytrees.py", "_nodes"),  # the library's own classes
        ("integrations/transformers.py", "_registered"),  # register and unregister
    }
    found = set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                for decorator in map(ast.unparse, node.decorator_list):
                    assert not decorator.startswith(("functools.cache", "functools.lru_cache", "cache(")), (
                        name,
                        node.name,
                    )
        for node in tree.body:
            target = (
                node.target
                if isinstance(node, ast.AnnAssign)
                else node.targets[0]
                if isinstance(node, ast.Assign)
                else None
            )
            if (
                isinstance(target, ast.Name)
                and target.id.startswith("_")
                and target.id != "__all__"
                and isinstance(node.value, (ast.Dict, ast.List, ast.Set, ast.Call))
            ):
                text = ast.unparse(node.value)
                if isinstance(node.value, ast.Call) and not text.startswith(
                    ("set(", "dict(", "list(", "WeakKey", "OrderedDict")
                ):
                    continue
                found.add((name, target.id))
    assert found <= known, found - known


def test_each_cache_of_the_library_is_bounded():
    multiprocessors(torch.device("cpu"))
    assert multiprocessors.cache_info().maxsize == 64
    assert "compiled attention, by kind of call" in state._forgetting
