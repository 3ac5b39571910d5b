"""The plan of the package: rooms import the rooms above them, never round in a circle; names with _ stay inside."""

import ast
import functools
from pathlib import Path

import flexprefill

PACKAGE = Path(flexprefill.__file__).parent
# from the ground up: a room imports those before it, and of the tools on top only those before it
GROUND = ("errors", "_version", "config")
ROOMS = (
    *("runtime", "blockmap", "variant", "search", "inspection", "attention", "store"),
    *("plotting", "viewer", "integrations", "evaluation", "bench", "cli"),
)
TOP_LEVEL_FILES = 6


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def read_package():
    """Each module's syntax tree by its dotted name."""
    return {module_of(path): ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(tree, modules):
    """Pairs of an imported module and the name taken from it (None: the module itself), wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner, None) if inner in modules else (node.module, alias.name)


def edges_of(trees):
    return {name: {target for target, _ in imports_of(tree, trees)} for name, tree in trees.items()}


def find_circle(edges):
    """Modules that import each other round in a circle, in their order; None if there are none."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        path.append(module)
        circle = next(filter(None, map(visit, sorted(edges[module]))), None)
        path.pop()
        done.add(module)
        return circle

    return next(filter(None, map(visit, edges)), None)


def floor_of(module):
    """How high up a module stands; the package's own face, its names and python -m, on top of all."""
    _, *inside = module.split(".")
    if not inside or inside[0] in ("api", "__main__"):
        return len(ROOMS) + 1
    return 0 if inside[0] in GROUND else 1 + ROOMS.index(inside[0])


def against_the_order(edges):
    return [
        f"{module} imports {target}"
        for module, targets in edges.items()
        for target in sorted(targets)
        if floor_of(target) > floor_of(module)
    ]


def underscored(trees):
    """Names with an underscore that a file takes from another one, by import or through the module."""
    found = []
    for module, tree in trees.items():
        bound = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in trees:
                for alias in node.names:
                    if f"{node.module}.{alias.name}" in trees:
                        bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    elif alias.name.startswith("_") and not alias.name.startswith("__"):
                        found.append(f"{module}: {node.module}.{alias.name}")
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound):
                continue
            if node.attr.startswith("_") and not node.attr.startswith("__"):
                found.append(f"{module}: {bound[node.value.id]}.{node.attr}")
    return found


def test_no_file_imports_itself_round_in_a_circle():
    assert find_circle(edges_of(read_package())) is None


def test_rooms_import_only_rooms_above_them():
    assert against_the_order(edges_of(read_package())) == []


def test_no_file_takes_an_underscored_name_from_another():
    assert underscored(read_package()) == []


def test_few_files_lie_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= TOP_LEVEL_FILES


def test_the_checks_find_what_they_are_for():
    def trees_of(**texts):
        return {f"flexprefill.{name}": ast.parse(text) for name, text in texts.items()}

    trees = trees_of(config="from flexprefill import errors", errors="def f():\n    import flexprefill.config")
    trees["flexprefill"] = ast.parse("")
    assert find_circle(edges_of(trees)) is not None
    trees = {
        "flexprefill": ast.parse(""),
        "flexprefill.runtime.a": ast.parse(
            "from flexprefill.cli.b import _hidden\nfrom flexprefill.cli import b\nb._x"
        ),
        "flexprefill.cli": ast.parse(""),
        "flexprefill.cli.b": ast.parse(""),
    }
    assert against_the_order(edges_of(trees)) == ["flexprefill.runtime.a imports flexprefill.cli.b"]
    assert underscored(trees) == [
        "flexprefill.runtime.a: flexprefill.cli.b._hidden",
        "flexprefill.runtime.a: flexprefill.cli.b._x",
    ]


def test_no_test_imports_another_test():
    """It would run after the other one alone: pytest puts a folder on the path when it reads a file there."""
    tests = Path(__file__).parents[1]
    trees = {path: ast.parse(path.read_text("utf-8")) for path in tests.rglob("test_*.py")}
    names = {path.stem for path in trees}
    assert not [path.name for path, tree in trees.items() if any(imports_of(tree, names))]
