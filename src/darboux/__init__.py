"""Differentiable geometry simulation on PyTorch.

Bring a metric (a formula, an embedding, a neural network) and get curvature, geodesics,
``exp``, ``log``, distance and parallel transport, batched and differentiable, and symplectic
simulation with an audit of what it conserves, and Laplace-Beltrami spectra with gradients.
"""

from typing import TYPE_CHECKING

from darboux import flows, integrators, manifolds, plotting
from darboux._checks import ConvergenceError, GeometryError, unchecked
from darboux.flows import geodesic_flow
from darboux.integrators import Hamiltonian, Separable, Trajectory, integrate
from darboux.manifolds import (
    Chart,
    Conformal,
    Euclidean,
    FlatTorus,
    Hyperbolic,
    Manifold,
    Product,
    Pullback,
    Sphere,
    TorusOfRevolution,
)
from darboux.manifolds.mesh import Mesh
from darboux.manifolds.spectral import eigenpairs, laplacian, perturb

if TYPE_CHECKING:
    from darboux import learners

__version__ = "0.1.0"

__all__ = [
    "Chart",
    "Conformal",
    "ConvergenceError",
    "Euclidean",
    "FlatTorus",
    "GeometryError",
    "Hamiltonian",
    "Hyperbolic",
    "Manifold",
    "Mesh",
    "Product",
    "Pullback",
    "Separable",
    "Sphere",
    "TorusOfRevolution",
    "Trajectory",
    "__version__",
    "eigenpairs",
    "flows",
    "geodesic_flow",
    "integrate",
    "integrators",
    "laplacian",
    "learners",
    "manifolds",
    "perturb",
    "plotting",
    "unchecked",
]


def __getattr__(name: str) -> object:
    # sequence models are a fifth of the time to import, and most scripts have none
    if name == "learners":
        import importlib

        return importlib.import_module("darboux.learners")
    raise AttributeError(f"module 'darboux' has no attribute {name!r}")
