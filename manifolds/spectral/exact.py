r"""Closed-form spectra of -Δ: the oracles of every discretisation.

To add a space, write a function that returns all its eigenvalues up to some bound, or the k
lowest, and enter it into ``_SPACES``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special
import torch
from torch import Tensor


def exact_spectrum(space: str, k: int, **parameters: Any) -> Tensor:
    r"""Return the ``k`` lowest eigenvalues of -Δ, ascending and repeated, as float64 ``(k,)``.

    =============== ============================ ==================================================
    space           parameters                   eigenvalues
    =============== ============================ ==================================================
    ``sphere``      dim=2, radius=1              :math:`l(l+n-1)/r^2`
    ``projective``  dim=2, radius=1              the same, l even
    ``hemisphere``  boundary, radius=1           :math:`l(l+1)/r^2`, l + 1 times (N) or l times (D)
    ``torus``       lattice, rows generate it    :math:`4\pi^2|\mathrm{lattice}^{-1}k|^2`
    ``box``         sides=(1, 1), boundary       :math:`\pi^2\sum (m_i/a_i)^2`, an interval too
    ``disk``        boundary, radius=1           squares of the zeros of :math:`J_m` (D), J'_m (N)
    ``triangle``    boundary, side=1             :math:`(16\pi^2/9)(m^2+mn+n^2)`, equilateral
    ``klein``       a=1, b=1                     :math:`(0,y)\sim(a,b-y),\ (x,0)\sim(x,b)`
    ``moebius``     a=1, b=1                     the strip of width b with that gluing, Neumann
    ``bolza``                                    genus 2; Strohmaier & Uski (2013), 39 of them
    =============== ============================ ==================================================

    ``boundary`` is "neumann" (the default) or "dirichlet". For the torus the result is
    differentiable in ``lattice``. Raises ``ValueError`` for an unknown space or parameter.

    >>> exact_spectrum("sphere", 5)
    tensor([0., 2., 2., 2., 6.], dtype=torch.float64)
    """
    if space not in _SPACES:
        raise ValueError(f"exact_spectrum: space is {space!r}, expected one of {sorted(_SPACES)}")
    if k < 1:
        raise ValueError(f"exact_spectrum: k is {k}, expected at least 1")
    boundary = parameters.get("boundary", "neumann")
    if boundary not in ("neumann", "dirichlet"):
        raise ValueError(
            f"exact_spectrum: boundary is {boundary!r}, expected 'neumann' or 'dirichlet'"
        )
    for name, value in parameters.items():
        plain = np.ones(1) if name in ("boundary", "lattice") else np.asarray(value, np.float64)
        if not (np.isfinite(plain).all() and (plain > 0).all()):
            raise ValueError(f"exact_spectrum: {name} is {value}, expected positive numbers")
    try:
        inspect.signature(_SPACES[space]).bind(k, **parameters)
    except TypeError as error:
        raise ValueError(f"exact_spectrum of {space!r}: {error}") from None
    return _SPACES[space](k, **parameters)


def _lowest(values: Any, k: int) -> Tensor:
    return torch.from_numpy(np.sort(np.asarray(values, dtype=np.float64))[:k].copy())


def _levels(k: int, level: Callable[[int], tuple[float, int]]) -> Tensor:
    # level(l) is the l-th eigenvalue, increasing, and how often it occurs
    values: list[float] = []
    l = 0
    while len(values) < k:
        value, times = level(l)
        values += [value] * times
        l += 1
    return _lowest(values, k)


def _multiplicity(l: int, dim: int) -> int:
    # of the harmonic polynomials of degree l in dim + 1 variables
    lower = math.comb(dim + l - 2, dim) if l > 1 else 0
    return math.comb(dim + l, dim) - lower


def _sphere(k: int, dim: int = 2, radius: float = 1.0) -> Tensor:
    return _levels(k, lambda l: (l * (l + dim - 1) / radius**2, _multiplicity(l, dim)))


def _projective(k: int, dim: int = 2, radius: float = 1.0) -> Tensor:
    return _levels(k, lambda l: (2 * l * (2 * l + dim - 1) / radius**2, _multiplicity(2 * l, dim)))


def _hemisphere(k: int, boundary: str = "neumann", radius: float = 1.0) -> Tensor:
    more = boundary == "neumann"
    return _levels(k, lambda l: (l * (l + 1) / radius**2, l + more))


def _lattice_points(
    form: np.ndarray, k: int, keep: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Return integer vectors, those to ``keep``, among them the k lowest of ``m^T form m``."""
    inverse = np.linalg.inv(form)
    d, bound = len(form), float(np.min(np.diag(form)))
    while True:
        # m_i^2 <= bound (form^-1)_ii holds for all m with m^T form m <= bound
        reach = np.floor(np.sqrt(bound * np.diag(inverse)) + 1e-9).astype(int)
        axes = np.meshgrid(*[np.arange(-r, r + 1) for r in reach], indexing="ij")
        m = np.stack(axes, -1).reshape(-1, d)
        m = m[np.einsum("ij,jk,ik->i", m, form, m) <= bound * (1 + 1e-9)]
        m = m[keep(m)]
        if len(m) >= k:
            return m
        bound *= 1.5


def _torus(k: int, lattice: Tensor | None = None) -> Tensor:
    rows = 2 * math.pi * torch.eye(2) if lattice is None else torch.as_tensor(lattice)
    rows = rows.to("cpu", torch.float64)
    if rows.dim() != 2 or rows.shape[0] != rows.shape[1]:
        raise ValueError(f"exact_spectrum: lattice has shape {tuple(rows.shape)}, expected (d, d)")
    dual = 2 * math.pi * torch.linalg.inv(rows)
    plain = dual.detach().numpy()
    m = torch.from_numpy(_lattice_points(plain.T @ plain, k, _every)).to(rows)
    values = (m @ dual.mT).square().sum(-1)
    return values[torch.argsort(values.detach())[:k]]


def _every(m: np.ndarray) -> np.ndarray:
    return np.ones(len(m), dtype=bool)


def _diagonal(k: int, weights: Any, keep: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    # sum_i weights_i m_i^2 over the integer m to keep
    form = np.diag(np.asarray(weights, dtype=np.float64))
    m = _lattice_points(form, k, keep)
    return _lowest(np.einsum("ij,jk,ik->i", m, form, m), k)


def _box(k: int, sides: Any = (1.0, 1.0), boundary: str = "neumann") -> Tensor:
    weights = (np.pi / np.atleast_1d(np.asarray(sides, dtype=np.float64))) ** 2
    first = int(boundary == "dirichlet")
    return _diagonal(k, weights, lambda m: np.all(m >= first, axis=-1))


def _disk(k: int, boundary: str = "neumann", radius: float = 1.0) -> Tensor:
    zeros = scipy.special.jn_zeros if boundary == "dirichlet" else scipy.special.jnp_zeros
    values = [] if boundary == "dirichlet" else [0.0]
    count = int(2 * math.sqrt(k)) + 4  # more than enough radial zeros and orders
    for m in range(2 * count):
        values += [z**2 for z in zeros(m, count)] * (1 if m == 0 else 2)
    return _lowest(np.asarray(values) / radius**2, k)


def _triangle(k: int, boundary: str = "neumann", side: float = 1.0) -> Tensor:
    first = int(boundary == "dirichlet")
    top = 2 * int(math.sqrt(2 * k)) + 4
    m, n = np.indices((top, top)) + first
    return _lowest((16 * np.pi**2 / (9 * side**2) * (m * m + m * n + n * n)).ravel(), k)


def _klein(k: int, a: float = 1.0, b: float = 1.0) -> Tensor:
    # m and -m are two functions, n and -n only one
    def keep(m: np.ndarray) -> np.ndarray:
        return (m[:, 1] >= 0) & ((m[:, 1] > 0) | (m[:, 0] % 2 == 0))

    return _diagonal(k, [(np.pi / a) ** 2, (2 * np.pi / b) ** 2], keep)


def _moebius(k: int, a: float = 1.0, b: float = 1.0) -> Tensor:
    def keep(m: np.ndarray) -> np.ndarray:
        return (m[:, 1] >= 0) & (m.sum(-1) % 2 == 0)

    return _diagonal(k, [(np.pi / a) ** 2, (np.pi / b) ** 2], keep)


_BOLZA = (
    (0.0, 1),
    (3.8388872588421995185866, 3),
    (5.3536013411890504109180, 4),
    (8.2495548152006581218901, 2),
    (14.7262167877888320412893, 4),
    (15.0489161332670487461816, 3),
    (18.6588196272601938062962, 3),
    (20.5198597341420020011498, 4),
    (23.0785584813816351550752, 1),
    (28.0796057376777290815622, 3),
    (30.8330427379325496742440, 4),
)


def _bolza(k: int) -> Tensor:
    known = sum(times for _, times in _BOLZA)
    if k > known:
        raise ValueError(f"exact_spectrum: k is {k}, but {known} eigenvalues are tabulated")
    return _levels(k, lambda l: _BOLZA[l])


_SPACES: dict[str, Callable[..., Tensor]] = {
    "sphere": _sphere,
    "projective": _projective,
    "hemisphere": _hemisphere,
    "torus": _torus,
    "box": _box,
    "disk": _disk,
    "triangle": _triangle,
    "klein": _klein,
    "moebius": _moebius,
    "bolza": _bolza,
}
