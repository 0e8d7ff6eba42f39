r"""Energies that everybody uses, in closed form.

Each function returns a :class:`Separable` whose force was derived by hand, so that no reverse pass
is needed. Parameters are numbers or tensors, and get their gradients. All of them compile to one
fused kernel (``integrate(..., compile=True)``); that of :func:`gravity` is written by hand.

To add one, write a function that returns ``Separable(potential, force=force)`` and a line in
``tests/test_integrators_engine.py``: force against potential and kernel against eager run follow.
"""

import torch
from torch import Tensor

from darboux.integrators._kernels import Native, gravity_kernel
from darboux.integrators.systems import Separable

Number = float | Tensor


class _Fused(Separable):
    # With a kernel written by hand, for the engine.
    native: Native


def oscillator(omega: Number = 1.0) -> Separable:
    r"""Return independent harmonic oscillators, one for each component of ``q (..., d)``.

    .. math:: V(q) = \tfrac12 \sum_i \omega_i^2 q_i^2

    ``omega`` is a number or has shape ``(d,)``. Hairer, Lubich & Wanner (2006), I.5.1.

    >>> oscillator(2.0).force(torch.ones(1))
    tensor([-4.])
    """
    return Separable(
        lambda q: ((omega * q) ** 2).sum(-1) / 2,
        force=lambda q: -omega * omega * q,
    )


def quadratic(matrix: Tensor, mass: Number = 1.0) -> Separable:
    r"""Return the motion in a quadratic potential, such as small oscillations.

    .. math:: V(q) = \tfrac12 q^T A q

    Only the symmetric part of ``matrix (d, d)`` counts. Arnold, Mathematical Methods (1989), §23.

    >>> quadratic(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).force(torch.tensor([1.0, 0.0]))
    tensor([-2., -1.])
    """
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"quadratic: matrix has shape {tuple(matrix.shape)}, expected (d, d)")
    return Separable(
        lambda q: (q * (q @ matrix)).sum(-1) / 2,
        force=lambda q: -(q @ ((matrix + matrix.mT) / 2)),
        mass=mass,
    )


def oscillator_chain(
    stiffness: Number = 1.0, alpha: Number = 0.0, beta: Number = 0.0, mass: Number = 1.0
) -> Separable:
    r"""Return a chain of particles on springs between two walls (Fermi-Pasta-Ulam-Tsingou).

    .. math:: V(q) = \sum_{i=0}^{d} \tfrac{k}{2} r_i^2 + \tfrac{\alpha}{3} r_i^3
              + \tfrac{\beta}{4} r_i^4, \qquad r_i = q_{i+1} - q_i, \quad q_0 = q_{d+1} = 0

    Harmonic for ``alpha = beta = 0``. Fermi, Pasta & Ulam, Los Alamos report LA-1940 (1955).

    >>> oscillator_chain().force(torch.tensor([1.0, 0.0]))
    tensor([-2.,  1.])
    """

    def stretch(q: Tensor) -> Tensor:
        wall = torch.zeros_like(q[..., :1])
        return torch.cat([q, wall], -1) - torch.cat([wall, q], -1)

    def potential(q: Tensor) -> Tensor:
        r = stretch(q)
        return (r * r * (stiffness / 2 + r * (alpha / 3 + r * beta / 4))).sum(-1)

    def force(q: Tensor) -> Tensor:
        r = stretch(q)
        tension = r * (stiffness + r * (alpha + r * beta))
        return tension[..., 1:] - tension[..., :-1]

    return Separable(potential, force=force, mass=mass)


def kepler(mu: Number = 1.0) -> Separable:
    r"""Return the motion about a fixed centre, in any dimension.

    .. math:: V(q) = -\mu / |q|

    Hairer, Lubich & Wanner (2006), I.2.1.

    >>> kepler().force(torch.tensor([2.0, 0.0]))
    tensor([-0.2500, -0.0000])
    """
    return Separable(
        lambda q: -mu * q.square().sum(-1).rsqrt(),
        force=lambda q: -mu * q.square().sum(-1, keepdim=True) ** -1.5 * q,
    )


def gravity(masses: Tensor, constant: Number = 1.0, softening: Number = 0.0) -> Separable:
    r"""Return the Newtonian ``n``-body problem on states ``q, p (..., n, 3)``.

    .. math:: V(q) = -\sum_{i<j} \frac{G m_i m_j}{\sqrt{|q_i - q_j|^2 + \varepsilon^2}},
              \qquad T(p) = \sum_i \frac{|p_i|^2}{2 m_i}

    ``p`` holds momenta, ``masses (n,)`` times velocities. Softening as in Aarseth, MNRAS 126
    (1963) 223. Raises ``ValueError`` unless ``masses`` is a vector.

    >>> q = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    >>> gravity(torch.tensor([1.0, 4.0])).force(q)[0]
    tensor([1., 0., 0.])
    """
    if masses.dim() != 1:
        raise ValueError(f"gravity: masses has shape {tuple(masses.shape)}, expected (n,)")
    n = masses.numel()
    i, j = torch.triu_indices(n, n, 1, device=masses.device)
    itself = torch.eye(n, dtype=masses.dtype, device=masses.device)

    def potential(q: Tensor) -> Tensor:
        r2 = (q[..., i, :] - q[..., j, :]).square().sum(-1) + softening * softening
        return -constant * (masses[i] * masses[j] * r2.rsqrt()).sum(-1)

    def force(q: Tensor) -> Tensor:
        gap = q[..., None, :, :] - q[..., :, None, :]  # (..., i, j, 3)
        # A body is at distance zero from itself: the one keeps that term finite, and it is zero.
        r2 = gap.square().sum(-1) + softening * softening + itself
        weight = constant * masses * masses[:, None] * r2**-1.5
        return (weight[..., None] * gap).sum(-2)

    system = _Fused(potential, force=force, mass=masses[:, None])
    system.native = gravity_kernel(masses, constant, softening)
    return system


def toda(periodic: bool = True) -> Separable:
    r"""Return the Toda lattice of the ``d >= 2`` particles of ``q (..., d)``, which is integrable.

    .. math:: V(q) = \sum_i e^{q_i - q_{i+1}}

    Periodic, the last particle is followed by the first; open, by nothing. Toda, J. Phys. Soc.
    Japan 22 (1967) 431; Flaschka, Phys. Rev. B 9 (1974) 1924.

    >>> toda(periodic=False).force(torch.zeros(3))
    tensor([-1.,  0.,  1.])
    """

    def bonds(q: Tensor) -> Tensor:
        following = torch.cat([q[..., 1:], q[..., :1]], -1) if periodic else q[..., 1:]
        return torch.exp((q if periodic else q[..., :-1]) - following)

    def force(q: Tensor) -> Tensor:
        bond = bonds(q)
        if periodic:
            return torch.cat([bond[..., -1:], bond[..., :-1]], -1) - bond
        wall = torch.zeros_like(bond[..., :1])
        return torch.cat([wall, bond], -1) - torch.cat([bond, wall], -1)

    return Separable(lambda q: bonds(q).sum(-1), force=force)


def henon_heiles(strength: Number = 1.0) -> Separable:
    r"""Return the system of Henon and Heiles on ``q = (x, y)``; chaotic above energy 1/8 or so.

    .. math:: V(x, y) = \tfrac12 (x^2 + y^2) + \lambda (x^2 y - \tfrac13 y^3)

    Hénon & Heiles, Astron. J. 69 (1964) 73, eq. 11, with :math:`\lambda = 1`.

    >>> henon_heiles().force(torch.tensor([0.0, 1.0]))
    tensor([-0., 0.])
    """

    def potential(q: Tensor) -> Tensor:
        x, y = q[..., 0], q[..., 1]
        return (x * x + y * y) / 2 + strength * (x * x * y - y**3 / 3)

    def force(q: Tensor) -> Tensor:
        x, y = q[..., 0], q[..., 1]
        return torch.stack([-x - 2 * strength * x * y, -y - strength * (x * x - y * y)], -1)

    return Separable(potential, force=force)


def pendulum(omega: Number = 1.0) -> Separable:
    r"""Return independent pendulums with angles ``q (..., d)`` from the lowest point.

    .. math:: V(q) = \sum_i \omega_i^2 (1 - \cos q_i)

    Hairer, Lubich & Wanner (2006), I.1.2.

    >>> pendulum().force(torch.zeros(1))
    tensor([-0.])
    """
    return Separable(
        lambda q: (omega * omega * (1 - torch.cos(q))).sum(-1),
        force=lambda q: -omega * omega * torch.sin(q),
    )


def double_well(height: Number = 1.0) -> Separable:
    r"""Return the motion between two wells, at ``-1`` and ``1`` in each component.

    .. math:: V(q) = h \sum_i (q_i^2 - 1)^2

    Guckenheimer & Holmes (1983), §2.2 (Duffing's equation without damping).

    >>> double_well().force(torch.tensor([0.5]))
    tensor([1.5000])
    """
    return Separable(
        lambda q: (height * (q * q - 1) ** 2).sum(-1),
        force=lambda q: 4 * height * q * (1 - q * q),
    )


def torus_pair(coupling: Number = 1.0) -> Separable:
    r"""Return two coupled pendulums: a system on the torus with angles ``q = (a, b)``.

    .. math:: V(a, b) = (1 - \cos a) + (1 - \cos b) + \kappa (1 - \cos(a - b))

    Two rotors of the Hamiltonian mean-field model in an outer field; Antoni & Ruffo, Phys. Rev. E
    52 (1995) 2361.

    >>> torus_pair().force(torch.tensor([0.3, 0.3]))
    tensor([-0.2955, -0.2955])
    """

    def potential(q: Tensor) -> Tensor:
        between = 1 - torch.cos(q[..., 0] - q[..., 1])
        return (1 - torch.cos(q)).sum(-1) + coupling * between

    def force(q: Tensor) -> Tensor:
        twist = coupling * torch.sin(q[..., 0] - q[..., 1])
        return -torch.sin(q) - torch.stack([twist, -twist], -1)

    return Separable(potential, force=force)
