"""The door: every public call checks what it was given and says what it expected.

Shapes, types, dtypes and devices are checked always; they are static, so the checks hold
under ``torch.func`` and ``torch.compile``. Values (NaN, a point off the manifold) are
checked too, unless the call runs inside :func:`unchecked` or is being compiled.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

_value_checks: ContextVar[bool] = ContextVar("darboux_value_checks", default=True)


class GeometryError(RuntimeError):
    """The geometry does not exist here: an indefinite metric, a point that left its chart."""


class ConvergenceError(RuntimeError):
    """An iteration did not converge; carries the ``residual`` and the ``iterations`` made.

    One that ends a run carries the ``trajectory`` up to the last good state.
    """

    def __init__(self, message: str, residual: float = float("nan"), iterations: int = 0):
        super().__init__(message)
        self.residual = residual
        self.iterations = iterations
        self.trajectory: Any = None


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Skip checks of values (not of shapes or dtypes) inside the block, for speed."""
    token = _value_checks.set(False)
    try:
        yield
    finally:
        _value_checks.reset(token)


def values(x: Tensor) -> Tensor:
    """Return the plain numbers below any ``torch.func`` wrapper, cut off from every graph.

    Lets a solver stop on data inside ``vmap``, ``jvp`` or ``grad``; a batched tensor shows
    the numbers of the whole batch.
    """
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    with temporarily_clear_interpreter_stack():
        return x.detach()


def in_transform() -> bool:
    """Say whether a ``torch.func`` transform, forward mode or a compiler is at work here.

    Plain ``torch.autograd`` must then be left alone.
    """
    if torch.compiler.is_compiling():
        return True
    return _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def in_reverse_transform() -> bool:
    """Say whether ``torch.func.grad``, ``vjp`` or ``jacrev`` is at work here."""
    levels = [] if torch.compiler.is_compiling() else _functorch.get_interpreter_stack() or []
    return any(level.key() == _functorch.TransformType.Grad for level in levels)


def corrections() -> int:
    """Return how many chord steps make all derivatives exact that are being taken.

    One for each: three, or as many as the ``torch.func`` transforms here are nested, and one to
    spare. How often a graph will be differentiated cannot be known.
    """
    levels = [] if torch.compiler.is_compiling() else _functorch.get_interpreter_stack() or []
    depth = sum(level.key() != _functorch.TransformType.Vmap for level in levels)
    return max(3, depth + 1)


def checks_values() -> bool:
    """Say whether values are to be checked here."""
    return _value_checks.get() and not torch.compiler.is_compiling()


def check_tensor(where: str, name: str, x: object) -> None:
    """Raise ``TypeError`` unless ``x`` is a real floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: {name} is a {type(x).__name__}, expected a torch.Tensor")
    if not x.is_floating_point():
        raise TypeError(
            f"{where}: {name} has dtype {x.dtype}, expected a real floating-point dtype"
        )


def check_last(where: str, name: str, x: object, size: int) -> None:
    """Raise unless ``x`` is a floating tensor of shape ``(..., size)``."""
    check_tensor(where, name, x)
    assert isinstance(x, Tensor)
    if x.dim() == 0 or x.shape[-1] != size:
        raise ValueError(f"{where}: {name} has shape {tuple(x.shape)}, expected (..., {size})")


def check_like(where: str, name: str, x: object, ref_name: str, ref: Tensor) -> None:
    """Raise unless ``x`` has the last dimension, dtype and device of ``ref`` and broadcasts."""
    check_tensor(where, name, x)
    assert isinstance(x, Tensor)
    n = ref.shape[-1]
    if x.dim() == 0 or x.shape[-1] != n:
        raise ValueError(
            f"{where}: {name} has shape {tuple(x.shape)}, expected (..., {n}) "
            f"to match {ref_name} of shape {tuple(ref.shape)}"
        )
    if x.dtype != ref.dtype:
        raise TypeError(
            f"{where}: {name} has dtype {x.dtype}, expected {ref.dtype} to match {ref_name}"
        )
    if x.device != ref.device:
        raise ValueError(
            f"{where}: {name} is on {x.device}, expected {ref.device} to match {ref_name}"
        )
    try:
        torch.broadcast_shapes(x.shape, ref.shape)
    except RuntimeError:
        raise ValueError(
            f"{where}: {name} has shape {tuple(x.shape)}, whose leading dimensions do not "
            f"broadcast with {ref_name} of shape {tuple(ref.shape)}"
        ) from None


def check_finite(where: str, **tensors: Tensor) -> None:
    """Raise ``ValueError`` where a tensor holds NaN or infinity (value check)."""
    if not checks_values():
        return
    for name, x in tensors.items():
        finite = values(x).isfinite()
        if not finite.all():
            bad = finite.numel() - int(finite.sum())
            raise ValueError(
                f"{where}: {name} of shape {tuple(x.shape)} has {bad} entries that are NaN or "
                "infinite, expected finite numbers"
            )


def check_that(
    where: str, holds: Callable[[], Tensor], message: str, error: type[Exception] = ValueError
) -> None:
    """Raise ``error`` unless ``holds()`` is true everywhere (value check)."""
    if not checks_values():
        return
    ok = values(holds())
    if not ok.all():
        bad = ok.numel() - int(ok.sum())
        raise error(f"{where}: {message} ({bad} of {ok.numel()})")
