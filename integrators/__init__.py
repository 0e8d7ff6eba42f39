"""Time stepping on phase space: structure-preserving methods and their audits.

Nothing here knows geometry: a system is made of callables on states ``q, p (..., d)``.
"""

from darboux.integrators import audit
from darboux.integrators.audit import check_symplectic
from darboux.integrators.base import Integrator, Trajectory
from darboux.integrators.driver import METHODS, find_method, integrate, methods_for
from darboux.integrators.implicit import Gauss, Stages, Tableau, gauss_legendre, solve_stages
from darboux.integrators.runge_kutta import ExplicitRungeKutta
from darboux.integrators.splitting import Splitting
from darboux.integrators.systems import Hamiltonian, Separable, Split, System, VectorField
from darboux.integrators.torchdiffeq_bridge import as_ode, odeint

__all__ = [
    "METHODS",
    "ExplicitRungeKutta",
    "Gauss",
    "Hamiltonian",
    "Integrator",
    "Separable",
    "Split",
    "Splitting",
    "Stages",
    "System",
    "Tableau",
    "Trajectory",
    "VectorField",
    "as_ode",
    "audit",
    "check_symplectic",
    "find_method",
    "gauss_legendre",
    "integrate",
    "methods_for",
    "odeint",
    "solve_stages",
]
