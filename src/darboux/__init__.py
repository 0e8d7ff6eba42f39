"""Differentiable geometry simulation on PyTorch.

Bring a metric (a formula, an embedding, a neural network) and get curvature, geodesics,
``exp``, ``log``, distance and parallel transport, batched and differentiable, and symplectic
simulation with an audit of what it conserves.
"""

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
    "Product",
    "Pullback",
    "Separable",
    "Sphere",
    "TorusOfRevolution",
    "Trajectory",
    "__version__",
    "flows",
    "geodesic_flow",
    "integrate",
    "integrators",
    "manifolds",
    "plotting",
    "unchecked",
]
