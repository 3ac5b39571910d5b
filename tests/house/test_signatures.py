"""Functions take few parameters, and no list of their own arguments is unpacked into a call."""

import ast
import functools
from pathlib import Path

import flexprefill

PACKAGE = Path(flexprefill.__file__).parent
MOST = 8
# the public calls that are a whole computation, or name a whole file's contents
MORE = {"prefill_attention": 14, "explain_backend": 12, "create_prefill_block_mask": 10, "save_masks": 9}


@functools.cache
def functions():
    """(file, function) of each function of the package that is no kernel and no operator's border."""
    return [
        (path.relative_to(PACKAGE), node)
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_border(node)
    ]


def is_border(function):
    decorators = " ".join(map(ast.unparse, function.decorator_list))
    return any(mark in decorators for mark in ("triton.jit", "gluon.jit", "operator(", "register_fake"))


def parameters_of(function):
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def test_functions_take_few_parameters():
    too_many = [
        f"{path}: {function.name} takes {len(parameters_of(function))}"
        for path, function in functions()
        if len(parameters_of(function)) > MORE.get(function.name, MOST)
    ]
    assert too_many == []


def starred_lists(call):
    """The lists and tuples written out inside a call only to be unpacked: f(*(a, b), *[c])."""
    return [
        argument
        for argument in call.args
        if isinstance(argument, ast.Starred) and isinstance(argument.value, (ast.Tuple, ast.List))
    ]


def is_launch(call):
    """Whether it launches a kernel: kernel[grid](...)."""
    return isinstance(call.func, ast.Subscript)


def test_no_call_unpacks_a_list_of_its_arguments():
    found = [
        f"{path}:{node.lineno}"
        for path, function in functions()
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and starred_lists(node) and not is_launch(node)
    ]
    assert found == []


def test_the_checks_find_what_they_are_for():
    code = "def f(a, b, c, d, e, g, h, i, *, j):\n    return g(*(a, b))\n\n@triton.jit\ndef k(a, b, c):\n    pass"
    function, kernel = ast.parse(code).body
    assert len(parameters_of(function)) == MOST + 1 and is_border(kernel)
    (call,) = (node for node in ast.walk(function) if isinstance(node, ast.Call))
    assert starred_lists(call)
