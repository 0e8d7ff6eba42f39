"""Attention as particles: against matrices, exact equations of motion, energies, invariants."""

import itertools
import math
from typing import Any

import pytest
import torch

from darboux import ConvergenceError
from darboux.flows import gaussian as ga
from darboux.flows.interaction import NORMS, SelfAttention, attention, attention_energy, interact
from darboux.manifolds import Sphere

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def dense(q, k, v, beta, norm, w, mask):
    l = beta * q @ k.mT
    a = l if norm == "linear" else l.exp()
    a = a * w.unsqueeze(-2) * mask
    if norm == "softmax":
        a = a / a.sum(-1, keepdim=True)
    if norm == "sinkhorn":
        for _ in range(200):
            a = a / a.sum(-2, keepdim=True) * w.unsqueeze(-2)
            a = a / a.sum(-1, keepdim=True) * w.unsqueeze(-1)
        a = a / w.unsqueeze(-1)
    return a @ v


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", ["no", "causal", "random"])
def test_attention_is_its_matrix(norm, weighted, masked):
    if norm == "sinkhorn" and masked != "no":
        with pytest.raises(ValueError, match="no mask"):
            attention(draw(4, 2), draw(4, 2), draw(4, 2), norm=norm, causal=True)
        return
    q, k, v = draw(3, 6, 2), draw(3, 6, 2, seed=1), draw(3, 6, 4, seed=2)
    w = torch.full((6,), 1 / 6, dtype=F64)
    if weighted:
        w = draw(6, seed=3).abs() + 0.1
        w = w / w.sum()
    mask = torch.ones(6, 6, dtype=torch.bool)
    kwargs: dict[str, Any] = {}
    if masked == "causal":
        mask, kwargs = mask.tril(), {"causal": True}
    elif masked == "random":
        mask = draw(6, 6, seed=4) > 0
        mask[:, 0] = True
        kwargs = {"mask": mask}
    out = attention(
        q, k, v, beta=0.7, norm=norm, w=w if weighted else None, iterations=200, **kwargs
    )
    expected = dense(q, k, v, 0.7, norm, w, mask)
    assert torch.allclose(out, expected, atol=1e-12)
    single = attention(
        *(z.float() for z in (q, k, v)),
        beta=0.7,
        norm=norm,
        w=w.float() if weighted else None,
        **kwargs,
    )
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), expected, atol=1e-4)


def test_sinkhorn_attention_is_doubly_stochastic():
    q, k, eye = draw(5, 2), draw(5, 2, seed=1), torch.eye(5, dtype=F64)
    a = attention(q, k, eye, norm="sinkhorn", iterations=300)
    assert torch.allclose(a.sum(-1), torch.ones(5, dtype=F64), atol=1e-13)
    assert torch.allclose(a.sum(-2), torch.ones(5, dtype=F64), atol=1e-10)


@pytest.mark.parametrize("norm", ["softmax", "sum", "linear"])
def test_causal_attention_does_not_see_the_future(norm):
    x = 0.4 * draw(6, 3)
    y = x.clone()
    y[4:] += 0.2
    field = SelfAttention(norm=norm, causal=True)
    a, b = (interact(field, z, dt=0.1, steps=3).x[-1] for z in (x, y))
    assert torch.allclose(a[:4], b[:4], atol=1e-14)
    assert not torch.allclose(a[4:], b[4:])


def test_heads_add():
    Q, K, V = draw(2, 3, 4), draw(2, 3, 4, seed=1), draw(2, 4, 4, seed=2)
    x = draw(3, 5, 4, seed=3)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    both = SelfAttention(Q, K, V)(x, mask)
    parts = [SelfAttention(*(A[h] for A in (Q, K, V)), causal=True)(x) for h in range(2)]
    assert torch.allclose(both, parts[0] + parts[1], atol=1e-13)


@pytest.mark.parametrize("norm", ["softmax", "sum"])
def test_equiangular_tokens_on_the_sphere_follow_their_equation(norm):
    n, beta, rho = 4, 1.5, torch.tensor(0.2, dtype=F64)
    gram = rho + (1 - rho) * torch.eye(n, dtype=F64)
    x = torch.linalg.cholesky(gram)
    run = interact(
        SelfAttention(beta=beta, norm=norm, manifold=Sphere(n - 1)), x, dt=0.02, steps=50
    )

    def field(r):
        e = torch.exp(beta * r)
        below = math.exp(beta) + (n - 1) * e if norm == "softmax" else n
        return (2 * e * (1 - r) * ((n - 1) * r + 1) / below,)

    (exact,) = ga.solve(field, (rho,), 1.0, 200)
    found = run.x[-1] @ run.x[-1].mT
    off = found[~torch.eye(n, dtype=torch.bool)]
    assert float((off - exact).abs().max()) <= 1e-8
    assert float((found.diagonal() - 1).abs().max()) <= 1e-13


@pytest.mark.parametrize("norm", ["softmax", "sum"])
@pytest.mark.parametrize("space", ["flat", "sphere"])
def test_attention_climbs_its_energy_at_the_stated_rate(norm, space):
    sphere = Sphere(2) if space == "sphere" else None
    x = draw(6, 3) if sphere is None else sphere.project(draw(6, 3))
    beta = 1.3
    v = SelfAttention(beta=beta, norm=norm, manifold=sphere)(x)
    rate = torch.func.jvp(lambda x: attention_energy(x, beta), (x,), (v,))[1]
    z = torch.ones(6, dtype=F64)
    if norm == "softmax":
        z = torch.exp(beta * x @ x.mT).mean(-1)
    assert abs(float(rate - (z * v.square().sum(-1)).mean())) <= 1e-12 * float(rate)


def test_linear_attention_preserves_elliptical_laws_and_a_causal_mask_does_not():
    x = draw(8, 3)
    second = x.mT @ x / 8
    repel = -torch.eye(3, dtype=F64)
    run = interact(SelfAttention(V=repel, norm="linear"), x, dt=0.01, steps=100, save_every=100)
    end = run.x[-1]
    M = end.mT @ end / 8
    assert float((M - ga.linear_attention_flow(second, 1.0)).abs().max()) <= 1e-8

    def radii(x):
        M = x.mT @ x / len(x)
        return (x @ ga.inverse(M) * x).sum(-1)

    general = (draw(3, 3, seed=1), 0.3 * draw(3, 3, seed=2))
    for Q, V in ((None, repel), general):
        run = interact(SelfAttention(Q=Q, V=V, norm="linear"), x, dt=0.02, steps=50)
        assert float((radii(run.x[-1]) - radii(x)).abs().max()) <= 1e-10
        assert float((run.x[-1] - x).abs().max()) >= 0.1
    run = interact(SelfAttention(V=repel, norm="linear", causal=True), x, dt=0.02, steps=50)
    assert float((radii(run.x[-1]) - radii(x)).abs().max()) >= 0.1


def test_softmax_attention_of_a_gaussian_is_affine():
    import numpy as np

    z, p = (torch.as_tensor(a) for a in np.polynomial.hermite_e.hermegauss(30))
    p = p / p.sum()
    x = 0.6 * torch.cartesian_prod(z, z) + torch.tensor([0.3, -0.2], dtype=F64)
    w = torch.outer(p, p).reshape(-1)
    Q, K, V = (0.8 * draw(2, 2, seed=s) for s in (1, 2, 3))
    v = SelfAttention(Q, K, V)(x, w=w)
    m, S = ga.moments(x, w)
    near = (x - m).norm(dim=-1) < 1.5
    exact = (m + x @ (S @ K.mT @ Q).mT) @ V.mT
    assert float((v - exact)[near].abs().max()) <= 1e-9
    dm, _ = ga.attention_field(m, S, K.mT @ Q, V)
    assert torch.allclose(w @ v, dm, atol=1e-9)


@pytest.mark.parametrize("space", ["flat", "sphere"])
def test_tokens_with_momentum_conserve_energy_without_friction(space):
    sphere = Sphere(2) if space == "sphere" else None
    x = 0.3 * draw(5, 3) if sphere is None else sphere.project(draw(5, 3))
    v = 0.3 * draw(5, 3, seed=1)
    v = v if sphere is None else sphere.project_tangent(x, v)
    field = SelfAttention(norm="sum", manifold=sphere)

    def hamiltonian(x, v):  # attention climbs the energy: it is minus the potential
        return v.square().sum(-1).mean() / 2 - attention_energy(x)

    drift = []
    for n in (10, 20):
        run = interact(field, x, v=v, dt=0.5 / n, steps=n, save_every=n)
        assert run.v is not None
        drift.append(abs(float(hamiltonian(run.x[-1], run.v[-1]) - hamiltonian(x, v))))
    assert drift[1] <= drift[0] / 12
    assert drift[1] <= 1e-6
    damped = interact(field, x, v=v, friction=2.0, dt=0.03, steps=20)
    assert damped.v is not None
    fall = [float(hamiltonian(a, b)) for a, b in zip(damped.x, damped.v, strict=True)]
    assert all(late < early for early, late in itertools.pairwise(fall))
    if sphere is not None:
        assert float((damped.x.norm(dim=-1) - 1).abs().max()) <= 1e-13
        assert float((damped.x * damped.v).sum(-1).abs().max()) <= 1e-13


def test_tokens_in_a_half_sphere_gather_in_one_point():
    x = draw(10, 3)
    x[:, 2] = x[:, 2].abs()
    sphere = Sphere(2)
    x = sphere.project(x)
    end = interact(SelfAttention(beta=1.0, manifold=sphere), x, dt=0.2, steps=150).x[-1]
    assert float((end @ end.mT).min()) >= 1 - 1e-10


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["spread", "coincident", "one", "zero weight"])
def test_gradcheck_in_tokens_matrices_and_temperature(norm, kind):
    x = draw(1 if kind == "one" else 4, 2)
    if kind == "coincident":
        x[1:3] = x[0]
    w = None
    if kind == "zero weight":
        w = torch.tensor([0.5, 0.2, 0.0, 0.3], dtype=F64)
    beta = torch.tensor(0.8, dtype=F64)

    def f(x, Q, K, V, beta):
        return SelfAttention(Q, K, V, beta=beta, norm=norm, iterations=3)(x, w=w)

    inputs = [
        z.clone().requires_grad_() for z in (x, *(draw(2, 2, seed=s) for s in (1, 2, 3)), beta)
    ]
    assert torch.autograd.gradcheck(f, inputs)
    batch = torch.func.vmap(lambda x: SelfAttention(norm=norm)(x, w=w))(torch.stack([x, 2 * x]))
    assert torch.allclose(batch[1], SelfAttention(norm=norm)(2 * x, w=w), atol=1e-13)


def test_blow_up_is_reported_and_the_good_part_kept():
    with pytest.raises(ConvergenceError, match="blow up") as caught:
        interact(SelfAttention(norm="sum"), 2 * draw(5, 2), dt=0.5, steps=50)
    assert bool(caught.value.trajectory.x.isfinite().all())


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"norm": "tanh"}, "unknown norm"),
        ({"mask": torch.ones(3, 3)}, "mask is"),
        ({"mask": torch.zeros(3, 3, dtype=torch.bool)}, "empty"),
        ({"causal": True, "mask": torch.ones(3, 3, dtype=torch.bool)}, "no mask"),
        ({"w": torch.ones(4, dtype=F64)}, "w has shape"),
    ],
)
def test_bad_input_is_refused(kwargs, match):
    x = draw(3, 2)
    with pytest.raises(ValueError, match=match):
        attention(x, x, x, **kwargs)


@pytest.mark.parametrize("norm", ["sum", "linear"])
def test_causal_attention_needs_no_matrix_of_pairs(norm):
    n = 150  # more than two blocks, and a part of one
    x = 0.5 * draw(2, n, 3)
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    found, expected = [], []
    for kwargs, out in (({"causal": True}, found), ({"mask": mask}, expected)):
        options: dict[str, Any] = {"norm": norm, "beta": 3.0, **kwargs}
        z = x.clone().requires_grad_()
        y = attention(z, z, z, **options)
        (g,) = torch.autograd.grad(y.square().sum(), z)
        batch = torch.func.vmap(lambda x, o=options: attention(x, x, x, **o))(x)
        out += [y.detach(), g, batch]
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) <= 1e-12 * float(b.abs().max())
    spoiled = x.clone()
    spoiled[:, 100:] = 1e3  # what comes later does not leak, not even as round-off
    y = attention(spoiled, spoiled, x, norm=norm, causal=True)
    clean = attention(x, x, x, norm=norm, causal=True)
    assert torch.allclose(y[:, :100], clean[:, :100], rtol=1e-13, atol=0)
    big = torch.zeros(6000, 8).requires_grad_()
    sizes: list[int] = []
    pack = lambda t: sizes.append(t.numel()) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        attention(big, big, big, norm=norm, causal=True).sum()
    assert max(sizes, default=0) <= 6000 * 70  # 17 times fewer numbers than pairs
