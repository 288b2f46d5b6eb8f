"""Notebooks run from beginning to end as in a user's Jupyter, each in its own directory, and are kept with outputs."""

import ast
import os
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MINUTES = ("1_shared_pool", "2_reduce_a_mixture", "3_skema_and_lora")  # these train for minutes
OF_TESTS = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")  # of tests/conftest.py: eight devices, slow code


@pytest.mark.parametrize(
    "file", [pytest.param(file, id=file.stem, marks=[pytest.mark.slow] * (file.stem in MINUTES)) for file in NOTEBOOKS]
)
def test_notebook_runs_and_ends_in_a_picture(file, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")  # by which a notebook finds the project's root
    notebook = nbformat.read(file, as_version=4)
    environment = {name: value for name, value in os.environ.items() if name not in OF_TESTS}
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, resources=place).execute(env=environment | {"PYTHONPATH": str(ROOT)})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert "image/png" in [*outputs[-1].get("data", {}), *outputs[-2].get("data", {})]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_names_that_a_notebook_uses_exist(file):
    """Names of the package alone: whether they still do what the notebook needs, the slow test shows."""
    cells = [cell.source for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    nodes = [node for source in cells for node in ast.walk(ast.parse(source))]
    names = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("moe_reduce"):
            exec(ast.unparse(node), names)
    used = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    modules = [(names[node.value.id], node.attr) for node in used if isinstance(names.get(node.value.id), ModuleType)]
    assert modules
    assert not [(module.__name__, name) for module, name in modules if not hasattr(module, name)]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_defines_nothing_and_is_kept_with_small_outputs(file):
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        nodes = ast.walk(ast.parse(cell.source))
        assert not [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert "error" not in [output.output_type for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs) >= 2
    assert file.stat().st_size < 500_000
