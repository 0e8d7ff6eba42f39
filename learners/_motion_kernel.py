"""The native kernel of a head's motion: forward and hand-written backward, compiled once a shape.

Eight sequences move together, one in each lane of a vector; a unit of work is such a group and some
heads: up to four, or all where they are coupled. The forward pass stores the path and nothing else;
the backward pass computes the rest again from the state before each step. The reference is
:class:`~darboux.learners.heads.Motion`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from darboux.integrators import _native
from darboux.integrators._kernels import HEADER
from darboux.learners import _coordinate_kernel, _motion_source as source
from darboux.learners.recurrence import State

_LANES = 8


def kernel_of(motion: Any) -> Callable[[State, Tensor, State], State] | None:
    """Return what :class:`~darboux.learners.recurrence.Cell` takes as kernel."""
    if motion.grid is not None:
        return None
    alone = _coordinate_kernel.fits(motion)
    return functools.partial(_coordinate_kernel.path if alone else _run, motion)


def _run(motion: Any, tensors: State, inputs: Tensor, state: State) -> State:
    rows = features(motion, tensors, inputs.transpose(0, 1), state)
    q, p = rows.unflatten(-1, (2, *state[0].shape[1:])).transpose(0, 1).unbind(2)
    return q, p


def features(motion: Any, tensors: State, inputs: Tensor, state: State) -> Tensor:
    """Return ``(q, p)`` after each token ``(time, batch, ...)``, in one row.

    Times follow each other in memory: one stream, where rows of a power of two of bytes would all
    want the same lines of the cache. So do those of ``inputs``.
    """
    _coordinate_kernel.check_inputs(inputs)
    return _Kernel.apply(motion, inputs, *state, *tensors)  # type: ignore[return-value]


def _gang(heads: int, rank: int) -> int:
    # heads moved together: coupled ones must be; else chains that hide each other's waits
    return heads if rank else math.gcd(heads, 4)


@functools.lru_cache(64)
def _built(
    name: str,
    dtype: torch.dtype,
    heads: int,
    dim: int,
    size: int,
    rank: int,
    free: bool,
    circular: bool,
    gates: int,
    kind: Any,
) -> Callable[..., None]:
    forced, curved = int(kind.forces > 0), int(name in source.DRIFTS)
    drifting = kind.forces
    coupling = drifting + kind.drifts
    count = coupling + ((3 if free else 2) if rank else 0)
    names = {
        "E": dim,
        "HEADS": _gang(heads, rank),
        "SIZE": size,
        "RANK": rank,
        "FREE": int(free),
        "CIRCULAR": int(circular),
        "GATES": gates,
        "FORCED": forced,
        "CURVED": curved,
        "DRIFTING": drifting,
        "COUPLING": coupling,
        "COUNT": count,
        "PERIODIC": int(kind.period is not None),
        "PERIOD": repr(kind.period or 1.0),
        "OMEGA": repr(2 * math.pi / (kind.period or 1.0)),
    }
    defines = "".join(f"#define {key} {value}\n" for key, value in names.items())
    text = (
        f"typedef {_native.SCALARS[dtype]} T;\n#define MANY_CALLS\n{defines}{HEADER}{source.COMMON}"
        + (source.FORCES[name] if forced else "")
        + ("" if name == "metric" else source.NOTHING)
        + (source.DRIFTS.get(name, source.PLAIN_DRIFT))
        + (source.ALL_HEADS if rank else "")
        + source.RUN
    )
    return _native.function(text, 2)


def _function(motion: Any, inputs: Tensor, tensors: State) -> tuple[Callable[..., None], int]:
    _, _, coupling = motion.split(tensors)
    heads, dim = inputs.shape[-2:]
    size = 1
    if motion.name == "potential":
        size = tensors[0].shape[1]
    elif motion.name.startswith("low_rank") or motion.name == "metric":
        size = tensors[0].shape[2]
    rank = coupling[0].shape[0] if coupling else 0
    free = len(coupling) == 3
    run = _built(
        motion.name, inputs.dtype, heads, dim, size, rank, free, motion.circular, motion.gates,
        motion.kind,
    )  # fmt: skip
    return run, heads // _gang(heads, rank)


def waves(x: Tensor, period: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of angles, a whole period being a turn, in one native pass.

    For float32 on a CPU; the angles are taken to have been wrapped.
    """
    return _Waves.apply(x, period)  # type: ignore[return-value]


@functools.cache
def _waves_function() -> Callable[..., None]:
    return _native.function(f"typedef float T;\n{HEADER}{source.WAVES}", 2)


class _Waves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, period: float):  # pyright: ignore[reportIncompatibleMethodOverride]
        x = x.contiguous()
        cosine, sine = torch.empty_like(x), torch.empty_like(x)
        run = _waves_function()
        pointers = _native.pointers([x, cosine, sine])
        rate = torch.tensor([4 / period], dtype=torch.float64)

        def part(begin: int, end: int, _: int) -> None:
            run(pointers, rate.data_ptr(), begin, end)

        threads = min(torch.get_num_threads(), max(1, x.numel() // 100_000))
        _native.in_parts(part, _native.cut(x.numel(), _LANES, threads))
        ctx.rate = 2 * math.pi / period
        ctx.save_for_backward(cosine, sine)
        return cosine, sine

    @staticmethod
    def backward(ctx: Any, of_cos: Tensor, of_sin: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        cosine, sine = ctx.saved_tensors
        return (of_sin * cosine).addcmul_(of_cos, sine, value=-1).mul_(ctx.rate), None


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, motion: Any, inputs: Tensor, q: Tensor, p: Tensor, *tensors: Tensor):
        data = [x.contiguous() for x in (inputs, q, p)]
        tensors = tuple(x.contiguous() for x in tensors)
        path = inputs.new_empty(*inputs.shape[:2], 2 * math.prod(q.shape[1:]))
        _call(motion, [*data, path], tensors, None)
        ctx.motion = motion
        ctx.save_for_backward(*data, path, *tensors)
        return path

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors
        data, tensors = list(saved[:4]), saved[4:]
        out = [torch.empty_like(x) for x in data[:3]]
        blocks = -(-data[0].shape[1] // _LANES)
        lanes = [x.new_zeros(blocks, *x.shape, _LANES) for x in tensors]
        _call(ctx.motion, [*data, slopes.contiguous(), *out], tensors, lanes)
        return None, *out, *(x.sum((0, -1)) for x in lanes)


def _call(motion: Any, data: list[Tensor], tensors: State, lanes: list[Tensor] | None) -> None:
    run, units = _function(motion, data[0], tensors)
    time, batch = data[0].shape[:2]
    if batch == 0:
        return
    blocks = -(-batch // _LANES)
    pad = [data[0]] * (8 - len(data))
    pointers = _native.pointers([*data, *pad, *tensors, *(lanes or [])])
    counts = [float(x.numel() // x.shape[0] // _LANES) for x in lanes or []]
    decay = motion.decay
    sizes = [float(batch), float(time), float(units), motion.h, decay, float(lanes is not None)]
    numbers = torch.tensor([*sizes, *counts], dtype=torch.float64)
    work = blocks * units

    def part(begin: int, end: int, _: int) -> None:
        run(pointers, numbers.data_ptr(), begin, end)

    threads = min(torch.get_num_threads(), work) if work * time > 2000 else 1
    _native.in_parts(part, _native.cut(work, 1, threads))
