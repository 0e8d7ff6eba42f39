r"""The native kernel of motions whose coordinates do not see each other: forward and backward.

Sums, oscillators and pendulums. Each row of the batch is one stream through memory, its coordinates
side by side in the lanes of a vector, and what is written are the rows that the map out reads:
cosines and sines, or positions and momenta. Without gradients the maps in and out are part of the
kernel: writing and reading those rows takes longer than the motion. Angles are integers, a turn
being :math:`2^{32}` (in float64 :math:`2^{64}`), whose sums are exact and wrap by themselves; a
force that is not finite makes all that follows NaN, as it would without them. The reference is
:class:`~darboux.learners.heads.Motion`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from darboux.integrators import _native
from darboux.learners.recurrence import State

_SOURCE = r"""
typedef T W __attribute__((vector_size(64)));
typedef decltype(W() < W()) Z;
typedef UINT U __attribute__((vector_size(64)));
enum { LANES = 64 / sizeof(T), BITS = 8 * sizeof(T), GROUPS = (N + LANES - 1) / LANES };
enum { ANGLES = WAVES && PERIODIC, WIDE = N * (2 + ANGLES + (ANGLES && CIRCULAR)) };
enum { IN = N * (1 + GATES), OF_P = ANGLES ? 2 * N : N };
#define INLINE static inline __attribute__((always_inline))
#define EACH for (int g = 0; g < GROUPS; ++g)
#define TURN (T(UINT(1) << (BITS - 2)) * 4)

INLINE W get(const T *x, int g) {
  W r{};
  if ((g + 1) * LANES <= N) __builtin_memcpy(&r, x + g * LANES, sizeof r);
  else __builtin_memcpy(&r, x + g * LANES, N % LANES * sizeof(T));
  return r;
}
INLINE void put(T *x, int g, W r) {
  if ((g + 1) * LANES <= N) __builtin_memcpy(x + g * LANES, &r, sizeof r);
  else __builtin_memcpy(x + g * LANES, &r, N % LANES * sizeof(T));
}
// x turns; beyond WHOLE all numbers are integers
INLINE U turned(W x) {
  x = (x < T(WHOLE)) & (x > -T(WHOLE)) ? x : W{};
  x = (x - __builtin_convertvector(__builtin_convertvector(x, Z), W)) * (TURN / 2);
  x += x < T(0) ? W{} - T(0.5) : W{} + T(0.5);
  return (U)__builtin_convertvector(x, Z) << 1;
}
INLINE W angle(U u) { return __builtin_convertvector(u, W) * T(PERIOD / TURN); }
// by quarter turns and series: one ulp or two in double, 1e-7 in single precision
INLINE void wave(U u, W &cosine, W &sine) {
  U k = (u + (UINT(1) << (BITS - 3))) >> (BITS - 2);
  W z = __builtin_convertvector((Z)(u - (k << (BITS - 2))), W) * T(6.283185307179586477 / TURN);
  W w = z * z, s, c;
  if (sizeof(T) == 8) {
    s = T(1.58969099521155010221e-10) * w - T(2.50507602534068634195e-08);
    s = s * w + T(2.75573137070700676789e-06);
    s = s * w - T(1.98412698298579493134e-04);
    s = s * w + T(8.33333333332248946124e-03);
    s = s * w - T(1.66666666666666324348e-01);
    c = T(-1.13596475577881948265e-11) * w + T(2.08757232129817482790e-09);
    c = c * w - T(2.75573143513906633035e-07);
    c = c * w + T(2.48015872894767294178e-05);
    c = c * w - T(1.38888888888741095749e-03);
    c = c * w + T(4.16666666666666019037e-02);
  } else {
    s = T(2.7557319e-6) * w - T(1.9841270e-4);
    s = s * w + T(8.3333333e-3);
    s = s * w - T(1.6666667e-1);
    c = T(-2.7557319e-7) * w + T(2.4801587e-5);
    c = c * w - T(1.3888889e-3);
    c = c * w + T(4.1666667e-2);
  }
  s = z + z * w * s;
  c = T(1) - T(0.5) * w + w * w * c;
  Z odd = (k & 1) != 0;
  cosine = (W)((U)(odd ? s : c) ^ (((k + 1) & 2) << (BITS - 2)));
  sine = (W)((U)(odd ? c : s) ^ ((k & 2) << (BITS - 2)));
}
#if PERIODIC
typedef U Q;
INLINE U shrunk(U q, W) { return q; }  // angles have no gate
INLINE U place(W q) { return turned(q * T(1 / PERIOD)); }
INLINE W number(U q) { return angle(q); }
#else
typedef W Q;
INLINE W shrunk(W q, W scale) { return q * scale; }
INLINE W place(W q) { return q; }
INLINE W number(W q) { return q; }
#endif
#if CIRCULAR
typedef U P;
INLINE U moment(W p) { return turned(p); }
INLINE W number_of(U p) { return angle(p); }
#else
typedef W P;
INLINE W moment(W p) { return p; }
INLINE W number_of(W p) { return p; }
#endif
INLINE W sine_at(W q) {
  W c, s;
  wave(turned(q * T(1 / PERIOD)), c, s);
  return s;
}

struct Body {
  Q q[GROUPS];
  P p[GROUPS];
  W bad[GROUPS], old[GROUPS], k[GROUPS];
};
INLINE void begin(Body &s, const T *q, const T *p, const T *k) {
  EACH {
    W x = get(q, g), y = get(p, g);
    s.q[g] = place(x), s.p[g] = moment(y), s.bad[g] = (x + y) * T(0);
    s.k[g] = s.old[g] = W{};
#if FORCE
    s.k[g] = get(k, g), s.old[g] = FORCE == 2 ? sine_at(x) : x;
#endif
  }
}
INLINE void finish(const Body &s, T *q, T *p) {
  EACH {
    put(q, g, PERIODIC ? number(s.q[g]) + s.bad[g] : number(s.q[g]));
    put(p, g, CIRCULAR ? number_of(s.p[g]) + s.bad[g] : number_of(s.p[g]));
  }
}
INLINE void move(Body &s, const T *f, long next, T *row, long time, T h, T a) {
  for (long t = 0; t < time; ++t, f += next, row += WIDE)
    EACH {
      W push = get(f, g);
#if CIRCULAR
      s.bad[g] += push * T(0);
      s.p[g] += turned(push);
      s.q[g] += s.p[g];
#else
      if (GATES) s.p[g] *= get(f + N, g);
      if (GATES == 2) {
        W scale = get(f + 2 * N, g);
        s.q[g] = shrunk(s.q[g], scale), s.old[g] *= scale;
      }
      if (FORCE) push -= s.k[g] * s.old[g];
      s.p[g] = a * s.p[g] + h * push;
      if (PERIODIC) s.bad[g] += s.p[g] * T(0);
      s.q[g] += place(h * s.p[g]);
#endif
#if PERIODIC
      W cosine, sine;
      if (WAVES || FORCE == 2) wave(s.q[g], cosine, sine);
      if (FORCE == 2) s.old[g] = sine + s.bad[g];
      if (WAVES) {
        put(row, g, cosine + s.bad[g]), put(row + N, g, sine + s.bad[g]);
#if CIRCULAR
        wave(s.p[g], cosine, sine);
        put(row + 2 * N, g, cosine + s.bad[g]), put(row + 3 * N, g, sine + s.bad[g]);
#else
        put(row + 2 * N, g, s.p[g]);
#endif
        continue;
      }
#else
      s.old[g] = s.q[g];
#endif
      put(row, g, PERIODIC ? number(s.q[g]) + s.bad[g] : number(s.q[g]));
      put(row + N, g, CIRCULAR ? number_of(s.p[g]) + s.bad[g] : number_of(s.p[g]));
    }
}
#if WIDTH
// A layer without gradients: few enough tokens at a time that their features stay in the cache.
enum { TOKENS = 24, TILE = 6 };
#define UNROLL _Pragma("GCC unroll 8")
#define PADDED(n) (((n) + LANES - 1) / LANES * LANES)
// y = x m + bias for R rows and G vectors of columns: the sums stay in registers
template <int R, int G, int IN, int OUT>
INLINE void tile(const T *x, const T *m, const T *bias, T *y, long next, int column) {
  W sum[R][G], w[G];
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int g = 0; g < G; ++g)
      __builtin_memcpy(&sum[r][g], bias + column + g * LANES, sizeof(W));
  for (int i = 0; i < IN; ++i) {
    UNROLL for (int g = 0; g < G; ++g)
      __builtin_memcpy(&w[g], m + i * PADDED(OUT) + column + g * LANES, sizeof(W));
    UNROLL for (int r = 0; r < R; ++r)
      UNROLL for (int g = 0; g < G; ++g) sum[r][g] += x[r * IN + i] * w[g];
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int g = 0; g < G; ++g) {
      int from = column + g * LANES, left = next - from < LANES ? next - from : LANES;
      if (OUT % LANES == 0) left = LANES;
      __builtin_memcpy(y + r * next + from, &sum[r][g], left * sizeof(T));
    }
}
template <int R, int IN, int OUT>
INLINE void columns(const T *x, const T *m, const T *bias, T *y, long next) {
  enum { MANY = 4, REST = PADDED(OUT) / LANES % MANY };
  int c = 0;
  for (; c + MANY * LANES <= PADDED(OUT); c += MANY * LANES)
    tile<R, MANY, IN, OUT>(x, m, bias, y, next, c);
  if (REST) tile<R, REST ? REST : 1, IN, OUT>(x, m, bias, y, next, c);
}
template <int IN, int OUT>
INLINE void product(const T *x, const T *m, const T *bias, T *y, long next, long rows) {
  long r = 0;
  for (; r + TILE <= rows; r += TILE)
    columns<TILE, IN, OUT>(x + r * IN, m, bias, y + r * next, next);
  for (; r < rows; ++r) columns<1, IN, OUT>(x + r * IN, m, bias, y + r * next, next);
}
// d: x, q0, p0, coefficient, y, last q, last p; maps in and out, their rows and the bias padded
static void layer(T *const *d, long time, T h, T a, long b) {
  static const T nothing[PADDED(N)] = {};
  static thread_local T f[TOKENS * PADDED(N)], rows[TOKENS * WIDE];
  Body s;
  begin(s, d[1] + b * N, d[2] + b * N, d[3]);
  for (long t = 0; t < time; t += TOKENS) {
    const long count = time - t < TOKENS ? time - t : TOKENS;
    product<WIDTH, N>(d[0] + (b * time + t) * WIDTH, d[7], nothing, f, PADDED(N), count);
    move(s, f, PADDED(N), rows, count, h, a);
    product<WIDE, WIDTH>(rows, d[8], d[9], d[4] + (b * time + t) * WIDTH, WIDTH, count);
  }
  finish(s, d[5] + b * N, d[6] + b * N);
}
#endif
// d: f and gates, q0, p0, coefficient, rows, last q, last p
static void forward(T *const *d, long time, T h, T a, long b) {
  Body s;
  begin(s, d[1] + b * N, d[2] + b * N, d[3]);
  move(s, d[0] + b * time * IN, IN, d[4] + b * time * WIDE, time, h, a);
  finish(s, d[5] + b * N, d[6] + b * N);
}
// then slopes: of rows, last q, last p; f, q0, p0, coefficient (a row of the batch each)
INLINE void backward(T *const *d, long time, T h, T a, long b) {
  const T rate = T(6.283185307179586477 / PERIOD);
  W gq[GROUPS], gp[GROUPS], gk[GROUPS], k[GROUPS];
  EACH {
    gq[g] = get(d[8] + b * N, g), gp[g] = get(d[9] + b * N, g);
    gk[g] = k[g] = W{};
    if (FORCE) k[g] = get(d[3], g);
  }
  for (long t = time - 1; t >= 0; --t) {
    const T *row = d[4] + (b * time + t) * WIDE, *slope = d[7] + (b * time + t) * WIDE;
    const T *gate = d[0] + (b * time + t) * IN + N;
    T *gf = d[10] + (b * time + t) * IN;
    EACH {
      if (ANGLES) {
        gq[g] += rate * (get(row, g) * get(slope + N, g) - get(row + N, g) * get(slope, g));
        gp[g] += CIRCULAR ? rate * (get(row + 2 * N, g) * get(slope + 3 * N, g) -
                                    get(row + 3 * N, g) * get(slope + 2 * N, g))
                          : get(slope + 2 * N, g);
      } else
        gq[g] += get(slope, g), gp[g] += get(slope + N, g);
      gp[g] += h * gq[g];
      W push = h * gp[g];
      put(gf, g, push);
      const T *from = t ? row - WIDE : d[1] + b * N;
      if (FORCE == 1) {
        W q = get(from, g);
        if (GATES == 2) q *= get(gate + N, g);
        gk[g] -= push * q;
        gq[g] -= push * k[g];
      }
      if (FORCE == 2) {
        W c, s;
        if (ANGLES && t) c = get(row - WIDE, g), s = get(row - WIDE + N, g);
        else wave(turned(get(from, g) * T(1 / PERIOD)), c, s);
        gk[g] -= push * s;
        gq[g] -= push * k[g] * c;
      }
      gp[g] *= a;
      if (GATES) {
        put(gf + N, g, gp[g] * get(t ? from + OF_P : d[2] + b * N, g));
        gp[g] *= get(gate, g);
      }
      if (GATES == 2) {
        put(gf + 2 * N, g, gq[g] * get(from, g));
        gq[g] *= get(gate + N, g);
      }
    }
  }
  EACH {
    put(d[11] + b * N, g, gq[g]), put(d[12] + b * N, g, gp[g]);
    if (FORCE) put(d[13] + b * N, g, gk[g]);
  }
}
extern "C" void run(void *const *all, const double *sizes, long first, long last) {
  T *const *d = (T *const *)all;
  for (long b = first; b < last; ++b)
#if WIDTH
    layer(d, sizes[0], sizes[1], sizes[2], b);
#else
    if (sizes[3]) backward(d, sizes[0], sizes[1], sizes[2], b);
    else forward(d, sizes[0], sizes[1], sizes[2], b);
#endif
}
"""

_FORCES = {"torus": 0, "oscillator": 1, "pendulum": 2}


def fits(motion: Any) -> bool:
    """Say whether a motion, of :class:`~darboux.learners.heads.Motion`, has this kernel."""
    alone = motion.name in _FORCES and motion.grid is None and not motion.coupled
    return alone and (motion.h == 1 or not motion.circular)


def check_inputs(x: Tensor) -> None:
    """Raise unless a native kernel can read ``x``."""
    if x.dtype not in _native.SCALARS or x.device.type != "cpu":
        raise ValueError(
            f"kernel: inputs are {x.dtype} on {x.device}, expected float32 or float64 on the cpu"
        )


def features(
    motion: Any, tensors: State, inputs: Tensor, state: State, waves: bool = True
) -> tuple[Tensor, State]:
    """Return one row of features ``(batch, time, ...)`` for each token, and the last state.

    With ``waves`` the cosines of angles, then their sines; otherwise ``q``, then ``p``.
    """
    check_inputs(inputs)
    rows, q, p = _Coordinates.apply(motion, waves, inputs, *state, *tensors)  # type: ignore[misc]
    return rows, (q, p)


def layer(
    motion: Any, tensors: State, x: Tensor, state: State, drive: Tensor, out: Tensor, bias: Tensor
) -> tuple[Tensor, State]:
    """Return a whole layer of ``x (batch, time, width)``, without gradients, and the last state.

    ``out`` of the features of what ``drive`` makes of ``x``, which are never written to memory.
    The motion has no gates.
    """
    check_inputs(x)
    lanes = 64 // x.element_size()
    in_, out_, bias = (
        torch.nn.functional.pad(m, (0, -m.shape[-1] % lanes)) for m in (drive.mT, out.mT, bias)
    )
    given = [z.contiguous() for z in (x, *state, tensors[0] if tensors else x)]
    y, *last = (z.new_empty(z.shape) for z in given[:3])
    maps = [m.contiguous() for m in (in_, out_, bias)]
    _call(motion, True, [*given, y, *last, *maps], False, x.shape[-1])
    return y, tuple(last)


def path(motion: Any, tensors: State, inputs: Tensor, state: State) -> State:
    """Return what :class:`~darboux.learners.recurrence.Cell` takes from its kernel."""
    rows, _ = features(motion, tensors, inputs, state, waves=False)
    q, p = rows.unflatten(-1, (2, *state[0].shape[1:])).unbind(2)
    return q, p


@functools.lru_cache(64)
def _function(
    motion: Any, dtype: torch.dtype, count: int, waves: bool, width: int
) -> Callable[..., None]:
    period = motion.kind.period
    double = dtype == torch.float64
    names = {
        "N": count,
        "WAVES": int(waves),
        "PERIODIC": int(period is not None),
        "CIRCULAR": int(motion.circular),
        "FORCE": _FORCES[motion.name],
        "GATES": motion.gates,
        "WIDTH": width,
        "PERIOD": repr(period or 1.0),
        "WHOLE": repr(2.0**52 if double else 2.0**23),
    }
    defines = "".join(f"#define {key} {value}\n" for key, value in names.items())
    whole = "unsigned long long" if double else "unsigned"
    types = f"typedef {_native.SCALARS[dtype]} T;\ntypedef {whole} UINT;\n"
    return _native.function(types + defines + _SOURCE, 2)


class _Coordinates(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, motion: Any, waves: bool, inputs: Tensor, q: Tensor, p: Tensor, *tensors: Tensor
    ):
        batch, time = inputs.shape[:2]
        count = math.prod(q.shape[1:])
        wide = 2
        if waves and motion.kind.period is not None:
            wide = 4 if motion.circular else 3
        coefficient = tensors[0] if tensors else q
        data = [x.contiguous() for x in (inputs, q, p, coefficient)]
        rows = inputs.new_empty(batch, time, wide * count)
        last = [torch.empty_like(x) for x in data[1:3]]
        _call(motion, waves, [*data, rows, *last], False)
        ctx.motion, ctx.waves, ctx.forced = motion, waves, bool(tensors)
        ctx.save_for_backward(*data, rows)
        return rows, *last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        data = list(ctx.saved_tensors)
        inputs, q, p, coefficient, _ = data
        data += [q, p, *(x.contiguous() for x in slopes)]
        out = [torch.empty_like(x) for x in (inputs, q, p)]
        of_coefficient = coefficient.new_zeros(len(q), *coefficient.shape)
        if not ctx.forced:
            of_coefficient = torch.empty_like(q)
        _call(ctx.motion, ctx.waves, [*data, *out, of_coefficient], True)
        return None, None, *out, *([of_coefficient.sum(0)] if ctx.forced else [])


def _call(motion: Any, waves: bool, data: list[Tensor], back: bool, width: int = 0) -> None:
    batch, time = data[0].shape[:2]
    count = math.prod(data[1].shape[1:])
    run = _function(motion, data[0].dtype, count, waves, width)
    pointers = _native.pointers([*data, *data[:1] * (14 - len(data))])
    sizes = torch.tensor([time, motion.h, motion.decay, back], dtype=torch.float64)

    def part(begin: int, end: int, _: int) -> None:
        run(pointers, sizes.data_ptr(), begin, end)

    work = batch * time * count
    threads = min(torch.get_num_threads(), batch) if work > 100_000 else 1
    _native.in_parts(part, _native.cut(batch, 1, max(threads, 1)))
