"""What the process remembers is in one list, bounded, and can be forgotten."""

import ast
from pathlib import Path

import pytest
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


def test_what_depends_on_a_key_is_kept_up_to_a_number_and_forgotten(monkeypatch):
    monkeypatch.setattr(state, "_forgetting", {})
    roots, made = state.Remembered("roots", most=2), []

    def root(number):
        def make():
            made.append(number)
            return [number**0.5]

        return roots.get(number, make)

    first = root(4)
    assert root(4) is first and made == [4]
    root(9), root(16)
    assert len(roots._held) == 2 and root(16) == [4.0] and made == [4, 9, 16]
    assert root(4) == [2.0] and made[-1] == 4, "the oldest went"
    forget("roots")
    assert root(16) == [4.0] and made[-1] == 16


def test_what_cannot_be_made_is_tried_again(monkeypatch):
    monkeypatch.setattr(state, "_forgetting", {})
    kept, tries = state.Remembered("things", most=2), []

    def fails():
        tries.append(1)
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            kept.get(1, fails)
    assert len(tries) == 2 and kept.get(1, lambda: "made") == "made"
