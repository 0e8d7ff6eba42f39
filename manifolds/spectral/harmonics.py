r"""Real spherical harmonics, the basis for any metric on S².

They are evaluated as polynomials in x, y, z by the recurrence in l at fixed m, which is stable
and has no singularity at the poles.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from darboux import _checks
from darboux.manifolds.base import Manifold
from darboux.manifolds.spectral.bases import Basis, Metric


class Harmonics(Basis):
    r"""Real spherical harmonics :math:`Y_{lm}`, :math:`l \le L`, orthonormal for the round area.

    Function number l² + l + m, m = -l..l; m > 0 goes with :math:`\cos m\varphi`, m < 0 with
    :math:`\sin|m|\varphi`; z is the polar axis and there is no sign :math:`(-1)^m`, so that
    :math:`Y_{1,-1}, Y_{10}, Y_{11}` are positive multiples of y, z, x.

    Points are unit vectors x in R^3, and a metric is a symmetric form G(x) ``(..., 3, 3)`` of which
    only the restriction to the tangent plane counts. So the metric induced by an embedding
    :math:`F: S^2 \to \mathbb R^D`, given as a map of R^3, is that of ``Pullback(F, 3)``. A
    :class:`Manifold` whose points have two coordinates, such as ``Ellipsoid``, is taken in
    :math:`(\theta, \varphi)`, polar angle and azimuth. Nodes: ``nodes`` Gauss-Legendre latitudes
    (2 L + 4 unless told), twice as many longitudes; never a pole.

    >>> Harmonics(12).size
    169
    """

    def __init__(
        self,
        degree: int,
        *,
        nodes: int | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ):
        if degree < 0:
            raise ValueError(f"Harmonics: degree is {degree}, expected at least 0")
        count = nodes or 2 * degree + 4
        if count <= degree:
            raise ValueError(f"Harmonics: nodes is {nodes}, expected more than {degree}")

        def as_given(x: np.ndarray) -> Tensor:
            return torch.as_tensor(x, dtype=dtype, device=device)

        self.degree, self.dim, self.size = degree, 2, (degree + 1) ** 2
        z, w = np.polynomial.legendre.leggauss(count)
        phi = np.pi * np.arange(2 * count) / count
        theta, phi = (a.ravel() for a in np.meshgrid(np.arccos(z), phi, indexing="ij"))
        st, ct, sp, cp = np.sin(theta), np.cos(theta), np.sin(phi), np.cos(phi)
        self.angles = as_given(np.stack([theta, phi], -1))
        self.points = as_given(np.stack([st * cp, st * sp, ct], -1))
        self.weights = as_given(np.repeat(w, 2 * count) * (np.pi / count))
        south, east = np.stack([ct * cp, ct * sp, -st], -1), np.stack([-sp, cp, 0 * sp], -1)
        self.frames = as_given(np.stack([south, east], -1))  # (q, 3, 2), orthonormal

        # p_l^m = a (z p_{l-1}^m - b p_{l-2}^m) for the normalised P_l^m over sin^m, and
        # p_m^m = top, dp_l^m/dz = slope p_l^{m+1}
        l, m = (k.astype(float) for k in np.indices((degree + 1, degree + 2)))
        below = m < l
        self._a = as_given(np.sqrt((4 * l * l - 1) / np.where(below, l * l - m * m, 1) * below))
        b = ((l - 1) ** 2 - m * m) / np.where(l > 1, 4 * (l - 1) ** 2 - 1, 1)
        self._b = as_given(np.sqrt(np.where(below & (l > 1), b, 0)))
        top = np.sqrt(np.cumprod([0.25 / np.pi, *(1 + 0.5 / np.arange(1, degree + 1))]))
        self._top = as_given(np.eye(degree + 1, degree + 2) * top[:, None])
        self._slope = as_given(np.sqrt(np.maximum((l - m) * (l + m + 1), 0)))
        orders = np.concatenate([np.arange(-l, l + 1) for l in range(degree + 1)])
        self._m = torch.as_tensor(orders, device=device)
        self._scale = as_given(np.where(orders == 0, 1.0, np.sqrt(2.0)))
        self._l = torch.as_tensor(np.sqrt(np.arange(self.size)).astype(int), device=device)

    def evaluate(self, x: Tensor) -> Tensor:
        _checks.check_last("Harmonics.evaluate", "x", x, 3)
        legendre = self._legendre(x[..., 2])
        return legendre[..., self._l, self._m.abs()] * self._azimuthal(*self._powers(x))

    def gradient(self, x: Tensor) -> Tensor:
        """Return the tangential gradients on the unit sphere as vectors of R^3, ``(..., n, 3)``."""
        _checks.check_last("Harmonics.gradient", "x", x, 3)
        legendre, (c, s) = self._legendre(x[..., 2]), self._powers(x)
        size = self._m.abs()
        # d (x + i y)^m = m (x + i y)^(m - 1) (dx + i dy)
        c_below, s_below = c[..., (size - 1).clamp(min=0)], s[..., (size - 1).clamp(min=0)]
        even = self._m > 0
        rise = self._scale * size * legendre[..., self._l, size]
        dx = rise * torch.where(even, c_below, s_below)
        dy = rise * torch.where(even, -s_below, c_below)
        dz = self._slope[self._l, size] * legendre[..., self._l, size + 1] * self._azimuthal(c, s)
        full = torch.stack([dx, dy, dz], -1)
        radial = (full * x[..., None, :]).sum(-1, keepdim=True)
        return full - radial * x[..., None, :]

    @property
    def gradients(self) -> Tensor:
        """The gradients at the nodes in the frame (south, east), ``(q, n, 2)``."""
        return self.gradient(self.points) @ self.frames

    def forms(self, metric: Metric) -> Tensor:
        if isinstance(metric, Manifold):
            if metric.point_dim == 2:
                g = self._at(metric, self.angles, 2)
                sine = self.angles[:, 0].sin()
                stretch = torch.stack([torch.ones_like(sine), 1 / sine], -1)
                return stretch[:, :, None] * g * stretch[:, None, :]
            if metric.dim == 2 and not bool(metric.is_point(self.points).all()):
                raise ValueError(
                    f"galerkin on Harmonics: the points of {metric.name} are not the unit vectors "
                    "of R^3; give its metric as that of Pullback(F, 3), F a map of R^3"
                )
        return self.frames.mT @ self._at(metric, self.points, 3) @ self.frames

    def _legendre(self, z: Tensor) -> Tensor:
        # p_l^m: (..., L + 1, L + 2), zero for m > l
        rows = [self._top[0].expand(*z.shape, -1)]
        z = z[..., None]
        for l in range(1, self.degree + 1):
            before = self._b[l] * rows[-2] if l > 1 else torch.zeros_like(rows[-1])
            rows.append(self._a[l] * (z * rows[-1] - before) + self._top[l])
        return torch.stack(rows, -2)

    def _powers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # real and imaginary parts of (x + i y)^m, m = 0..L
        x, y = x[..., 0], x[..., 1]
        reals, imaginaries = [torch.ones_like(x)], [torch.zeros_like(x)]
        for _ in range(self.degree):
            c, s = reals[-1], imaginaries[-1]
            reals.append(x * c - y * s)
            imaginaries.append(x * s + y * c)
        return torch.stack(reals, -1), torch.stack(imaginaries, -1)

    def _azimuthal(self, c: Tensor, s: Tensor) -> Tensor:
        size = self._m.abs()
        return self._scale * torch.where(self._m >= 0, c[..., size], s[..., size])
