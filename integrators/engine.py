"""The compiled engine: a whole run of a splitting or an implicit method as one native call.

The force and the velocity of a :class:`Separable` system are traced, once, to expressions of one
trajectory; the C++ made of them keeps eight trajectories in vector registers through all steps of
a call. Nothing is asked of the user: a potential in plain torch is enough. What cannot be traced
to scalar operations, or has too many of them, runs through ``torch.compile`` in chunks of steps
instead; the line printed at the first compilation, and :func:`engine_of`, say which of the two.

For an implicit Runge-Kutta method the field of any system is traced, and the kernel makes the
sweeps (:mod:`darboux.integrators._implicit_kernel`). What cannot be traced is moved as without
``compile``, and so is what keeps a graph: the gradient of such a run is made by retracing it step
by step (:mod:`darboux.integrators.reversible`), of which only the way back is compiled.

Captured tensors are arguments of the kernel: their values are read at every call, and gradients
reach whatever they were computed from. The gradient walks the flows backwards, undoing each one
as it goes, so its memory does not grow with the number of steps.

What a trace takes for granted is checked where it can be: a run with other tensors or numbers in
the closure, the attributes or the parameters of the callables is traced again; the first step of
every kernel, and its gradient, are compared with the uncompiled ones. An integer tensor used as
an index is part of the trace: change it in a new system, not in place.
"""

import ctypes
import dataclasses
import functools
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from darboux._checks import ConvergenceError
from darboux.integrators import _native
from darboux.integrators._codegen import (
    Unsupported,
    backward_source,
    forward_source,
    lifted,
    packs_of,
    trace,
)
from darboux.integrators._implicit_kernel import ImplicitPlan, implicit_plan
from darboux.integrators._kernels import LANES, Native, compiler
from darboux.integrators.base import Integrator
from darboux.integrators.implicit import ImplicitRungeKutta
from darboux.integrators.splitting import Splitting, program
from darboux.integrators.systems import Separable, System

# Forces in one torch.compile graph of the second engine: more take minutes to compile.
_CHUNK = 40


def supports(method: Integrator, system: System) -> str | None:
    """Return None if the engine can run ``method`` on ``system``, else why not."""
    if isinstance(method, ImplicitRungeKutta):
        return None
    if not isinstance(method, Splitting):
        return f"{method.name} is not an explicit splitting, nor an implicit Runge-Kutta method"
    if not isinstance(system, Separable):
        return f"the system is a {type(system).__name__}, not a Separable"
    return None


def engine_of(system: System, q: Tensor, p: Tensor, method: Integrator | None = None) -> str:
    """Return which engine moves such a state: ``native kernel``, or another and why.

    ``method`` is a splitting unless given.
    """
    if isinstance(method, ImplicitRungeKutta):
        plan = _implicit(system, q, p, method)
        return plan if isinstance(plan, str) else plan.describe()
    assert isinstance(system, Separable)
    return _plan(system, q, p, _EULER).describe()


def advance(
    method: Integrator,
    system: System,
    q: Tensor,
    p: Tensor,
    dt: float | Tensor,
    steps: int,
    memory: Any = None,
    *,
    compensated: bool = False,
) -> tuple[Tensor, Tensor, Any]:
    """Take ``steps`` steps, like ``method.advance``; the memory holds what was rounded off.

    Splittings are differentiable once, by reversal, in ``q``, ``p``, ``dt`` and the captured
    tensors; implicit methods, where a graph is asked for, as without a kernel. Raises
    ``ValueError`` where :func:`supports` gives a reason and off the CPU, ``RuntimeError`` without
    a C++ compiler, and ``ConvergenceError`` if the stages of a step are not found, or from the
    backward pass if the run could not be undone: then the motion is chaotic, and its gradient
    means nothing.
    """
    reason = supports(method, system)
    if reason is not None:
        raise ValueError(f"compile=True: {reason}")
    if q.device.type != "cpu":
        raise ValueError(f"compile=True: q is on {q.device}; the kernels run on the CPU")
    if q.dtype not in _native.SCALARS:
        raise TypeError(f"compile=True: q has dtype {q.dtype}, expected float32 or float64")
    if isinstance(method, ImplicitRungeKutta):
        return _advance_implicit(method, system, q, p, dt, steps, memory)
    assert isinstance(method, Splitting)
    assert isinstance(system, Separable)
    compensated = compensated or method.compensated
    plan = _plan(system, q, p, method)
    if steps == 0 or q.numel() == 0:
        return q, p, memory
    return plan.advance(_Flows(method, dt, steps), q, p, memory, compensated)


# ---------------------------------------------------------------- what a call is made of


class _Flows:
    # The flows of a run, as the kernels take them.

    def __init__(self, method: Splitting, dt: float | Tensor, steps: int):
        self.method, self.dt, self.steps = method, dt, steps
        self.h = float(dt.detach()) if isinstance(dt, Tensor) else float(dt)

    def plan(self) -> "_CPlan":
        return _c_plan(self.method.flows, self.h, self.steps)


_known_sources: set[str] = set()


class _CPlan(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("head", ctypes.c_long),
        ("count", ctypes.c_long),
        ("mid", ctypes.c_long),
        ("end_mid", ctypes.c_long),
        ("repeats", ctypes.c_long),
    )


@functools.lru_cache(maxsize=64)
def _c_plan(flows: tuple, h: float, steps: int) -> _CPlan:
    head, first, middle, repeats, last = _pairs(flows, steps)
    rows = [(0.0, head), *first, *(middle if repeats else ()), *last]
    table = [x for kick, drift in rows for x in (kick * h, drift * h, kick, drift)]
    numbers = (ctypes.c_double * len(table))(*table)
    mid = 1 + len(first)
    end_mid = mid + len(middle) if repeats else 0
    out = _CPlan(ctypes.addressof(numbers), int(head != 0), len(rows), mid, end_mid, repeats)
    out.keep = numbers
    return out


Pairs = list[tuple[float, float]]


def _pairs(flows: tuple, steps: int) -> tuple[float, Pairs, Pairs, int, Pairs]:
    """Write the program of ``steps`` steps as a drift and pairs (kick, drift).

    Returns the drift, the first pairs, those of the middle, how often these come, the last.
    """
    c = [x for _, x in flows]
    kicks_first, kicks_last = bool(flows[0][0]), bool(flows[-1][0])
    if kicks_first and not kicks_last:
        return 0.0, [], _two(c), steps, []
    if not kicks_first and kicks_last:
        return c[0], [], _two([*c[1:], c[0]]), steps - 1, _two([*c[1:], 0.0])
    joined = c[-1] + c[0]
    if kicks_first:
        return 0.0, _two(c[:-1]), _two([joined, *c[1:-1]]), steps - 1, [(c[-1], 0.0)]
    return c[0], [], _two([*c[1:-1], joined]), steps - 1, _two(c[1:])


def _two(c: list[float]) -> Pairs:
    return list(zip(c[::2], c[1::2], strict=True))


# ---------------------------------------------------------------- the native engine


@dataclass
class _NativePlan:
    # How to move one system in states of one kind by generated or hand-written C++.

    system: "weakref.ref[Separable]"
    constants: Callable[[], Sequence[Tensor]]
    captured: list[Tensor]  # what the constants are computed from
    # The C++ for: backward, compensated, the constants to differentiate by, the step too.
    source: Callable[[bool, bool, tuple[int, ...], bool], str]
    all_slots: tuple[int, ...] | None  # if the source always differentiates by all of these
    widths: tuple[int, int]  # numbers in one q and one p
    block: int  # trajectories that a kernel takes together
    dtype: torch.dtype
    seconds: float  # spent on tracing
    compared: bool = False  # whether the gradient was compared with autograd's
    functions: dict[tuple, Callable[..., None]] = field(default_factory=dict)

    def describe(self) -> str:
        return "native kernel"

    def function(
        self,
        flows: _Flows,
        backward: bool,
        compensated: bool = False,
        slots: tuple[int, ...] = (),
        rate: bool = False,
    ) -> Callable[..., None]:
        key = (backward, compensated, slots, rate)
        if key not in self.functions:
            start = time.perf_counter()
            source = self.source(*key)
            fresh = source not in _known_sources
            _known_sources.add(source)
            self.functions[key] = _native.function(source, 7 if backward else 6)
            if fresh:
                what = "native kernel, gradient" if backward else "native kernel"
                seconds = time.perf_counter() - start + (0 if backward else self.seconds)
                _native.announce(flows.method, "Separable", seconds, what)
        return self.functions[key]

    def present(self) -> list[Tensor]:
        """Return the constants as they are now."""
        return [x.to(self.dtype).contiguous() for x in self.constants()]

    def advance(
        self, flows: _Flows, q: Tensor, p: Tensor, memory: Any, compensated: bool
    ) -> tuple[Tensor, Tensor, Any]:
        constants = self.present()
        lost = None
        if compensated:
            lost = memory or (torch.zeros_like(q), torch.zeros_like(p))
        inputs = (q, p, flows.dt, *constants)
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in inputs
        ):
            if not self.compared:
                system = self.system()
                assert system is not None
                _compare_gradient(self, system, q, p, flows)
                self.compared = True
            return self.reversible(flows, lost, q, p, constants)
        return self.forward(flows, q, p, lost, constants)

    def reversible(
        self, flows: _Flows, lost: Any, q: Tensor, p: Tensor, constants: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Any]:
        """Do the same as ``forward``, differentiably."""
        dt = flows.dt if isinstance(flows.dt, Tensor) else None
        out: Any = _Reversible.apply(self, flows, lost, dt, q, p, *constants)
        return out[0], out[1], out[2:] or None

    def forward(
        self, flows: _Flows, q: Tensor, p: Tensor, lost: Any, constants: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Any]:
        q, p, *lost = (_native.copy(x) for x in (q, p, *(lost or ())))
        run = self.function(flows, False, bool(lost))
        data = [x.data_ptr() for x in (q, p, *lost)] + [None] * (2 - len(lost))
        pointers, plan = _native.pointers(constants), flows.plan()
        batch = q.numel() // self.widths[0]
        _native.in_parts(
            lambda begin, end, _: run(*data, pointers, ctypes.byref(plan), begin, end),
            _native.cut(batch, self.block, _native.threads(batch * flows.steps)),
        )
        return q, p, tuple(lost) or None

    def backward(
        self,
        flows: _Flows,
        states: Sequence[Tensor],
        constants: Sequence[Tensor],
        slots: tuple[int, ...],
        rate: bool,
    ) -> tuple[list[Tensor], Tensor]:
        """Undo a run; ``states`` are ``q, p`` and their cotangents, of its end, then its start.

        Also returns the gradients of the constants in ``slots`` and of the step, one after the
        other.
        """
        moved = [_native.copy(x) for x in states]
        run = self.function(flows, True, False, slots, rate)
        batch = moved[0].numel() // self.widths[0]
        parts = _native.cut(batch, self.block, _native.PARTS)
        size = sum(constants[s].numel() for s in slots) + rate
        sums = torch.zeros(len(parts), size, dtype=torch.float64)
        data = [x.data_ptr() for x in moved]
        pointers, plan = _native.pointers(constants), flows.plan()

        def part(begin: int, end: int, k: int) -> None:
            bars = sums.data_ptr() + 8 * size * k
            run(*data, bars, pointers, ctypes.byref(plan), begin, end)

        _native.in_parts(part, parts, _native.threads(batch * flows.steps))
        return moved, sums.sum(0)


class _Reversible(torch.autograd.Function):
    # A run whose backward pass recomputes the states from the last one.

    @staticmethod
    def forward(ctx: Any, plan: _NativePlan, flows: _Flows, lost: Any, dt: Any, *tensors: Tensor):
        q, p, *constants = tensors
        end_q, end_p, lost = plan.forward(flows, q, p, lost, constants)
        ctx.plan, ctx.flows, ctx.lost = plan, flows, lost
        ctx.save_for_backward(q, p, end_q, end_p, *constants)
        ctx.mark_non_differentiable(*(lost or ()))
        return end_q, end_p, *(lost or ())

    @staticmethod
    def backward(ctx: Any, *bars: Tensor):  # type: ignore
        if torch.is_grad_enabled():
            raise RuntimeError(
                "compile=True: a compiled run is differentiable once; for create_graph=True use "
                "adjoint='autograd'"
            )
        q, p, end_q, end_p, *constants = ctx.saved_tensors
        slots = tuple(i for i, need in enumerate(ctx.needs_input_grad[6:]) if need)
        rate = bool(ctx.needs_input_grad[3])
        states = (end_q, end_p, bars[0], bars[1])
        plan: _NativePlan = ctx.plan
        if plan.all_slots is not None:
            slots, rate = plan.all_slots, True
        (q0, p0, qb, pb), sums = plan.backward(ctx.flows, states, constants, slots, rate)
        _check_undone(q, p, q0, p0)
        grads: list[Tensor | None] = [None] * len(constants)
        sizes = [constants[s].numel() for s in slots]
        for slot, grad in zip(slots, sums.split([*sizes, int(rate)]), strict=False):
            grads[slot] = grad.reshape(constants[slot].shape).to(constants[slot].dtype)
        dt = sums[-1].to(ctx.flows.dt.dtype) if ctx.needs_input_grad[3] else None
        return None, None, None, dt, qb, pb, *grads


def _check_undone(q: Tensor, p: Tensor, q0: Tensor, p0: Tensor) -> None:
    scale = 1 + torch.maximum(q.abs().max(), p.abs().max())
    error = torch.maximum((q - q0).abs().max(), (p - p0).abs().max()) / scale
    if not error <= torch.finfo(q.dtype).eps ** 0.4:
        raise ConvergenceError(
            f"compile=True: undoing the steps missed the initial state by {float(error):.1e} of "
            "its size, so the gradient would be wrong: the motion is chaotic or the state is not "
            "finite. Save the state more often (save_every), or use adjoint='autograd'",
            residual=float(error),
        )


# ---------------------------------------------------------------- the second engine


@dataclass
class _ChunkPlan:
    # Chunks of steps through torch.compile, for what is no native kernel.

    system: "weakref.ref[Separable]"
    reason: str
    compiled: dict[tuple, Callable[..., tuple[Tensor, ...]]] = field(default_factory=dict)

    def describe(self) -> str:
        return f"torch.compile in chunks of steps: {self.reason}"

    def advance(
        self, flows: _Flows, q: Tensor, p: Tensor, memory: Any, compensated: bool
    ) -> tuple[Tensor, Tensor, Any]:
        system = self.system()
        assert system is not None
        if compensated:
            raise ValueError(
                f"compile=True: no compensated sums, for the engine is {self.describe()}"
            )
        if torch.is_grad_enabled() and any(
            x.requires_grad for x in (q, p, system.force(q), system.velocity(p))
        ):
            raise ValueError(f"compile=True: no gradient, for the engine is {self.describe()}")
        with torch.no_grad():
            whole, rest = divmod(flows.steps, _chunk_steps(flows.method))
            if whole:
                chunk = self.chunk(system, flows.method, q, p)
                h = torch.tensor(flows.h, dtype=q.dtype)
                for _ in range(whole):
                    q, p = chunk(q, p, h)
            q, p, _ = dataclasses.replace(flows.method, compensated=False).advance(
                system, q, p, flows.h, rest, None
            )
        return q, p, None

    def chunk(
        self, system: Separable, method: Splitting, q: Tensor, p: Tensor
    ) -> Callable[..., tuple[Tensor, ...]]:
        if method.flows not in self.compiled:
            start = time.perf_counter()
            force, force_tensors = lifted(system.force, q)
            velocity, velocity_tensors = lifted(system.velocity, p)
            flows = list(program(method.flows, 1.0, _chunk_steps(method)))

            def steps(
                q: Tensor, p: Tensor, h: Tensor, kicks: list[Tensor], drifts: list[Tensor]
            ) -> tuple[Tensor, Tensor]:
                for kick, c in flows:
                    if kick:
                        p = p + c * h * force(q, *kicks)
                    else:
                        q = q + c * h * velocity(p, *drifts)
                return q, p

            # Without these two thresholds compile time grows exponentially with the steps.
            options: dict[str, Any] = {"realize_opcount_threshold": 1, "realize_reads_threshold": 1}
            run = torch.compile(steps, dynamic=False, options=options)

            def chunk(q: Tensor, p: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
                return run(q, p, h, force_tensors, velocity_tensors)

            chunk(q, p, torch.zeros((), dtype=q.dtype))
            _native.announce(method, "Separable", time.perf_counter() - start, self.describe())
            self.compiled[method.flows] = chunk
        return self.compiled[method.flows]


def _chunk_steps(method: Splitting) -> int:
    return max(1, _CHUNK // sum(part for part, _ in method.flows))


# ---------------------------------------------------------------- plans and their cache

_Plan = _NativePlan | _ChunkPlan
_plans: "weakref.WeakKeyDictionary[System, dict[tuple, tuple[tuple, Any]]]"
_plans = weakref.WeakKeyDictionary()
_lock = threading.RLock()


def _plan(system: Separable, q: Tensor, p: Tensor, method: Splitting) -> _Plan:
    return _once(_make_plan, system, q, p, method)


def _implicit(
    system: System, q: Tensor, p: Tensor, method: ImplicitRungeKutta
) -> ImplicitPlan | str:
    return _once(_make_implicit_plan, system, q, p, method)


def _once(make: Callable[..., Any], system: System, q: Tensor, p: Tensor, method: Any) -> Any:
    key = (make, tuple(q.shape), tuple(p.shape), q.dtype)
    seen = _native.fingerprint(system)
    with _lock:
        known = _plans.setdefault(system, {})
        if key not in known or known[key][0] != seen:
            known[key] = (seen, make(system, q.detach(), p.detach(), method))
        return known[key][1]


def _make_plan(system: Separable, q: Tensor, p: Tensor, method: Splitting) -> _Plan:
    compiler()
    reason = ""
    for event in _event_dims(system, q):
        try:
            plan = _native_plan(system, q, p, event)
            _compare(plan, system, q, p, method)
            return plan
        except Unsupported as error:
            reason = reason or str(error).splitlines()[0]
        except Exception as error:  # whatever a function raises when given another shape
            reason = reason or f"{type(error).__name__}: {error}".splitlines()[0]
    return _ChunkPlan(weakref.ref(system), f"no native kernel, for {reason}")


def _event_dims(system: Separable, q: Tensor) -> Sequence[int]:
    # The dimensions that the potential sums away; with a force alone, try them in turn.
    if system.potential is None:
        return range(1, q.dim() + 1)
    with torch.no_grad():
        v = system.potential(*((q[..., :-1], q[..., -1]) if system.time else (q,)))
    return [max(1, q.dim() - v.dim())]


def _make_implicit_plan(
    system: System, q: Tensor, p: Tensor, method: ImplicitRungeKutta
) -> ImplicitPlan | str:
    # Or why there is none.
    compiler()
    reason = ""
    for event in range(1, q.dim() + 1):
        try:
            return implicit_plan(method, system, q, p, event)
        except Unsupported as error:
            reason = reason or str(error).splitlines()[0]
        except Exception as error:  # whatever a function raises when given another shape
            reason = reason or f"{type(error).__name__}: {error}".splitlines()[0]
    why = f"uncompiled: no native kernel, for {reason}"
    print(f"{method.name} for {type(system).__name__} runs {why}", file=sys.stderr)
    return why


def _advance_implicit(
    method: ImplicitRungeKutta,
    system: System,
    q: Tensor,
    p: Tensor,
    dt: float | Tensor,
    steps: int,
    memory: Any,
) -> tuple[Tensor, Tensor, Any]:
    plan = _implicit(system, q, p, method)
    if isinstance(plan, str) or steps == 0 or q.numel() + p.numel() == 0:
        return method.advance(system, q, p, dt, steps, memory)
    if torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in (q, p, dt, *plan.present())
    ):
        return method.advance(system, q, p, dt, steps, memory)
    return plan.advance(method, system, q, p, dt, steps, memory)


def _native_plan(system: Separable, q: Tensor, p: Tensor, event: int) -> _NativePlan:
    start = time.perf_counter()
    scalar = _native.SCALARS[q.dtype]
    widths = (q.shape[q.dim() - event :].numel(), p.shape[p.dim() - event :].numel())
    native: Native | None = getattr(system, "native", None)
    if native and q.shape[q.dim() - event :] == native.event:
        kernel = native
        if kernel.wanted(q.numel() // widths[0]):
            return _NativePlan(
                system=weakref.ref(system),
                constants=kernel.tensors,
                captured=list(kernel.tensors()),
                source=lambda backward, compensated, slots, rate: kernel.source(scalar, backward),
                all_slots=tuple(range(len(kernel.tensors()))),
                widths=widths,
                block=1,
                dtype=q.dtype,
                seconds=time.perf_counter() - start,
            )
    traced = trace(system.force, system.velocity, q, p, event)

    def source(backward: bool, compensated: bool, slots: tuple[int, ...], rate: bool) -> str:
        if backward:
            return backward_source(traced, scalar, slots, rate)
        return forward_source(traced, scalar, compensated)

    return _NativePlan(
        system=weakref.ref(system),
        constants=traced.constants,
        captured=traced.captured,
        source=source,
        all_slots=None,
        widths=widths,
        block=LANES * packs_of(traced),
        dtype=q.dtype,
        seconds=time.perf_counter() - start,
    )


def _compare(plan: _NativePlan, system: Separable, q: Tensor, p: Tensor, method: Splitting) -> None:
    # One kick and one drift of unit length, with the kernel and without.
    with torch.no_grad():
        ours = plan.forward(_one_step(method, 1.0), q, p, None, plan.present())[:2]
        p = p + system.force(q)
        theirs = q + system.velocity(p), p
    for a, b in zip(ours, theirs, strict=True):
        if not _native.close(a, b):
            raise Unsupported("its kernel does not reproduce it")


def _one_step(method: Splitting, dt: float | Tensor) -> _Flows:
    # Named after the method, for the line that is printed when a kernel is compiled.
    return _Flows(dataclasses.replace(_EULER, name=method.name), dt, 1)


def _compare_gradient(
    plan: _NativePlan, system: Separable, q: Tensor, p: Tensor, flows: _Flows
) -> None:
    # The same for the gradient, by the tensors that were captured too.
    captured = list({id(x): x for x in plan.captured if x.requires_grad}.values())
    generator = torch.Generator().manual_seed(0)
    wq, wp = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (q, p))
    by_step = isinstance(flows.dt, Tensor) and flows.dt.requires_grad
    with torch.enable_grad():
        q, p = q.detach().requires_grad_(), p.detach().requires_grad_()
        dt = torch.ones((), dtype=q.dtype, requires_grad=by_step)
        a, b = plan.reversible(_one_step(flows.method, dt), None, q, p, plan.present())[:2]
        kicked = p + dt * system.force(q)
        moved = q + dt * system.velocity(kicked)
        by = [q, p, *([dt] if by_step else []), *captured]
        ours, theirs = (
            torch.autograd.grad(
                x.sum(), by, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for x in (wq * a + wp * b, wq * moved + wp * kicked)
        )
    for x, y in zip(ours, theirs, strict=True):
        if not _native.close(x, y):
            raise ValueError(
                "compile=True: the gradient of the kernel is not that of the system, as happens "
                "if a part of it is detached: use adjoint='autograd'"
            )


_EULER = Splitting(name="one step", order=1, symmetric=False, source="", flows=((1, 1.0), (0, 1.0)))
