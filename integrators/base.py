"""The interface of a time-stepping method, and what a run returns.

To add a method, add a row to the table of its family (``splitting``, ``runge_kutta``,
``implicit``). To add a family, subclass :class:`Integrator` with ``check`` and ``advance``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from darboux.integrators.systems import System


class Trajectory(NamedTuple):
    """Saved states, time first; index 0 is the initial state."""

    t: Tensor  # (time,)
    q: Tensor  # (time, ..., d)
    p: Tensor  # (time, ..., d)


@dataclass(frozen=True, kw_only=True, eq=False)
class Integrator(ABC):
    """A one-step method ``(q, p) -> (q, p)``: what it is, and how it moves."""

    name: str
    order: int
    symplectic: bool
    symmetric: bool
    explicit: bool
    source: str

    def facts(self) -> dict[str, Any]:
        """Return what a method that wraps this one keeps of it."""
        names = ("name", "order", "symplectic", "symmetric", "explicit", "source")
        return {name: getattr(self, name) for name in names}

    @abstractmethod
    def check(self, system: System) -> None:
        """Raise ``ValueError`` unless the method applies to ``system``."""

    @abstractmethod
    def advance(
        self, system: System, q: Tensor, p: Tensor, dt: float | Tensor, steps: int, memory: Any
    ) -> tuple[Tensor, Tensor, Any]:
        """Take ``steps`` steps and return the state and a memory.

        The memory is work that the next call, from that very state with that ``dt``, need not
        repeat; a first call gets None. Nothing is checked here.
        """

    def step(
        self, system: System, q: Tensor, p: Tensor, dt: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take one step. Raises ``ValueError`` when the method does not apply to ``system``."""
        self.check(system)
        q, p, _ = self.advance(system, q, p, dt, 1, None)
        return q, p
