"""The systems that integrators are tested on, and independent solutions of them."""

import math

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from darboux.integrators import METHODS, Hamiltonian, Separable, Splitting, catalogue
from darboux.integrators.driver import applies

F64 = torch.float64


def rocking(q: Tensor) -> Tensor:
    """Return a potential without symmetry in two dimensions."""
    return 0.3 * torch.sin(q[..., 0] - 2 * q[..., 1]) - torch.cos(q).sum(-1) + q[..., 0] ** 4 / 9


def rocking_force(q: Tensor) -> Tensor:
    """Return minus the gradient of :func:`rocking`."""
    shear = 0.3 * torch.cos(q[..., 0] - 2 * q[..., 1])
    first = shear + torch.sin(q[..., 0]) + q[..., 0] ** 3 * 4 / 9
    return -torch.stack([first, torch.sin(q[..., 1]) - 2 * shear], -1)


def relativistic(p: Tensor) -> Tensor:
    """Return a kinetic energy without symmetry that is not quadratic."""
    return (1 + p.square().sum(-1)).sqrt() + 0.2 * torch.sin(p[..., 0] + p[..., 1])


def relativistic_velocity(p: Tensor) -> Tensor:
    """Return the gradient of :func:`relativistic`."""
    slant = 0.2 * torch.cos(p[..., 0] + p[..., 1])
    return p / (1 + p.square().sum(-1, keepdim=True)).sqrt() + slant[..., None]


def coupled(q: Tensor, p: Tensor) -> Tensor:
    """Return an energy that does not separate."""
    kinetic = (1 + q.square().sum(-1)) * p.square().sum(-1) / 2
    return kinetic + q[..., 0] * p[..., 1] - torch.cos(q).sum(-1)


def coupled_field(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Return Hamilton's equations of :func:`coupled`."""
    zero = torch.zeros_like(q[..., 0])
    velocity = (1 + q.square().sum(-1, keepdim=True)) * p + torch.stack([zero, q[..., 0]], -1)
    shear = torch.stack([p[..., 1], zero], -1)
    return velocity, -(q * p.square().sum(-1, keepdim=True) + shear + torch.sin(q))


QUADRATIC = Separable(rocking, force=rocking_force, mass=torch.tensor([1.0, 1.5], dtype=F64))
GENERAL = Separable(rocking, relativistic, force=rocking_force, velocity=relativistic_velocity)
COUPLED = Hamiltonian(coupled, coupled_field)


LEAST_SPECIAL_FIRST = (COUPLED, GENERAL, QUADRATIC)
# Methods for systems of other kinds are tested with these.
GENERIC = [m for m in METHODS.values() if any(applies(m, s) for s in LEAST_SPECIAL_FIRST)]
SPLITTINGS = [m for m in METHODS.values() if isinstance(m, Splitting)]
SYMPLECTIC = [m for m in GENERIC if m.symplectic]
SYMMETRIC = [m for m in GENERIC if m.symmetric]


def hardest(method) -> Separable | Hamiltonian:
    """Return the least special of the systems that ``method`` moves."""
    return next(system for system in LEAST_SPECIAL_FIRST if applies(method, system))


def start(*batch: int, dtype=F64) -> tuple[Tensor, Tensor]:
    """Return generic initial states of shape ``(*batch, 2)``."""
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(*batch, 2, generator=generator, dtype=F64) * 0.5
    p = torch.randn(*batch, 2, generator=generator, dtype=F64) * 0.5
    return q.to(dtype), p.to(dtype)


def solve(system, q: Tensor, p: Tensor, t: float) -> Tensor:
    """Return ``z (..., 2 d)`` at time ``t`` by scipy's DOP853, to about 1e-13."""

    def field(_, z):
        a, b = torch.from_numpy(z).reshape(2, *q.shape)
        return np.concatenate([x.numpy().ravel() for x in system.field(a, b)])

    z = torch.stack([q, p]).numpy().ravel()
    run = solve_ivp(field, (0, t), z, "DOP853", rtol=3e-14, atol=1e-15)
    return torch.cat(tuple(torch.from_numpy(run.y[:, -1]).reshape(2, *q.shape)), -1)


OSCILLATOR = Separable(lambda q: q.square().sum(-1) / 2, force=torch.neg)


def _kepler_potential(q: Tensor) -> Tensor:
    return -q.square().sum(-1).rsqrt()


def _kepler_force(q: Tensor) -> Tensor:
    return -q * q.square().sum(-1, keepdim=True) ** -1.5


KEPLER = Separable(_kepler_potential, force=_kepler_force)


HENON_HEILES = catalogue.henon_heiles()
PENDULUM = catalogue.pendulum()


def perihelion(eccentricity: float) -> tuple[Tensor, Tensor]:
    """Return the Kepler orbit of semi-major axis 1 (period 2 pi) at perihelion."""
    e = eccentricity
    q = torch.tensor([1 - e, 0.0], dtype=F64)
    return q, torch.tensor([0.0, math.sqrt((1 + e) / (1 - e))], dtype=F64)


# Hairer, Lubich & Wanner (2006), table I.2.2: astronomical units, days, solar masses.
_GRAVITY = 2.95912208286e-4
_MASSES = [
    1.00000597682,
    0.000954786104043,
    0.000285583733151,
    0.0000437273164546,
    0.0000517759138449,
    1 / 1.3e8,
]
_POSITIONS = [
    [0, 0, 0],
    [-3.5023653, -3.8169847, -1.5507963],
    [9.0755314, -3.0458353, -1.6483708],
    [8.3101420, -16.2901086, -7.2521278],
    [11.4707666, -25.7294829, -10.8169456],
    [-15.5387357, -25.2225594, -3.1902382],
]
_VELOCITIES = [
    [0, 0, 0],
    [0.00565429, -0.00412490, -0.00190589],
    [0.00168318, 0.00483525, 0.00192462],
    [0.00354178, 0.00137102, 0.00055029],
    [0.00288930, 0.00114527, 0.00039677],
    [0.00276725, -0.00170702, -0.00136504],
]


def solar_system() -> tuple[Separable, Tensor, Tensor]:
    """Return the sun and the outer planets, ``q, p (6, 3)``."""
    m = torch.tensor(_MASSES, dtype=F64)[:, None]
    i, j = torch.triu_indices(6, 6, 1)
    weight = _GRAVITY * (m[i] * m[j])[:, 0]

    def potential(q: Tensor) -> Tensor:
        return -(weight / (q[..., i, :] - q[..., j, :]).norm(dim=-1)).sum(-1)

    def force(q: Tensor) -> Tensor:
        gap = q[..., None, :, :] - q[..., :, None, :]
        cube = gap.square().sum(-1, keepdim=True) + torch.eye(6, dtype=q.dtype)[..., None]
        return _GRAVITY * m * (m * gap * cube**-1.5).sum(-2)

    q = torch.tensor(_POSITIONS, dtype=F64)
    return Separable(potential, force=force, mass=m), q, m * torch.tensor(_VELOCITIES, dtype=F64)
