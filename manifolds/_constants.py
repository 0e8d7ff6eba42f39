"""Numbers that a space is made of: a radius, a curvature, the axes of an ellipsoid.

Each is a Python float, which takes the dtype of whatever it meets, or a tensor, which may
require a gradient and is registered so that ``.to()`` and ``.parameters()`` see it.
"""

from typing import TypeAlias

import torch
from torch import Tensor, nn

from darboux._checks import values

Constant: TypeAlias = "float | Tensor"


def register(space: nn.Module, name: str, value: Constant, *, positive: bool = False) -> None:
    """Keep the scalar ``value`` as ``space.name``; raise unless it is finite (and positive)."""
    where = type(space).__name__
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.is_floating_point():
            raise ValueError(
                f"{where}: {name} has shape {tuple(value.shape)} and dtype {value.dtype}, expected "
                "a floating-point scalar"
            )
        if isinstance(value, nn.Parameter):
            setattr(space, name, value)
        else:
            space.register_buffer(name, value)
    else:
        value = float(value)
        setattr(space, name, value)
    plain = plain_number(value)
    if not abs(plain) < float("inf"):
        raise ValueError(f"{where}: {name} is {plain}, expected a finite number")
    if positive and not plain > 0:
        raise ValueError(f"{where}: {name} is {plain}, expected a positive number")


def plain_number(value: Constant) -> float:
    """Return the number itself; of a batch under ``vmap``, the first."""
    return float(values(value).flatten()[0]) if isinstance(value, Tensor) else float(value)


def sqrt(value: Constant) -> Constant:
    """Return the square root of a positive constant."""
    return torch.sqrt(value) if isinstance(value, Tensor) else value**0.5


def magnitude(value: Constant, like: Tensor) -> Tensor:
    """Return the absolute value of a constant as a tensor."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).abs()
