r"""Gradients through long runs at the memory of one state: the run is retraced, not recorded.

Each kick and drift of a splitting has an exact inverse, so the backward pass undoes them one by
one and pulls the cotangents through on the way: after a kick :math:`p' = p + h f(q)`,

.. math:: p = p' - h f(q), \qquad \bar q \mathrel{+}= h J_f(q)^T \bar p, \qquad
          \bar\theta \mathrel{+}= h f_\theta(q)^T \bar p,

all from one evaluation of the force with a graph. Other symmetric methods are undone step by step
with :math:`-h`. Round-off grows on the way back as the orbit is unstable: on a chaotic one the
retraced orbit leaves the true one after some thirty Lyapunov times, unless the run is on a
lattice (:mod:`darboux.integrators.lattice`), where it is retraced to the last bit.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from darboux._checks import ConvergenceError, checks_values
from darboux.integrators import lattice
from darboux.integrators.lattice import LatticeSplitting
from darboux.integrators.march import Bar, Run
from darboux.integrators.splitting import Splitting, program
from darboux.integrators.systems import Separable, Split, _identity

Move = Callable[[Tensor, Tensor, float | Tensor], tuple[Tensor, Tensor]]

_FAILED = 0.1  # the retraced start is off by this much of the orbit


def check_reversible(run: Run) -> None:
    """Raise ``ValueError`` unless steps of the method can be undone."""
    method = run.method
    if isinstance(method, Splitting | LatticeSplitting) or method.symmetric:
        return
    raise ValueError(
        f"adjoint='reversible': a step of {method.name} has no inverse in closed form, since it is "
        "not symmetric: use adjoint='checkpoint', or a symmetric method such as 'leapfrog' or "
        "'gauss4'"
    )


def march_reversibly(
    run: Run, stops: Sequence[int], qs: list[Tensor], ps: list[Tensor], bar: Bar | None
) -> None:
    """Do what :meth:`Run.march` does, with a graph of one node that retraces the run."""
    lists = [qs[-1].detach()], [ps[-1].detach()]
    retrace = _Retrace(run, stops, lists, bar, *captured(run, qs[-1], ps[-1]))
    dt = run.dt if isinstance(run.dt, Tensor) else None
    try:
        more_qs, more_ps = _Reversible.apply(retrace, qs[-1], ps[-1], dt, *retrace.parameters)  # pyright: ignore
    except ConvergenceError:
        qs += lists[0][1:]
        ps += lists[1][1:]
        raise
    qs += more_qs.unbind()
    ps += more_ps.unbind()


@dataclass(eq=False)
class _Retrace:
    # What the backward pass needs besides tensors.
    run: Run
    stops: Sequence[int]
    lists: tuple[list[Tensor], list[Tensor]]  # the states, while they are being made
    bar: Bar | None
    parameters: list[Tensor]
    keep: bool  # the graph of a step reaches nodes older than the step
    end: Any = None  # integers at the end of a run on a lattice


class _Reversible(torch.autograd.Function):
    # (q, p) at the first stop -> those at the others, (time, ..., d).

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, retrace: _Retrace, q: Tensor, p: Tensor, dt: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        qs, ps = retrace.lists
        run = still(retrace.run)
        memory = run.march(retrace.stops, qs, ps, None, retrace.bar)
        if isinstance(run.method, LatticeSplitting) and memory is not None:
            retrace.end = memory[0]
        more_qs, more_ps = torch.stack(qs[1:]), torch.stack(ps[1:])
        retrace.lists = [], []
        ctx.retrace = retrace
        ctx.save_for_backward(q, p, dt, more_qs, more_ps, *parameters)
        return more_qs, more_ps

    @staticmethod
    def backward(ctx: Any, q_bars: Tensor, p_bars: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        retrace: _Retrace = ctx.retrace
        q, p, dt, qs, ps, *parameters = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True
            inputs = (q, p, dt, *parameters)
            wanted = [x if need else None for x, need in zip(inputs, needed[1:], strict=True)]
            found = gradient_by_tape(retrace.run, retrace.stops, q, p, dt, wanted, q_bars, p_bars)
            return (None, *found)
        states = [(q, p), *zip(qs.unbind(), ps.unbind(), strict=True)]
        bars = [None, *zip(q_bars.unbind(), p_bars.unbind(), strict=True)]
        if isinstance(retrace.run.method, LatticeSplitting) or _kicks(retrace.run):
            back: _Backward = _ByFlows(retrace, states, bars, needed[3])
        else:
            back = _ByMoves(retrace, states, bars, needed[3])
        q_bar, p_bar = back.go()
        return None, q_bar, p_bar, back.dt_bar, *back.parameter_bars


def gradient_by_tape(
    run: Run,
    stops: Sequence[int],
    q: Tensor,
    p: Tensor,
    dt: Tensor | None,
    wanted: Sequence[Tensor | None],
    q_bars: Tensor,
    p_bars: Tensor,
) -> list[Tensor | None]:
    """Return a gradient that can itself be differentiated: the run once more, recorded.

    ``wanted`` is q, p, dt and the captured tensors, None for those that need no gradient.
    """
    # Aliases, so that a path through a captured tensor made from q counts for that tensor alone.
    start = q.view_as(q), p.view_as(p)
    step = run.dt if dt is None else dt.view_as(dt)
    qs, ps = [start[0]], [start[1]]
    Run(run.system, run.method, step).march(stops, qs, ps)
    own = [*start, step]
    inputs = [None if x is None else [*own, x][min(i, 3)] for i, x in enumerate(wanted)]
    some = [x for x in inputs if isinstance(x, Tensor)]
    outputs = torch.stack(qs[1:]), torch.stack(ps[1:])
    grads = iter(
        torch.autograd.grad(outputs, some, (q_bars, p_bars), create_graph=True, allow_unused=True)
    )
    return [None if x is None else next(grads) for x in inputs]


def still(run: Run) -> Run:
    """Return the run with a step that is not differentiated."""
    return Run(run.system, run.method, run.dt.detach()) if isinstance(run.dt, Tensor) else run


def _kicks(run: Run) -> bool:
    return isinstance(run.method, Splitting) and isinstance(run.system, Separable)


# --- The way back ----------------------------------------------------------------------------


class _Backward:
    # Retraces a run from its last saved state to its first. The saved states on the way give
    # their cotangents and put the retraced orbit right again.

    def __init__(
        self,
        retrace: _Retrace,
        states: list[tuple[Tensor, Tensor]],
        bars: list[Any],
        needs_dt: bool,
    ):
        run = still(retrace.run)
        self.system, self.method, self.dt = run.system, run.method, run.dt
        self.retrace, self.states, self.bars = retrace, states, bars
        self.parameters = retrace.parameters
        self.parameter_bars: list[Tensor | None] = [None] * len(self.parameters)
        self.needs_dt = needs_dt
        self.dt_bar = torch.zeros_like(run.dt) if needs_dt else None  # pyright: ignore
        self.z, self.z_bar = list(states[-1]), list(bars[-1])
        self.off = 0.0

    def go(self) -> tuple[Tensor, Tensor]:
        for i in range(len(self.states) - 2, -1, -1):
            self.undo(self.retrace.stops[i + 1] - self.retrace.stops[i])
            self.arrive(i)
        self.judge()
        return self.z_bar[0], self.z_bar[1]

    def undo(self, steps: int) -> None:
        raise NotImplementedError

    def arrive(self, i: int) -> None:
        self.compare(i, (0, 1))
        self.z = list(self.states[i])
        self.inject(i)

    def inject(self, i: int) -> None:
        if i > 0:
            for k in (0, 1):
                self.z_bar[k] = self.z_bar[k] + self.bars[i][k]

    def compare(self, i: int, which: Sequence[int]) -> None:
        # How far the retraced state is from the saved one, relative to the size of the orbit.
        if not checks_values():
            return
        for k in which:
            true = self.states[i][k]
            if true.numel():
                size = float(torch.maximum(true.abs().max(), self.states[-1][k].abs().max()))
                off = float((self.z[k] - true).abs().max()) / (size or 1.0)
                self.off = max(self.off, off if math.isfinite(off) else math.inf)

    def judge(self) -> None:
        message = (
            f"adjoint='reversible': {self.method.name} retraced to within {self.off:.1e} of the "
            "saved states, relative to the orbit; the motion is unstable"
        )
        cure = "use lattice=True, which retraces every bit, save states more often, or checkpoint"
        if self.off > _FAILED:
            raise ConvergenceError(f"{message} and the gradient is lost: {cure}", self.off)
        if self.off > torch.finfo(self.z[0].dtype).eps ** 0.5:
            message += f" and the gradient has few digits: {cure}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def collect(self, grads: Sequence[Tensor | None]) -> None:
        for i, bar in enumerate(grads):
            if bar is not None:
                held = self.parameter_bars[i]
                self.parameter_bars[i] = bar if held is None else held + bar


class _ByFlows(_Backward):
    # Kick by kick. Neighbouring kicks, of two steps or on both sides of a saved state, see one
    # position: they wait until it changes and share one force.

    def __init__(self, *args: Any):
        super().__init__(*args)
        assert isinstance(self.system, Separable)
        self.halves = self.system.velocity, self.system.force
        self.linear = _self_adjoint(self.system), False
        self.waiting: int | None = None
        self.steps_back: list[float | Tensor] = []
        self.weight: Tensor | None = None  # cotangent of the slope
        self.dt_weight: Tensor | None = None
        method = self.method
        self.spacings = None
        if isinstance(method, LatticeSplitting):
            self.spacings, self.places = method.spacings, list(self.retrace.end or ())
            method = method.base
        assert isinstance(method, Splitting)
        self.flows = method.flows[::-1]

    def undo(self, steps: int) -> None:
        # On a lattice neighbours are rounded one by one, else they are one flow.
        if self.spacings is None:
            flows = program(self.flows, self.dt, steps)
            plain = program(self.flows, 1.0, steps)
        else:
            scaled = [(kind, c * self.dt) for kind, c in self.flows]
            flows, plain = (chain.from_iterable(repeat(x, steps)) for x in (scaled, self.flows))
        for (kind, h), (_, c) in zip(flows, plain, strict=True):
            if kind != self.waiting:
                self.settle()
                self.waiting = kind
            bar = h * self.z_bar[kind]
            self.weight = bar if self.weight is None else self.weight + bar
            if self.needs_dt:
                bar = c * self.z_bar[kind]
                self.dt_weight = bar if self.dt_weight is None else self.dt_weight + bar
            self.steps_back.append(h)

    def settle(self) -> None:
        kind, weight = self.waiting, self.weight
        if kind is None or weight is None:
            return
        slope, bar = self.pull(kind, self.z[1 - kind], weight)
        if bar is not None:
            self.z_bar[1 - kind] = self.z_bar[1 - kind] + bar
        if self.dt_weight is not None:
            self.dt_bar = self.dt_bar + (self.dt_weight * slope).sum()
        for h in self.steps_back:
            if self.spacings is None:
                self.z[kind] = _less(self.z[kind], h, slope)
            else:
                jump = lattice.increment(slope, h, self.spacings[kind])
                self.places[kind] = self.places[kind] - jump.to(torch.int64)
        if self.spacings is not None:
            self.z[kind] = lattice.read(self.places[kind], self.spacings[kind], slope.dtype)
        self.waiting = self.weight = self.dt_weight = None
        self.steps_back = []

    def pull(self, kind: int, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        # The slope at x and the cotangent of x; those of the parameters are collected.
        half = self.halves[kind]
        if self.linear[kind]:
            return half(x), half(weight)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            slope = half(x)
        if not slope.requires_grad:
            return slope, None
        bar, *others = torch.autograd.grad(
            slope,
            (x, *self.parameters),
            weight,
            retain_graph=self.retrace.keep,
            allow_unused=True,
        )
        self.collect(others)
        return slope.detach(), bar

    def arrive(self, i: int) -> None:
        # What waits may have neighbours of its kind beyond the saved state, or not.
        if i == 0 or self.flows[0][0] != self.waiting:
            self.settle()
        if self.spacings is None:
            self.compare(i, [k for k in (0, 1) if k != self.waiting])
            self.z = list(self.states[i])
            self.steps_back = []  # the saved state has them undone
        elif i == 0:
            self.compare_places()
        self.inject(i)

    def compare_places(self) -> None:
        pairs = zip(self.places, self.states[0], self.spacings or (), strict=True)
        if self.places and any(bool((n != lattice.place(x, s)).any()) for n, x, s in pairs):
            raise ConvergenceError(
                "adjoint='reversible': the lattice was not retraced exactly, so the force did not "
                "give the same bits twice: make it deterministic "
                "(torch.use_deterministic_algorithms), and change no threads or device in between"
            )


def _self_adjoint(system: Separable) -> bool:
    # Whether the velocity is its own transpose: p / mass, without a mass to differentiate.
    velocity = getattr(system.velocity, "__func__", system.velocity)
    tracked = isinstance(system.mass, Tensor) and system.mass.requires_grad
    return velocity in (_identity, Separable._momentum_over_mass) and not tracked


def _less(x: Tensor, h: float | Tensor, slope: Tensor) -> Tensor:
    return x - h * slope if isinstance(h, Tensor) else torch.sub(x, slope, alpha=h)


class _ByMoves(_Backward):
    # Flow by flow of a Split, or step by step: undone by the same map with -h, then pulled back.

    def undo(self, steps: int) -> None:
        for move, h, c in _moves(self.retrace.run, self.dt, steps, reverse=True):
            self.z = [x.detach() for x in move(*self.z, -h)]
            self.pull(move, h, c)

    def pull(self, move: Move, h: float | Tensor, c: float) -> None:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in self.z]
            size = h
            if self.needs_dt:
                assert isinstance(h, Tensor)
                size = h.detach().requires_grad_()
            outputs = move(inputs[0], inputs[1], size)
        extra = [size] if self.needs_dt and isinstance(size, Tensor) else []
        live = [(y, bar) for y, bar in zip(outputs, self.z_bar, strict=True) if y.requires_grad]
        q_bar, p_bar, *others = torch.autograd.grad(
            [y for y, _ in live],
            (*inputs, *extra, *self.parameters),
            [bar for _, bar in live],
            retain_graph=self.retrace.keep,
            allow_unused=True,
        )
        zero = torch.zeros_like
        self.z_bar = [
            zero(x) if bar is None else bar for x, bar in zip(inputs, (q_bar, p_bar), strict=True)
        ]
        if extra:
            h_bar, *others = others
            if h_bar is not None:
                self.dt_bar = self.dt_bar + c * h_bar
        self.collect(others)


def _moves(run: Run, dt: float | Tensor, steps: int, *, reverse: bool) -> Any:
    # (map, its h, h / dt) in the order in which they act, or against it.
    method, system = run.method, run.system
    if isinstance(method, Splitting) and isinstance(system, Split):
        parts = method.parts(len(system.flows))
        parts = parts[::-1] if reverse else parts
        flows, plain = program(parts, dt, steps), program(parts, 1.0, steps)
        for (part, h), (_, c) in zip(flows, plain, strict=True):
            yield system.flows[part], h, c
        return

    def step(q: Tensor, p: Tensor, h: float | Tensor) -> tuple[Tensor, Tensor]:
        q, p, _ = method.advance(system, q, p, h, 1, None)
        return q, p

    for _ in range(steps):
        yield step, dt, 1.0


# --- What a force depends on -----------------------------------------------------------------


def captured(run: Run, q: Tensor, p: Tensor) -> tuple[list[Tensor], bool]:
    """Return the tensors beside q and p whose gradient one step reaches.

    They are the parameters of a module, or ``mu = log_mu.exp()`` in a closure. The flag says
    whether pulling a step back to them passes through nodes older than the step.
    """
    # A non-leaf shows itself only as an argument of some function, a leaf also at the end of the
    # graph.
    q, p = (x.detach().requires_grad_() for x in (q, p))
    dt = run.dt.detach() if isinstance(run.dt, Tensor) else run.dt
    with torch.enable_grad(), _Watch() as watch:
        if isinstance(run.system, Separable):
            outputs = run.system.field(q, p)
        elif isinstance(run.method, Splitting):
            outputs = []
            for move, h, _ in _moves(run, dt, 1, reverse=False):
                outputs += move(q, p, h)
        else:
            outputs = run.method.advance(run.system, q, p, dt, 1, None)[:2]
    seen = {_key(x): x for x in watch.seen.values()}
    roots = [_key(x) for x in outputs if x.requires_grad]
    own = {_key(q), _key(p)}
    found, leaves = _reach(roots, seen)
    leaves = {k: x for k, x in leaves.items() if k not in own}
    found = {k: x for k, x in found.items() if k not in own}
    below = [k for k, x in found.items() if x.grad_fn is not None]
    deeper, _ = _reach([e for k in below for e in _parents(k)], found)
    if deeper:
        # One captured tensor is made from another: count every path once, from the leaves.
        _, leaves = _reach(roots, {})
        return [x for k, x in leaves.items() if k not in own], True
    return [*found.values(), *leaves.values()], bool(leaves)


class _Watch(TorchFunctionMode):
    # Remembers the tensors that functions were given and none of them made.
    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, Tensor] = {}
        self.made: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.requires_grad and id(x) not in self.made:
                self.seen[id(x)] = x
        result = func(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and id(x) not in self.seen:
                self.made[id(x)] = x
        return result


_Key = tuple[Any, int]


def _key(x: Tensor) -> _Key:
    edge: GradientEdge = get_gradient_edge(x)
    return edge.node, edge.output_nr


def _parents(key: _Key) -> list[_Key]:
    return [edge for edge in key[0].next_functions if edge[0] is not None]


def _reach(
    roots: list[_Key], known: dict[_Key, Tensor]
) -> tuple[dict[_Key, Tensor], dict[_Key, Tensor]]:
    # Follow the graph backward up to the known tensors; what else it ends in are leaves.
    found: dict[_Key, Tensor] = {}
    leaves: dict[_Key, Tensor] = {}
    todo, seen = list(roots), set()
    while todo:
        key = todo.pop()
        if key in seen:
            continue
        seen.add(key)
        if key in known:
            found[key] = known[key]
        elif hasattr(key[0], "variable"):
            leaves[key] = key[0].variable
        else:
            todo += _parents(key)
    return found, leaves
