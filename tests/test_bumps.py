"""Token bumps on flat tori: closed-form matrix elements and the streaming spectrum."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from darboux.manifolds import TokenBumps
from darboux.manifolds.spectral import bases
from darboux.manifolds.spectral.bases import Basis, Fourier
from darboux.manifolds.spectral.bumps import (
    LowRank,
    StreamingSpectrum,
    bump_elements,
    low_rank_elements,
    periodised,
)
from darboux.manifolds.spectral.eigen import eigenpairs
from darboux.manifolds.spectral.operator import Operator

galerkin: Any = bases.galerkin  # its matrices are dense
SKEW = torch.tensor([[3.0, 0.9], [-0.6, 4.2]], dtype=torch.float64)
CASES = pytest.mark.parametrize(
    ("basis", "size"),
    [
        (Fourier(5, 1, nodes=48), 0.5),
        (Fourier(3, nodes=28), 0.6),
        (Fourier((2, 3), lattice=SKEW, nodes=32), 0.4),
        (Fourier(1, 3, nodes=16), 0.9),
    ],
    ids=["circle", "square", "skew", "three"],
)


def tokens(basis: Fourier, size: float, n: int = 3, seed: int = 0) -> TokenBumps:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    centers = random(n, basis.dim) @ basis.lattice * 1.5 - 1  # some outside the cell
    sigma = size * (0.8 + 0.4 * random(n))
    return TokenBumps(centers, 2 * random(n, basis.dim) - 1, random(n), sigma)


def parameters(bumps: TokenBumps) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return bumps.centers, bumps.directions, bumps.amplitudes, bumps.sigma


def flat(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype).expand(len(x), -1, -1)


def by_quadrature(basis: Fourier, bumps: TokenBumps) -> tuple[Tensor, Tensor]:
    # the first-order changes tr(h)/2 I - h and tr(h)/2, summed over nodes one by one
    h = periodised(bumps, basis)(basis.points) - flat(basis.points)
    trace = h.diagonal(dim1=-2, dim2=-1).sum(-1)
    return Basis.assemble(basis, 0.5 * trace[:, None, None] * flat(basis.points) - h, 0.5 * trace)


@CASES
def test_elements_against_quadrature(basis, size):
    bumps = tokens(basis, size)
    stiffness, mass = bump_elements(basis, bumps)
    slow = by_quadrature(basis, bumps)
    errors = (stiffness - slow[0]).abs().max(), (mass - slow[1]).abs().max()
    print("elements", *map(float, errors))
    assert max(errors) < 1e-12
    each = bump_elements(basis, bumps, each=True)
    assert each.d_mass.shape == (3, basis.size, basis.size)
    assert (each.d_stiffness.sum(0) - stiffness).abs().max() < 1e-13
    assert (each.d_mass.sum(0) - mass).abs().max() < 1e-13
    centers, directions, amplitudes, sigma = (x[1:2] for x in parameters(bumps))
    one = TokenBumps(centers, directions, amplitudes, sigma)
    assert (bump_elements(basis, one).d_stiffness - each.d_stiffness[1]).abs().max() < 1e-13


def test_elements_are_the_derivative_of_the_matrices():
    basis = Fourier(2, nodes=24)
    bumps = tokens(basis, 0.6)

    def operator(scale: Tensor) -> Operator:
        scaled = TokenBumps(bumps.centers, bumps.directions, scale * bumps.amplitudes, bumps.sigma)
        return galerkin(periodised(scaled, basis), basis)

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    rates = torch.func.jvp(
        lambda s: (lambda o: (o.stiffness, o.mass))(operator(s)), (zero,), (one,)
    )
    elements = bump_elements(basis, bumps)
    assert (rates[1][0] - elements.d_stiffness).abs().max() < 1e-12
    assert (rates[1][1] - elements.d_mass).abs().max() < 1e-12


def test_stiffness_ignores_isotropic_change_in_two_dimensions():
    # two bumps at one place along orthogonal directions change g by a multiple of I
    basis = Fourier(3)
    ones = torch.ones(2, dtype=torch.float64)
    bumps = TokenBumps(torch.full((2, 2), 1.3).double(), torch.eye(2).double(), ones, 0.4)
    elements = bump_elements(basis, bumps)
    assert elements.d_stiffness.abs().max() < 1e-14
    assert elements.d_mass.abs().max() > 0.01


def test_every_bump_on_a_circle_changes_its_length_alone():
    # eigenvalues (2 pi m / L)^2: rates -2 m^2 dL / 2 pi, dL = alpha v^2 sigma sqrt(2 pi) / 2
    basis = Fourier(8, 1)
    bumps = tokens(basis, 0.3, n=1)
    elements = bump_elements(basis, bumps)
    length = 0.5 * bumps.amplitudes * bumps.directions[:, 0] ** 2 * bumps.sigma
    length = length * math.sqrt(2 * math.pi)
    for m in (1, 3):
        pair = [m, m + 8]  # the cosine and the sine
        block = (elements.d_stiffness - m * m * elements.d_mass)[pair][:, pair]
        expected = -2 * m * m * length / (2 * math.pi) * torch.eye(2)
        assert (block - expected).abs().max() < 1e-13


def test_periodised_metric_is_periodic_and_smooth():
    basis = Fourier(1, lattice=SKEW)
    bumps = tokens(basis, 0.8)
    metric = periodised(bumps, basis)
    x = torch.rand(5, 2, dtype=torch.float64)
    shift = torch.tensor([2.0, -3.0], dtype=torch.float64) @ SKEW
    assert (metric(x) - metric(x + shift)).abs().max() < 1e-13
    # brute force over many images
    images = torch.cartesian_prod(*[torch.arange(-9, 10).double()] * 2) @ SKEW
    y = x[:, None, None] - bumps.centers[:, None] - images
    theta = torch.exp(-0.5 * y.square().sum(-1) / bumps.sigma.square()[:, None]).sum(-1)
    v = bumps.directions
    expected = torch.einsum("qn,na,nb->qab", theta * bumps.amplitudes, v, v) + flat(x)
    assert (metric(x) - expected).abs().max() < 1e-13


def test_derivatives_and_batches():
    basis = Fourier(1)
    bumps = tokens(basis, 0.5, n=2)
    inputs = parameters(bumps)

    def total(*given: Tensor) -> Tensor:
        stiffness, mass = bump_elements(basis, TokenBumps(*given))
        steps = torch.arange(stiffness.numel(), dtype=torch.float64).reshape(stiffness.shape)
        return (steps * stiffness).sum() + (steps.sin() * mass).sum()

    leaves = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(total, leaves)
    batch = TokenBumps(*(torch.stack([x, x.flip(0)]) for x in inputs))
    elements = bump_elements(basis, batch)
    assert elements.d_mass.shape == (2, basis.size, basis.size)
    assert (elements.d_stiffness[0] - bump_elements(basis, bumps).d_stiffness).abs().max() < 1e-14
    assert (elements.d_stiffness[1] - elements.d_stiffness[0]).abs().max() < 1e-14
    metric = periodised(batch, basis)(basis.points)
    assert metric.shape == (2, len(basis.points), 2, 2)
    assert (metric[0] - periodised(bumps, basis)(basis.points)).abs().max() < 1e-14


def test_low_rank_elements_converge_to_the_closed_form():
    basis = Fourier(2)
    bumps = tokens(basis, 0.3)
    exact = bump_elements(basis, bumps)
    errors = []
    for nodes in (1, 3, 6, 10):
        stiffness, mass = low_rank_elements(basis, bumps, nodes=nodes)
        assert mass.factors.shape == (3 * nodes**2, basis.size)
        assert stiffness.factors.shape == (9 * nodes**2, basis.size)
        errors.append(
            float((stiffness.dense() - exact.d_stiffness).abs().max())
            + float((mass.dense() - exact.d_mass).abs().max())
        )
    print("low rank", errors)
    assert errors[-1] < 1e-10
    assert errors[0] > 10 * errors[1] > 1000 * errors[2]


# -- streaming ----------------------------------------------------------------------------


def stream_of_tokens(basis: Fourier, count: int):
    for i in range(count):
        bumps = tokens(basis, 0.6, n=1, seed=i)
        small = TokenBumps(bumps.centers, bumps.directions, 0.3 * bumps.amplitudes, bumps.sigma)
        yield low_rank_elements(basis, small, nodes=4)


def test_streaming_follows_the_exact_spectrum():
    basis, k = Fourier(4), 13
    start: Any = galerkin(flat, basis)
    solves, worst = [], []
    for tolerance in (0.2, 0.07, 0.03):
        stream = StreamingSpectrum.start(start, k, tolerance=tolerance)
        stiffness, mass = start.stiffness, start.mass
        values, functions = [], []
        for changes in stream_of_tokens(basis, 30):
            stream = stream.update(*changes)
            stiffness, mass = stiffness + changes[0].dense(), mass + changes[1].dense()
            exact = eigenpairs(Operator(stiffness, mass), basis.size)
            assert stream.drift <= tolerance
            values.append(((stream.values - exact.values[:k]) / exact.values[k - 1]).abs().max())
            u = stream.functions[:, :5]  # the constant and the first shell
            part = exact.functions[:, 5:].mT @ (mass @ u)
            functions.append(part.norm(dim=0).max())
        solves.append(stream.solves)
        worst.append(float(max(values)))
        assert max(values) < tolerance**3
        assert max(functions) < tolerance**2
    print("stream", solves, worst)
    assert solves[0] < solves[1] < solves[2] <= 31
    assert worst[0] > 10 * worst[1] > 100 * worst[2]


def test_streaming_is_exact_after_a_solve_and_takes_full_matrices():
    basis = Fourier(3)
    stream = StreamingSpectrum.start(galerkin(flat, basis), tolerance=1e-12)
    both = StreamingSpectrum.start(galerkin(flat, basis), tolerance=1e-12)
    start: Any = galerkin(flat, basis)
    total, gram = start.stiffness, start.mass
    for stiffness, mass in stream_of_tokens(basis, 3):
        stream = stream.update(stiffness, mass)
        both = both.update(stiffness.dense(), mass.dense())
        total, gram = total + stiffness.dense(), gram + mass.dense()
    exact = eigenpairs(Operator(total, gram), basis.size).values
    assert stream.solves == 4
    assert (stream.values - exact).abs().max() < 1e-11
    assert (both.values - exact).abs().max() < 1e-11
    kept = stream.functions.mT @ gram @ stream.functions
    assert (kept - torch.eye(basis.size)).abs().max() < 1e-11


def test_streaming_agrees_with_perturbation_theory():
    from darboux.manifolds.spectral.perturbation import perturb

    basis = Fourier(3)
    operator = galerkin(flat, basis)
    stiffness, mass = next(stream_of_tokens(basis, 1))
    stream = StreamingSpectrum.start(operator, 9, tolerance=10.0).update(stiffness, mass)
    series = perturb(eigenpairs(operator, 9), stiffness.dense(), mass.dense())
    assert (stream.values - series.values(1.0)).abs().max() < 1e-13
    u, v = stream.functions, series.functions(1.0)
    assert ((u.mT @ u).abs() - (v.mT @ v).abs()).abs().max() < 1e-12


def test_errors():
    basis = Fourier(2)
    operator = galerkin(flat, basis)
    with pytest.raises(ValueError, match="dimension 3, expected 2"):
        bump_elements(basis, tokens(Fourier(1, 3), 0.5))
    with pytest.raises(TypeError, match="expected a TokenBumps"):
        bump_elements(basis, None)  # pyright: ignore[reportArgumentType]
    batch = TokenBumps(torch.zeros(2, 3, 2), torch.ones(2, 3, 2), torch.ones(2, 3), 0.5)
    with pytest.raises(ValueError, match="expected \\(n, d\\)"):
        low_rank_elements(basis, batch)
    with pytest.raises(ValueError, match="k is 99"):
        StreamingSpectrum.start(operator, 99)
    with pytest.raises(ValueError, match="tolerance is 0"):
        StreamingSpectrum.start(operator, tolerance=0.0)
    with pytest.raises(ValueError, match="not one dense matrix"):
        StreamingSpectrum.start(Operator(operator.stiffness[None], operator.mass[None]))
    stream = StreamingSpectrum.start(operator, 5)
    with pytest.raises(ValueError, match="3 columns, expected 25"):
        stream.update(LowRank(torch.ones(1, 3), torch.ones(1)), None)
    with pytest.raises(ValueError, match="NaN"):
        stream.update(operator.stiffness * math.nan, None)
