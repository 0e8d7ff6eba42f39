"""Small networks and their derivatives by hand.

Forward-mode autodiff costs 0.3 to 1 ms an operation in eager torch, whatever its size. The layers
of a small network have derivatives that one can write down, at 20 times the speed; what is not
known here goes through torch.func all the same. To add one: a row of ``_ACTIVATIONS``, or a
method ``push(jet)`` of the module.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from darboux import _autodiff


class Jet(NamedTuple):
    """A value and its derivatives along given directions."""

    value: Tensor  # (..., n)
    first: Tensor  # (m, ..., n), along m directions
    second: Tensor | None  # (..., n), the second derivative along the last of them


def push(f: Callable[[Tensor], Tensor], jet: Jet) -> Jet:
    """Carry the derivatives in ``jet`` through ``f: (..., n) -> (..., k)``.

    A module whose class has a method ``push(jet)`` is asked for its own derivatives.
    """
    hooked = isinstance(f, nn.Module) and (f._forward_hooks or f._forward_pre_hooks)
    x, first, second = jet
    if not hooked:
        if isinstance(f, nn.Sequential) and type(f) is nn.Sequential:
            for layer in f:
                jet = push(layer, jet)
            return jet
        own = getattr(type(f), "push", None)
        if own is not None and isinstance(f, nn.Module):
            return own(f, jet)
        if isinstance(f, nn.Linear) and type(f) is nn.Linear:
            w = f.weight.mT
            return Jet(f(x), first @ w, None if second is None else second @ w)
        if type(f) in _ACTIVATIONS:
            y, slope, bend = _ACTIVATIONS[type(f)](f(x), x)
            if second is not None:
                second = slope * second + bend * first[-1].square()
            return Jet(y, slope * first, second)
    y, first_y = _autodiff.directional(f, x.expand(first.shape), first)
    if second is None:
        return Jet(y[0], first_y, None)
    along = first[-1]
    _, bend = _autodiff.directional(lambda z: _autodiff.directional(f, z, along)[1], x, along)
    return Jet(y[0], first_y, bend + _autodiff.directional(f, x, second)[1])


def _tanh(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    slope = 1 - y.square()
    return y, slope, -2 * y * slope


def _sigmoid(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    slope = y * (1 - y)
    return y, slope, slope * (1 - 2 * y)


#: activation -> function of (y, x) that returns y, dy/dx and d2y/dx2
_ACTIVATIONS = {nn.Tanh: _tanh, nn.Sigmoid: _sigmoid}


def _rate(network: nn.Sequential, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return a network's output and its derivative along ``v``."""
    y, first, _ = push(network, Jet(x, v.unsqueeze(0), None))
    return y, first[0]


#: softplus(_SOFTPLUS_ONE) = 1: metrics start near the identity
_SOFTPLUS_ONE = math.log(math.e - 1)


def _softplus(x: Tensor) -> Tensor:
    # torch switches to x itself at 20, a step of 2e-9 there
    return nn.functional.softplus(x, threshold=40.0)


def _network(
    inputs: int,
    outputs: int,
    width: int,
    depth: int,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    generator: torch.Generator | None,
) -> nn.Sequential:
    """Return a perceptron of ``depth`` hidden tanh layers, drawn from ``generator``."""
    if width < 1 or depth < 1:
        raise ValueError(f"width and depth are {width} and {depth}, expected at least 1")
    sizes = [inputs, *[width] * depth, outputs]
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layer = nn.utils.skip_init(nn.Linear, n_in, n_out, dtype=dtype, device=device or "cpu")
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -(n_in**-0.5), n_in**-0.5, generator=generator)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _eye(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


# Below exp(-80) a Gaussian is no longer felt beside 1 in any precision; a CPU is 25-100 times
# slower on the subnormal numbers further down.
_LOWEST_EXPONENT = -80.0


def _gaussian(s: Tensor) -> Tensor:
    """Return ``exp(-s / 2)``, never subnormal."""
    return (-0.5 * s).clamp_min(_LOWEST_EXPONENT).exp()
