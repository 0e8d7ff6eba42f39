"""The compiled engine against the eager executor, and the catalogue against autograd."""

import gc
import re
import weakref
from typing import Any

import pytest
import torch
from integrator_cases import PENDULUM, perihelion, rocking, start
from torch import Tensor, nn

from darboux import ConvergenceError
from darboux.integrators import (
    METHODS,
    Hamiltonian,
    Separable,
    Splitting,
    VectorField,
    catalogue,
    engine,
    integrate,
)
from darboux.integrators._codegen import Expressions
from darboux.integrators._kernels import NoCompiler, compiler

F64 = torch.float64
LEAPFROG = METHODS["leapfrog"]
SPREAD = ["leapfrog", "position_leapfrog", "ruth3", "yoshida4", "bm6_rkn", "kahan_li8"]

try:
    compiler()
except NoCompiler as error:
    pytest.skip(str(error), allow_module_level=True)


def randn(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, dtype=F64, generator=generator)


def symmetric(d: int) -> Tensor:
    a = randn(d, d)
    return a @ a.mT / d + torch.eye(d, dtype=F64)


class Network(nn.Module):
    """A potential with two layers."""

    def __init__(self, activation: type[nn.Module]):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(2, 7), activation(), nn.Linear(7, 1)).double()

    def forward(self, q: Tensor) -> Tensor:
        return self.layers(q).squeeze(-1) + q.square().sum(-1)


def pairs(q: Tensor) -> Tensor:
    """Return a potential of all pairs of bodies, as one writes it."""
    gap = (q[..., :, None, :] - q[..., None, :, :]).square().sum(-1)
    return -torch.rsqrt(gap + 0.1).triu(1).sum((-2, -1))


def clipped(q: Tensor) -> Tensor:
    """Return a potential with kinks."""
    return (
        torch.clamp(q, -0.5, 0.4).square().sum(-1) + torch.relu(q - 0.1).sum(-1) + q.abs().sum(-1)
    )


WEIGHTS = randn(3, 2)

CATALOGUE = {
    "oscillator": (lambda: catalogue.oscillator(1.3), (2,)),
    "quadratic": (lambda: catalogue.quadratic(symmetric(3), mass=1 + randn(3).square()), (3,)),
    "harmonic_chain": (lambda: catalogue.oscillator_chain(0.7), (5,)),
    "fput": (lambda: catalogue.oscillator_chain(1.0, 0.25, 0.3), (4,)),
    "kepler": (lambda: catalogue.kepler(1.2), (2,)),
    "gravity": (lambda: catalogue.gravity(1 + randn(3).square(), 0.8, 0.5), (3, 3)),
    "gravity_many": (lambda: catalogue.gravity(1 + randn(11).square(), 0.8, 0.5), (11, 3)),
    "toda": (catalogue.toda, (3,)),
    "toda_open": (lambda: catalogue.toda(periodic=False), (3,)),
    "henon_heiles": (catalogue.henon_heiles, (2,)),
    "pendulum": (lambda: catalogue.pendulum(1.1), (1,)),
    "double_well": (catalogue.double_well, (2,)),
    "torus_pair": (lambda: catalogue.torus_pair(0.4), (2,)),
}
WRITTEN = {
    "kepler by hand": (lambda: Separable(lambda q: -1 / q.norm(dim=-1)), (2,)),
    "rocking": (lambda: Separable(rocking), (2,)),
    "general kinetic": (
        lambda: Separable(rocking, lambda p: (1 + p.square().sum(-1)).sqrt()),
        (2,),
    ),
    "tanh network": (lambda: Separable(Network(nn.Tanh)), (2,)),
    "softplus network": (lambda: Separable(Network(nn.Softplus)), (2,)),
    "silu network": (lambda: Separable(Network(nn.SiLU)), (2,)),
    "gelu network": (lambda: Separable(Network(nn.GELU)), (2,)),
    "einsum": (
        lambda: Separable(lambda q: torch.einsum("...i,ki->...k", q, WEIGHTS).cos().sum(-1)),
        (2,),
    ),
    "softmax": (lambda: Separable(lambda q: torch.logsumexp(q @ WEIGHTS.mT, -1)), (2,)),
    "pairs": (lambda: Separable(pairs), (3, 2)),
    "kinks": (lambda: Separable(clipped), (2,)),
    "elementary": (
        lambda: Separable(
            lambda q: (
                (torch.exp(-(q**2)) + torch.log1p(q * q) + torch.atan(q) + torch.sinh(q / 4)).sum(
                    -1
                )
                + (2 + torch.sin(q)).pow(2.3).mean(-1)
                + torch.sigmoid(q[..., 0]) * q[..., 1]
            )
        ),
        (2,),
    ),
    "force alone": (lambda: Separable(force=lambda q: -torch.sin(q).roll(1, -1)), (3,)),
    "of the time": (
        lambda: Separable(lambda q, t: (q * q).sum(-1) * (1 + t.sin()), time=True),
        (2,),
    ),
}
ALL = CATALOGUE | WRITTEN


def state(system: Separable, event: tuple[int, ...], *batch: int) -> tuple[Tensor, Tensor]:
    """Return a lifted state, on moderate orbits of Kepler's problem."""
    q, p = 0.2 * randn(*batch, *event), 0.2 * randn(*batch, *event, seed=1)
    if len(event) == 1:
        q[..., 0] += 2
        p[..., -1] += 0.7
    return system.lift(q, p, 0.2) if system.time else (q, p)


def both(method, system, q, p, dt, steps, **options):
    with torch.no_grad():
        fast = engine.advance(method, system, q, p, dt, steps, None, **options)
        slow = method.advance(system, q, p, dt, steps, None)
    return fast[:2], slow[:2]


def agree(fast, slow, tolerance=1e-13) -> None:
    for a, b in zip(fast, slow, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert float((a - b).abs().max()) <= tolerance * (1 + float(b.abs().max()))


@pytest.mark.parametrize("name", ALL)
def test_kernel_is_eager(name):
    make, event = ALL[name]
    system = make()
    q, p = state(system, event, 11)
    assert engine.engine_of(system, q, p) == "native kernel"
    for spread in SPREAD if name in ("kepler", "rocking") else ["leapfrog"]:
        method = METHODS[spread]
        assert isinstance(method, Splitting)
        agree(*both(method, system, q, p, 0.01, 200 // len(method.flows) * 3))


@pytest.mark.parametrize("name", ["kepler", "gravity_many", "pairs"])
@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 5), (70,)])
def test_batch_shapes_and_directions(name, batch):
    make, event = ALL[name]
    system = make()
    q, p = state(system, event, *batch)
    for steps, dt in ((0, 0.1), (1, 0.1), (3, -0.1)):
        agree(*both(LEAPFROG, system, q, p, dt, steps))
    # What is not contiguous is read in the right order.
    q, p = (x.mT.contiguous().mT if x.dim() > 1 else x for x in (q, p))
    agree(*both(LEAPFROG, system, q, p, 0.1, 2))


@pytest.mark.parametrize("name", ["kepler", "gravity_many", "tanh network"])
def test_single_precision(name):
    make, event = ALL[name]
    system = make()
    q, p = (x.float() for x in state(system, event, 5))
    if name == "tanh network":
        system.potential.float()
    if name == "gravity_many":
        system = catalogue.gravity((1 + randn(11).square()).float(), 0.8, 0.5)
    agree(*both(LEAPFROG, system, q, p, 0.01, 50), tolerance=2e-5)


@pytest.mark.parametrize("name", CATALOGUE)
def test_catalogue_force(name):
    make, event = CATALOGUE[name]
    system = make()
    q, _ = state(system, event, 4)
    q.requires_grad_()
    (slope,) = torch.autograd.grad(system.potential(q).sum(), q)
    torch.testing.assert_close(system.force(q), -slope, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- gradients


def gradients(advance, make, event, leaves, dt):
    q, p = (x.requires_grad_() for x in state(make(), event, 9))
    q1, p1, _ = advance(make(), q, p, dt)
    weight = randn(*q1.shape, seed=2)
    return torch.autograd.grad((q1 * weight).sum() + p1.square().sum(), [q, p, *leaves])


def learnable():
    log_mu = torch.tensor(0.1, dtype=F64, requires_grad=True)
    masses = (1 + randn(3).square()).requires_grad_()
    many = (1 + randn(9).square()).requires_grad_()
    strength, soft = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (0.9, 0.4))
    network = Network(nn.Tanh)
    shared = nn.Parameter(randn(2, 2))
    return {
        "kepler, of a logarithm": (lambda: catalogue.kepler(log_mu.exp()), (2,), [log_mu]),
        "by hand": (lambda: Separable(lambda q: -log_mu.exp() / q.norm(dim=-1)), (2,), [log_mu]),
        "gravity": (
            lambda: catalogue.gravity(masses, strength, soft),
            (3, 3),
            [masses, strength, soft],
        ),
        "gravity, many": (
            lambda: catalogue.gravity(many, strength, soft),
            (9, 3),
            [many, strength, soft],
        ),
        "network": (lambda: Separable(network), (2,), list(network.parameters())[:-1]),
        "matrix": (lambda: catalogue.quadratic(shared @ shared.mT), (2,), [shared]),
        "mass": (
            lambda: catalogue.oscillator_chain(strength, 0.2, soft, mass=masses),
            (3,),
            [strength, soft, masses],
        ),
        "kinks": (lambda: Separable(clipped), (2,), []),
    }


@pytest.mark.parametrize("name", learnable())
@pytest.mark.parametrize("method", ["position_leapfrog", "ruth3"])
def test_gradient(name, method):
    make, event, leaves = learnable()[name]
    dt = torch.tensor(0.02, dtype=F64, requires_grad=True)
    method = METHODS[method]
    fast = gradients(
        lambda s, q, p, h: engine.advance(method, s, q, p, h, 40), make, event, [*leaves, dt], dt
    )
    slow = gradients(
        lambda s, q, p, h: method.advance(s, q, p, h, 40, None), make, event, [*leaves, dt], dt
    )
    for a, b in zip(fast, slow, strict=True):
        assert float((a - b).abs().max()) <= 1e-10 * float(b.abs().max() + 1e-3)


def test_gradient_of_several_calls():
    mu = torch.tensor(1.1, dtype=F64, requires_grad=True)
    system = catalogue.kepler(mu)
    q, p = perihelion(0.3)
    grads = []
    for advance in (engine.advance, LEAPFROG.advance.__func__):
        x, y, total, memory = q, p, torch.zeros((), dtype=F64), None
        for _ in range(3):
            x, y, memory = advance(LEAPFROG, system, x, y, 0.01, 20, memory)
            total = total + x[0]
        grads += torch.autograd.grad(total, mu)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=0)


def test_gradient_is_the_same_in_every_run_and_with_threads():
    network = Network(nn.Tanh)
    system = Separable(network)
    q, p = (x.requires_grad_() for x in state(system, (2,), 3000))
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        q1, _, _ = engine.advance(LEAPFROG, system, q, p, 0.01, 100)
        results.append(
            torch.autograd.grad(q1.square().sum(), [q, *list(network.parameters())[:-1]])
        )
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_chaotic_gradient_is_refused():
    system = catalogue.henon_heiles()
    q = torch.tensor([0.0, 0.1], dtype=F64, requires_grad=True)
    p = torch.tensor([0.55, 0.1], dtype=F64)
    q1, _, _ = engine.advance(LEAPFROG, system, q, p, 0.05, 40_000)
    with pytest.raises(ConvergenceError, match="chaotic"):
        q1.sum().backward()


def test_no_second_derivative():
    q, p = (x.requires_grad_() for x in state(catalogue.kepler(), (2,)))
    q1, _, _ = engine.advance(LEAPFROG, catalogue.kepler(), q, p, 0.1, 3)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(q1.sum(), q, create_graph=True)


def test_a_detached_part_is_noticed():
    mu = torch.tensor(1.0, dtype=F64, requires_grad=True)
    system = Separable(force=lambda q: -q * (mu + mu.detach()))
    q, p = state(system, (2,), 3)
    with pytest.raises(ValueError, match="detached"):
        engine.advance(LEAPFROG, system, q, p, 0.1, 3)


# ---------------------------------------------------------------- what changes between calls


def test_new_values_are_seen():
    mu, factor = torch.tensor(1.0, dtype=F64), 1.0
    network = Network(nn.Tanh)
    weight = next(network.parameters())
    system = Separable(lambda q: factor * mu * q.square().sum(-1) + network(q))
    q, p = state(system, (2,), 3)
    agree(*both(LEAPFROG, system, q, p, 0.1, 5))
    mu.fill_(2.0)
    with torch.no_grad():
        weight.mul_(1.5)
    agree(*both(LEAPFROG, system, q, p, 0.1, 5))
    mu = torch.tensor(3.0, dtype=F64)
    agree(*both(LEAPFROG, system, q, p, 0.1, 5))
    factor = 0.5
    agree(*both(LEAPFROG, system, q, p, 0.1, 5))
    network.layers[0].weight = nn.Parameter(randn(7, 2))
    agree(*both(LEAPFROG, system, q, p, 0.1, 5))


def test_systems_are_let_go():
    system = catalogue.kepler()
    engine.advance(LEAPFROG, system, *state(system, (2,)), 0.1, 2)
    gone = weakref.ref(system)
    del system
    gc.collect()
    assert gone() is None


def test_inputs_are_left_alone():
    system = catalogue.kepler()
    q, p = state(system, (2,), 3)
    before = q.clone(), p.clone()
    engine.advance(LEAPFROG, system, q, p, 0.1, 2)
    agree((q, p), before, 0.0)


def test_one_line_for_one_compilation(capfd):
    system = Separable(lambda q: 0.1234567 * q.square().sum(-1))
    for _ in range(2):
        engine.advance(LEAPFROG, system, *state(system, (2,), 3), 0.1, 2)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("compiled leapfrog for Separable in ")
    assert line.endswith(" s (native kernel)")


# ---------------------------------------------------------------- long runs


def test_compensated_sums():
    system = catalogue.oscillator()
    q, p = torch.tensor([1.0], dtype=F64), torch.tensor([0.0], dtype=F64)
    h, steps = 0.01, 1_000_000

    def drift(compensated: bool) -> float:
        # Leapfrog keeps this quadratic form exactly; HLW (2006), I.1.4.
        x, y, memory = q, p, None
        for _ in range(2):
            x, y, memory = engine.advance(
                LEAPFROG, system, x, y, h, steps // 2, memory, compensated=compensated
            )
        return abs(float(y**2 + (1 - h * h / 4) * x**2) - (1 - h * h / 4))

    assert drift(True) < 1e-15 < 1e-14 < drift(False)


@pytest.mark.parametrize("name", ["kepler", "gravity_many"])
def test_compensated_is_eager(name):
    make, event = ALL[name]
    system = make()
    q, p = state(system, event, 5)
    agree(*both(LEAPFROG, system, q, p, 0.01, 50, compensated=True))


# ---------------------------------------------------------------- what it will not do


def test_refusals():
    q, p = state(catalogue.kepler(), (2,), 3)
    coupled = Hamiltonian(lambda q, p: (q * p).sum(-1))
    assert "not an explicit splitting" in str(engine.supports(METHODS["rk4"], coupled))
    assert engine.supports(METHODS["gauss4"], coupled) is None
    assert "a Hamiltonian, not a Separable" in str(engine.supports(LEAPFROG, coupled))
    assert engine.supports(LEAPFROG, catalogue.kepler()) is None
    with pytest.raises(ValueError, match="not a Separable"):
        engine.advance(LEAPFROG, coupled, q, p, 0.1, 1)
    with pytest.raises(TypeError, match=r"dtype torch\.float16"):
        engine.advance(LEAPFROG, catalogue.kepler(), q.half(), p.half(), 0.1, 1)


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    system = catalogue.kepler()
    with pytest.raises(RuntimeError, match=r"neither g\+\+ nor clang\+\+"):
        engine.advance(LEAPFROG, system, *state(system, (2,)), 0.1, 1)


@pytest.mark.parametrize(
    ("system", "event", "words"),
    [
        (Separable(force=lambda q: q.sort(-1).values), (2,), "it uses aten.sort"),
        (
            Separable(lambda q: (q - q.mean(0)).square().sum(-1)),
            (2,),
            "trajectories of a batch mix",
        ),
        (Separable(pairs), (90, 3), "more than 12000 scalar operations"),
        (Separable(lambda q: q.square().sum(-1) * q.sum().item()), (2,), "get value out"),
    ],
)
def test_what_no_kernel_can_do_is_said(system, event, words):
    said = engine.engine_of(system, *state(system, event, 3))
    assert said.startswith("torch.compile in chunks of steps: no native kernel, for ")
    assert re.search(words, said)


def test_a_batch_that_mixes_is_one_system():
    strength = 1 + randn(3, 1).square()
    system = Separable(force=lambda q: -strength * (q - q.mean(0)))
    q, p = state(system, (2,), 3)
    assert engine.engine_of(system, q, p) == "native kernel"
    agree(*both(LEAPFROG, system, q, p, 0.1, 20))


@pytest.mark.slow
def test_the_second_engine(capfd, monkeypatch):
    monkeypatch.setattr(engine, "_CHUNK", 3)
    # The potential says that trajectories are independent, but each has its own strength.
    strength = 1 + randn(3).square()
    system = Separable(lambda q: strength * q.square().sum(-1))
    q, p = state(system, (1,), 3)
    agree(*both(LEAPFROG, system, q, p, 0.1, 7))
    assert "(torch.compile in chunks of steps: no native kernel" in capfd.readouterr().err
    strength.mul_(2)
    agree(*both(LEAPFROG, system, q, p, 0.1, 7))
    with pytest.raises(ValueError, match="no gradient, for the engine is torch.compile"):
        engine.advance(LEAPFROG, system, q.requires_grad_(), p, 0.1, 7)
    with pytest.raises(ValueError, match="no compensated sums"):
        engine.advance(LEAPFROG, system, q.detach(), p, 0.1, 7, compensated=True)


# ---------------------------------------------------------------- implicit methods


def coupled_energy(q: Tensor, p: Tensor) -> Tensor:
    """Return an energy without parts that keeps angular momentum."""
    return (1 + q.square().sum(-1)) * p.square().sum(-1) / 2 + q.square().sum(-1) / 2


COUPLED = Hamiltonian(coupled_energy)
ROTOR = torch.tensor([1.0, 2.0, 3.5], dtype=F64)
IMPLICIT = {
    "henon_heiles": (lambda: catalogue.henon_heiles(), (2,), "gauss6"),
    "gravity": (lambda: catalogue.gravity(1 + randn(3).square(), 0.8, 0.5), (3, 3), "gauss4"),
    "coupled": (lambda: COUPLED, (2,), "gauss6"),
    "midpoint": (lambda: COUPLED, (2,), "implicit_midpoint"),
    "eight stages": (lambda: COUPLED, (2,), "gauss16"),
    "pair": (lambda: COUPLED, (2,), "lobatto4"),
    "driven": (
        lambda: Hamiltonian(
            lambda q, p, t: coupled_energy(q, p) + t.sin() * q.square().sum(-1), time=True
        ),
        (2,),
        "gauss4",
    ),
    "body": (lambda: VectorField(lambda m: torch.linalg.cross(m, m / ROTOR)), (3,), "gauss4"),
}


def moving(name: str, *batch: int) -> tuple[Any, Tensor, Any, str]:
    """Return a system, a state and a method."""
    make, event, method = IMPLICIT[name]
    q, p = randn(*batch, *event, scale=0.15), randn(*batch, *event, scale=0.15, seed=1)
    return make(), q, None if name == "body" else p, method


@pytest.mark.parametrize("name", IMPLICIT)
def test_an_implicit_kernel_is_eager(name):
    system, q, p, method = moving(name, 9)
    rest = q[..., :0] if p is None else p
    said = engine.engine_of(system, *system.lift(q, rest, 0.0), method=METHODS[method])
    assert said == "native kernel"
    steps = 200 if name == "henon_heiles" else 40
    options = {"dt": 0.05, "steps": steps, "save_every": steps // 3, "method": method}
    fast = integrate(system, q, p, compile=True, **options)
    slow = integrate(system, q, p, **options)
    agree(fast[1 : 2 if p is None else 3], slow[1 : 2 if p is None else 3], 1e-12)


def test_implicit_kernels_take_any_batch_and_resume_where_they_were():
    system, q, p, method = moving("coupled", 2, 5)
    options = {"dt": -0.05, "steps": 20, "method": method, "compile": True}
    whole = integrate(system, q, p, save_every=20, **options)
    often = integrate(system, q, p, **options)
    assert torch.equal(often.q[-1], whole.q[-1])
    # A trajectory does not depend on its neighbours.
    alone = integrate(system, q[1, 4], p[1, 4], save_every=20, **options)
    assert torch.equal(alone.q[-1], whole.q[-1, 1, 4])
    single = integrate(system, q.float(), p.float(), save_every=20, **options)
    agree(single[1:], [x.float() for x in whole[1:]], 2e-6)


def test_implicit_kernels_keep_what_symplectic_symmetric_maps_keep():
    # Gauss methods keep quadratic invariants: HLW (2006), theorem IV.2.2.
    system, q, p, method = moving("coupled", 9)
    options = {"dt": 0.1, "steps": 5000, "save_every": 500, "method": method, "compile": True}
    run = integrate(system, q, p, **options)
    momentum = run.q[..., 0] * run.p[..., 1] - run.q[..., 1] * run.p[..., 0]
    assert float((momentum - momentum[0]).abs().max()) < 1e-14
    energy = system.energy(run.q, run.p)
    assert float((energy / energy[0] - 1).abs().max()) < 1e-7
    back = integrate(system, run.q[1], run.p[1], **{**options, "dt": -0.1, "steps": 500})
    agree((back.q[-1], back.p[-1]), (q, p), 1e-12)


def test_an_implicit_kernel_is_symplectic():
    system, q, p, method = moving("coupled")
    h, steps = 1e-3, torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=F64)
    z = torch.cat([q, p]) + h * steps[:, None, None] * torch.eye(4, dtype=F64)
    run = integrate(
        system, z[..., :2], z[..., 2:], dt=0.1, steps=5, save_every=5, method=method, compile=True
    )
    end = torch.cat([run.q[-1], run.p[-1]], -1)
    j = ((end[0] - end[3]) / 12 + (end[2] - end[1]) * (2 / 3)).mT / h  # up to h^4
    omega = torch.eye(4, dtype=F64).roll(2, 1) * torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    assert float((j.mT @ omega @ j - omega).abs().max()) < 1e-10


def test_single_precision_does_not_drift():
    # Coefficients rounded one by one to float32 are not symplectic: 19 standard errors.
    e = torch.linspace(0.1, 0.6, 64)
    q, p = torch.stack([1 - e, 0 * e], -1), torch.stack([0 * e, ((1 + e) / (1 - e)).sqrt()], -1)
    run = integrate(
        catalogue.kepler(),
        q,
        p,
        dt=0.06,
        steps=10_000,
        save_every=10_000,
        method="gauss8",
        compile=True,
    )
    q, p = run.q.double(), run.p.double()
    momentum = q[..., 0] * p[..., 1] - q[..., 1] * p[..., 0]
    error = momentum[1] / momentum[0] - 1
    assert abs(float(error.mean())) < 5 * float(error.std()) / 8


def test_gradients_of_implicit_kernels():
    _, q, p, method = moving("coupled", 3)
    rate = torch.tensor(0.7, dtype=F64, requires_grad=True)
    dt = torch.tensor(0.05, dtype=F64, requires_grad=True)
    system = Hamiltonian(lambda q, p: coupled_energy(rate.exp() * q, p))
    leaves = (q.requires_grad_(), p.requires_grad_(), rate, dt)
    first, second = [], []
    kinds: list[dict[str, Any]] = [
        {},
        {"compile": True, "adjoint": "reversible"},
        {"compile": True, "adjoint": "checkpoint"},
        {"compile": True},
    ]
    for more in kinds:
        run = integrate(system, q, p, dt=dt, steps=4, save_every=3, method=method, **more)
        loss = (run.q.cos() * run.p).sum()
        first.append(torch.autograd.grad(loss, leaves, retain_graph=True))
        if "adjoint" not in more:
            grads = torch.autograd.grad(loss, leaves, create_graph=True)
            total = torch.cat([x.flatten() for x in grads]).sum()
            second.append(torch.autograd.grad(total, leaves))
    for fast in first[1:]:
        agree(fast, first[0], 1e-12)
    agree(second[1], second[0], 1e-12)


def test_a_force_detached_in_part_has_the_gradient_of_the_eager_run():
    mu = torch.tensor(1.0, dtype=F64, requires_grad=True)
    system = Separable(force=lambda q: -q * (mu + mu.detach()))
    q, p = state(system, (2,), 3)
    options = {"dt": 0.1, "steps": 3, "method": "gauss4"}
    fast, slow = (
        torch.autograd.grad(integrate(system, q, p, compile=c, **options).q.sum(), mu)
        for c in (True, False)
    )
    agree(fast, slow, 1e-13)


def test_new_values_are_seen_by_implicit_kernels():
    mu, factor = torch.tensor(1.0, dtype=F64), 1.0
    system = Hamiltonian(lambda q, p: mu * factor * coupled_energy(q, p))
    _, q, p, _ = moving("coupled", 3)

    def check():
        options = {"dt": 0.1, "steps": 5, "method": "gauss4"}
        agree(integrate(system, q, p, compile=True, **options), integrate(system, q, p, **options))

    check()
    mu.fill_(2.0)
    check()
    factor = 0.5
    check()


@pytest.mark.parametrize(
    ("system", "words"),
    [
        # The frequency grows with time, the motion reaches infinity, the field its edge.
        (
            Hamiltonian(
                lambda q, p, t: torch.exp(t) * (q.square() + p.square()).sum(-1), time=True
            ),
            "change by",
        ),
        (Hamiltonian(lambda q, p: (p.square() - q.pow(4)).sum(-1)), "change by nan"),
        (Hamiltonian(lambda q, p: (p.square() + (0.8 - q).sqrt()).sum(-1)), "change by nan"),
    ],
)
def test_an_unsolved_step_of_a_kernel_is_named(system, words):
    q = torch.tensor([[0.5, 0.3]] * 9, dtype=F64)
    q[:8] = 0.01  # fails later than the last one, if at all
    options = {"dt": 0.1, "method": "gauss4", "compile": True}
    with pytest.raises(ConvergenceError, match=r"gauss4, between steps \d+ and \d+:") as info:
        integrate(system, q, q, steps=100, save_every=5, **options)
    error = info.value
    assert words in str(error)
    assert error.iterations > 0
    assert not error.residual < 1e-13
    step = int(str(error).split("steps ")[1].split(" ")[0])
    assert error.trajectory.q.shape == (step // 5 + 1, 9, 2)
    assert bool(error.trajectory.q.isfinite().all())
    whole = integrate(system, q, q, steps=step, save_every=step or 1, **options)
    assert bool(whole.q.isfinite().all())


def test_a_field_without_a_kernel_runs_without(capfd):
    system = Hamiltonian(lambda q, p: p.square().sum(-1) + q.sort(-1).values[..., 0].square())
    _, q, p, method = moving("coupled", 3)
    options = {"dt": 0.05, "steps": 4, "method": method}
    fast = integrate(system, q, p, compile=True, **options)
    said = "uncompiled: no native kernel, for it uses aten.sort"
    assert f"gauss6 for Hamiltonian runs {said}" in capfd.readouterr().err
    assert engine.engine_of(system, q, p, METHODS[method]).startswith(said)
    agree(fast, integrate(system, q, p, **options), 0.0)


# ---------------------------------------------------------------- expressions


def test_expressions_are_simplified():
    e = Expressions()
    x, y = e.new("input", "q", 0, 0), e.new("input", "q", 1, 0)
    number = e.literal
    assert e.add(x, y) == e.add(y, x)
    assert e.mul(number(2.0), e.mul(number(0.5), x)) == x
    assert e.sub(x, e.neg(y)) == e.add(x, y)
    assert e.div(x, e.apply("sqrt", y)) == e.mul(x, e.apply("rsqrt", y))
    assert e.pow(x, number(2.0)) == e.mul(x, x)
    assert e.where(e.compare("lt", number(1.0), number(2.0)), x, y) == x


def test_the_implicit_kernel_compensates_its_sums():
    """The energy of a pendulum stays at one rounding; summed plainly it walks away tenfold."""
    q, p = start(32)
    run = integrate(
        PENDULUM,
        0.4 * q,
        0.4 * p,
        dt=0.02,
        steps=50_000,
        method="gauss6",
        save_every=500,
        compile=True,
    )
    energy = PENDULUM.energy(run.q, run.p)
    assert float((energy - energy[0]).square().mean().sqrt()) < 3e-16
