"""Time stepping on phase space: structure-preserving methods and their audits.

Nothing here knows geometry: a system is made of callables on states ``q, p (..., d)``.
"""

from darboux.integrators import audit, catalogue, lattice
from darboux.integrators.adaptive import logarithmic, step_controlled
from darboux.integrators.audit import check_symplectic
from darboux.integrators.base import Integrator, Trajectory
from darboux.integrators.composed import Composition, compose
from darboux.integrators.constrained import Constrained, Rattle, rods
from darboux.integrators.dissipative import contact, damped, langevin, nesterov
from darboux.integrators.driver import METHODS, find_method, integrate, methods_for
from darboux.integrators.energy_preserving import EnergyPreserving, average_vector_field
from darboux.integrators.events import Crossings, crossings, interpolate
from darboux.integrators.extended import OmegaScan, SemiExplicit, Tao, scan_omega, tao
from darboux.integrators.fixed_point import Equations, Solution, solve_fixed_point
from darboux.integrators.implicit import (
    Gauss,
    ImplicitRungeKutta,
    Stages,
    Tableau,
    gauss_legendre,
    lobatto_pair,
    solve_stages,
)
from darboux.integrators.recording import load_trajectory
from darboux.integrators.runge_kutta import ExplicitRungeKutta
from darboux.integrators.split_systems import (
    diagonal_metric,
    kepler_flow,
    magnetic,
    planetary,
    quaternion_product,
    rigid_body,
    spinning_top,
)
from darboux.integrators.splitting import Splitting
from darboux.integrators.systems import Hamiltonian, Poisson, Separable, Split, System, VectorField
from darboux.integrators.torchdiffeq_bridge import as_ode, odeint

__all__ = [
    "METHODS",
    "Composition",
    "Constrained",
    "Crossings",
    "EnergyPreserving",
    "Equations",
    "ExplicitRungeKutta",
    "Gauss",
    "Hamiltonian",
    "ImplicitRungeKutta",
    "Integrator",
    "OmegaScan",
    "Poisson",
    "Rattle",
    "SemiExplicit",
    "Separable",
    "Solution",
    "Split",
    "Splitting",
    "Stages",
    "System",
    "Tableau",
    "Tao",
    "Trajectory",
    "VectorField",
    "as_ode",
    "audit",
    "average_vector_field",
    "catalogue",
    "check_symplectic",
    "compose",
    "contact",
    "crossings",
    "damped",
    "diagonal_metric",
    "find_method",
    "gauss_legendre",
    "integrate",
    "interpolate",
    "kepler_flow",
    "langevin",
    "lattice",
    "load_trajectory",
    "lobatto_pair",
    "logarithmic",
    "magnetic",
    "methods_for",
    "nesterov",
    "odeint",
    "planetary",
    "quaternion_product",
    "rigid_body",
    "rods",
    "scan_omega",
    "solve_fixed_point",
    "solve_stages",
    "spinning_top",
    "step_controlled",
    "tao",
]
