"""Kernel sums: against the dense formula, in memory, at degenerate particles, differentiated."""

import time
from typing import Any

import pytest
import torch

from darboux.flows import _blocks, kernel_sums as ks
from darboux.flows.kernels import (
    Bilinear,
    Distance,
    Gaussian,
    InverseMultiquadric,
    Laplace,
    bandwidth,
)

F64 = torch.float64


def draw(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matrix(x, y, h):
    return torch.exp(-(x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1) / (2 * h))


@pytest.mark.parametrize(("dtype", "tol"), [(F64, 1e-13), (torch.float32, 3e-6)])
@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_the_three_forms_agree_with_the_dense_formula(dtype, tol, shift):
    x, y = draw(3, 7, 2) + shift, draw(3, 9, 2, seed=1) + shift
    b, w = draw(3, 9, 4, seed=2), draw(3, 9, seed=3).abs()
    h = torch.tensor([0.5, 1.0, 3.0], dtype=F64)
    # rounding x itself is not the engine's error
    x, y = x.to(dtype).double(), y.to(dtype).double()
    k = matrix(x, y, h[:, None, None])
    s = ks.gaussian_sum(*(z.to(dtype) for z in (x, y, b, h)))
    m = ks.gaussian_mean(*(z.to(dtype) for z in (x, y, b, h, w)))
    lse = ks.gaussian_log_sum(*(z.to(dtype) for z in (x, y, h, w)))
    assert s.dtype == dtype
    scale = tol * 20 if dtype == torch.float32 else tol * (1 + shift)
    assert float((s - k @ b).abs().max()) <= scale
    kw = k * w.unsqueeze(-2)
    assert float((m - kw @ b / kw.sum(-1, keepdim=True)).abs().max()) <= scale
    assert float((lse - kw.sum(-1).log()).abs().max()) <= scale


def test_far_particles_underflow_to_the_right_limits():
    y = draw(20, 2)
    x = torch.tensor([[140.0, 0.0], [1e3, 1e3]], dtype=F64)
    h = torch.tensor(0.5, dtype=F64)
    logits = -(x[:, None] - y).square().sum(-1) / (2 * h)
    lse = ks.gaussian_log_sum(x, y, h)
    assert torch.allclose(lse, logits.logsumexp(-1), rtol=1e-12)
    mean = ks.gaussian_mean(x, y, y, h)
    assert float((mean - logits.softmax(-1) @ y).abs().max()) <= 1e-9
    assert float(ks.gaussian_sum(x, y, y, h).abs().max()) <= 1e-14  # truly about e^-19000


def test_absent_particles_leave_no_trace():
    x, y, b = draw(4, 2), draw(6, 2, seed=1), draw(6, 3, seed=2)
    w = torch.tensor([0.2, 0.0, 0.3, 0.0, 0.5, 0.0], dtype=F64)
    h = torch.tensor(0.7, dtype=F64)
    y = y.requires_grad_()
    w = w.requires_grad_()
    keep = [0, 2, 4]
    mean = ks.gaussian_mean(x, y, b, h, w)
    assert torch.allclose(mean, ks.gaussian_mean(x, y[keep], b[keep], h, w[keep]), atol=1e-14)
    lse = ks.gaussian_log_sum(x, y, h, w)
    assert torch.allclose(lse, ks.gaussian_log_sum(x, y[keep], h, w[keep]), atol=1e-13)
    for g in torch.autograd.grad(mean.sum() + lse.sum(), [y, w]):
        assert bool(g.isfinite().all())
        assert float(g[1::2].abs().max()) == 0.0


@pytest.mark.parametrize("kind", ["coincident", "one", "spread"])
@pytest.mark.parametrize("second", [False, True])
def test_derivatives(kind, second):
    n = 1 if kind == "one" else 4
    x = torch.zeros(n, 2, dtype=F64) if kind == "coincident" else draw(n, 2)
    b, w = draw(n, 2, seed=2), draw(n, seed=3).abs() + 0.1
    h = torch.tensor(0.7, dtype=F64)
    inputs = [z.clone().requires_grad_() for z in (x, b, h, w)]

    def f(x, b, h, w):
        return (
            ks.gaussian_sum(x, x, b, h),
            ks.gaussian_mean(x, x, b, h, w),
            ks.gaussian_log_sum(x, x, h, w),
        )

    check = torch.autograd.gradgradcheck if second else torch.autograd.gradcheck
    assert check(f, inputs)


def test_forward_mode_and_nested_transforms_fall_back_and_agree():
    x, h = draw(5, 2), torch.tensor(0.7, dtype=F64)
    t = draw(5, 2, seed=1)

    def f(x):
        return ks.gaussian_log_sum(x, x, h).square().sum()

    def plain(x):
        return matrix(x, x, h).sum(-1).log().square().sum()

    found = torch.func.jvp(f, (x,), (t,))
    expected = torch.func.jvp(plain, (x,), (t,))
    assert torch.allclose(found[0], expected[0], rtol=1e-13)
    assert torch.allclose(found[1], expected[1], rtol=1e-12)
    hess = torch.func.hessian(f)(x)
    assert float((hess - torch.func.hessian(plain)(x)).abs().max()) <= 1e-11
    batch = torch.func.vmap(f)(torch.stack([x, t]))
    assert torch.allclose(batch, torch.stack([f(x), f(t)]), rtol=1e-13)


def test_a_causal_and_a_boolean_mask_are_the_same():
    q, k, v = draw(2, 5, 3), draw(2, 5, 3, seed=1), draw(2, 5, 2, seed=2)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = (q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    cases: list[dict[str, Any]] = [{"causal": True}, {"mask": mask}]
    for kwargs in [*cases, {"mask": mask.expand(2, 5, 5)}]:
        assert torch.allclose(ks.attend(q, k, v, **kwargs), expected, atol=1e-14)
        assert torch.allclose(ks.attend_plainly(q, k, v, causal=True), expected, atol=1e-14)
    with pytest.raises(ValueError, match="one of them"):
        ks.attend(q, k, v, mask=mask, causal=True)


KERNELS = {
    "gaussian": (Gaussian(0.8), lambda z: torch.exp(-z.square().sum(-1) / 1.6)),
    "imq": (InverseMultiquadric(0.8), lambda z: (1 + z.square().sum(-1) / 0.8).rsqrt()),
    "laplace": (Laplace(0.8), lambda z: torch.exp(-z.norm(dim=-1) / 0.8**0.5)),
    "distance": (Distance(), lambda z: -z.norm(dim=-1)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_and_their_gradients(name):
    kernel, formula = KERNELS[name]
    x, y, b, w = draw(6, 3), draw(5, 3, seed=1), draw(5, 2, seed=2), draw(5, seed=3)
    k = formula(x[:, None] - y)
    assert torch.allclose(kernel.sum(x, y, b), k @ b, atol=1e-13)
    assert torch.allclose(kernel(x, y), k, atol=1e-13)
    z = x.clone().requires_grad_()
    (g,) = torch.autograd.grad((formula(z[:, None] - y) @ w).sum(), z)
    assert torch.allclose(kernel.gradient_sum(x, y, w), g, atol=1e-13)
    assert torch.allclose(kernel.repulsion(x, y, w), -g, atol=1e-13)
    # coincident particles: finite, and the self term has no gradient
    twice = torch.zeros(2, 3, dtype=F64).requires_grad_()
    (g,) = torch.autograd.grad(kernel.sum(twice, twice, torch.ones(2, 1, dtype=F64)).sum(), twice)
    assert float(g.abs().max()) <= 1e-15


def test_the_bilinear_kernel():
    A = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=F64)
    x, y, w = draw(4, 2), draw(5, 2, seed=1), draw(5, seed=2)
    kernel = Bilinear(A)
    assert torch.allclose(kernel(x, y), x @ A @ y.mT + 1, atol=1e-14)
    assert torch.allclose(kernel.gradient_sum(x, y, w), (w @ y @ A).expand(4, 2), atol=1e-14)
    assert torch.allclose(kernel.repulsion(x, y, w), x @ A * w.sum(), atol=1e-14)


def test_blocks_of_rows_join_and_recompute(monkeypatch):
    x, b = draw(23, 2).requires_grad_(), draw(23, 2, seed=1)
    kernel = Laplace(0.8)

    def run():
        out = kernel.sum(x, x, b)
        return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]

    whole = run()
    monkeypatch.setattr(ks, "_BLOCK", 5 * 23 * 2)
    for a, b_ in zip(run(), whole, strict=True):
        assert torch.allclose(a, b_, atol=1e-13)


def test_memory_is_linear_in_the_number_of_particles():
    activities = [torch.profiler.ProfilerActivity.CPU]
    peaks = []
    for n in (1000, 4000):
        x = draw(n, 2, dtype=torch.float32).requires_grad_()
        h = torch.tensor(0.5)
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            ks.gaussian_sum(x, x, x, h).sum().backward()
        profiler: Any = profile.profiler
        events = profiler.kineto_results.events()
        held = peak = 0
        for e in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            held += e.nbytes()
            peak = max(peak, held)
        peaks.append(peak)
    assert 1000 < peaks[1] < 4.5 * peaks[0]
    assert peaks[1] < 4000 * 4000  # a quarter of the matrix of pairs


def test_far_apart_particles_cost_no_more_than_near_ones():
    # exp underflows there, and a raw one is up to a hundred times slower
    x = draw(1500, 2, dtype=torch.float32)
    kernel = Laplace(1.0)
    b = torch.ones(1500, 1)

    def seconds(scale):
        best = 1e9
        for _ in range(3):
            start = time.process_time()
            ks.gaussian_sum(scale * x, scale * x, b, torch.tensor(1.0))
            kernel.sum(scale * x, scale * x, b)
            best = min(best, time.process_time() - start)
        return best

    seconds(1.0)
    assert seconds(300.0) <= 4 * seconds(1.0)


def test_rules_of_width():
    x = draw(50, 3)
    pairs = torch.pdist(x).square()
    expected = pairs.sort().values[(len(pairs) - 1) // 2] / (
        2 * torch.tensor(51.0, dtype=F64).log()
    )
    assert torch.allclose(bandwidth(x), expected, rtol=1e-12)
    expected = x.var(0, correction=0).mean() * 50 ** (-2 / 7)
    assert torch.allclose(bandwidth(x, "scott"), expected, rtol=1e-12)
    for collapsed in (torch.zeros(5, 2, dtype=F64), torch.zeros(1, 2, dtype=F64)):
        assert float(bandwidth(collapsed)) == 1.0
        out = Gaussian("median").sum(collapsed, collapsed, torch.ones_like(collapsed))
        assert torch.equal(out, torch.full_like(collapsed, len(collapsed)))


@pytest.mark.parametrize("h", [0.0, -1.0, float("nan"), torch.tensor(0.0), "silverman"])
def test_a_bad_width_is_refused(h):
    with pytest.raises(ValueError, match="bandwidth|rule"):
        Gaussian(h).sum(draw(3, 2), draw(3, 2), draw(3, 1))


@pytest.mark.parametrize(("d", "c"), [(2, 3), (3, 9)])  # values expanded into columns, and not
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_sums_of_particles_with_themselves(d, c, lead, monkeypatch):
    x, b, h = 1e3 + draw(*lead, 23, d), draw(23, c, seed=1), torch.full(lead, 0.7, dtype=F64)
    inputs = [z.clone().requires_grad_() for z in (x, b, h)]
    g = draw(*lead, 23, c, seed=2)

    def y_sum(y, x, b, h):
        return ks.gaussian_sum(x, y, b, h)

    def run(y, x, b, h):
        s = y_sum(y(x), x, b, h)
        first = torch.autograd.grad((g * s).sum(), [x, b, h], create_graph=True)
        length = torch.stack([z.square().sum() for z in first]).sum()
        second = torch.autograd.grad(length, [x, b, h])
        plain = torch.autograd.grad((g * y_sum(y(x), x, b, h)).sum(), [x, b, h])
        return [s, *plain, *second]

    expected = run(lambda x: x.view_as(x), *inputs)  # another object: the path of any two sets
    for block in (1 << 20, 8 * 49):  # one block; blocks of seven, one problem at a time
        monkeypatch.setattr(_blocks, "_BYTES", block)
        for found, value in zip(run(lambda x: x, *inputs), expected, strict=True):
            found, value = found.detach(), value.detach()
            assert float((found - value).abs().max()) <= 1e-10 * (1 + float(value.abs().max()))
