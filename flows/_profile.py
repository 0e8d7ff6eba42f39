"""Profiles of rotationally symmetric metrics: their door, and where between nodes one pinches."""

import math

import torch
from torch import Tensor

from darboux import _checks
from darboux._checks import checks_values


def check_profile(where: str, psi: Tensor, length: Tensor | float, n: int, fewest: int) -> Tensor:
    """Raise unless ``psi (..., N)`` and ``length`` are a profile; return the length ``(...)``."""
    _checks.check_tensor(where, "psi", psi)
    if psi.dim() == 0 or psi.shape[-1] < fewest:
        raise ValueError(
            f"{where}: psi has shape {tuple(psi.shape)}, expected (..., N) with N at least {fewest}"
        )
    if not isinstance(n, int) or n < 2:
        raise ValueError(f"{where}: n is {n}, expected the dimension of the sphere, at least 2")
    length = torch.as_tensor(length, dtype=psi.dtype, device=psi.device)
    length = length.expand(psi.shape[:-1])
    if checks_values():
        _checks.check_finite(where, psi=psi, length=length)
        _checks.check_that(where, lambda: psi > 0, "psi is not positive")
        _checks.check_that(where, lambda: length > 0, "length is not positive")
    return length


def check_run(
    where: str, t: float, dt: float | None, pinched_below: float, save_every: int
) -> None:
    """Raise ``ValueError`` unless the numbers of a run make sense."""
    if not (t > 0 and math.isfinite(t)):
        raise ValueError(f"{where}: t is {t}, expected a positive number")
    if dt is not None and not dt > 0:
        raise ValueError(f"{where}: dt is {dt}, expected a positive number or None")
    if not 0 < pinched_below < 1:
        raise ValueError(f"{where}: pinched_below is {pinched_below}, expected between 0 and 1")
    if not (isinstance(save_every, int) and save_every >= 1):
        raise ValueError(f"{where}: save_every is {save_every}, expected a positive integer")


def neighbour(f: Tensor, index: Tensor, shift: int) -> Tensor:
    """Return ``f (..., N)`` at ``index (..., 1)`` plus ``shift``, around the circle."""
    return f.gather(-1, (index + shift) % f.shape[-1])[..., 0]


def vertex(y: Tensor, index: Tensor) -> Tensor:
    """Return how many nodes from ``index`` the parabola through three nodes has its vertex."""
    left, middle, right = (neighbour(y, index, shift) for shift in (-1, 0, 1))
    bend = left - 2 * middle + right
    return torch.where(bend != 0, (left - right) / torch.where(bend != 0, 2 * bend, 1.0), 0.0)


def between(f: Tensor, index: Tensor, offset: Tensor) -> Tensor:
    """Return the parabola through three nodes, ``offset`` nodes from ``index``."""
    left, middle, right = (neighbour(f, index, shift) for shift in (-1, 0, 1))
    return middle + offset * ((right - left) / 2 + offset * ((left + right) / 2 - middle))


def life(rate: Tensor) -> Tensor:
    """Return the time that is left to what shrinks by the share ``rate`` of itself, or infinity."""
    return torch.where(rate > 0, 1 / torch.where(rate > 0, rate, 1.0), math.inf)
