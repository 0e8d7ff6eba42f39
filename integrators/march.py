"""The loop that takes a state from one saved step to the next, and notices when it fails."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from darboux._checks import ConvergenceError, checks_values, values
from darboux.integrators.base import Integrator
from darboux.integrators.systems import System

# A run that has blown up is noticed within about this many steps.
_CHECK_EVERY = 256


class StoppedError(ConvergenceError):
    """A stretch of steps stopped after ``steps`` good ones."""

    def __init__(self, message: str, residual: float, iterations: int, steps: int):
        super().__init__(message, residual, iterations)
        self.steps = steps


@dataclass(frozen=True, eq=False)
class Run:
    """A method with what it moves and how far."""

    system: System
    method: Integrator
    dt: float | Tensor

    def advance(self, q: Tensor, p: Tensor, steps: int, memory: Any) -> tuple[Tensor, Tensor, Any]:
        """Take ``steps`` steps, as :meth:`Integrator.advance` does."""
        return self.method.advance(self.system, q, p, self.dt, steps, memory)

    def march(
        self,
        stops: Sequence[int],
        qs: list[Tensor],
        ps: list[Tensor],
        memory: Any = None,
        bar: "Bar | None" = None,
    ) -> Any:
        """Append to ``qs`` and ``ps``, which end with the state at ``stops[0]``, those at the rest.

        Returns the memory. On ``ConvergenceError`` the lists hold only states that are good.
        """
        checked, first = stops[0], len(qs) - 1
        for before, now in pairwise(stops):
            kept = memory
            try:
                q, p, memory = self.advance(qs[-1], ps[-1], now - before, kept)
            except ConvergenceError as error:
                _check_alive(stops, qs, ps, first)
                if isinstance(error, StoppedError):
                    last = before + error.steps
                else:
                    last = self._last_good_step(before, now, qs[-1], ps[-1], kept)
                message = f"integrate: {self.method.name}, between steps {last} and {last + 1}: "
                message += str(error)
                raise ConvergenceError(message, error.residual, error.iterations) from error
            qs.append(q)
            ps.append(p)
            if now - checked >= _CHECK_EVERY:
                _check_alive(stops, qs, ps, first)
                checked = now
            if bar is not None:
                bar.show(now)
        _check_alive(stops, qs, ps, first)
        return memory

    def _last_good_step(self, before: int, now: int, q: Tensor, p: Tensor, memory: Any) -> int:
        # A stretch of many steps has failed: repeat it one by one to name the step.
        for step in range(before, now - 1):
            try:
                q, p, memory = self.advance(q, p, 1, memory)
            except ConvergenceError:
                return step
        return now - 1


def _check_alive(stops: Sequence[int], qs: list[Tensor], ps: list[Tensor], first: int) -> None:
    # NaN and infinity stay once they come, so the last state tells of all.
    if not checks_values() or (_finite(qs[-1]) and _finite(ps[-1])):
        return
    last = max(i for i in range(first, len(qs)) if _finite(qs[i]) and _finite(ps[i]))
    del qs[last + 1 :], ps[last + 1 :]
    bad, good = stops[last + 1 - first], stops[last - first]
    raise ConvergenceError(
        f"integrate: the state is NaN or infinite at step {bad}; it was finite at step {good}: "
        "take a smaller dt",
        iterations=good,
    )


def _finite(x: Tensor) -> bool:
    return bool(values(x).isfinite().all())


class Bar:
    """A progress bar on stderr, redrawn at most five times a second."""

    def __init__(self, steps: int):
        self.steps, self.start, self.next, self.first = steps, time.monotonic(), 0.0, 0

    def show(self, done: int) -> None:
        now = time.monotonic()
        if now < self.next and done < self.steps:
            return
        self.next = now + 0.2
        left = (now - self.start) * (self.steps - done) / max(done - self.first, 1)
        bar = "#" * (30 * done // self.steps)
        end = "\n" if done == self.steps else ""
        print(f"\r[{bar:<30}] {done}/{self.steps}, {left:.0f} s left ", end=end, file=sys.stderr)
        sys.stderr.flush()
