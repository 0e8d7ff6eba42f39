"""Sphinx configuration; from the repository root: ``sphinx-build -W -b html docs docs/_build``."""

import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

import darboux
from darboux import flows, integrators, learners, manifolds
from darboux.integrators import (
    METHODS,
    Constrained,
    Hamiltonian,
    Separable,
    VectorField,
)
from darboux.integrators.driver import applies

project = "darboux"
author = "The darboux developers"
copyright = "The darboux developers"
version = release = darboux.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "examples_header.rst"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

# The public names of a module are those in its __all__, in the order of the source.
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

# sphinx-gallery wants the header of its page beside the examples; a copy of both is given to it.
# Nothing is run here: the tests run the examples.
HERE = Path(__file__).parent
EXAMPLES = HERE / "_build" / "examples"
shutil.rmtree(EXAMPLES, ignore_errors=True)
EXAMPLES.mkdir(parents=True)
for script in (HERE.parent / "examples").glob("*.py"):
    shutil.copy(script, EXAMPLES)
shutil.copy(HERE / "examples_header.rst", EXAMPLES / "GALLERY_HEADER.rst")
sphinx_gallery_conf = {
    "examples_dirs": str(EXAMPLES),
    "gallery_dirs": "gallery",
    "plot_gallery": False,
    "download_all_examples": False,
    "show_memory": False,
    "write_computation_times": False,
}

html_theme = "furo"
html_title = f"darboux {release}"
html_copy_source = False
html_show_sphinx = False


# From what asks least of a system to what asks most: the first that a method moves names its row.
KINDS = {
    "any": VectorField(lambda z: z),
    "Hamiltonian": Hamiltonian(lambda q, p: q[..., 0] * p[..., 0]),
    "separable": Separable(lambda q: q[..., 0], lambda p: p[..., 0]),
    "separable, quadratic": Separable(lambda q: q[..., 0]),
    "constrained": Constrained(Separable(lambda q: q[..., 0]), lambda q: q[..., :1]),
}


class MethodsTable(SphinxDirective):
    """The table of integrators, read from the package so that it cannot go stale."""

    def run(self) -> list[nodes.Node]:
        lines = ["| name | order | symplectic | symmetric | moves | source |", "|---" * 6 + "|"]
        for method in METHODS.values():
            moves = next(kind for kind, system in KINDS.items() if applies(method, system))
            marks = ("yes" if x else "" for x in (method.symplectic, method.symmetric))
            row = (f"`{method.name}`", str(method.order), *marks, moves, method.source)
            lines.append("| " + " | ".join(row) + " |")
        return self.parse_text_to_nodes("\n".join(lines))


def warn_of_undocumented(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of every public name that the reference leaves out."""
    domain = env.domains.python_domain
    found = {*domain.objects, *domain.modules}
    for package in (manifolds, manifolds.spectral, manifolds.mesh, integrators, flows, learners):
        for name in package.__all__:
            full = f"{package.__name__}.{name}"
            if full not in found:
                logging.getLogger(__name__).warning("docs/api does not document %s", full)


def skip_fields(
    app: Sphinx, kind: str, name: str, item: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out fields of named tuples, of which Python says no more than their number."""
    return True if (getattr(item, "__doc__", "") or "").startswith("Alias for field") else None


def setup(app: Sphinx) -> None:
    """Register what this file defines."""
    app.add_directive("methods-table", MethodsTable)
    app.connect("env-check-consistency", warn_of_undocumented)
    app.connect("autodoc-skip-member", skip_fields)
