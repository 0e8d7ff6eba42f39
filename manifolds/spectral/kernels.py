r"""Uses of the spectrum: heat, signatures of points, spectral distances, filters.

Everything is a function of the operator :math:`A = M^{-1}K`, taken through the primitives of
:mod:`darboux.manifolds.spectral.functions`, so gradients are exact at multiple eigenvalues.
Times are in units of length², as eigenvalues are in units of 1 / length². Of a truncated spectrum
only the computed modes enter: an error of about :math:`e^{-t\lambda_k}`.

Times and energies are numbers or tensors ``(s...)``, whose axes come first in the result. Points
are numbers of unknowns of the operator, ``0 ... n - 1``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from darboux import _checks
from darboux.manifolds.spectral.adjoint import numbers
from darboux.manifolds.spectral.eigen import Spectrum
from darboux.manifolds.spectral.exponential import exponential
from darboux.manifolds.spectral.functions import Function, apply, diagonal, kernel, trace
from darboux.manifolds.spectral.operator import Operator, Sparse

Times = float | Tensor
Points = int | Sequence[int] | Tensor

# -- responses: functions of the eigenvalue ---------------------------------------------------


def heat(t: Times) -> Function:
    r"""Return the response :math:`e^{-t\lambda}` of diffusion for the time(s) t."""
    return lambda values: torch.exp(-_spread(t, values) * values)


def low_pass(cutoff: float | Tensor, order: int = 4) -> Function:
    r"""Return Butterworth's response :math:`1 / (1 + (\lambda / \lambda_c)^{2\,order})`."""
    _check_positive("low_pass", "cutoff", cutoff)
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"low_pass: order is {order}, expected a positive integer")
    return lambda values: 1 / (1 + (values / _spread(cutoff, values)) ** (2 * order))


def high_pass(cutoff: float | Tensor, order: int = 4) -> Function:
    """Return one minus the response of :func:`low_pass`; to be filtered with ``beyond=1``."""
    low = low_pass(cutoff, order)
    return lambda values: 1 - low(values)


def band_pass(low: float | Tensor, high: float | Tensor, order: int = 4) -> Function:
    """Return the product of the high pass at ``low`` and the low pass at ``high``."""
    if not bool((torch.as_tensor(low) < torch.as_tensor(high)).all()):
        raise ValueError(f"band_pass: low is {low} and high is {high}, expected low < high")
    above, below = high_pass(low, order), low_pass(high, order)
    return lambda values: above(values) * below(values)


def spectral_filter(
    spectrum: Spectrum | Operator, u: Tensor, response: Function, *, beyond: float = 0.0
) -> Tensor:
    r"""Return :math:`f(A) u`, where f is the ``response``, and ``beyond`` past the modes known.

    ``u (n,)`` or ``(n, m)``. As :math:`f(A)u = c\,u + (f - c)(A)\,u` with c = ``beyond``: a high
    pass with c = 1 keeps what a truncated spectrum does not resolve.
    """
    if beyond == 0:
        return apply(spectrum, response, u)
    return beyond * u + apply(spectrum, lambda values: response(values) - beyond, u)


# -- heat -------------------------------------------------------------------------------------


def heat_kernel(spectrum: Spectrum | Operator, t: Times, sources: Points | None = None) -> Tensor:
    r"""Return :math:`h_t(x, y) = \sum_k e^{-t\lambda_k}\varphi_k(x)\,\varphi_k(y)`.

    For all x and the points y in ``sources``: ``(s..., n)`` for one, ``(s..., n, m)`` for m of them
    or for all. A density in x: its integral over a closed surface is one.
    """
    n, batch, like = _unknowns("heat_kernel", spectrum)
    _check_times("heat_kernel", t)
    if sources is None:
        load = torch.eye(n, **like)
    else:
        points = _index("heat_kernel", "sources", sources, n, like["device"])
        load = torch.zeros(*points.shape, n, **like).scatter(-1, points[..., None], 1)
        load = load.T if points.dim() else load
    return kernel(spectrum, heat(t), load.expand(*batch, *load.shape))


def heat_trace(spectrum: Spectrum | Operator, t: Times) -> Tensor:
    r"""Return :math:`Z(t) = \sum_k e^{-t\lambda_k}`, ``(s...)``.

    On a closed surface :math:`Z(t) = |S| / 4\pi t + \chi / 6 + O(t)`, from which one hears area
    and Euler characteristic. McKean and Singer (1967), J. Differential Geometry 1.
    """
    _unknowns("heat_trace", spectrum)
    _check_times("heat_trace", t)
    return trace(spectrum, heat(t))


def diffuse(
    spectrum: Spectrum | Operator, u: Tensor, t: Times, *, tolerance: float = 1e-12
) -> Tensor:
    r"""Return the solution :math:`e^{-tA} u` of the heat equation, ``(s..., *u)``.

    ``u`` is ``(n,)`` or ``(n, m)``. With a :class:`Spectrum`: exact in its modes, the others are
    dropped. With an :class:`Operator`: all modes, by a rational function with one real pole, to a
    relative error of ``tolerance`` in the norm of the mass whatever t and the mesh: about 30 solves
    with one factorisation for each time (:mod:`darboux.manifolds.spectral.exponential`). The
    integral of u is kept to rounding. K must be positive semi-definite.

    Differentiable in u, t and the operator; through :func:`apply` once, through the solves to any
    order. Raises ``ValueError`` for negative times and a tolerance below 1e-14.
    """
    n, batch, like = _unknowns("diffuse", spectrum)
    _check_times("diffuse", t)
    _checks.check_tensor("diffuse", "u", u)
    axes = len(batch)
    vector = u.dim() == axes + 1
    if u.dim() not in (axes + 1, axes + 2) or u.shape[-1 if vector else -2] != n:
        raise ValueError(f"diffuse: u has shape {tuple(u.shape)}, expected ({n},) or ({n}, m)")
    if u.dtype != like["dtype"]:
        raise TypeError(f"diffuse: u has dtype {u.dtype}, expected {like['dtype']}")
    _checks.check_finite("diffuse", u=u)
    if isinstance(spectrum, Spectrum):
        return apply(spectrum, heat(t), u)
    columns = u[..., None] if vector else u
    times = torch.as_tensor(t, **like)
    found = [exponential(spectrum, columns, s, tolerance) for s in times.reshape(-1).unbind()]
    every = torch.stack(found).reshape(*times.shape, *columns.shape)
    return every[..., 0] if vector else every


# -- signatures -------------------------------------------------------------------------------


def heat_kernel_signature(
    spectrum: Spectrum | Operator, times: Times, *, scaled: bool = False
) -> Tensor:
    r"""Return :math:`h_t(x, x) = \sum_k e^{-t\lambda_k}\varphi_k(x)^2`, ``(s..., n)``.

    Under a scaling of lengths by c in dimension d, :math:`h_{c^2 t}` is divided by :math:`c^d`.
    ``scaled=True`` divides by the heat trace, so that different times weigh alike: the integral is
    then one. Sun, Ovsjanikov and Guibas (2009), Computer Graphics Forum 28.
    """
    _unknowns("heat_kernel_signature", spectrum)
    _check_times("heat_kernel_signature", times)
    found = diagonal(spectrum, heat(times))
    return found / trace(spectrum, heat(times))[..., None] if scaled else found


def heat_times(spectrum: Spectrum, count: int = 100) -> Tensor:
    r"""Return times, evenly in the logarithm, from :math:`4\ln 10/\lambda_k` to :math:`/\lambda_1`.

    At the first the last mode computed has decayed to :math:`10^{-4}`, at the last the first that
    is not constant. They carry no gradient. Sun, Ovsjanikov and Guibas (2009).
    """
    low, high = _range("heat_times", spectrum)
    if count < 2:
        raise ValueError(f"heat_times: count is {count}, expected at least 2")
    first, last = (math.log10(4 * math.log(10) / x) for x in (high, low))
    values = spectrum.values
    return torch.logspace(first, last, count, dtype=values.dtype, device=values.device)


def wave_kernel_signature(
    spectrum: Spectrum | Operator, energies: Times, sigma: float | Tensor
) -> Tensor:
    r"""Return the probability to meet at x a particle of energy e, ``(s..., n)``.

    .. math:: w(e, x) = \sum_k f_k\,\varphi_k(x)^2 \Big/ \sum_k f_k, \qquad
              f_k = e^{-(e - \ln\lambda_k)^2 / 2\sigma^2}

    over the modes with :math:`\lambda_k > 0`. ``energies`` are logarithms of eigenvalues; those of
    :func:`wave_energies` follow the scale: lengths times c divide the signature by :math:`c^d`.
    Its integral over the surface is one. Raises ``ValueError`` for energies that no mode has.
    Aubry, Schlickewei and Cremers (2011), ICCV Workshops.
    """
    _unknowns("wave_kernel_signature", spectrum)
    _check_positive("wave_kernel_signature", "sigma", sigma)
    response = wave(energies, sigma)
    total = trace(spectrum, response)
    if _checks.checks_values() and not bool((total.detach() > 1e-6).all()):
        worst = torch.as_tensor(energies).broadcast_to(total.shape)[total.detach() <= 1e-6][0]
        raise ValueError(
            f"wave_kernel_signature: no eigenvalue has an energy near {float(worst):.6g}; expected "
            "logarithms of eigenvalues of the spectrum, see wave_energies"
        )
    return diagonal(spectrum, response) / total[..., None]


def wave(energies: Times, sigma: float | Tensor) -> Function:
    r"""Return the response :math:`e^{-(e - \ln\lambda)^2 / 2\sigma^2}`, zero at zero."""

    def response(values: Tensor) -> Tensor:
        # what rounding makes of zero is below this part of the spectrum
        moving = values > 1e-9 * values.detach().abs().amax()
        logarithm = torch.where(moving, values, 1).log()
        part = (_spread(energies, values) - logarithm) / _spread(sigma, values)
        return torch.where(moving, torch.exp(-0.5 * part**2), 0)

    return response


def wave_energies(spectrum: Spectrum, count: int = 100) -> tuple[Tensor, float]:
    r"""Return even energies and :math:`\sigma`, which is seven of their steps.

    From :math:`\ln\lambda_1 + 2\sigma` to :math:`\ln\lambda_k - 2\sigma`. They carry no gradient.
    Aubry, Schlickewei and Cremers (2011).
    """
    low, high = (math.log(x) for x in _range("wave_energies", spectrum))
    if count < 2:
        raise ValueError(f"wave_energies: count is {count}, expected at least 2")
    step = (high - low) / (count - 1 + 28)
    steps = torch.arange(count, dtype=spectrum.values.dtype, device=spectrum.values.device)
    return low + step * (14 + steps), 7 * step


# -- distances --------------------------------------------------------------------------------


def diffusion_distance(spectrum: Spectrum | Operator, t: Times, i: Points, j: Points) -> Tensor:
    r"""Return :math:`|h_t(x_i, \cdot) - h_t(x_j, \cdot)|_{L^2}`, ``(s..., *points)``.

    :math:`d^2 = \sum_k e^{-2t\lambda_k}(\varphi_k(x_i) - \varphi_k(x_j))^2`; ``i`` and ``j`` are
    broadcast. It is a metric, in units of length to the power -d/2. The gradient at i = j is zero.
    Coifman and Lafon (2006), Appl. Comput. Harmon. Anal. 21.
    """
    n, batch, like = _unknowns("diffusion_distance", spectrum)
    _check_times("diffusion_distance", t)
    given = (("i", i), ("j", j))
    places = [_index("diffusion_distance", name, x, n, like["device"]) for name, x in given]
    a, b = torch.broadcast_tensors(*places)
    shape, a, b = a.shape, a.reshape(-1), b.reshape(-1)
    which = torch.arange(a.numel(), device=a.device)
    load = torch.zeros(n, a.numel(), **like)
    load = load.index_put((a, which), load.new_ones(())).index_put(
        (b, which), -load.new_ones(()), accumulate=True
    )
    field = kernel(spectrum, lambda v: heat(t)(v).square(), load.expand(*batch, *load.shape))
    square = field[..., a, which] - field[..., b, which]
    apart = (a != b) & (square > 0)
    found = torch.where(apart, torch.where(apart, square, 1).sqrt(), 0)
    return found.unflatten(-1, shape) if shape else found[..., 0]


# -- the door ---------------------------------------------------------------------------------


def _spread(t: Times, values: Tensor) -> Tensor:
    """Return ``t`` with axes behind it for the values."""
    t = torch.as_tensor(t, dtype=values.dtype, device=values.device)
    return t.reshape(*t.shape, *(1,) * values.dim()) if t.dim() else t


def _unknowns(where: str, spectrum: Any) -> tuple[int, tuple[int, ...], dict[str, Any]]:
    """Return the number of unknowns, the batch, and dtype and device."""
    if not isinstance(spectrum, Spectrum | Operator):
        raise TypeError(
            f"{where}: got a {type(spectrum).__name__}, expected a Spectrum or an Operator"
        )
    operator = spectrum.operator if isinstance(spectrum, Spectrum) else spectrum
    entries = numbers(operator.stiffness)
    batch = () if isinstance(operator.stiffness, Sparse) else tuple(entries.shape[:-2])
    return operator.size, batch, {"dtype": entries.dtype, "device": entries.device}


def _check_times(where: str, t: Times) -> None:
    seen = torch.as_tensor(t)
    if seen.is_complex() or seen.dtype == torch.bool:
        raise TypeError(f"{where}: t has dtype {seen.dtype}, expected real numbers")
    if _checks.checks_values() and not bool((seen >= 0).all() and seen.isfinite().all()):
        bad = seen[~((seen >= 0) & seen.isfinite())].reshape(-1)[0]
        raise ValueError(f"{where}: t holds {float(bad)}, expected finite times t >= 0")


def _check_positive(where: str, name: str, x: float | Tensor) -> None:
    if not bool((torch.as_tensor(x) > 0).all()):
        raise ValueError(f"{where}: {name} is {x}, expected positive")


def _index(where: str, name: str, points: Points, n: int, device: Any) -> Tensor:
    index = torch.as_tensor(points, device=device)
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"{where}: {name} has dtype {index.dtype}, expected integers")
    if not index.numel() or not bool(((index >= 0) & (index < n)).all()):
        raise ValueError(
            f"{where}: {name} is {index.tolist()}, expected numbers of points in 0 ... {n - 1}"
        )
    return index.to(torch.int64)


def _range(where: str, spectrum: Spectrum) -> tuple[float, float]:
    """Return the lowest eigenvalue that is not zero, and the highest."""
    if not isinstance(spectrum, Spectrum) or spectrum.values.dim() != 1:
        raise TypeError(f"{where}: expected one Spectrum, got a {type(spectrum).__name__}")
    values = spectrum.values.detach()
    moving = values[values > 1e-9 * values[-1].abs()]
    if not moving.numel() or not float(moving[-1]) > float(moving[0]):
        raise ValueError(
            f"{where}: the spectrum holds {values.tolist()[:5]}, expected two different positive "
            "eigenvalues; compute more"
        )
    return float(moving[0]), float(moving[-1])
