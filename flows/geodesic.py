r"""The Hamiltonian flow of a point on a manifold: geodesics, potentials, magnetic fields.

.. math:: H(x, p) = \tfrac12 g^{ij}(x)\,(p_i - A_i(x))(p_j - A_j(x)) + V(x)

on the cotangent bundle with its canonical symplectic form. The magnetic field enters through
its potential one-form ``A`` (minimal coupling), so that the flow stays canonical and every
integrator for Hamiltonian systems applies to it unchanged.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from darboux import _autodiff, _checks
from darboux.integrators import Hamiltonian, Integrator, Trajectory, integrate
from darboux.manifolds import Chart, Product

Potential = Callable[[Tensor], Tensor]  # (..., d) -> (...)
OneForm = Callable[[Tensor], Tensor]  # (..., d) -> (..., d)


def geodesic_hamiltonian(
    manifold: Chart | Product,
    *,
    potential: Potential | None = None,
    magnetic: OneForm | None = None,
) -> Hamiltonian:
    r"""Return the motion on ``manifold`` as a system for any integrator.

    ``potential(x) (...)`` adds the force :math:`-dV`. ``magnetic(x) (..., d)`` is the one-form
    ``A`` whose field is :math:`B = dA`; momenta are then canonical, :math:`p = g\dot x + A`.
    """
    free = manifold.geodesic_system()
    if potential is None and magnetic is None:
        return free

    def energy(x: Tensor, p: Tensor) -> Tensor:
        kinetic = free.energy(x, p if magnetic is None else p - magnetic(x))
        return kinetic if potential is None else kinetic + potential(x)

    def field(x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        if magnetic is None:
            velocity, force = free.field(x, p)
        else:
            velocity, force = free.field(x, p - magnetic(x))
            # dH/dx gains -v_i dA_i/dx, with v held
            force = force + _autodiff.pullback(magnetic, x, lambda _: velocity)[1]
        if potential is not None:
            force = force - _autodiff.gradient(potential, x)
        return velocity, force

    return Hamiltonian(energy, field=field)


def geodesic_flow(
    manifold: Chart | Product,
    x: Tensor,
    v: Tensor,
    *,
    dt: float,
    steps: int,
    method: str | Integrator = "gauss4",
    potential: Potential | None = None,
    magnetic: OneForm | None = None,
    save_every: int = 1,
    progress: bool = False,
) -> Trajectory:
    r"""Move from ``x (..., d)`` with velocity ``v`` and return the trajectory on T*M.

    Without ``potential`` and ``magnetic`` this is the geodesic flow. The result holds canonical
    momenta, ``p = g v`` plus the one-form ``magnetic(x)``, time first.

    >>> import darboux
    >>> M = darboux.TorusOfRevolution(R=2.0, r=1.0)
    >>> x, v = torch.tensor([0.3, 0.0]), torch.tensor([0.5, 0.4])
    >>> geodesic_flow(M, x, v, dt=0.1, steps=10).q.shape
    torch.Size([11, 2])
    """
    where = "geodesic_flow"
    if not isinstance(manifold, Chart | Product):
        raise TypeError(
            f"{where}: manifold is a {type(manifold).__name__}, expected a Chart or a Product of "
            "charts: the flow lives in the coordinates of one chart"
        )
    p = manifold.flat(x, v)  # checks both
    x = x.expand_as(p)
    for name, f, shape in (("potential", potential, x.shape[:-1]), ("magnetic", magnetic, x.shape)):
        if f is None:
            continue
        with torch.no_grad():
            found = f(x).shape
        if found != shape:
            raise ValueError(
                f"{where}: {name} maps x of shape {tuple(x.shape)} to shape {tuple(found)}, "
                f"expected {tuple(shape)}"
            )
    if magnetic is not None:
        p = p + magnetic(x)
    _checks.check_finite(where, p=p)
    system = geodesic_hamiltonian(manifold, potential=potential, magnetic=magnetic)
    return integrate(
        system, x, p, dt=dt, steps=steps, method=method, save_every=save_every, progress=progress
    )
