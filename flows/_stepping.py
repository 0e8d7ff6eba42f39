"""Explicit Runge-Kutta steps on tuples of tensors, for right sides that are no phase space."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

State = tuple[Tensor, ...]
Field = Callable[[float, State], State]


class Tableau(NamedTuple):
    """Coefficients of an explicit method; ``error`` are those of an embedded pair."""

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    error: tuple[float, ...] | None = None


TABLEAUS = {
    "euler": Tableau((0.0,), ((),), (1.0,)),
    "heun": Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    "rk4": Tableau(
        (0.0, 0.5, 0.5, 1.0),
        ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
    # Bogacki and Shampine (1989), order 3 with an embedded order 2
    "adaptive": Tableau(
        (0.0, 0.5, 0.75, 1.0),
        ((), (0.5,), (0.0, 0.75), (2 / 9, 1 / 3, 4 / 9)),
        (2 / 9, 1 / 3, 4 / 9, 0.0),
        (2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
    ),
}


def combine(y: State, coefficients: tuple[float, ...], slopes: list[State], dt: float) -> State:
    """Return ``y + dt sum_i c_i k_i``."""
    for c, k in zip(coefficients, slopes, strict=True):
        if c != 0.0:
            y = tuple(a + (dt * c) * b for a, b in zip(y, k, strict=True))
    return y


def step(table: Tableau, f: Field, t: float, y: State, dt: float) -> tuple[State, list[State]]:
    """Return the state after one step and the slopes of its stages."""
    slopes: list[State] = []
    for c, row in zip(table.nodes, table.rows, strict=True):
        slopes.append(f(t + c * dt, combine(y, row, slopes, dt)))
    return combine(y, table.weights, slopes, dt), slopes
