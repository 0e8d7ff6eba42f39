r"""Engines of recurrences: one cell, several ways to move it along a sequence.

.. math:: s_t = \Phi_\theta(f_t, s_{t-1}), \qquad t = 1 \dots T

A :class:`Cell` is that map on states which are tuples of tensors ``(batch, ...)``; :func:`run`
moves it and gives all states. The engines differ in time and memory, not in results:

=============== ==============================================================================
``sequential``  a loop: the reference
``compiled``    the same loop, compiled 16 steps at a time (the first call takes tens of seconds)
``scan``        the cell's own parallel form: affine maps, translations, group products
``deer``        Newton on the whole trajectory, Jacobians in full (:mod:`~darboux.learners.deer`)
``quasi-deer``  the same with the 2 x 2 blocks of the Jacobians
``reversible``  a loop that keeps no states for the gradient: they are computed backwards
``kernel``      the cell's native kernel
``auto``        on a CPU ``kernel``, for 64 steps or more where one can be built; else ``scan``
                where there is one, else the loop
=============== ==============================================================================
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from darboux import _checks
from darboux.integrators._kernels import NoCompiler, compiler

State = tuple[Tensor, ...]
Step = Callable[[State, Tensor, State], State]

ENGINES = (
    "sequential",
    "compiled",
    "scan",
    "deer",
    "quasi-deer",
    "reversible",
    "kernel",
    "auto",
)

_LONG = 64  # steps from which on a kernel is worth building
_UNROLL = 16  # steps compiled together
_CHUNK = 64  # steps whose graph the reversible engine holds at once


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A map ``step(parameters, f, state) -> state``, and what is known about it.

    All tensors that are learned go through ``parameters``; ``f (batch, ...)`` is one input.
    ``step`` must not depend on the batch nor wrap angles: ``wrap`` does, after the step, and what
    it removes must not change later steps up to ``wrap``. ``inverse`` undoes ``step``.
    ``scan(parameters, inputs, state)`` and ``kernel`` of the same signature return the states of
    all times ``(batch, time, ...)``, wrapped. ``blocks`` promises two state tensors of one shape
    and a Jacobian made of 2 x 2 blocks, one for each pair of entries.
    """

    step: Step
    parameters: tuple[Tensor, ...] = ()
    inverse: Step | None = None
    wrap: Callable[[State], State] | None = None
    scan: Callable[[State, Tensor, State], State] | None = None
    kernel: Callable[[State, Tensor, State], State] | None = None
    blocks: bool = False

    def wrapped(self, state: State) -> State:
        """Return the representative of the state that is kept."""
        return state if self.wrap is None else self.wrap(state)


def run(cell: Cell, inputs: Tensor, state: State, engine: str = "auto") -> tuple[State, State]:
    """Return the states after every input, ``(batch, time, ...)`` each, and the last.

    ``inputs`` is ``(batch, time, ...)``. Raises ``ValueError`` for an engine that is not known or
    that this cell has no means for; ``deer`` warns (``RuntimeWarning``) where it had to fall back.
    """
    if engine not in ENGINES:
        raise ValueError(f"run: engine is {engine!r}, expected one of {', '.join(ENGINES)}")
    for name, part in (("scan", cell.scan), ("kernel", cell.kernel), ("reversible", cell.inverse)):
        if engine == name and part is None:
            lacks = "inverse" if name == "reversible" else name
            raise ValueError(f"run: engine is {engine!r}, and this cell has no {lacks}")
    if engine == "auto":
        engine = choose(cell, inputs)
    path = _engine(engine)(cell, inputs, tuple(state))
    # a copy: a view would hold the whole path for as long as the state is kept
    return path, tuple(x[:, -1].clone() for x in path)


def choose(cell: Cell, inputs: Tensor) -> str:
    """Return the engine that ``auto`` stands for; warns, once, where there is no compiler."""
    plain = inputs.device.type == "cpu" and inputs.dtype in (torch.float32, torch.float64)
    long = inputs.shape[1] >= _LONG and not _checks.in_transform()
    if cell.kernel is not None and plain and long and _has_compiler():
        return "kernel"
    return "sequential" if cell.scan is None else "scan"


@functools.cache
def _has_compiler() -> bool:
    try:
        compiler()
    except NoCompiler:
        warnings.warn(
            "recurrent layers run without their native kernel, some 50 times slower: neither g++ "
            "nor clang++ was found on PATH",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _engine(name: str) -> Callable[[Cell, Tensor, State], State]:
    if name.endswith("deer"):
        from darboux.learners.deer import newton

        return functools.partial(newton, blocks=name == "quasi-deer")  # type: ignore[return-value]
    return {
        "sequential": sequential,
        "compiled": compiled,
        "scan": lambda cell, *args: cell.scan(cell.parameters, *args),  # type: ignore[misc]
        "kernel": lambda cell, *args: cell.kernel(cell.parameters, *args),  # type: ignore[misc]
        "reversible": reversible,
    }[name]


# ---------------------------------------------------------------- one step after the other


def sequential(cell: Cell, inputs: Tensor, state: State) -> State:
    """Return the states of a plain loop."""
    out = []
    for f in inputs.unbind(1):
        state = cell.wrapped(cell.step(cell.parameters, f, state))
        out.append(state)
    return tuple(torch.stack(parts, 1) for parts in zip(*out, strict=True))


def compiled(cell: Cell, inputs: Tensor, state: State) -> State:
    """Return the states of the loop, compiled ``16`` steps at a time; the rest is not compiled."""
    whole = inputs.shape[1] // _UNROLL * _UNROLL
    pieces = []
    many = _compiled(cell.step, cell.wrap)
    for begin in range(0, whole, _UNROLL):
        pieces.append(many(cell.parameters, inputs[:, begin : begin + _UNROLL], state))
        state = tuple(x[:, -1] for x in pieces[-1])
    if whole < inputs.shape[1]:
        pieces.append(sequential(cell, inputs[:, whole:], state))
    return tuple(torch.cat(parts, 1) for parts in zip(*pieces, strict=True))


@functools.lru_cache(16)
def _compiled(step: Step, wrap: Callable[[State], State] | None) -> Any:
    def many(parameters: State, inputs: Tensor, state: State) -> State:
        return sequential(Cell(step=step, parameters=parameters, wrap=wrap), inputs, state)

    return torch.compile(many)


# ---------------------------------------------------------------- parallel forms


def scan(
    compose: Callable[[State, State], State],
    act: Callable[[State, State], State],
    elements: State,
    state: State,
) -> State:
    """Return the states ``g_t ... g_1 s`` of all times, by halving: O(time) work, O(log) depth.

    ``compose(later, earlier)`` multiplies elements ``(batch, time, ...)`` of an associative
    family; ``act`` applies them to states. Blelloch (1990), in the form that needs the products
    of pairs only.
    """
    time = elements[0].shape[1]
    if time <= 2:
        out = []
        for t in range(time):
            state = act(tuple(x[:, t] for x in elements), state)
            out.append(state)
        return tuple(torch.stack(parts, 1) for parts in zip(*out, strict=True))
    odd = tuple(x[:, 1::2] for x in elements)
    even = tuple(x[:, : 2 * odd[0].shape[1] : 2] for x in elements)
    after_odd = scan(compose, act, compose(odd, even), state)
    first = act(tuple(x[:, :1] for x in elements), tuple(x.unsqueeze(1) for x in state))
    later = tuple(x[:, 2::2] for x in elements)
    n = later[0].shape[1]
    after_even = act(later, tuple(x[:, :n] for x in after_odd))
    return tuple(
        _interleave(torch.cat([a, b], 1), c)
        for a, b, c in zip(first, after_even, after_odd, strict=True)
    )


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    n = odd.shape[1]
    both = torch.stack([even[:, :n], odd], 2).flatten(1, 2)
    return both if even.shape[1] == n else torch.cat([both, even[:, n:]], 1)


def affine_scan(matrix: Tensor, shift: Tensor, state: Tensor) -> Tensor:
    r"""Return the states of :math:`s_t = M_t s_{t-1} + b_t`, ``(batch, time, ..., n)``.

    ``matrix`` is ``(batch, time, ..., n, n)``; a batch or time of one stands for all, and a
    matrix constant in time is squared rather than multiplied.
    """
    if shift.shape[1] <= 2:
        out = []
        for t in range(shift.shape[1]):
            state = apply(matrix[:, min(t, matrix.shape[1] - 1)], state) + shift[:, t]
            out.append(state)
        return torch.stack(out, 1)
    constant = matrix.shape[1] == 1
    odd, even = (matrix, matrix) if constant else (matrix[:, 1::2], matrix[:, :-1:2])
    pairs = shift.shape[1] // 2
    b = apply(odd, shift[:, : 2 * pairs : 2]) + shift[:, 1::2]
    after_odd = affine_scan(odd @ even[:, :pairs], b, state)
    m = matrix if constant else matrix[:, ::2]
    first = torch.cat([state.unsqueeze(1), after_odd], 1)
    after_even = apply(m, first[:, : (shift.shape[1] + 1) // 2]) + shift[:, ::2]
    return _interleave(after_even, after_odd)


def apply(matrix: Tensor, x: Tensor) -> Tensor:
    """Return ``M x`` for ``M (..., n, n)`` and ``x (..., n)``; written out for ``n <= 2``."""
    if x.shape[-1] > 2:
        return (matrix @ x.unsqueeze(-1)).squeeze(-1)
    if x.shape[-1] == 1:
        return matrix[..., 0] * x
    return matrix[..., 0] * x[..., :1] + matrix[..., 1] * x[..., 1:]


# ---------------------------------------------------------------- memory that does not grow


def reversible(cell: Cell, inputs: Tensor, state: State, keep: int = 16) -> State:
    """Return the states of the loop, keeping for the gradient one in ``64 keep``.

    The backward pass goes through the sequence in chunks of 64, the last first. Where a chunk
    began is found by inverse steps, or read, every ``keep``-th time: under friction the inverse
    amplifies round-off as the step damps it. Only one chunk's graph exists at a time. What the
    caller keeps of the states returned is not this engine's: see :func:`fold`.
    """
    return _Reversible.apply(cell, keep, len(state), inputs, *state, *cell.parameters)  # type: ignore[return-value]


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cell: Cell, keep: int, parts: int, inputs: Tensor, *rest: Tensor):
        state: State = rest[:parts]
        ctx.cell, ctx.parts, ctx.keep = cell, parts, keep
        ctx.save_for_backward(inputs, *rest)
        ctx.kept, out = {}, []
        for number, begin in enumerate(range(0, inputs.shape[1], _CHUNK)):
            if number % keep == 0:
                ctx.kept[number] = state
            out.append(_forwards(cell, inputs[:, begin : begin + _CHUNK], state))
            # a copy: a view would hold the whole chunk
            state = tuple(x[:, -1].clone() for x in out[-1])
        ctx.last = state
        return tuple(torch.cat(pieces, 1) for pieces in zip(*out, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs, *rest = ctx.saved_tensors
        parameters = tuple(x.detach().requires_grad_() for x in rest[ctx.parts :])
        cell, end = ctx.cell, ctx.last
        of_state = [torch.zeros_like(x) for x in end]
        of_parameters = [torch.zeros_like(x) for x in parameters]
        of_inputs = torch.empty_like(inputs)
        for number in reversed(range(-(-inputs.shape[1] // _CHUNK))):
            piece = slice(number * _CHUNK, (number + 1) * _CHUNK)
            f = inputs[:, piece].detach()
            start = ctx.kept.get(number)
            if start is None:
                start = end
                for one in reversed(f.unbind(1)):
                    start = cell.wrapped(cell.inverse(tuple(rest[ctx.parts :]), one, start))
            end = start
            with torch.enable_grad():
                f.requires_grad_()
                start = tuple(x.detach().requires_grad_() for x in start)
                path = _forwards(_with(cell, parameters), f, start)
                outputs = [*path, *(x[:, -1] for x in path)]
            wanted = [x[:, piece] for x in slopes] + of_state
            found = torch.autograd.grad(
                outputs, [f, *start, *parameters], wanted, materialize_grads=True
            )
            of_inputs[:, piece] = found[0]
            of_state = list(found[1 : 1 + ctx.parts])
            for sum_, g in zip(of_parameters, found[1 + ctx.parts :], strict=True):
                sum_ += g
        return None, None, None, of_inputs, *of_state, *of_parameters


def _forwards(cell: Cell, inputs: Tensor, state: State) -> State:
    # never the scan: what is computed again must be what was computed
    if choose(cell, inputs) == "kernel":
        assert cell.kernel is not None
        return cell.kernel(cell.parameters, inputs, state)
    return sequential(cell, inputs, state)


def _with(cell: Cell, parameters: State) -> Cell:
    return Cell(
        step=cell.step,
        parameters=parameters,
        inverse=cell.inverse,
        wrap=cell.wrap,
        kernel=cell.kernel,
    )


def fold(
    step: Callable[[Any, Any], tuple[Tensor, Any]],
    pieces: Sequence[Any],
    state: Any = None,
) -> tuple[float, Any]:
    """Add the gradient of a loss over a long sequence, holding the graph of one piece at a time.

    ``step(piece, state) -> (loss, state)`` is any streamed model, the losses of the pieces add
    up, and the gradient is that of the whole (nothing is cut between pieces): the states between
    pieces are kept, and each piece is computed twice. Parameters get their ``.grad`` as from
    ``backward``. Returns the loss and the last state, detached. ``pieces`` may make its items when
    asked. Griewank, Optim. Methods Softw. 1 (1992) 35.
    """
    states, total = [state], 0.0
    with torch.no_grad():
        for n in range(len(pieces)):
            loss, state = step(pieces[n], states[-1])
            states.append(state)
            total += float(loss)
    slopes: list[Tensor] = []
    for n in reversed(range(len(pieces))):
        parts, form = tree_flatten(states[n])
        parts = [_leaf(x) for x in parts]
        with torch.enable_grad():
            loss, end = step(pieces[n], tree_unflatten(parts, form))
        outputs, wanted = [loss], [torch.ones_like(loss)]
        for x, g in zip(tree_flatten(end)[0] if slopes else [], slopes, strict=True):
            if isinstance(x, Tensor) and x.requires_grad:
                outputs.append(x)
                wanted.append(g)
        torch.autograd.backward(outputs, wanted)
        slopes = [_slope(x) for x in parts]
    return total, states[-1]


def _leaf(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().requires_grad_()
    return x


def _slope(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.grad is None:
        return torch.zeros_like(x) if isinstance(x, Tensor) else None
    return x.grad
