r"""The reference simplex of dimension d: Lagrange polynomials of degree p and quadrature.

Reference coordinates ``x`` run over the simplex :math:`x_i \ge 0, \sum x_i \le 1` of volume
``1 / d!``; barycentric coordinates put :math:`1 - \sum x_i` before them. Everything here is a
constant, in numpy and float64.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations, product
from math import factorial

import numpy as np
from scipy.special import roots_jacobi

HIGHEST = 6  # equally spaced nodes of higher degree are badly conditioned

# Symmetric rules: for each orbit of points its kind, its parameters and the weight of one point in
# parts of the volume. Degree -> orbits. Triangles: Strang and Fix (1973), Dunavant (1985), IJNME
# 21; tetrahedra: Hammer and Stroud (1956), Walkington (2000).
_ORBITS: dict[int, dict[int, list[tuple[float, ...]]]] = {
    2: {
        1: [(1.0,)],
        2: [(1 / 3, 1 / 6)],
        4: [
            (0.223381589678011466, 0.445948490915964886),
            (0.109951743655321868, 0.091576213509770743),
        ],
        6: [
            (0.050844906370206817, 0.063089014491502),
            (0.116786275726379366, 0.249286745170910),
            (0.082851075618373575, 0.310352451033784, 0.053145049844817),
        ],
        8: [
            (0.144315607677787168,),
            (0.095091634267284625, 0.459292588292723),
            (0.103217370534718250, 0.170569307751760),
            (0.032458497623198080, 0.050547228317031),
            (0.027230314174434994, 0.263112829634638, 0.008394777409958),
        ],
    },
    3: {
        1: [(1.0,)],
        2: [(0.25, 0.138196601125010504)],
        5: [
            (0.1126879257180158, 0.31088591926330060980),
            (0.07349304311636194, 0.092735250310891226402),
            (0.04254602077708147, 0.454496295874350350508, 0.454496295874350350508),
        ],
    },
}


def _orbit(dim: int, parameters: tuple[float, ...]) -> list[tuple[float, ...]]:
    # no parameter: the centre; a: (1 - dim a, a, ..., a); a, b: (1 - a - b, a, b) in a triangle
    # and (1/2 - a, 1/2 - a, a, a) in a tetrahedron
    if not parameters:
        corner = (1 / (dim + 1),) * (dim + 1)
    elif len(parameters) == 1:
        corner = (1 - dim * parameters[0], *parameters * dim)
    elif dim == 2:
        corner = (1 - sum(parameters), *parameters)
    else:
        corner = (*[0.5 - parameters[0]] * 2, *parameters)
    return sorted(set(permutations(corner)))


@lru_cache(maxsize=64)
def quadrature(dim: int, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Return barycentric points ``(q, dim + 1)`` and weights ``(q,)``, which sum to 1 / dim!.

    Exact for polynomials of the degree. A symmetric rule where the table has one, else the
    conical product of Gauss-Jacobi rules; all weights are positive. Stroud (1971), 2.5.
    """
    if degree < 0:
        raise ValueError(f"quadrature: degree is {degree}, expected at least 0")
    known = [k for k in sorted(_ORBITS.get(dim, ())) if k >= degree]
    if not known:
        return _conical(dim, degree // 2 + 1)
    points, weights = [], []
    for weight, *parameters in _ORBITS[dim][known[0]]:
        orbit = _orbit(dim, tuple(parameters))
        points += orbit
        weights += [weight] * len(orbit)
    return np.array(points), np.array(weights) / factorial(dim)


def _conical(dim: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    # x_1 = t_1, x_2 = (1 - t_1) t_2, ...: the Jacobian is the weight of Jacobi's polynomials
    points, weights = np.zeros((1, 0)), np.ones(1)
    for k in reversed(range(dim)):
        t, w = roots_jacobi(n, k, 0)
        t, w = (1 + t) / 2, w / 2 ** (k + 1)
        left = 1 - points.sum(1)
        points = np.concatenate([np.repeat(points, n, 0), np.outer(left, t).reshape(-1, 1)], 1)
        weights = np.outer(weights, w).reshape(-1)
    return np.concatenate([1 - points.sum(1, keepdims=True), points], 1), weights


@dataclass(frozen=True, eq=False)
class Lagrange:
    """The polynomials of degree ``order`` that are 1 at one node and 0 at the others.

    ``exponents (a, dim + 1)`` are the barycentric coordinates of the nodes times the order:
    first the corners, then nodes inside edges, triangles, tetrahedra, each in the order of
    :func:`itertools.combinations`.
    """

    dim: int
    order: int
    exponents: np.ndarray

    def faces(self) -> list[tuple[tuple[int, ...], np.ndarray]]:
        """Return, corners first, the corners of each face and the nodes strictly inside it."""
        inside: dict[tuple[int, ...], list[int]] = {}
        for node, exponent in enumerate(self.exponents):
            inside.setdefault(tuple(np.flatnonzero(exponent).tolist()), []).append(node)
        return [(face, np.array(nodes)) for face, nodes in inside.items()]

    def tabulate(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return values ``(q, a)`` and gradients ``(q, a, dim)`` at barycentric points.

        A product over the corners of ``prod_k (p l - k) / (k + 1)`` (Silvester 1969).
        """
        p, d = self.order, self.dim
        # rising[q, v, e]: the factor of corner v with exponent e, and its slope
        rising, slope = np.ones((len(points), d + 1, p + 1)), np.zeros((len(points), d + 1, p + 1))
        for e in range(p):
            step = (p * points - e) / (e + 1)
            rising[..., e + 1] = rising[..., e] * step
            slope[..., e + 1] = slope[..., e] * step + rising[..., e] * p / (e + 1)
        corner = np.arange(d + 1)
        parts, slopes = rising[:, corner, self.exponents], slope[:, corner, self.exponents]
        values = parts.prod(-1)
        gradients = np.stack(
            [slopes[..., v] * np.delete(parts, v, -1).prod(-1) for v in range(d + 1)], -1
        )
        return values, gradients[..., 1:] - gradients[..., :1]


@lru_cache(maxsize=64)
def lagrange(dim: int, order: int) -> Lagrange:
    """Return the Lagrange polynomials on equally spaced nodes, ``1 <= order <= 6``."""
    exponents = []
    for corners in range(1, dim + 2):
        for face in combinations(range(dim + 1), corners):
            for powers in product(range(1, order + 1), repeat=corners):
                if sum(powers) == order:
                    exponent = np.zeros(dim + 1, int)
                    exponent[list(face)] = powers
                    exponents.append(exponent)
    return Lagrange(dim, order, np.array(exponents))
