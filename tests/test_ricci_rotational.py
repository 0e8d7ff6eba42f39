"""The rotationally symmetric Ricci flow of spheres, up to their neck pinch."""

import math

import pytest
import torch

from darboux._checks import ConvergenceError
from darboux.flows import ricci_rotational
from darboux.manifolds import curvature

F64 = torch.float64


def nodes(size):
    return (torch.arange(size, dtype=F64) + 0.5) * (math.pi / size)


def dumbbell(size, lean=0.0):
    s = nodes(size)
    return s.sin() * (1 - 0.7 * s.sin() ** 4 * (1 + lean * s.cos()))


@pytest.mark.parametrize("n", [2, 3])
def test_round_spheres_shrink_by_the_closed_form(n):
    x = nodes(24)
    run = ricci_rotational.rotational_flow(2 * x.sin(), 2 * math.pi, 0.3, n=n, save_every=1000)
    r = math.sqrt(4 - 2 * n * 0.3)
    assert run.status == "done"
    assert float((run.psi[-1] / (r * x.sin()) - 1).abs().max()) <= 1e-9
    assert float((run.arclength[-1] - r * x).abs().max()) <= 1e-9
    run = ricci_rotational.rotational_flow(2 * x.sin(), 2 * math.pi, 9.0, n=n)
    assert run.status == "extinct"
    assert abs(float(run.pinch_time) - 2 / n) <= 1e-9


@pytest.mark.parametrize("n", [2, 3])
def test_the_rate_is_ricci_and_a_lie_derivative(n):
    """Against the tensors of the metric in polar coordinates, by automatic differentiation."""

    def exponents(x, a, b):
        big, w = a * torch.cos(2 * x) + 0.1 * torch.cos(x), b * torch.cos(x) * x.sin() ** 2
        return big - w, big + w

    def metric_of(a, b):
        def metric(z):
            u, v = exponents(z[..., 0], a, b)
            ring = torch.exp(2 * v) * z[..., 0].sin() ** 2
            parts = [torch.exp(2 * u), ring]
            for i in range(1, n):
                parts.append(parts[-1] * z[..., i].sin() ** 2)
            return torch.diag_embed(torch.stack(parts, -1))

        return metric

    def fields(x, a, b):
        u, v = exponents(x, a, b)
        return torch.stack([(u + v) / 2, (v - u) / (2 * x.sin() ** 2)])

    g, bar, size = metric_of(0.3, 0.2), metric_of(-0.1, 0.15), 48
    x = nodes(size)
    found = ricci_rotational.rotational_rate(fields(x, 0.3, 0.2), fields(x, -0.1, 0.15), n)
    found, x = found[:, ::7], x[::7]
    z = torch.full((len(x), n + 1), 1.1, dtype=F64)
    z[:, 0] = x

    def deturck(y):
        gamma = _christoffel(g, y) - _christoffel(bar, y)
        return torch.einsum("pq,kpq->k", torch.linalg.inv(g(y)), gamma)

    def lie(y):
        w, dw = deturck(y), torch.func.jacrev(deturck)(y)
        lowered = g(y) @ dw
        return torch.func.jacrev(g)(y) @ w + lowered + lowered.T

    expected = -2 * curvature.ricci(g, z) + torch.stack([lie(y) for y in z])
    u_t, v_t = (expected[:, i, i] / (2 * g(z)[:, i, i]) for i in (0, 1))
    torch.testing.assert_close(found[0], (u_t + v_t) / 2, atol=1e-8, rtol=0)
    torch.testing.assert_close(found[1] * 2 * x.sin() ** 2, v_t - u_t, atol=1e-8, rtol=0)


def _christoffel(metric, y):
    dg = torch.func.jacrev(metric)(y)  # (i, j, l)
    first = (dg.permute(0, 2, 1) + dg - dg.permute(2, 1, 0)) / 2  # g_jl,i etc.: (l, i, j)
    return torch.einsum("kl,lij->kij", torch.linalg.inv(metric(y)), first)


def test_volume_falls_by_the_integral_of_the_scalar_curvature():
    s = nodes(48)
    psi = s.sin() * (1 - 0.3 * s.sin() ** 2)
    run = ricci_rotational.rotational_flow(psi, math.pi, 2e-3, dt=5e-4)
    chi = torch.stack([_slope(a) for a in run.arclength])
    volumes = (chi * run.psi**2).mean(-1)
    # R = 4 K_0 + 2 K_1 in the variables of the profile, here by differences in arclength
    psi_s = torch.stack([_odd(p) for p in run.psi]) / chi
    scalar = torch.stack([_even(q) for q in psi_s]) / chi
    scalar = -4 * scalar / run.psi + 2 * (1 - psi_s**2) / run.psi**2
    loss = (chi * run.psi**2 * scalar).mean(-1)
    h = torch.diff(run.t)
    assert len(h) == 4
    simpson = h[0] / 3 * (loss[0] + 4 * loss[1] + 2 * loss[2] + 4 * loss[3] + loss[4])
    assert float((volumes[0] - volumes[-1]) / simpson - 1) == pytest.approx(0, abs=1e-9)


def _fourier(f, sign):
    # the derivative of the even (+) or odd (-) extension to the whole circle
    whole = torch.cat([f, sign * f.flip(0)])
    k = torch.fft.fftfreq(len(whole), 1 / len(whole), dtype=F64)
    k[len(whole) // 2] = 0
    return torch.fft.ifft(1j * k * torch.fft.fft(whole)).real[: len(f)]


def _odd(f):
    return _fourier(f, -1)


def _even(f):
    return _fourier(f, 1)


def _slope(arclength):
    x = nodes(len(arclength))
    c = arclength[-1] + arclength[0]  # the length, by symmetry of the profile
    return c / math.pi + _odd(arclength - c * x / math.pi)


def test_necks_pinch_where_and_when():
    run = ricci_rotational.rotational_flow(dumbbell(64), math.pi, 1.0, pinched_below=0.2)
    assert run.status == "pinched"
    assert abs(float(run.pinch_place) - math.pi / 2) <= 1e-3  # by symmetry
    assert abs(float(run.pinch_time) / 0.07154 - 1) <= 2e-3  # 128 nodes and two other gauges
    coarse, fine = (
        ricci_rotational.rotational_flow(dumbbell(size, 0.3), math.pi, 1.0, pinched_below=0.2)
        for size in (48, 64)
    )
    assert abs(float(coarse.pinch_time / fine.pinch_time) - 1) <= 2e-3
    assert abs(float(coarse.pinch_place / fine.pinch_place) - 1) <= 5e-3
    assert float(fine.pinch_place) < math.pi / 2 - 0.05


def test_gradients_through_time():
    x = nodes(10)

    def end(amplitude, length):
        psi = length / math.pi * x.sin() * (1 - amplitude * x.sin() ** 2)
        run = ricci_rotational.rotational_flow(psi, length, 0.02, dt=0.01)
        return run.psi[-1], run.length[-1]

    a = torch.tensor([0.1, 0.3], dtype=F64)[:, None].requires_grad_()
    assert torch.autograd.gradcheck(lambda a: end(a, torch.tensor(3.0, dtype=F64)), (a,), atol=1e-6)


def test_what_a_bad_profile_is_told():
    x = nodes(16)
    flow = ricci_rotational.rotational_flow
    with pytest.raises(ValueError, match="close smoothly"):
        flow(2 * x.sin(), math.pi, 0.1)
    with pytest.raises(ValueError, match="at least 8"):
        flow(x[:4].sin(), math.pi, 0.1)
    with pytest.raises(ValueError, match="not positive"):
        flow(-x.sin(), math.pi, 0.1)
    with pytest.raises(ValueError, match="expected a positive number"):
        flow(x.sin(), math.pi, -0.1)
    with pytest.raises(ConvergenceError, match="no longer resolves") as caught:
        flow(dumbbell(16, 0.3), math.pi, 1.0, pinched_below=0.05)
    assert bool(caught.value.trajectory.psi.isfinite().all())
