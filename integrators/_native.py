"""How native kernels are called, and how a changed system is told from the one traced."""

import ctypes
import functools
import sys
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from darboux.integrators._kernels import build
from darboux.integrators.base import Integrator
from darboux.integrators.systems import System

SCALARS = {torch.float64: "double", torch.float32: "float"}

# Gradients are summed in this many parts of the batch, whatever the number of threads.
PARTS = 16

# Trajectories times steps below which another thread costs more than it saves.
_WORTH_A_THREAD = 200_000


def pointers(tensors: Sequence[Tensor]) -> Any:
    """Return the addresses of the data, as a kernel takes them."""
    return (ctypes.c_void_p * max(1, len(tensors)))(*(x.data_ptr() for x in tensors))


def function(source: str, pointers: int) -> Callable[..., None]:
    """Compile a kernel that takes so many pointers, then the first trajectory and the last."""
    run = build(source).run
    run.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_long] * 2
    run.restype = None
    return run


def copy(x: Tensor) -> Tensor:
    """Return a contiguous copy that a kernel may write to."""
    return x.detach().clone(memory_format=torch.contiguous_format)


def threads(work: int) -> int:
    """Return how many threads so many trajectories times steps are worth."""
    return max(1, min(torch.get_num_threads(), work // _WORTH_A_THREAD))


def cut(batch: int, block: int, parts: int) -> list[tuple[int, int]]:
    """Cut a batch into parts, between blocks: a trajectory is always computed in the same way."""
    blocks = -(-batch // block)
    size = -(-blocks // parts) * block
    return [(begin, min(begin + size, batch)) for begin in range(0, batch, size)]


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="darboux")


def in_parts(
    work: Callable[[int, int, int], None], parts: list[tuple[int, int]], threads: int | None = None
) -> None:
    """Call ``work(begin, end, k)`` for the ``k``-th part, in that many threads."""
    threads = len(parts) if threads is None else threads
    if threads <= 1:
        for k, (begin, end) in enumerate(parts):
            work(begin, end, k)
        return
    # The calls run side by side: ctypes lets go of the interpreter.
    jobs = [_pool(threads).submit(work, *part, k) for k, part in enumerate(parts)]
    for job in jobs:
        job.result()


def close(a: Tensor, b: Tensor) -> bool:
    """Say whether ``a`` is ``b`` up to some three fifths of the digits."""
    finite = b[b.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    tolerance = torch.finfo(b.dtype).eps ** 0.6
    return a.shape == b.shape and torch.allclose(
        a, b, rtol=tolerance, atol=tolerance * size, equal_nan=True
    )


def announce(method: Integrator, kind: str, seconds: float, what: str) -> None:
    """Say, on stderr, that and how a method was compiled."""
    print(f"compiled {method.name} for {kind} in {seconds:.1f} s ({what})", file=sys.stderr)


# ---------------------------------------------------------------- what a trace took for granted


def fingerprint(system: System) -> tuple:
    """Return what the callables of ``system`` refer to: numbers by value, the rest by identity.

    Closures, defaults, globals, attributes and parameters are looked through. A tensor that
    takes another value in place keeps its identity: kernels read its value anyway.
    """
    out: list[Any] = []
    seen = {id(system)}
    named = ("field", "force", "velocity", "potential", "kinetic", "mass", "native")
    for x in (*(getattr(system, name, None) for name in named), *vars(system).values()):
        _look(x, out, seen, 5)
    return tuple(out)


def _look(x: Any, out: list[Any], seen: set[int], depth: int) -> None:
    if x is None or isinstance(x, bool | int | float | str):
        out.append(x)
        return
    if id(x) in seen or depth == 0 or isinstance(x, type | types.ModuleType):
        return
    seen.add(id(x))
    inside: Any = ()
    if isinstance(x, types.FunctionType):
        out.append(id(x.__code__))
        names = (x.__globals__.get(name) for name in x.__code__.co_names)
        inside = (*_cells(x), *(x.__defaults__ or ()), *names)
    elif isinstance(x, types.MethodType):
        inside = (x.__func__, x.__self__)
    elif isinstance(x, functools.partial):
        inside = (x.func, *x.args, *x.keywords.values())
    elif isinstance(x, list | tuple):
        inside = x
    elif isinstance(x, dict):
        inside = x.values()
    else:
        out.append(id(x))
        if not isinstance(x, Tensor | types.BuiltinFunctionType):
            inside = getattr(x, "__dict__", {}).values()
    for y in inside:
        _look(y, out, seen, depth - (not isinstance(x, nn.Module | dict | list | tuple)))


def _cells(f: types.FunctionType) -> list[Any]:
    out = []
    for cell in f.__closure__ or ():
        try:
            out.append(cell.cell_contents)
        except ValueError:  # a variable that has no value yet
            out.append(None)
    return out
