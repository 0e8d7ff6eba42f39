"""Gradients that retrace the run, or repeat pieces of it, are those of the recorded run."""

import math
import weakref
from typing import Any

import pytest
import torch
from integrator_cases import (
    COUPLED,
    F64,
    GENERAL,
    QUADRATIC,
    SPLITTINGS,
    hardest,
    perihelion,
    start,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from darboux._checks import ConvergenceError
from darboux.integrators import METHODS, Separable, Split, integrate, lattice

HENON_HEILES = Separable(
    lambda q: q.square().sum(-1) / 2 + q[..., 0] ** 2 * q[..., 1] - q[..., 1] ** 3 / 3,
    force=lambda q: (
        -torch.stack(
            [q[..., 0] + 2 * q[..., 0] * q[..., 1], q[..., 1] + q[..., 0] ** 2 - q[..., 1] ** 2], -1
        )
    ),
)


def kepler(mu: Tensor) -> Separable:
    return Separable(force=lambda q: q * (-mu * q.square().sum(-1, keepdim=True) ** -1.5))


def rotor() -> Split:
    """Return the free rigid body, on the momenta ``q (..., 3)``, in three exact rotations."""

    def turn(i: int, rate: float):
        def flow(q, p, h):
            j, k = (i + 1) % 3, (i + 2) % 3
            angle = torch.as_tensor(h, dtype=q.dtype) * rate * q[..., i]
            c, s = torch.cos(angle), torch.sin(angle)
            parts: list[Tensor] = [q[..., i]] * 3
            parts[j] = c * q[..., j] + s * q[..., k]
            parts[k] = c * q[..., k] - s * q[..., j]
            return torch.stack(parts, -1), p

        return flow

    return Split([turn(i, 1 / inertia) for i, inertia in enumerate((1.0, 2.0, 3.5))])


def gradients(system, q, p, parameters=(), dt: Any = 0.01, steps=100, **options):
    """Return the gradient of a function of all saved states."""
    q, p = q.detach().requires_grad_(), p.detach().requires_grad_()
    run = integrate(system, q, p, dt=dt, steps=steps, **options)
    weight = torch.arange(1.0, len(run.q) + 1, dtype=q.dtype).cos()
    loss = (weight * run.q.exp().flatten(1).sum(-1)).sum()
    if p.numel():
        loss = loss + (weight * run.p.sin().flatten(1).sum(-1)).sum()
    inputs = (q, p, *parameters) if p.numel() else (q, *parameters)
    return torch.autograd.grad(loss, inputs)


def difference(found, exact) -> float:
    pairs = zip(found, exact, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("save_every", [7, 1000])
def test_a_thousand_steps_of_kepler(save_every):
    log_mu = torch.tensor(0.1, dtype=F64, requires_grad=True)
    dt = torch.tensor(0.01, dtype=F64, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(5, 2, generator=generator, dtype=F64)
    q, p = (x + noise for x in perihelion(0.2))
    exact, *others = (
        gradients(
            kepler(log_mu.exp()),  # a captured tensor that is not a leaf
            q,
            p,
            (log_mu, dt),
            dt=dt,
            steps=1000,
            save_every=save_every,
            adjoint=adjoint,
        )
        for adjoint in ("autograd", "reversible", "checkpoint")
    )
    for found in others:
        assert difference(found, exact) < 1e-10


@pytest.mark.parametrize("method", SPLITTINGS, ids=lambda m: m.name)
def test_every_splitting_is_retraced(method):
    exact, found = (
        gradients(
            hardest(method),
            *start(3),
            dt=0.05,
            steps=8,
            save_every=3,
            method=method,
            adjoint=adjoint,
            compensated=adjoint == "reversible",
        )
        for adjoint in ("autograd", "reversible")
    )
    assert difference(found, exact) < 1e-12


@pytest.mark.parametrize("name", ["leapfrog", "kahan_li8"])
def test_splits_of_any_parts_are_retraced_by_their_flows(name):
    dt = torch.tensor(0.1, dtype=F64, requires_grad=True)
    q = torch.tensor([[0.3, 1.0, -0.4], [0.8, 0.1, 0.5]], dtype=F64)
    exact, found = (
        gradients(
            rotor(),
            q,
            q[..., :0],
            (dt,),
            dt=dt,
            steps=9,
            save_every=4,
            method=name,
            adjoint=adjoint,
        )
        for adjoint in ("autograd", "reversible")
    )
    assert difference(found, exact) < 1e-12


@pytest.mark.parametrize("name", ["implicit_midpoint", "gauss6"])
def test_symmetric_implicit_methods_are_retraced_by_steps(name):
    options = {"dt": 0.1, "steps": 6, "save_every": 2, "method": name}
    exact = gradients(COUPLED, *start(2), **options)
    assert difference(gradients(COUPLED, *start(2), adjoint="reversible", **options), exact) < 1e-11


@pytest.mark.parametrize("name", ["leapfrog", "ruth3", "bm4", "rk4", "gauss4", "tao2"])
def test_checkpoints_give_the_gradient(name):
    # Pieces of four steps or more that end at saved states; Tao's copies are in the memory.
    system = hardest(METHODS[name])
    for save_every in (1, 20):
        options = {"dt": 0.05, "steps": 20, "save_every": save_every, "method": name}
        exact = gradients(system, *start(2), **options)
        found = gradients(system, *start(2), adjoint="checkpoint", **options)
        assert difference(found, exact) < 1e-14


def test_learned_energies_get_their_gradients():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1, bias=False)).double()
    shift = torch.tensor(0.3, dtype=F64, requires_grad=True)
    mass = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    found = []
    for adjoint in ("autograd", "reversible", "checkpoint"):
        scale = shift.exp()  # ``shift`` acts by itself and through ``scale``
        system = Separable(lambda q: net(q * scale + shift)[..., 0], mass=mass)
        parameters = (*net.parameters(), shift, mass)
        options = {"steps": 30, "save_every": 11, "adjoint": adjoint}
        found.append(gradients(system, *start(4), parameters, **options))
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], rtol=1e-11, atol=1e-13)


def test_parameters_alone_and_clocks():
    rate = torch.tensor(1.3, dtype=F64, requires_grad=True)
    system = Separable(
        lambda q, t: (1 + 0.3 * torch.sin(rate * t)) * q.square().sum(-1) / 2, time=True
    )
    q, p = start(2)
    found = []
    for adjoint in ("autograd", "reversible", "checkpoint"):
        run = integrate(system, q, p, dt=0.05, steps=40, save_every=9, adjoint=adjoint)
        found.append(torch.autograd.grad(run.q.square().sum(), rate)[0])
    assert float(found[1]) == pytest.approx(float(found[0]), rel=1e-11)
    assert float(found[2]) == pytest.approx(float(found[0]), rel=1e-11)


def test_a_second_derivative_records_the_run():
    mu = torch.tensor(1.2, dtype=F64, requires_grad=True)
    system = kepler(mu)

    def hessian(adjoint):
        q = perihelion(0.1)[0].requires_grad_()
        run = integrate(
            system, q, perihelion(0.1)[1], dt=0.05, steps=20, save_every=8, adjoint=adjoint
        )
        (first,) = torch.autograd.grad(run.q.square().sum(), mu, create_graph=True)
        return torch.autograd.grad(first, (mu, q))

    assert difference(hessian("reversible"), hessian("autograd")) < 1e-11
    assert difference(hessian("checkpoint"), hessian("autograd")) < 1e-14


@pytest.mark.parametrize("on_lattice", [False, True])
def test_memory_does_not_grow_with_the_steps(on_lattice):
    def cost(steps):
        alive, most, kept = [], 0, 0

        def force(q):
            nonlocal most
            alive.append(weakref.ref(q))
            alive[:] = [x for x in alive if x() is not None]
            most = max(most, len(alive))
            return -q * q.square().sum(-1, keepdim=True) ** -1.5

        def pack(x):
            nonlocal kept
            kept += x.numel()
            return x

        q, p = (x.requires_grad_() for x in perihelion(0.2))
        run = integrate(
            Separable(force=force),
            q,
            p,
            dt=0.01,
            steps=steps,
            save_every=steps,
            adjoint="reversible",
            lattice=on_lattice,
        )
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            torch.autograd.grad(run.q[-1].sum(), (q, p))
        return most, kept / steps

    (few, _), (many, _) = cost(20), cost(1500)
    assert many <= few + 2


class LiveBytes(TorchDispatchMode):
    """Follow the storages that operations make, whatever the allocator does with freed ones."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, list | tuple) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.alive:
                self.follow(x.untyped_storage())
        return out

    def follow(self, storage):
        key, size = storage._cdata, storage.nbytes()

        def gone(_):
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def test_live_tensors_do_not_grow_with_the_steps():
    mu = torch.tensor(1.1, dtype=F64, requires_grad=True)
    q, p = (x.expand(50, 2).clone().requires_grad_() for x in perihelion(0.2))

    def peak(adjoint, steps):
        with LiveBytes() as meter:
            run = integrate(
                kepler(mu), q, p, dt=0.01, steps=steps, save_every=steps, adjoint=adjoint
            )
            torch.autograd.grad(run.q[-1].square().sum(), (q, p, mu))
        return meter.peak

    assert peak("reversible", 1000) <= 1.5 * peak("reversible", 20)
    # That the meter would see a state kept in every step:
    assert peak("autograd", 200) > 5 * peak("autograd", 20)


# --- The lattice ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SPLITTINGS, ids=lambda m: m.name)
def test_a_lattice_gradient_is_that_of_the_record_to_the_last_bit(method):
    exact, found = (
        gradients(
            HENON_HEILES,
            *start(4),
            dt=0.05,
            steps=8,
            save_every=3,
            method=method,
            adjoint=adjoint,
            lattice=True,
        )
        for adjoint in ("autograd", "reversible")
    )
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    real = gradients(HENON_HEILES, *start(4), dt=0.05, steps=8, save_every=3, method=method)
    assert difference(found, real) < 1e-13


def chaotic() -> tuple[Tensor, Tensor]:
    # Energy 0.15, not far below escape at 1/6: most orbits are chaotic.
    y = torch.linspace(-0.25, 0.5, 32, dtype=F64)
    q = torch.stack([torch.zeros_like(y), y], -1)
    speed = (2 * (0.15 - HENON_HEILES.energy(q, torch.zeros_like(q)))).sqrt()
    return q, torch.stack([speed, torch.zeros_like(y)], -1)


@pytest.mark.parametrize(("name", "dtype"), [("leapfrog", F64), ("bm4", torch.float32)])
def test_ten_thousand_steps_of_chaos_and_back_to_the_same_bits(name, dtype):
    steps = 10_000 if name == "leapfrog" else 100
    q, p = (x.to(dtype) for x in chaotic())
    options = {"steps": steps, "save_every": steps, "method": name, "lattice": 2.0**-50}
    there = integrate(HENON_HEILES, q, p, dt=0.1, **options)
    # float32 shows the end rounded: turn round inside the run instead.
    if dtype == F64:
        back = integrate(HENON_HEILES, there.q[-1], there.p[-1], dt=-0.1, **options)
        assert torch.equal(back.q[-1], there.q[0])
        assert torch.equal(back.p[-1], there.p[0])
    else:
        gradients(HENON_HEILES, q, p, dt=0.1, adjoint="reversible", **options)  # or it raises


def test_chaos_is_noticed_and_the_lattice_cures_it():
    q, p = chaotic()
    options = {"dt": 0.1, "steps": 4000, "save_every": 4000, "adjoint": "reversible"}
    with pytest.raises(ConvergenceError, match="gradient is lost: use lattice=True") as info:
        gradients(HENON_HEILES, q, p, **options)
    assert info.value.residual > 0.1
    with pytest.warns(RuntimeWarning, match=r"gradient has few digits: use lattice=True"):
        gradients(HENON_HEILES, q, p, **{**options, "steps": 1500, "save_every": 1500})
    gradients(HENON_HEILES, q, p, lattice=True, **options)


def test_lattice_states_do_not_depend_on_what_is_saved():
    often, once = (
        integrate(GENERAL, *start(3), dt=0.1, steps=40, save_every=n, method="bm4", lattice=True)
        for n in (1, 40)
    )
    assert torch.equal(often.q[-1], once.q[-1])
    real = integrate(GENERAL, *start(3), dt=0.1, steps=40, save_every=40, method="bm4")
    torch.testing.assert_close(once, real, rtol=0, atol=1e-13)


def test_grad_mode_changes_no_bit_of_a_force():
    # What the bits of a retraced lattice rest on.
    q = start(1000)[0]
    for system in (QUADRATIC, Separable(QUADRATIC.potential), GENERAL):
        plain = system.field(q, q)
        with torch.enable_grad():
            x = q.clone().requires_grad_()
            traced = system.field(x, x)
        assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))


def test_integer_rotations_are_bijections():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randint(-(2**50), 2**50, (2, 5000), generator=g)
    angle = 20 * torch.randn(5000, generator=g, dtype=F64)
    x, y = lattice.rotate(a, b, angle)
    back = lattice.rotate(x, y, angle, inverse=True)
    assert torch.equal(back[0], a)
    assert torch.equal(back[1], b)
    small_a, small_b = a // 2**20, b // 2**20
    x, y = lattice.rotate(small_a, small_b, angle)
    c, s = torch.cos(angle), torch.sin(angle)
    assert float((x - (c * small_a - s * small_b)).abs().max()) < 1.6
    assert float((y - (s * small_a + c * small_b)).abs().max()) < 1.6
    assert lattice.rotate(a, b, math.pi)[0].equal(-a)


# --- Refusals ---------------------------------------------------------------------------------


def test_what_cannot_be_retraced_is_refused_with_the_way_out():
    q, p = (x.requires_grad_() for x in start(2))

    def run(system: Any = QUADRATIC, **options):
        return integrate(system, q, p, dt=0.1, steps=3, **options)

    with pytest.raises(ValueError, match="rk4 has no inverse .*'checkpoint'"):
        run(method="rk4", adjoint="reversible")
    with pytest.raises(ValueError, match="expected 'autograd', 'reversible' or 'checkpoint'"):
        run(adjoint="adjoint")
    with pytest.raises(ValueError, match="kicks and drifts, got gauss4"):
        run(COUPLED, method="gauss4", lattice=True)
    body = torch.ones(3, dtype=F64)
    with pytest.raises(ValueError, match=r"got a Split.*rotate"):
        integrate(rotor(), body, dt=0.1, steps=3, lattice=True)
    with pytest.raises(ValueError, match="spacing is 0.1, expected a power of two"):
        run(lattice=0.1)
    with pytest.raises(ValueError, match="leave compensated out"):
        run(lattice=True, compensated=True)
    with pytest.raises(ConvergenceError, match=r"may have reached .* give a larger spacing"):
        run(lattice=2.0**-63)
    with pytest.raises(ValueError, match="dt is 0"):
        integrate(QUADRATIC, q, p, dt=0.0, steps=3)


def test_transforms_take_what_keeps_no_steps_and_refuse_the_rest():
    q, p = start(3)

    def end(q, **options):
        return integrate(QUADRATIC, q, p, dt=0.1, steps=4, **options).q[-1]

    exact = torch.func.jacfwd(end)(q)
    for options in ({"adjoint": "reversible"}, {"adjoint": "checkpoint"}, {"lattice": True}):
        found = torch.func.jacfwd(lambda q, options=options: end(q, **options))(q)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-14)
    found = torch.func.jacrev(lambda q: end(q, lattice=True))(q)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match=r"inside torch.func.grad.*torch.autograd.grad"):
        torch.func.jacrev(lambda q: end(q, adjoint="reversible"))(q)


def test_a_force_that_differs_the_second_time_is_noticed_on_a_lattice():
    count = 0

    def force(q):
        nonlocal count
        count += 1
        return -q * (1 + 1e-9 * count)

    with pytest.raises(ConvergenceError, match="same bits twice"):
        gradients(Separable(force=force), *start(2), steps=5, adjoint="reversible", lattice=True)


def test_a_parameter_changed_before_the_backward_pass_is_noticed():
    mu = torch.tensor(1.0, dtype=F64, requires_grad=True)
    run = integrate(kepler(mu), *perihelion(0.1), dt=0.1, steps=5, adjoint="reversible")
    with torch.no_grad():
        mu.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run.q.sum().backward()
