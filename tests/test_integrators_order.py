"""Every method has the order it states: by its order conditions, and by the slope of its errors."""

import math
from decimal import Decimal
from functools import cache

import numpy as np
import pytest
from integrator_cases import SPLITTINGS

from darboux.integrators import METHODS, Splitting, gauss_legendre

# --- Order conditions of splittings -----------------------------------------------------------
# A composition of flows is a product of exponentials of two letters, drift 0 and kick 1. The
# method has order p when its logarithm is drift + kick up to words of length p. A series is a
# list: entry n holds the coefficients of all 2^n words of length n.


def times(a, b):
    return [
        sum(np.multiply.outer(a[k], b[n - k]).ravel() for k in range(n + 1)) for n in range(len(a))
    ]


def followed(series, letter, c):
    """Return the series times the exponential of ``c`` letters, whose words are all of one."""
    product = []
    for n in range(len(series)):
        total = series[n].copy()
        factor = 1
        for k in range(1, n + 1):
            factor = factor * c / k
            total.reshape(2 ** (n - k), 2**k)[:, -letter] += series[n - k] * factor
        product.append(total)
    return product


def logarithm(series):
    x = [0 * series[0], *series[1:]]
    power, total = x, x
    for k in range(2, len(x)):
        power = times(power, x)
        total = [t - (-1) ** k * p / k for t, p in zip(total, power, strict=True)]
    return total


def bracket(a, b):
    return np.multiply.outer(a, b).ravel() - np.multiply.outer(b, a).ravel()


@cache
def vanishing(degree):
    """Span the ideal of [kick, [kick, [kick, drift]]]: zero for a quadratic kinetic energy."""
    drift, kick = np.eye(2)
    if degree < 4:
        return []
    if degree == 4:
        return [bracket(kick, bracket(kick, bracket(kick, drift)))]
    return [bracket(letter, x) for x in vanishing(degree - 1) for letter in (drift, kick)]


def error_terms(flows, degree):
    """Return the series of the logarithm of a step less drift + kick, in Decimals."""
    product = [np.array([Decimal(n == 0)] * 2**n) for n in range(degree + 1)]
    for kick, c in flows:
        product = followed(product, int(kick), c)
    error = logarithm(product)
    error[1] = error[1] - 1
    return error


def defects(flows, degree, rkn=False):
    """Return the size of the error terms of each degree up to ``degree``."""
    error = [x.astype(float) for x in error_terms(flows, degree)]
    if rkn:
        for n in range(4, degree + 1):
            span = np.stack(vanishing(n), 1)
            error[n] = error[n] - span @ np.linalg.lstsq(span, error[n], rcond=None)[0]
    return [float(np.abs(x).max()) for x in error[1:]]


@pytest.mark.parametrize("method", SPLITTINGS, ids=lambda m: m.name)
def test_splitting_satisfies_its_order_conditions_and_no_more(method):
    assert method.flows == tuple((part, float(c)) for part, c in method.exact)
    *kept, first_missed = defects(method.exact, min(method.order, 9) + 1, method.rkn)
    assert max(kept) < 1e-15
    if method.order < 10:
        assert first_missed > 1e-8
    else:
        assert first_missed < 1e-15


@pytest.mark.parametrize("method", [m for m in SPLITTINGS if m.order > 1], ids=lambda m: m.name)
def test_a_wrong_digit_loses_the_order(method):
    # Two drifts or two kicks trade 1e-13, so that their sums stay right.
    flows = list(method.exact)
    for i, sign in ((0, 1), (2, -1)):
        flows[i] = (flows[i][0], flows[i][1] + sign * Decimal("1e-13"))
    assert max(defects(flows, min(method.order, 6), method.rkn)) > 1e-15


# The error terms with one, two and three kicks are free up to these degrees.
NEAR_INTEGRABLE = {"saba2": (4, 2), "aba864": (8, 6, 4), "aba1064": (10, 6, 4)}


@pytest.mark.parametrize("name", NEAR_INTEGRABLE)
def test_near_integrable_rows_have_their_generalised_order(name):
    orders = NEAR_INTEGRABLE[name]
    method = METHODS[name]
    assert isinstance(method, Splitting)
    error = error_terms(method.exact, max(orders) + 1)
    for kicks, order in enumerate(orders, 1):
        sizes = []
        for degree in range(1, order + 2):
            words = [i for i in range(2**degree) if i.bit_count() == kicks]
            sizes.append(max((abs(error[degree][i]) for i in words), default=0))
        assert max(sizes[:order]) < 1e-15
        assert sizes[order] > 1e-12


# Symmetry alone gives bm4_rkn the fourth order; the quadratic kinetic energy its small error.
NYSTROM = [m for m in SPLITTINGS if m.rkn and m.name != "bm4_rkn"]


@pytest.mark.parametrize("method", NYSTROM, ids=lambda m: m.name)
def test_nystrom_rows_need_what_they_say(method):
    assert max(defects(method.exact, method.order)) > 1e-6
    swapped = tuple((not kick, c) for kick, c in method.exact)
    assert max(defects(swapped, method.order, rkn=True)) > 1e-6


# --- Order conditions of Gauss methods --------------------------------------------------------


@pytest.mark.parametrize("s", range(1, 13))
def test_gauss_tableau_satisfies_the_simplifying_assumptions(s):
    # B(2s) and C(s) give order 2s: Hairer, Lubich & Wanner (2006), theorem II.1.5.
    tableau = gauss_legendre(s)
    for k in range(1, 2 * s + 1):
        assert abs(tableau.b @ tableau.c ** (k - 1) - 1 / k) < 4e-16
    for k in range(1, s + 1):
        assert np.abs(tableau.A @ tableau.c ** (k - 1) - tableau.c**k / k).max() < 6e-16
    assert (tableau.mu + tableau.mu.T == 1).all()
    assert (tableau.mu == 1 - tableau.mu[::-1, ::-1]).all()


def test_gauss_tableau_matches_closed_forms():
    r3, r15 = math.sqrt(3), math.sqrt(15)
    two = [[1 / 4, 1 / 4 - r3 / 6], [1 / 4 + r3 / 6, 1 / 4]]
    three = [
        [5 / 36, 2 / 9 - r15 / 15, 5 / 36 - r15 / 30],
        [5 / 36 + r15 / 24, 2 / 9, 5 / 36 - r15 / 24],
        [5 / 36 + r15 / 30, 2 / 9 + r15 / 15, 5 / 36],
    ]
    # Hairer, Lubich & Wanner's table of order 8, first row, from 36 digits.
    four = [
        0.0869637112843634643432659873055,
        -0.026604180084998793313385130476953,
        0.012627462689404724515056880574618,
        -0.0035551496857956831569109818495696,
    ]
    np.testing.assert_allclose(gauss_legendre(1).A, [[0.5]], rtol=0, atol=0)
    np.testing.assert_allclose(gauss_legendre(2).A, two, rtol=0, atol=6e-17)
    np.testing.assert_allclose(gauss_legendre(3).A, three, rtol=0, atol=6e-17)
    np.testing.assert_allclose(gauss_legendre(4).A[0], four, rtol=0, atol=6e-17)
    np.testing.assert_allclose(gauss_legendre(3).b, [5 / 18, 8 / 18, 5 / 18], rtol=0, atol=6e-17)
    with pytest.raises(ValueError, match="at least 1"):
        gauss_legendre(0)


def test_guess_extrapolates_polynomial_slopes_exactly():
    tableau = gauss_legendre(3)
    slopes = 2 - tableau.c + 3 * tableau.c**2
    expected = 2 - (1 + tableau.c) + 3 * (1 + tableau.c) ** 2
    np.testing.assert_allclose(tableau.ahead @ slopes, expected, rtol=1e-14)


def test_every_row_is_named_and_sourced():
    for name, method in METHODS.items():
        assert name == method.name
        assert len(method.source) > 8
