"""What every sequence layer shares: its interface and the door.

A layer maps tokens ``(batch, time, width)`` to as many: ``y, state = layer(x, state)``. A state is
a ``NamedTuple`` of tensors with the batch first, ``None`` before the first token; the one returned
is that after the last token. Feeding a sequence whole, in chunks or token by token gives the same.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from darboux import _checks


class Layer(Protocol):
    """Anything that a :class:`~darboux.learners.SequenceModel` stacks."""

    def __call__(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]: ...


def check_input(where: str, x: object, width: int) -> None:
    """Raise unless ``x`` is a floating tensor ``(batch, time, width)`` with at least one token."""
    _checks.check_tensor(where, "x", x)
    assert isinstance(x, Tensor)
    if x.dim() != 3 or x.shape[-1] != width or x.shape[1] == 0:
        raise ValueError(
            f"{where}: x has shape {tuple(x.shape)}, expected (batch, time, {width}) with time > 0"
        )


def check_dtype(where: str, x: Tensor, parameter: Tensor) -> None:
    """Raise where ``x`` and the parameters differ in dtype, unless autocast is at work."""
    if x.dtype != parameter.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{where}: x has dtype {x.dtype}, expected {parameter.dtype}, that of the parameters"
        )


def check_state(
    where: str, state: object, kind: type, *shapes: Sequence[int | None], x: Tensor
) -> None:
    """Raise unless ``state`` is a ``kind`` whose tensors have the ``shapes`` of this layer.

    The batch is not in ``shapes`` and must be that of ``x``; ``None`` stands for any size.
    """
    if not isinstance(state, kind):
        raise TypeError(
            f"{where}: state is a {type(state).__name__}, expected {kind.__name__} as this layer "
            "returns it, or None"
        )
    for name, part, shape in zip(kind._fields, state, shapes, strict=True):  # type: ignore[attr-defined]
        seen = tuple(part.shape)
        fits = len(seen) == len(shape) + 1 and seen[0] == x.shape[0]
        if not fits or any(want not in (None, got) for want, got in zip(shape, seen[1:])):  # noqa: B905
            wanted = ", ".join("*" if n is None else str(n) for n in (x.shape[0], *shape))
            raise ValueError(
                f"{where}: {name} of the state has shape {seen}, expected ({wanted}): "
                "the state of another layer or batch"
            )
        if part.device != x.device:
            raise ValueError(f"{where}: {name} of the state is on {part.device}, x on {x.device}")
