"""The layout holds: one-way imports, every folder linked and packaged."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("integrators", "manifolds", "flows", "learners")  # lowest first


def imported_layers(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (n.split(".")[1] for n in names if n.startswith("darboux."))


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_imports_only_lower_layers(layer):
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    for path in (ROOT / layer).rglob("*.py"):
        assert not above & set(imported_layers(path)), path


def test_every_package_is_linked_and_built():
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"darboux"}
    for layer in LAYERS:
        link = ROOT / "src" / "darboux" / layer
        assert link.resolve() == ROOT / layer or link.is_file()  # a clone without symbolic links
        assert built["package-dir"][f"darboux.{layer}"] == layer
        for init in (ROOT / layer).rglob("__init__.py"):
            found.add(".".join(("darboux", *init.parent.relative_to(ROOT).parts)))
    assert set(built["packages"]) == found


def test_importing_darboux_does_not_import_what_draws():
    code = "import sys, darboux; sys.exit('pyvista' in sys.modules or 'vtk' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code]).returncode == 0
