"""Both ways across to torchdiffeq: our systems for its solvers, our methods for its users."""

import math
from typing import Any, cast

import torch
import torchdiffeq
from torch import Tensor, nn

from darboux._checks import check_tensor
from darboux.integrators.base import Integrator, Trajectory
from darboux.integrators.driver import METHODS, check_state, check_step, integrate
from darboux.integrators.systems import System


class OdeFunction(nn.Module):
    """A system as torchdiffeq sees it: ``func(t, (q, p)) -> (dq/dt, dp/dt)``.

    Its parameters are those of the modules (and parameters) that the system was built from,
    so that ``odeint_adjoint`` finds them. One hidden in a closure stays hidden.
    """

    def __init__(self, system: System):
        super().__init__()
        self.system = system
        owners = [getattr(value, "__self__", value) for value in vars(system).values()]
        self.parts = nn.ModuleList(x for x in owners if isinstance(x, nn.Module))
        self.weights = nn.ParameterList(x for x in owners if isinstance(x, nn.Parameter))

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.system.field(*state)


def as_ode(system: System) -> OdeFunction:
    """Return ``system`` as a torchdiffeq function on the state ``(q, p)``."""
    return OdeFunction(system)


def odeint(
    system: System,
    q: Tensor,
    p: Tensor | None = None,
    *,
    t: Tensor,
    method: str | Integrator = "dopri5",
    step_size: float | None = None,
    rtol: float = 1e-7,
    atol: float = 1e-9,
    adjoint: bool = False,
    **options: Any,
) -> Trajectory:
    """Move ``system`` through the times ``t (time,)``, as ``torchdiffeq.odeint`` does.

    ``method`` is one of torchdiffeq's, then ``rtol``, ``atol``, ``adjoint`` and further
    ``options`` go there; or one of :data:`METHODS` (these names come first), then the stretch
    between two times is cut into equal steps of at most ``step_size``. A structure-preserving
    method wants one constant step: let ``t`` be evenly spaced.

    Raises ``ValueError`` when one of our methods lacks its ``step_size`` or is given torchdiffeq's
    options, or when ``adjoint`` would miss parameters that the system hides.
    """
    where = "odeint"
    p = check_state(where, system, q, p)
    check_tensor(where, "t", t)
    if t.dim() != 1 or len(t) < 1:
        raise ValueError(f"{where}: t has shape {tuple(t.shape)}, expected (time,)")
    if isinstance(method, Integrator) or method in METHODS:
        if step_size is None:
            raise ValueError(f"{where}: method {method!r} takes fixed steps and needs a step_size")
        if adjoint or options:
            extra = ", ".join((["adjoint"] if adjoint else []) + list(options))
            raise ValueError(f"{where}: {extra} belong to torchdiffeq's methods, not to {method!r}")
        return _by_steps(system, q, p, t, method, step_size)
    if step_size is not None:
        options["options"] = {**options.get("options", {}), "step_size": step_size}
    function = as_ode(system)
    solve = torchdiffeq.odeint
    if adjoint:
        solve = torchdiffeq.odeint_adjoint
        hidden = any(x.requires_grad for x in system.field(q.detach(), p.detach()))
        if (
            hidden
            and "adjoint_params" not in options
            and not any(True for _ in function.parameters())
        ):
            raise ValueError(
                f"{where}: the system depends on parameters inside a closure, which the adjoint "
                "would miss: build it from nn.Modules, or pass adjoint_params"
            )
    qs, ps = cast(
        tuple[Tensor, Tensor],
        solve(function, (q, p), t, rtol=rtol, atol=atol, method=method, **options),
    )
    return Trajectory(t, qs, ps)


def _by_steps(
    system: System, q: Tensor, p: Tensor, t: Tensor, method: str | Integrator, step_size: float
) -> Trajectory:
    check_step("odeint", step_size)
    if not step_size > 0:
        raise ValueError(f"odeint: step_size is {step_size}, expected a positive number")
    lengths = t.diff()
    qs, ps = [q], [p]
    for length, seconds in zip(lengths, lengths.tolist(), strict=True):
        # The small slack keeps 10 steps of 0.1 from becoming 11.
        steps = max(1, math.ceil(abs(seconds) / step_size * (1 - 1e-9)))
        dt = length / steps if t.requires_grad else seconds / steps
        run = integrate(system, qs[-1], ps[-1], dt=dt, steps=steps, method=method, save_every=steps)
        qs.append(run.q[-1])
        ps.append(run.p[-1])
    return Trajectory(t, torch.stack(qs), torch.stack(ps))
