"""Symplectic attention: what each manifold conserves, closed forms, streams, the kernel."""

import math
from typing import Any

import pytest
import torch

from darboux.integrators import METHODS, Split, _native, diagonal_metric
from darboux.integrators._kernels import HEADER
from darboux.learners import _motion_source, symplectic_attention
from darboux.learners._coordinate_kernel import features
from darboux.learners._motion_kernel import waves
from darboux.learners.heads import (
    KINDS,
    Motion,
    Rotation,
    inverse_metric,
    landmarks,
    rotation_matrix,
    snap,
    unit,
)
from darboux.learners.recurrence import Cell, run
from darboux.learners.symplectic_attention import (
    MANIFOLDS,
    Phase,
    SymplecticAttention,
    audit,
)

F64 = torch.float64


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64)


def layer_of(manifold, *, heads=2, dim=4, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    if manifold != "rotation":
        more = {"size": 3, "dim": dim, **more}
    layer = SymplecticAttention(6, heads, manifold=manifold, generator=generator, **more)
    return layer.double()


def close_on_circle(a, b, period, tolerance):
    gap = (a - b) % period
    assert float(torch.minimum(gap, period - gap).max()) < tolerance


# ---------------------------------------------------------------- what is conserved


GATED = [(m, "momenta") for m in KINDS] + [(m, "phase") for m, k in KINDS.items() if not k.period]


@pytest.mark.parametrize("friction", [0.0, 0.4])
@pytest.mark.parametrize("coupling", [None, "gradient", "free"])
@pytest.mark.parametrize(("manifold", "gate"), [(m, None) for m in KINDS] + GATED)
def test_audit_finds_what_is_declared(manifold, gate, coupling, friction):
    layer = layer_of(manifold, coupling=coupling, friction=friction, gate=gate)
    found = audit(layer, states=2, generator=torch.Generator().manual_seed(1))
    assert found.declared.factor == pytest.approx(math.exp(-friction * layer.step))
    assert found.holds(1e-10)
    x = rand(2, 5, 6)
    assert audit(layer, x).holds(1e-10)
    if gate is not None:  # the factor is what the gates leave
        kept = layer.forces(x)[:, -1, 1:].detach()
        assert bool(((kept > 0) & (kept < 1)).all())
        wanted = kept.prod(1).flatten(1).prod(1) * found.declared.factor**8
        assert bool((wanted < 0.1).all())
        if manifold != "low_rank_literal":
            det = audit(layer, x).det
            assert float((wanted / det - 1).abs().min()) < 1e-10
    if found.declared.symplectic:
        assert found.factor == pytest.approx(found.declared.factor, abs=1e-12)
    else:
        assert found.symplectic > 1e-3  # the declaration is not too modest
    if not found.declared.volume:
        assert manifold == "low_rank_literal"
        assert found.volume > 1e-2


def test_audit_of_a_trained_layer_in_single_precision():
    torch.manual_seed(0)
    for manifold in MANIFOLDS:
        layer = layer_of(manifold).float()
        optimiser = torch.optim.Adam(layer.parameters(), lr=0.01)
        x = torch.randn(4, 5, 6)
        for _ in range(3):
            optimiser.zero_grad()
            (layer(x)[0][:, 1:] - x[:, :-1]).square().mean().backward()
            optimiser.step()
        found = audit(layer, x)
        assert found.holds(1e-6), (manifold, found)
        assert audit(layer.double(), x.double()).holds(1e-10), manifold


def test_determinant_of_the_literal_rule():
    # det(I - h dGamma/dv), by the formula of Gamma and not by the layer
    layer = layer_of("low_rank_literal", heads=1, dim=4, step=0.5)
    u, w = (layer.geometry[name][0] for name in ("u", "w"))
    v = rand(4, seed=3)

    def gamma(v):
        s = v @ u
        return w @ (s * s / (1 + s.norm()))

    j = torch.autograd.functional.jacobian(gamma, v)
    wanted = torch.linalg.det(torch.eye(4, dtype=F64) - 0.5 * j)
    cell = layer.cell()
    zero = torch.zeros(1, 4, dtype=F64)
    j = torch.func.jacfwd(lambda v: cell.step(cell.parameters, zero, (zero, v[None]))[1][0])(v)
    torch.testing.assert_close(torch.linalg.det(j), wanted)
    assert abs(float(wanted.detach()) - 1) > 1e-2


@pytest.mark.parametrize("coupling", [None, "gradient", "free"])
@pytest.mark.parametrize("manifold", [m for m in KINDS if KINDS[m].volume])
def test_inverse_undoes_a_token(manifold, coupling):
    for gate in (None, *(g for m, g in GATED if m == manifold)):
        layer = layer_of(manifold, coupling=coupling, friction=0.3, gate=gate)
        cell, motion = layer.cell(), layer.motion()
        f, (q, p) = layer.forces(rand(2, 1, 6))[:, 0], rand(2, 2, 2, 4).unbind(0)
        assert (cell.inverse is None) == (gate is not None)
        back = motion.inverse(cell.parameters, f, cell.step(cell.parameters, f, (q, p)))
        torch.testing.assert_close(back[0], q, rtol=0, atol=1e-12)
        torch.testing.assert_close(back[1], p, rtol=0, atol=1e-12)


def test_low_rank_coefficients_are_orthogonal():
    u, w = KINDS["low_rank"].tensors(layer_of("low_rank").geometry, 0.5)
    assert float((u.mT @ w).detach().abs().max()) < 1e-14


# ---------------------------------------------------------------- closed forms and the library


def test_revolution_is_the_step_of_the_library():
    layer = layer_of("revolution", heads=1, dim=2, step=0.3)
    cell = layer.cell()
    small, large = (float(x.detach()) for x in cell.parameters)
    split = diagonal_metric(
        lambda q: torch.stack(
            [0 * q[..., 0] + small**-2, (large + small * q[..., 0].cos()) ** -2], -1
        ),
        2,
    )
    q, p = rand(5, 1, 2), rand(5, 1, 2, seed=1)
    found = cell.step(cell.parameters, torch.zeros_like(q), (q, p))
    for a, b in zip(found, _swapped_leapfrog(split, q, p, 0.3), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_learned_metric_is_the_step_of_the_library():
    layer = layer_of("metric", heads=1, dim=2, step=0.3)
    cell = layer.cell()
    split = diagonal_metric(lambda q: inverse_metric(cell.parameters, q), 2)
    q, p = rand(5, 1, 2), rand(5, 1, 2, seed=1)
    split.lift(q, p, 0.0)  # refuses a metric that does not split
    found = cell.step(cell.parameters, torch.zeros_like(q), (q, p))
    for a, b in zip(found, _swapped_leapfrog(split, q, p, 0.3), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    assert float(inverse_metric(cell.parameters, q).detach().min()) > 0


def _swapped_leapfrog(split, q, p, h):
    # the library's leapfrog takes its second part at the ends
    return METHODS["leapfrog"].step(Split(split.flows[::-1]), q, p, h)


def test_energy_of_a_torus_of_revolution_does_not_drift():
    layer = layer_of("revolution", heads=1, dim=2, step=0.1)
    cell = layer.cell()
    small, large = (float(x.detach()) for x in cell.parameters)
    q, p = torch.tensor([[[0.3, 0.0]]], dtype=F64), torch.tensor([[[0.5, 1.0]]], dtype=F64)
    with torch.no_grad():
        (q, p), _ = run(cell, torch.zeros(1, 2000, 1, 2, dtype=F64), (q, p), "sequential")
    x, (u, v) = q[0, :, 0, 0], p[0, :, 0].unbind(-1)
    h = u**2 / (2 * small**2) + v**2 / (2 * (large + small * x.cos()) ** 2)
    assert float((h / h[0] - 1).abs().max()) < 1e-2
    assert float((h[:1000].mean() / h[1000:].mean() - 1).abs()) < 1e-4
    assert float((v - v[0]).abs().max()) == 0.0  # Clairaut


def test_oscillator_is_the_linear_recurrence_with_determinant_one():
    # LinOSS-IMEX: z += h(-A y + B u), y += h z: the same map with y = q, z = p
    layer = layer_of("oscillator", step=0.5)
    (a,) = layer.cell().parameters
    assert bool(((a * 0.25 > 0) & (a * 0.25 < 4)).all())
    f, y, z = rand(1, 30, 2, 4), torch.zeros(1, 2, 4, dtype=F64), torch.zeros(1, 2, 4, dtype=F64)
    out = []
    for t in range(30):
        z = z + 0.5 * (-a * y + f[:, t])
        y = y + 0.5 * z
        out.append(y)
    start = tuple(layer.start(1, f))
    for engine in ("sequential", "scan"):
        path, _ = run(layer.cell(), f, start, engine)
        torch.testing.assert_close(path[0], torch.stack(out, 1))
    # and the free motion is the closed form: a rotation by arccos(1 - h^2 A / 2)
    q = torch.ones(1, 2, 4, dtype=F64)
    path, _ = run(layer.cell(), torch.zeros(1, 300, 2, 4, dtype=F64), (q, 0 * q), "scan")
    angle = torch.acos(1 - 0.125 * a)
    t = torch.arange(1, 301, dtype=F64)[:, None, None]
    slope = ((1 - 0.25 * a) - angle.cos()) / angle.sin()
    wanted = (t * angle).cos() + slope * (t * angle).sin()
    torch.testing.assert_close(path[0][0], wanted, rtol=0, atol=1e-10)


def test_torus_counts_by_exact_phase():
    # half a turn a one: exact in binary, in float32, at any length
    layer = SymplecticAttention(2, 1, dim=1, manifold="torus", engine="scan")
    with torch.no_grad():
        layer.drive.weight.copy_(torch.tensor([[0.0, 0.5]]))
    bits = torch.randint(0, 2, (2, 3000), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        path, _ = layer.orbit(torch.nn.functional.one_hot(bits, 2).float())
    assert torch.equal(path.p[..., 0, 0], (bits.cumsum(1) % 2) / 2)
    assert torch.equal(landmarks(path.p[..., 0, 0], 2).argmax(-1), bits.cumsum(1) % 2)


def test_snapped_sums_stay_on_the_grid():
    layer = SymplecticAttention(2, 1, dim=1, manifold="torus", grid=60)
    layer.snapped = True
    with torch.no_grad():
        layer.drive.weight.copy_(torch.tensor([[0.003, 0.338]]))
    ones = torch.tensor([0.0, 1.0]).expand(1, 500, 2)
    for engine in ("scan", "sequential"):
        layer.engine = engine
        _, state = layer.orbit(ones)
        _, state = layer.orbit(ones, state)
        path, _ = layer.orbit(ones, state)
        wanted = (torch.arange(1001, 1501) * 20 % 60).float() / 60
        assert torch.equal(path.p[0, :, 0, 0], wanted)
    layer.orbit(ones)[0].p.sum().backward()
    assert layer.drive.weight.grad is not None
    assert float(layer.drive.weight.grad[0, 1]) == pytest.approx(500 * 501 / 2)
    assert float(snap(torch.tensor(0.338), 60)) == pytest.approx(1 / 3)


def test_rotations_compose_as_matrices():
    f = unit(rand(1, 9, 2, 4))
    turn = Rotation()
    start = (unit(rand(1, 2, 4, seed=1)), torch.zeros(1, 2, 0, dtype=F64))
    path, _ = run(Cell(step=turn, scan=turn.scan), f, start, "scan")
    m = rotation_matrix(start[0])
    for t in range(9):
        m = rotation_matrix(f[:, t]) @ m
        torch.testing.assert_close(rotation_matrix(path[0][:, t]), m)
    eye = torch.eye(3, dtype=F64).expand_as(m)
    torch.testing.assert_close(m @ m.mT, eye)
    layer = layer_of("rotation")
    x = rand(1, 4, 6)
    assert float((layer.orbit(x)[0].q.detach().norm(dim=-1) - 1).abs().max()) < 1e-14
    assert torch.equal(unit(torch.zeros(4)), torch.tensor([1.0, 0, 0, 0]))


def test_friction_contracts_momenta_exactly():
    layer = layer_of("torus", friction=0.7)
    q, p = torch.zeros(1, 2, 4, dtype=F64), rand(1, 2, 4)
    for engine in ("scan", "sequential"):
        path, _ = run(layer.cell(), torch.zeros(1, 10, 2, 4, dtype=F64), (q, p), engine)
        t = torch.arange(1, 11, dtype=F64)[:, None, None]
        torch.testing.assert_close(path[1][0], (-0.7 * t).exp() * p)
        ratio = math.exp(-0.7)
        summed = p * ratio * (1 - ratio**t) / (1 - ratio)
        close_on_circle(path[0][0], summed, 1.0, 1e-12)


def test_a_map_that_keeps_the_form_may_have_gradients_that_explode():
    # singular values come in pairs s, 1/s: the largest is never below one, and nothing bounds it
    slopes = {}
    for gate in (None, "phase"):
        layer = layer_of("metric", dim=8, size=8, gate=gate)
        for time in (10, 80):
            x = rand(1, time, 6).requires_grad_()
            (grad,) = torch.autograd.grad(layer.orbit(x)[1].q.sum(), x)
            slopes[gate, time] = float(grad[:, 0].norm())
    assert slopes[None, 80] > 30 * slopes[None, 10] > 30
    assert slopes["phase", 80] < 1e-9 * slopes["phase", 10] < 1e-9


def test_gates_are_a_linear_recurrence_that_tokens_choose():
    # a free particle: p' = a p + h f, q' = b q + h p', written out
    layer = layer_of("oscillator", gate="phase", step=0.5)
    with torch.no_grad():
        layer.geometry["rate"].fill_(-800.0)  # no spring
    x, state = rand(2, 9, 6), [rand(2, 2, 4, seed=s) for s in (1, 2)]
    f = (x @ layer.drive.weight.mT).unflatten(-1, (2, 4))
    a, b = torch.sigmoid(layer.keep(x)).unflatten(-1, (2, 2, 4)).unbind(2)
    for engine in ("sequential", "scan", "kernel"):
        layer.engine = engine
        path, _ = layer.orbit(x, Phase(*state))
        q, p = state
        for t in range(9):
            p = a[:, t] * p + 0.5 * f[:, t]
            q = b[:, t] * q + 0.5 * p
            torch.testing.assert_close(path.q[:, t], q, rtol=0, atol=1e-12)
            torch.testing.assert_close(path.p[:, t], p, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_whole_chunks_and_tokens_agree(manifold):
    coupling = None if manifold == "rotation" else "gradient"
    gate = None if manifold == "rotation" else "momenta"
    for layer in {layer_of(manifold), layer_of(manifold, coupling=coupling, gate=gate)}:
        x = rand(2, 12, 6)
        with torch.no_grad():
            whole, end = layer(x)
            for sizes in ([5, 7], [1] * 12):
                state, parts = None, []
                for piece in x.split(sizes, 1):
                    y, state = layer(piece, state)
                    parts.append(y)
                torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
                assert state is not None
                assert state.q.shape == end.q.shape


def test_state_does_not_hold_the_path():
    x = torch.zeros(1, 50, 6, dtype=F64)
    for manifold in MANIFOLDS:
        layer = layer_of(manifold)
        for part in layer(x)[1]:
            assert part.untyped_storage().nbytes() == part.numel() * 8


@pytest.mark.parametrize(("manifold", "gate"), [(m, None) for m in MANIFOLDS] + GATED)
def test_later_tokens_do_not_change_earlier_outputs(manifold, gate):
    layer = layer_of(manifold, gate=gate)
    x = rand(2, 9, 6)
    other = x.clone()
    other[:, 5:] = rand(2, 4, 6, seed=5)
    for mode in (True, False):
        layer.train(mode)
        a, b = layer(x)[0], layer(other)[0]
        assert torch.equal(a[:, :5], b[:, :5])
        assert not torch.equal(a[:, 5:], b[:, 5:])


@pytest.mark.parametrize(("manifold", "gate"), [(m, None) for m in MANIFOLDS] + GATED)
def test_engines_agree_on_the_layer(manifold, gate):
    layer = layer_of(manifold, gate=gate)
    x = rand(2, 9, 6).requires_grad_()
    found = {}
    cell = layer.cell()
    engines = ["sequential", "scan"] if cell.scan else ["sequential"]
    engines += ["reversible"] if cell.inverse else []
    for engine in [*engines, "deer"]:
        layer.engine = engine
        y, _ = layer(x)
        slopes = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        found[engine] = (y, *slopes)
    for engine in found:
        for a, b in zip(found[engine], found["sequential"], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


@pytest.mark.parametrize("coupling", ["gradient", "free"])
def test_engines_agree_on_a_coupled_torus_that_is_not_chaotic(coupling):
    layer = layer_of("torus", coupling=coupling, friction=0.2)
    with torch.no_grad():
        for parameter in layer.field.values():
            parameter *= 0.1
    x, found = 0.3 * rand(2, 100, 6).requires_grad_(), {}
    for engine in ("sequential", "kernel", "reversible", "deer"):
        layer.engine = engine
        y, end = layer(x)
        loss = y.square().sum() + end.p.square().sum()
        found[engine] = (y, *torch.autograd.grad(loss, [x, *layer.parameters()]))
    for engine in found:
        for a, b in zip(found[engine], found["sequential"], strict=True):
            scale = max(1.0, float(b.detach().abs().max()))
            torch.testing.assert_close(a, b, rtol=0, atol=1e-8 * scale, msg=engine)


# One of each kind of force, drift and coupling: a compiler takes about a second for each.
@pytest.mark.parametrize(
    ("manifold", "more"),
    [
        ("potential", {"coupling": "free"}),
        ("revolution", {"coupling": "gradient", "friction": 0.2}),
        ("low_rank", {"dim": 8}),
        ("metric", {}),
        ("torus", {"dim": 5}),
        ("oscillator", {}),
        ("pendulum", {"friction": 0.2}),
        ("metric", {"gate": "phase", "coupling": "gradient", "friction": 0.2}),
        ("low_rank", {"gate": "momenta"}),
        ("oscillator", {"gate": "phase", "friction": 0.2}),
        ("pendulum", {"gate": "momenta"}),
        ("torus", {"gate": "momenta"}),
    ],
)
def test_kernel_is_the_loop(manifold, more):
    layer = layer_of(manifold, **more)
    for batch in (3, 9):  # less than one group of eight, and more
        x, state = rand(batch, 7, 6).requires_grad_(), layer.start(batch, rand(1))
        state = Phase(*(s.normal_(generator=torch.Generator().manual_seed(2)) for s in state))
        found = []
        for engine in ("kernel", "sequential"):
            layer.engine = engine
            start = Phase(*(s.clone().requires_grad_() for s in state))
            y, end = layer(x, start)
            loss = y.square().sum() + end.q.sin().sum() + end.p.sum()
            found.append((y, *torch.autograd.grad(loss, [x, *start, *layer.parameters()])))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_kernel_of_one_coordinate_each_gives_the_orbit():
    layer = layer_of("pendulum", friction=0.2)
    x, found = rand(3, 9, 6).requires_grad_(), []
    for engine in ("kernel", "sequential"):
        layer.engine = engine
        path, _ = layer.orbit(x)
        loss = (torch.stack(list(path)) * rand(2, *path.q.shape, seed=4)).sum()
        found.append((*path, *torch.autograd.grad(loss, [x, *list(layer.parameters())[:2]])))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_native_sums_of_angles_are_exact():
    # forces on a grid of 2^-20 turns: integers, modulo one turn
    motion, zero = Motion("torus"), torch.zeros(1, 2, 3)
    steps = torch.randint(-(2**22), 2**22, (1, 5000, 2, 3), generator=torch.Generator())
    rows, (q, p) = features(motion, (), steps.float() / 2**20, (zero, zero))
    p_path = steps.cumsum(1)
    q_path = p_path.cumsum(1)
    for a, b in ((p, p_path), (q, q_path)):
        assert torch.equal(a, (b[:, -1] % 2**20).float() / 2**20)
    angles = [2 * math.pi * (x.flatten(2) % 2**20).double() / 2**20 for x in (q_path, p_path)]
    wanted = torch.cat([f(x) for x in angles for f in (torch.cos, torch.sin)], -1)
    assert float((rows - wanted).abs().max()) < 2e-7
    steps = steps.float() / 2**20
    steps[0, 7, 0, 0] = math.nan
    rows, (q, p) = features(motion, (), steps, (zero, zero))
    assert bool(rows[0, :7].isfinite().all())
    assert bool(rows[0, 7:, ::6].isnan().all())
    assert bool(rows[0, 7:, 1:6].isfinite().all())
    assert bool(q[0, 0, 0].isnan() & p[0, 0, 0].isnan())


def test_native_functions_in_single_precision():
    names = {"E": 1, "HEADS": 1, "SIZE": 1, "RANK": 0, "PERIODIC": 0, "PERIOD": 1.0}
    source = "typedef float T;\n" + "".join(f"#define {k} {v}\n" for k, v in names.items())
    source += HEADER + _motion_source.COMMON
    source += """
extern "C" void run(void *const *d, long first, long last) {
  for (long i = first; i < last; i += L) {
    V x = *(V *)((T *)d[0] + i);
    *(V *)((T *)d[1] + i) = tanh_of(x), *(V *)((T *)d[2] + i) = exp_of(x);
  }
}"""
    x = torch.linspace(-87, 88, 2**16)
    x = torch.cat([x, x / 80, x / 1e4, torch.tensor([math.nan, math.inf, -math.inf, 0.0] * 2)])
    # what the vectors are read from is aligned as tensors are
    out = [torch.empty_like(x) for _ in range(2)]
    _native.function(source, 1)(_native.pointers([x, *out]), 0, len(x))
    for found, f in zip(out, (torch.tanh, torch.exp), strict=True):
        wanted = f(x.double())
        torch.testing.assert_close(found.double(), wanted, rtol=1e-7, atol=0, equal_nan=True)


def test_long_sequences_go_in_pieces(monkeypatch):
    x = rand(2, 300, 6)
    for manifold, gate in (("potential", None), ("oscillator", "phase")):
        layer = layer_of(manifold, gate=gate)
        whole, end = layer(x)
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(symplectic_attention, "_PIECE", 100)
            y, last = layer(x)
        torch.testing.assert_close(y, whole.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(last.p, end.p.detach(), rtol=0, atol=1e-10)


# Rows of features and of tokens that fill vectors and blocks, and such that do not.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("manifold", "width", "dim", "time"), [("torus", 6, 4, 101), ("oscillator", 96, 8, 71)]
)
def test_layer_without_gradients_is_the_loop(manifold, width, dim, time, dtype):
    generator = torch.Generator().manual_seed(0)
    layer = SymplecticAttention(width, 2, dim=dim, manifold=manifold, generator=generator).to(dtype)
    x, found = rand(time, 3, width).to(dtype).transpose(0, 1), []  # strides that are not those
    state = Phase(*rand(3, 2, dim, 2, seed=1).to(dtype).unbind(-1))
    for engine in ("kernel", "sequential"):
        layer.engine = engine
        with torch.no_grad():
            y, end = layer(x, state)
        turns = end.q % 1 if manifold == "torus" else end.q
        found.append((y, turns, end.p))
    tolerance = 1e-11 if dtype == torch.float64 else 1e-3
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    assert layer.drive.weight.grad is None


def test_native_waves_are_cosine_and_sine():
    x = (rand(1003).float() / 2).requires_grad_()
    weights = rand(2, 1003, seed=1).float()
    for period in (1.0, 2 * math.pi):
        angle = 2 * math.pi / period * x
        found, wanted = waves(x, period), (angle.cos(), angle.sin())
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        slopes = [torch.autograd.grad((torch.stack(y) * weights).sum(), x) for y in (found, wanted)]
        torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=1e-5)


def test_parity_is_learned_on_short_sequences_and_holds_on_long_ones():
    torch.manual_seed(0)
    layer = SymplecticAttention(2, 16, dim=1, manifold="torus", grid=60, engine="scan")
    with torch.no_grad():
        layer.drive.weight.uniform_()
    optimiser = torch.optim.Adam([layer.drive.weight], lr=0.05)

    def losses(bits):
        path, _ = layer.orbit(torch.nn.functional.one_hot(bits, 2).float())
        logits = landmarks(path.p[..., 0], 2)
        wanted = (bits.cumsum(1) % 2)[..., None, None].expand(*logits.shape[:-1], 1)
        return -logits.log_softmax(-1).gather(-1, wanted).mean((0, 1, 3)), logits

    for step in range(150):
        layer.snapped = step > 100
        optimiser.zero_grad()
        losses(torch.randint(0, 2, (32, 12)))[0].sum().backward()
        optimiser.step()
    with torch.no_grad():
        best = int(losses(torch.randint(0, 2, (64, 12)))[0].argmin())
        bits = torch.randint(0, 2, (1, 5000))
        assert torch.equal(losses(bits)[1][:, :, best].argmax(-1), bits.cumsum(1) % 2)


# ---------------------------------------------------------------- the door


def test_bad_input_is_refused():
    for arguments, message in (
        ({"manifold": "klein"}, "manifold is 'klein', expected one of torus"),
        ({"coupling": "strong"}, "coupling is 'strong'"),
        ({"engine": "fast"}, "engine is 'fast'"),
        ({"manifold": "revolution", "dim": 3}, "dim is 3, expected a positive, even number"),
        ({"manifold": "torus", "step": 0.5}, "step is 0.5, expected 1 on the torus"),
        ({"friction": -1.0}, "friction is -1.0, expected at least 0"),
        ({"grid": 60}, "grid is 60, expected None"),
        ({"manifold": "rotation", "friction": 0.1}, "rotations have no coupling, no friction"),
        ({"gate": "positions"}, "gate is 'positions', expected one of None, momenta, phase"),
        (
            {"gate": "phase", "manifold": "pendulum"},
            "expected 'momenta' where positions are angles",
        ),
        ({"gate": "momenta", "manifold": "torus", "grid": 60}, "grid is 60, expected None"),
        ({"manifold": "rotation", "gate": "momenta"}, "rotations have no coupling, no friction"),
        ({"manifold": "low_rank", "size": 9}, "rank is 9, expected less than dim"),
    ):
        more: dict[str, Any] = arguments
        with pytest.raises(ValueError, match=message):
            SymplecticAttention(8, 2, **more)
    with pytest.raises(ValueError, match="width 7 and heads 2"):
        SymplecticAttention(7, 2)
    layer = layer_of("potential")
    with pytest.raises(ValueError, match=r"expected \(batch, time, 6\)"):
        layer(rand(2, 3, 5))
    with pytest.raises(TypeError, match="expected torch.float64"):
        layer(torch.zeros(2, 3, 6))
    x = rand(2, 3, 6)
    with pytest.raises(ValueError, match="state of another layer or batch"):
        layer(x, layer_of("potential", heads=3).start(2, x))
    with pytest.raises(TypeError, match="the state has dtype torch.float32"):
        layer(x, layer.start(2, torch.zeros(1)))
    with pytest.raises(TypeError, match="expected Phase"):
        layer(x, (x, x))


def test_kernels_refuse_what_they_cannot_read():
    for manifold in ("torus", "potential"):
        layer = layer_of(manifold, engine="kernel").bfloat16()
        for gradients in (True, False):
            with (
                torch.set_grad_enabled(gradients),
                pytest.raises(
                    ValueError, match="inputs are torch.bfloat16 on cpu, expected float32"
                ),
            ):
                layer(torch.zeros(1, 3, 6, dtype=torch.bfloat16))


def test_motion_of_equal_settings_is_one_key():
    # what lets a compiled step be found again
    assert hash(Motion("torus")) == hash(Motion("torus"))
    assert Motion("torus", 1.0, 0.5) != Motion("torus")
