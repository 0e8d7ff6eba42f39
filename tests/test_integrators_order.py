"""Every method has the order it states: by its order conditions, and by the slope of its errors."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from integrator_cases import F64, OSCILLATOR, SPLITTINGS, hardest, solve, start

from darboux.integrators import METHODS, ExplicitRungeKutta, Gauss, gauss_legendre, integrate

# --- Order conditions of splittings -----------------------------------------------------------
# A composition of flows is a product of exponentials of two letters, drift 0 and kick 1. The
# method has order p when its logarithm is drift + kick up to words of length p. A series is a
# list: entry n holds the coefficients of all 2^n words of length n.


def times(a, b):
    return [
        sum(np.multiply.outer(a[k], b[n - k]).ravel() for k in range(n + 1)) for n in range(len(a))
    ]


def exponential(letter, c, degree):
    series = []
    for n in range(degree + 1):
        series.append(np.zeros(2**n))
        series[n][-letter] = c**n / math.factorial(n)  # the word of n equal letters
    return series


def logarithm(series):
    x = [np.zeros(1), *series[1:]]
    power, total = x, x
    for k in range(2, len(x)):
        power = times(power, x)
        total = [t - (-1) ** k / k * p for t, p in zip(total, power, strict=True)]
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


def defects(flows, degree, rkn=False):
    """Return the size of the error terms of each degree up to ``degree``."""
    product = exponential(0, 0.0, degree)
    for kick, c in flows:
        product = times(product, exponential(int(kick), c, degree))
    error = logarithm(product)
    error[1] = error[1] - 1
    if rkn:
        for n in range(4, degree + 1):
            span = np.stack(vanishing(n), 1)
            error[n] = error[n] - span @ np.linalg.lstsq(span, error[n], rcond=None)[0]
    return [float(np.abs(x).max()) for x in error[1:]]


@pytest.mark.parametrize("method", SPLITTINGS, ids=lambda m: m.name)
def test_splitting_satisfies_its_order_conditions_and_no_more(method):
    *kept, first_missed = defects(method.flows, min(method.order, 9) + 1, method.rkn)
    if method.order < 10:
        assert max(kept) < 2e-14
        assert first_missed > 1e-8
    else:
        assert max(*kept, first_missed) < 2e-14


# Symmetry alone gives bm4_rkn the fourth order; the quadratic kinetic energy its small error.
NYSTROM = [m for m in SPLITTINGS if m.rkn and m.name != "bm4_rkn"]


@pytest.mark.parametrize("method", NYSTROM, ids=lambda m: m.name)
def test_nystrom_rows_need_what_they_say(method):
    assert max(defects(method.flows, method.order)) > 1e-6
    swapped = tuple((not kick, c) for kick, c in method.flows)
    assert max(defects(swapped, method.order, rkn=True)) > 1e-6


def test_a_wrong_digit_loses_the_order():
    flows = list(next(m for m in SPLITTINGS if m.name == "yoshida6").flows)
    flows[2] = (flows[2][0], flows[2][1] + 1e-9)
    assert max(defects(tuple(flows), 6)) > 1e-10


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


# --- Slopes -----------------------------------------------------------------------------------

# Where the generic problem reaches round-off before its slope settles: a long stretch of the
# oscillator instead, with these two numbers of steps and this tolerance.
LONG = {
    "bm6_rkn": (96, 192, 0.1),
    "bm6_rkn14": (96, 192, 0.1),
    "suzuki_umeno8": (192, 384, 0.1),
    "kahan_li8": (192, 384, 0.1),
    "sofroniou_spaletta10": (96, 192, 0.1),
    "gauss8": (96, 192, 0.1),
    "gauss10": (96, 192, 0.1),
    "gauss12": (64, 96, 0.1),
    "gauss14": (32, 48, 0.3),
    "gauss16": (24, 32, 0.4),
}


@cache
def reference(system):
    return solve(system, *start(3), 1.0)


def end(system, state, method, t, steps):
    run = integrate(system, *state, dt=t / steps, steps=steps, method=method, save_every=steps)
    return torch.cat([run.q[-1], run.p[-1]], -1)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in LONG])
def test_order_by_slope_on_a_generic_system(name):
    method = METHODS[name]
    system, errors = hardest(method), []
    for level in range(1 if method.explicit else 2, 7):
        z = end(system, start(3), method, 1.0, 2**level)
        errors.append(float((z - reference(system)).norm()))
        if errors[-1] < 1.5e-12:  # round-off of the reference
            del errors[-1]
            break
    assert math.log2(errors[-2] / errors[-1]) == pytest.approx(method.order, abs=0.1)


@pytest.mark.parametrize("name", LONG)
def test_order_by_slope_on_the_oscillator(name):
    coarse, fine, tolerance = LONG[name]
    state = torch.tensor([1.0], dtype=F64), torch.tensor([0.3], dtype=F64)
    t, c, s = 96.0, math.cos(96.0), math.sin(96.0)
    exact = torch.tensor([c + 0.3 * s, 0.3 * c - s], dtype=F64)
    a, b = (float((end(OSCILLATOR, state, name, t, n) - exact).norm()) for n in (coarse, fine))
    order = math.log(a / b) / math.log(fine / coarse)
    assert order == pytest.approx(METHODS[name].order, abs=tolerance)


def test_every_row_is_named_and_sourced():
    for name, method in METHODS.items():
        assert name == method.name
        assert len(method.source) > 8
        assert method.explicit != isinstance(method, Gauss)
        assert method.symplectic != isinstance(method, ExplicitRungeKutta)
