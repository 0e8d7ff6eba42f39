"""Engines of recurrences: the same states and gradients by every way."""

import math
import warnings

import pytest
import torch

from darboux.learners import deer, recurrence
from darboux.learners.heads import Motion, quaternion_product, unit
from darboux.learners.recurrence import Cell, affine_scan, fold, reversible, run, scan, sequential

F64 = torch.float64


def rand(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64)


def tanh_step(parameters, f, state):
    """A contracting step without structure, for DEER."""
    q, p = state
    (w,) = parameters
    return (0.5 * p + 0.3 * torch.tanh(p @ w) + f, 0.8 * torch.tanh(q @ w.mT))


def tanh_cell(n=3):
    return Cell(step=tanh_step, parameters=((0.2 * rand(n, n, seed=1)).requires_grad_(),))


def pendulum_cell(decay=1.0, strength=0.3):
    motion = Motion("pendulum", 0.4, decay)
    k = torch.full((2, 3), strength, dtype=F64, requires_grad=True)
    return Cell(step=motion, parameters=(k,), inverse=motion.inverse, wrap=motion.wrap, blocks=True)


def path_and_slopes(cell, inputs, state, engine):
    leaves = [x.clone().requires_grad_() for x in (inputs, *state)]
    path, _ = run(cell, leaves[0], tuple(leaves[1:]), engine)
    loss = torch.stack([(x.sin() * rand(*x.shape, seed=7)).sum() for x in path]).sum()
    return path, torch.autograd.grad(loss, [*leaves, *cell.parameters])


def test_affine_scan_is_the_loop_for_any_length():
    for time in (1, 2, 3, 4, 7, 16, 33):
        m, b, s = 0.5 * rand(2, time, 3, 3), rand(2, time, 3, seed=1), rand(2, 3, seed=2)
        for constant in (False, True):
            matrix = m[:, :1] if constant else m
            out, state = [], s
            for t in range(time):
                state = (matrix[:, 0 if constant else t] @ state[..., None])[..., 0] + b[:, t]
                out.append(state)
            torch.testing.assert_close(affine_scan(matrix, b, s), torch.stack(out, 1))


def test_affine_scan_of_a_rotation_is_its_closed_form():
    angle = torch.tensor(0.3, dtype=F64)
    c, s = angle.cos(), angle.sin()
    m = torch.stack([torch.stack([c, -s]), torch.stack([s, c])])[None, None]
    path = affine_scan(m, torch.zeros(1, 1001, 2, dtype=F64), torch.tensor([[1.0, 0.0]]).double())
    t = torch.arange(1, 1002, dtype=F64) * angle
    torch.testing.assert_close(path[0], torch.stack([t.cos(), t.sin()], -1), rtol=0, atol=1e-12)


def test_scan_multiplies_a_group_that_does_not_commute_in_order():
    turns, start = unit(rand(2, 13, 4)), unit(rand(2, 4, seed=1))

    def times(a, b):
        return (quaternion_product(a[0], b[0]),)

    (path,) = scan(times, times, (turns,), (start,))
    state = start
    for t in range(13):
        state = quaternion_product(turns[:, t], state)
        torch.testing.assert_close(path[:, t], state)
    assert not torch.allclose(path[:, 1], quaternion_product(turns[:, 0], path[:, 0]))


@pytest.mark.parametrize("engine", ["deer", "quasi-deer"])
def test_newton_gives_the_loop_and_its_gradients(engine):
    cell, inputs, state = tanh_cell(), rand(2, 150, 3), (rand(2, 3, seed=3), rand(2, 3, seed=4))
    wanted, slopes = path_and_slopes(cell, inputs, state, "sequential")
    path, found = path_and_slopes(cell, inputs, state, engine)
    for a, b in zip((*path, *found), (*wanted, *slopes), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_newton_of_two_by_two_blocks_is_newton():
    cell, inputs = pendulum_cell(math.exp(-0.5)), rand(2, 64, 2, 3)
    state = (rand(2, 2, 3, seed=1), rand(2, 2, 3, seed=2))
    full, blocks = (deer.solve(cell, inputs, state, blocks=b)[1] for b in (False, True))
    assert full.fallbacks == blocks.fallbacks == 0
    assert abs(full.sweeps - blocks.sweeps) <= 1
    assert blocks.residual < 1e-11
    wanted, slopes = path_and_slopes(cell, inputs, state, "sequential")
    path, found = path_and_slopes(cell, inputs, state, "quasi-deer")
    turn = 2 * math.pi
    assert float(((path[0] - wanted[0] + 1) % turn - 1).detach().abs().max()) < 1e-9
    for a, b in zip(found, slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


def test_newton_falls_back_on_chaos_and_says_so():
    cell, inputs = pendulum_cell(strength=60.0), rand(1, 100, 2, 3)
    state = (rand(1, 2, 3, seed=1), rand(1, 2, 3, seed=2))
    assert float(deer.lyapunov(cell, inputs, state).min().detach()) > 0.3
    with pytest.warns(RuntimeWarning, match="did not settle in 1 of 1 chunks.*Lyapunov"):
        path, _ = run(cell, inputs, state, "deer")
    wanted, _ = run(cell, inputs, state, "sequential")
    assert float((path[0] - wanted[0])[:, :12].detach().abs().max()) < 1e-6
    assert all(bool(x.isfinite().all()) for x in path)


def test_lyapunov_exponent_of_a_linear_map():
    def step(parameters, f, state):
        return (1.3 * state[0], 0.5 * state[1])

    state = (torch.ones(2, 3, dtype=F64), torch.ones(2, 3, dtype=F64))
    found = deer.lyapunov(Cell(step=step), torch.zeros(2, 400, 3, dtype=F64), state)
    torch.testing.assert_close(found, torch.full_like(found, math.log(1.3)), rtol=0, atol=1e-2)


@pytest.mark.parametrize("decay", [1.0, math.exp(-0.2)])
def test_reversible_engine_gives_the_same_gradients(decay):
    cell, inputs = pendulum_cell(decay), 0.3 * rand(2, 200, 2, 3)
    state = (rand(2, 2, 3, seed=1), rand(2, 2, 3, seed=2))
    _, slopes = path_and_slopes(cell, inputs, state, "sequential")
    _, found = path_and_slopes(cell, inputs, state, "reversible")
    for a, b in zip(found, slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8 * float(b.abs().max()))


def test_reversible_engine_keeps_no_states():
    cell, state = pendulum_cell(), (rand(1, 2, 3), rand(1, 2, 3, seed=1))
    held = []
    for time in (128, 512):
        total = 0

        def count(x):
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            path = reversible(cell, torch.zeros(1, time, 2, 3, dtype=F64), state)
        held.append(total - time * 6)  # beside the inputs
        assert path[0].shape[1] == time
    assert held[0] == held[1] > 0


def test_fold_is_the_gradient_of_the_whole():
    cell, inputs = tanh_cell(), rand(2, 40, 3)
    (w,) = cell.parameters
    state = (rand(2, 3, seed=3), rand(2, 3, seed=4))
    _, end = run(cell, inputs, state, "sequential")
    path = sequential(cell, inputs, state)
    loss = path[0].square().sum()
    (wanted,) = torch.autograd.grad(loss, w)

    def step(piece, start):
        states, last = run(cell, piece, start, "sequential")
        return states[0].square().sum(), last

    total, last = fold(step, inputs.split(7, 1), state)
    assert total == pytest.approx(float(loss.detach()), rel=1e-12)
    torch.testing.assert_close(w.grad, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(last[0], end[0].detach())


def test_engines_that_cannot_be_are_refused():
    cell, inputs, state = tanh_cell(), rand(1, 3, 3), (rand(1, 3), rand(1, 3))
    for engine, lacks in (("scan", "scan"), ("kernel", "kernel"), ("reversible", "inverse")):
        with pytest.raises(ValueError, match=f"this cell has no {lacks}"):
            run(cell, inputs, state, engine)
    with pytest.raises(ValueError, match="engine is 'fast', expected one of sequential"):
        run(cell, inputs, state, "fast")
    with pytest.raises(ValueError, match="two tensors of one shape"):
        run(cell, inputs, (rand(1, 3), rand(1, 2)), "quasi-deer")


def test_without_a_compiler_the_loop_runs_and_says_so(monkeypatch):
    from darboux.learners import recurrence

    cell, inputs = pendulum_cell(), torch.zeros(1, 64, 2, 3, dtype=F64)
    cell = Cell(step=cell.step, parameters=cell.parameters, wrap=cell.wrap, kernel=lambda *a: a)

    def nothing():
        raise recurrence.NoCompiler("none")

    monkeypatch.setattr(recurrence, "compiler", nothing)
    recurrence._has_compiler.cache_clear()
    state = (rand(1, 2, 3), rand(1, 2, 3, seed=1))
    try:
        with pytest.warns(RuntimeWarning, match="without their native kernel"):
            path, _ = run(cell, inputs, state)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it says so once
            again, _ = run(cell, inputs, state)
    finally:
        recurrence._has_compiler.cache_clear()
    assert torch.equal(path[0], sequential(cell, inputs, state)[0])
    assert torch.equal(path[1], again[1])


def test_compiled_engine_is_the_loop(monkeypatch):
    monkeypatch.setattr(recurrence, "_UNROLL", 4)  # 16 compile for four times as long
    cell, inputs = tanh_cell(), rand(2, 35, 3)
    state = (rand(2, 3, seed=3), rand(2, 3, seed=4))
    wanted, slopes = path_and_slopes(cell, inputs, state, "sequential")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, found = path_and_slopes(cell, inputs, state, "compiled")
    for a, b in zip((*path, *found), (*wanted, *slopes), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
