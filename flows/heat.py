r"""The heat flow of a function, :math:`\dot u = -A u` with :math:`A = M^{-1}K \ge 0`.

On whatever has a Laplacian in :mod:`darboux.manifolds.spectral`: meshes, charts, graphs, points.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from darboux import _checks
from darboux.flows import _metric_march
from darboux.manifolds.mesh import Mesh
from darboux.manifolds.spectral import stiffness_mass
from darboux.manifolds.spectral.exponential import add
from darboux.manifolds.spectral.kernels import diffuse
from darboux.manifolds.spectral.operator import Operator, Sparse
from darboux.manifolds.spectral.solve import solver

_IMPLICIT = {"euler": 1.0, "crank-nicolson": 0.5}


class HeatRun(NamedTuple):
    """A heat flow, saved states time first."""

    t: Tensor  # (time,)
    u: Tensor  # (time, n) or (time, n, m)


def heat_flow(
    domain: Mesh | Operator,
    u: Tensor,
    *,
    dt: float,
    steps: int,
    method: str = "exact",
    save_every: int = 1,
) -> HeatRun:
    r"""Flow the functions ``u (n,)`` or ``(n, m)`` on a mesh or any sparse operator by the heat.

    ``method`` is ``"exact"``, :math:`e^{-tA}u` at every saved time by
    :func:`darboux.manifolds.spectral.diffuse`; ``"euler"``, implicit steps of first order that
    damp what is high; or ``"crank-nicolson"``, of second order. The last two factor one matrix for
    all steps. Any ``dt`` is stable, :math:`\int u` is kept, :func:`dirichlet_energy` falls.
    Differentiable in u and the operator by ``torch.autograd``. Crank and Nicolson (1947).

    >>> from darboux.manifolds.mesh import icosphere
    >>> mesh = icosphere(3)
    >>> run = heat_flow(mesh, mesh.vertices[:, 2], dt=0.25, steps=2)
    >>> decay = run.u[-1].norm() / run.u[0].norm()
    >>> abs(float(decay) - 0.3679) < 0.003
    True
    """
    where = "heat_flow"
    operator = _operator(where, domain)
    _metric_march.check_run(where, dt, steps, save_every)
    _checks.check_tensor(where, "u", u)
    n = operator.size
    if u.dim() not in (1, 2) or u.shape[0] != n:
        raise ValueError(f"{where}: u has shape {tuple(u.shape)}, expected ({n},) or ({n}, m)")
    if u.dtype != operator.mass.dtype:
        raise TypeError(f"{where}: u has dtype {u.dtype}, expected {operator.mass.dtype}")
    _checks.check_finite(where, u=u)
    if method == "exact":
        counts = [*range(0, steps, save_every), steps]
        t = dt * torch.tensor(counts, dtype=u.dtype, device=u.device)
        return HeatRun(t, torch.cat([u[None], diffuse(operator, u, t[1:])]))
    if method not in _IMPLICIT:
        raise ValueError(
            f"{where}: method is {method!r}, expected 'exact', 'euler' or 'crank-nicolson'"
        )
    stiffness, mass = operator.stiffness, operator.mass
    if not (isinstance(stiffness, Sparse) and isinstance(mass, Sparse)):
        raise TypeError(f"{where}: the operator is dense; method {method!r} needs a sparse one")
    share = _IMPLICIT[method]
    solve = solver(add(mass, stiffness, share * dt), where)

    def step(v: Tensor) -> Tensor:
        right = mass @ v
        if share < 1:
            right = right - (1 - share) * dt * (stiffness @ v)
        return solve(right)

    t, saved, _ = _metric_march.march(step, u, dt, steps, save_every, lambda v: None)
    return HeatRun(t, saved)


def dirichlet_energy(domain: Mesh | Operator, u: Tensor) -> Tensor:
    r"""Return :math:`\frac12\int|\nabla u|^2` ``()`` or ``(m,)`` of ``u (n,)`` or ``(n, m)``."""
    operator = _operator("dirichlet_energy", domain)
    return (u * (operator.stiffness @ u)).sum(0) / 2


def _operator(where: str, domain: Mesh | Operator) -> Operator:
    if isinstance(domain, Mesh):
        return stiffness_mass(domain)
    if not isinstance(domain, Operator):
        raise TypeError(
            f"{where}: domain is a {type(domain).__name__}, expected a Mesh or an Operator"
        )
    return domain
