"""The native kernel of implicit Runge-Kutta methods: all sweeps of all steps in one call.

The field is traced and printed once, inside a loop over the stages. Around it stands the iteration
of :mod:`darboux.integrators.fixed_point`, with its starting guess and its rule for stopping, for
every trajectory by itself: one that has settled stays as it is while its neighbours go on, and so
does not depend on them. To have settled, it must have stalled twice: the first time may be a chance
(Antonana, Makazaga & Murua, Numer. Algorithms 74 (2017) 575), and in float32 made the energy drift.
Sweeps that contract slowly get no matrix here, so that a step may be too long for the kernel alone.
"""

import ctypes
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from darboux.integrators import _native
from darboux.integrators._codegen import (
    Printer,
    Trace,
    Unsupported,
    barrier,
    library,
    opening,
    trace_field,
)
from darboux.integrators._kernels import LANES
from darboux.integrators.fixed_point import MAX_SWEEPS, ROUND_OFF
from darboux.integrators.implicit import (
    ImplicitRungeKutta,
    Memory,
    Stages,
    are_rows_alone,
    extrapolation,
    rounded,
    step_ratio,
)
from darboux.integrators.march import StoppedError
from darboux.integrators.systems import System, packed

# S stages of W components, x_i = z + sum_j mu_ij y_j with y_j = h b_j k_j. Of every ROW components
# the first Q are those of q.
_STAGES = r"""
struct Sweeps {
  const T *hb, *mu, *mu_hat, *ahead;
  long batch, guessed, most;
  double round_off;
};
typedef V Stages[S][W];

INLINE bool some(M m) {
  long long r = 0;
  for (int l = 0; l < L; ++l) r |= m[l];
  return r;
}
INLINE V stage(const Sweeps &plan, const V *z, const Stages &y, int i, int c) {
  const T *mu = (!PAIR || c % ROW < Q ? plan.mu : plan.mu_hat) + i * S;
  V sum = mu[0] * y[0][c];
  for (int j = 1; j < S; ++j) sum += mu[j] * y[j][c];
  return z[c] + sum;
}
"""

# stopped: how many steps were good, the residual and the sweeps of the one that was not.
_SIGNATURE = "T *state, T *rest, T *slopes, double *stopped, const T *const *c, const Sweeps *plan"
_CALL = "(state, rest, slopes, stopped, c, *plan, b, end)"
_HEAD = """__attribute__((noinline)) static void group1(T *state, T *rest, T *slopes,
    double *stopped, const T *const *c, const Sweeps &plan, long b, long end) {
#define COUNT(u) (v##u < L ? v##u : L)
"""

_STEPS = r"""
V z[W], lost[W], least, change, limit{};
Stages k, x, y;
state += b * W, rest += b * W, slopes += b * W;
for (int n = 0; n < W; ++n) {
  z[n] = load(state + n, W, COUNT(0)), lost[n] = load(rest + n, W, COUNT(0));
  for (int i = 0; i < S; ++i) k[i][n] = load(slopes + i * plan.batch * W + n, W, COUNT(0));
}
bool guessed = plan.guessed;
for (long step = 0; step < stopped[0]; ++step, guessed = true) {
  for (int i = 0; i < S; ++i)
    for (int n = 0; n < W; ++n) {
      V sum{};
      if (guessed)
        for (int j = 0; j < S; ++j) sum += plan.ahead[i * S + j] * k[j][n];
      y[i][n] = plan.hb[i] * sum;
    }
  for (int i = 0; i < S; ++i)
    for (int n = 0; n < W; ++n) x[i][n] = stage(plan, z, y, i, n);
  M settled{}, once{};
  least = splat(T(__builtin_inf()));
  long sweep = 0;
  bool good;
  do {
    for (int i = 0; i < S; ++i) {
      V f[W];
      FIELD
      for (int n = 0; n < W; ++n) {
        k[i][n] = sel(settled, k[i][n], f[n]);
        y[i][n] = plan.hb[i] * k[i][n];
      }
    }
    V size = change = V{};
    for (int i = 0; i < S; ++i)
      for (int n = 0; n < W; ++n) {
        V moved = stage(plan, z, y, i, n);
        change = f_max(f_abs(moved - x[i][n]), change);
        size = f_max(f_abs(moved), size);
        x[i][n] = moved;
      }
    if (!sweep++) limit = T(plan.round_off) * size;
    good = !some(~(change < T(__builtin_inf())));
    M stalled = (change == T(0)) | ((change <= limit) & (change >= least));
    settled |= stalled & once;
    once |= stalled;
    least = f_min(change, least);
  } while (good && some(~settled) && sweep < plan.most);
  M failed = ~settled & ~(change <= limit);
  if (some(failed)) {
    stopped[0] = step, stopped[1] = 0, stopped[2] = sweep;
    for (int l = 0; l < L; ++l)
      if (failed[l] && stopped[1] == stopped[1] && !(change[l] <= stopped[1]))
        stopped[1] = change[l];
    break;
  }
  for (int n = 0; n < W; ++n) {
    V sum = y[0][n];
    for (int i = 1; i < S; ++i) sum += y[i][n];
    kahan(z[n], sum, lost[n]);
  }
}
for (int n = 0; n < W; ++n) {
  store(state + n, z[n], W, COUNT(0)), store(rest + n, lost[n], W, COUNT(0));
  for (int i = 0; i < S; ++i) store(slopes + i * plan.batch * W + n, k[i][n], W, COUNT(0));
}
}
#undef COUNT
"""


def source(t: Trace, scalar: str, stages: int, rows: tuple[int, int], pair: bool) -> str:
    """Return the kernel for a field; ``rows`` are the widths of a row ``(q, p)`` and of its q."""
    roots = t.velocity
    printer = Printer(t, 1, {"z": "z"})
    before = opening(t, printer, roots)
    used = sorted(t.e.nodes[i][2] for i in t.e.reachable(roots) if t.e.is_op(i, "input"))
    inside = [*barrier(t, roots), *(f"const V z{n}_0 = x[i][{n}];" for n in used)]
    inside += printer.body(roots)
    inside += [f"f[{n}] = splat({printer.name(i, 0)});" for n, i in enumerate(roots)]
    sizes = {"S": stages, "W": len(roots), "ROW": rows[0], "Q": rows[1], "PAIR": int(pair)}
    constants = ", ".join(f"{name} = {value}" for name, value in sizes.items())
    group = "".join(
        (
            f"enum {{ {constants} }};\n{_STAGES}{_HEAD}",
            "\n".join(before),
            _STEPS.replace("FIELD", "\n      ".join(inside)),
        )
    )
    return library(scalar, [group], _SIGNATURE, _CALL, 1)


class _Sweeps(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("hb", "mu", "mu_hat", "ahead")),
        *((name, ctypes.c_long) for name in ("batch", "guessed", "most")),
        ("round_off", ctypes.c_double),
    )


@dataclass
class ImplicitPlan:
    """How to move one system in states of one kind by sweeps in generated C++."""

    traced: Trace
    event: int  # dimensions of one trajectory
    kind: str  # of system
    dtype: torch.dtype
    seconds: float  # spent on tracing
    functions: dict[tuple[int, int, bool], Callable[..., None]] = field(default_factory=dict)

    def describe(self) -> str:
        """Say what moves the state."""
        return "native kernel"

    def present(self) -> list[Tensor]:
        """Return the constants as they are now."""
        return [x.to(self.dtype).contiguous() for x in self.traced.constants()]

    def function(self, method: ImplicitRungeKutta, split: int, row: int) -> Callable[..., None]:
        """Return the kernel of a method, on rows of which ``split`` components belong to q."""
        tableau = method.tableau
        key = len(tableau.b), split, tableau.is_pair
        if key not in self.functions:
            start = time.perf_counter()
            text = source(
                self.traced, _native.SCALARS[self.dtype], key[0], (row, split), tableau.is_pair
            )
            self.functions[key] = _native.function(text, 6)
            seconds = time.perf_counter() - start + self.seconds
            _native.announce(method, self.kind, seconds, self.describe())
        return self.functions[key]

    def advance(
        self,
        method: ImplicitRungeKutta,
        system: System,
        q: Tensor,
        p: Tensor,
        dt: float | Tensor,
        steps: int,
        memory: Memory | None,
    ) -> tuple[Tensor, Tensor, Memory]:
        """Do what ``method.advance`` does, without a graph; memories are of one kind."""
        d, tableau = q.shape[-1], method.tableau
        dt = dt.detach() if isinstance(dt, Tensor) else dt
        z = torch.cat([q.detach(), p.detach()], -1).contiguous()
        if memory is None:
            memory = Memory(None, dt, torch.zeros_like(z), are_rows_alone(system, q, p))
        lost = _native.copy(memory.lost)
        ratio = step_ratio(dt, memory.dt)
        s = len(tableau.b)
        if memory.stages is None:
            slopes = z.new_zeros(s, *z.shape)
        else:
            slopes = _native.copy(memory.stages.slopes)
        numbers = [
            torch.from_numpy(x).to(z).contiguous()
            for x in (tableau.b, *rounded(tableau, z.dtype), extrapolation(tableau, ratio))
        ]
        numbers[0] = dt * numbers[0]
        batch = math.prod(z.shape[: z.dim() - self.event])
        constants = self.present()
        addresses = _native.pointers(constants)
        plan = _Sweeps(
            *(x.data_ptr() for x in numbers),
            batch,
            memory.stages is not None,
            MAX_SWEEPS,
            ROUND_OFF * torch.finfo(z.dtype).eps,
        )
        run = self.function(method, d, z.shape[-1])
        data = [x.data_ptr() for x in (z, lost, slopes)]
        parts = _native.cut(batch, LANES, _native.threads(batch * steps * s * s))
        stopped = torch.tensor([[steps, 0.0, 0.0]] * len(parts), dtype=torch.float64)

        def part(begin: int, end: int, k: int) -> None:
            out = stopped.data_ptr() + 24 * k
            run(*data, out, addresses, ctypes.byref(plan), begin, end)

        _native.in_parts(part, parts)
        good, residual, sweeps = min(stopped.tolist())
        if good < steps:
            raise StoppedError(
                f"compile=True: after {int(sweeps)} sweeps of a step dt = {float(dt):g} the stages "
                f"still change by {residual:.3g}: take a smaller dt, or leave compile out, without "
                "which slow sweeps are sped up",
                residual,
                int(sweeps),
                int(good),
            )
        increment = (numbers[0] @ slopes.flatten(1)).reshape(z.shape)
        stages = Stages(increment, slopes, 0, 0.0)
        return z[..., :d], z[..., d:], Memory(stages, dt, lost, memory.rows_alone)


def implicit_plan(
    method: ImplicitRungeKutta, system: System, q: Tensor, p: Tensor, event: int
) -> ImplicitPlan:
    """Trace the field on states like ``q, p``. Raises ``Unsupported`` where it cannot be."""
    start = time.perf_counter()
    z = torch.cat([q, p], -1)
    right_hand_side = packed(system, q.shape[-1])
    traced = trace_field(right_hand_side, z, event)
    seconds = time.perf_counter() - start
    plan = ImplicitPlan(traced, event, type(system).__name__, q.dtype, seconds)
    # The slopes of a step of no length are the field.
    with torch.no_grad():
        memory = plan.advance(method, system, q, p, 0.0, 1, None)[2]
        assert memory.stages is not None
        if not _native.close(memory.stages.slopes[0], right_hand_side(z)):
            raise Unsupported("its kernel does not reproduce it")
    return plan
