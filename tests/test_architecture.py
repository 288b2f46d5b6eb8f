"""The structure that docs/architecture.md states: rooms, sizes of functions, names of parameters, docstrings."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "moe_reduce"
# A room may import the rooms before it.
ROOMS = (
    "core", "data", "models", "families", "storage", "training", "reduction", "quantization", "adapters", "inference",
    "planning", "reports", "runs", "commands",
)  # fmt: skip
MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 400, 50, 6
FRAGMENTS = {"Of", "What", "As", "In which", "Where", "Whether"}
PARAMETER_PATH = re.compile(r"^(layers|embedding|unembedding|experts|router|final_norm)/")


def modules() -> dict[Path, ast.Module]:
    """Every module of the package, parsed, by its path inside the package."""
    return {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


MODULES = modules()


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def imported_rooms(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == PACKAGE.name:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE.name}."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith(f"{PACKAGE.name}.")}
    return found & set(ROOMS)


def test_every_directory_is_a_room():
    assert {path.parts[0] for path in MODULES if len(path.parts) > 1} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_before_it(room):
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    wrong = {
        str(path): sorted(imported_rooms(tree) - allowed)
        for path, tree in MODULES.items()
        if path.parts[0] == room and imported_rooms(tree) - allowed
    }
    assert not wrong


def test_modules_and_functions_are_short():
    long = []
    for path, tree in MODULES.items():
        lines = len((PACKAGE / path).read_text().splitlines())
        long += [f"{path}: {lines} lines"] if lines > MOST_LINES else []
        for function in functions(tree):
            lines = (function.end_lineno or 0) - function.lineno + 1
            long += [f"{path}: {function.name} has {lines} lines"] if lines > MOST_FUNCTION_LINES else []
    assert not long


def test_signatures_are_short():
    long = []
    for path, tree in MODULES.items():
        for function in functions(tree):
            given = function.args
            names = {argument.arg for argument in given.posonlyargs + given.args + given.kwonlyargs} - {"self", "cls"}
            long += [f"{path}: {function.name} takes {len(names)}"] if len(names) > MOST_PARAMETERS else []
    assert not long


def test_docstrings_begin_with_a_noun_or_a_verb():
    fragments = []
    for path, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                words = (ast.get_docstring(node) or "").split()
                fragments += [f"{path}: {' '.join(words[:6])}"] if {*words[:1], " ".join(words[:2])} & FRAGMENTS else []
    assert not fragments


def test_parameters_are_named_only_where_they_are_defined():
    """Paths of parameters stand in models/ and, as tensor names, in families/; elsewhere records are asked."""
    named = [
        f"{path}:{node.lineno} {node.value}"
        for path, tree in MODULES.items()
        if path.parts[0] not in ("models", "families")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and PARAMETER_PATH.match(node.value)
    ]
    assert not named
