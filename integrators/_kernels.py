"""Native kernels: the C++ that they share, the compiler, and a kernel of Newtonian gravity.

A kernel moves trajectories through all flows of a run without touching memory in between. It is a
shared library with one function, ``run``, called through ctypes with pointers to the data. All
kernels are compiled with contraction (``a * b + c`` may round once) but without any other licence
that ``-ffast-math`` would give: infinities, NaN, signed zeros and the order of sums are kept.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wno-psabi",
    "-std=c++17",
    "-shared",
    "-fPIC",
)

LANES = 8


class NoCompiler(RuntimeError):
    """No C++ compiler was found."""


def compiler() -> str:
    """Return the C++ compiler: that of ``CXX``, or else ``g++`` or ``clang++``."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise NoCompiler(
        "compile=True needs a C++ compiler, and neither g++ nor clang++ was found on PATH: "
        "install one (Debian: apt install g++) or name it in the environment variable CXX"
    )


@functools.cache
def _machine(cxx: str) -> str:
    # -march=native means another thing on another machine that shares the home directory.
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout
    flags = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((x for x in lines if x.startswith(("flags", "Features"))), "")
    return cxx + version + flags


def cache_folder() -> Path:
    """Return where libraries are kept: ``$DARBOUX_CACHE``, or else below ``~/.cache``."""
    chosen = os.environ.get("DARBOUX_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "darboux"


def build(source: str) -> ctypes.CDLL:
    """Compile ``source``, or find the library that an earlier process made of it."""
    cxx = compiler()
    key = "\0".join([source, *FLAGS, _machine(cxx)])
    return _load(hashlib.sha256(key.encode()).hexdigest()[:32], source, cxx)


_loaded: dict[str, ctypes.CDLL] = {}


def _load(name: str, source: str, cxx: str) -> ctypes.CDLL:
    if name not in _loaded:
        folder = cache_folder()
        path = folder / f"{name}.so"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _compile(cxx, source, path)
        _loaded[name] = ctypes.CDLL(str(path))
    return _loaded[name]


def _compile(cxx: str, source: str, path: Path) -> None:
    # Two processes may do this at once: each writes its own file, the last rename wins.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        text, made = Path(scratch, "kernel.cpp"), Path(scratch, "kernel.so")
        text.write_text(source)
        done = subprocess.run(
            [cxx, *FLAGS, str(text), "-o", str(made)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{cxx} failed on a generated kernel:\n{done.stderr[:2000]}")
        os.replace(made, path)


# The shared beginning. D is eight doubles; V, the working type, is eight numbers of type T.
# The elementary functions are fdlibm's and Cephes's (tanh), branchless, within 1 or 2 ulp; the
# rarer ones call libm lane by lane.
HEADER = r"""
enum { L = 8 };
typedef double D __attribute__((vector_size(L * sizeof(double))));
typedef long long I __attribute__((vector_size(L * sizeof(long long))));
typedef T V __attribute__((vector_size(L * sizeof(T))));
typedef decltype(V() < V()) M;
#define INLINE static inline __attribute__((always_inline))
#define BARRIER __asm__ volatile("" ::: "memory")

// The flows of a run: rows (h of the kick, h of the drift, their rates dh/dt). Row 0 is a drift
// before the rest; [mid, end_mid) is repeated.
struct Plan { const double *rows; long head, count, mid, end_mid, repeats; };

INLINE V splat(T x) { return V{} + x; }
INLINE V splat(V x) { return x; }
INLINE V sel(M m, V a, V b) { return m ? a : b; }
INLINE D all(double x) { return D{} + x; }

INLINE bool any(I m) {
  m |= __builtin_shufflevector(m, m, 4, 5, 6, 7, 0, 1, 2, 3);
  m |= __builtin_shufflevector(m, m, 2, 3, 0, 1, 6, 7, 4, 5);
  return m[0] | m[1];
}

__attribute__((noinline)) static V load(const T *x, long stride, long valid) {
  V r{};
  for (long l = 0; l < L; ++l) r[l] = x[(l < valid ? l : valid - 1) * stride];
  return r;
}
__attribute__((noinline)) static V load_or_zero(const T *x, long stride, long valid) {
  V r{};
  for (long l = 0; l < valid; ++l) r[l] = x[l * stride];
  return r;
}
__attribute__((noinline)) static void store(T *x, V v, long stride, long valid) {
  for (long l = 0; l < valid; ++l) x[l * stride] = v[l];
}
__attribute__((noinline)) static void collect(double *x, V v, long valid) {
  double s = 0;
  for (long l = 0; l < valid; ++l) s += v[l];
  *x += s;
}
INLINE void kahan(V &x, V step, V &lost) {
  step += lost;
  V moved = x + step;
  lost = step - (moved - x);
  x = moved;
}

INLINE D d_sqrt(D x) {
#if defined(__AVX512F__) && !defined(__clang__)
  return __builtin_ia32_sqrtpd512_mask(x, x, -1, 4);
#else
  D r;
  for (int l = 0; l < L; ++l) r[l] = __builtin_sqrt(x[l]);
  return r;
#endif
}
INLINE D d_rsqrt(D x) {
#if defined(__AVX512F__) && !defined(__clang__)
  // 14 bits, then a step of third order (42 bits) and a Newton step.
  D y = __builtin_ia32_rsqrt14pd512_mask(x, x, -1);
  D e = 1.0 - (x * y) * y;
  D z = y + y * e * (0.5 + 0.375 * e);
  e = 1.0 - (x * z) * z;
  z = z + 0.5 * z * e;
  return (x > 0.0) & (x < __builtin_inf()) ? z : y;
#else
  return 1.0 / d_sqrt(x);
#endif
}
// The larger functions are called, not inlined, where a kernel uses many of them.
#ifdef MANY_CALLS
#define LARGE __attribute__((noinline)) static
#else
#define LARGE INLINE
#endif
LARGE D d_exp(D x) {
  const D big = all(0x1.8p52);
  D k = x * 1.4426950408889634 + big;
  I n = (I)k - (I)big;
  k -= big;
  D r = x - k * 6.93147180369123816490e-01 - k * 1.90821492927058770002e-10;
  D y = all(1.0 / 6227020800.0);
  y = y * r + 1.0 / 479001600.0;
  y = y * r + 1.0 / 39916800.0;
  y = y * r + 1.0 / 3628800.0;
  y = y * r + 1.0 / 362880.0;
  y = y * r + 1.0 / 40320.0;
  y = y * r + 1.0 / 5040.0;
  y = y * r + 1.0 / 720.0;
  y = y * r + 1.0 / 120.0;
  y = y * r + 1.0 / 24.0;
  y = y * r + 1.0 / 6.0;
  y = y * r + 0.5;
  y = 1.0 + (r + r * r * y);
  I h = n >> 1;
  y = y * (D)((h + 1023) << 52) * (D)((n - h + 1023) << 52);
  y = x > 709.782712893384 ? all(__builtin_inf()) : y;
  return x < -745.1332191019412 ? all(0) : y;
}
LARGE D d_log(D x) {
  const D big = all(0x1.8p52);
  I tiny = x < 0x1p-1022;
  D y = tiny ? x * 0x1p54 : x;
  I e = ((I)y - 0x3fe6a09e667f3bcdLL) >> 52;
  D m = (D)((I)y - (e << 52));
  D k = (D)(e + (I)big) - big;
  k = tiny ? k - 54.0 : k;
  D f = m - 1.0, s = f / (2.0 + f), z = s * s, w = z * z;
  D a = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01
        + w * 1.531383769920937332e-01));
  D b = z * (6.666666666666735130e-01 + w * (2.857142874366239149e-01
        + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
  D half = 0.5 * f * f;
  D r = k * 6.93147180369123816490e-01
        - ((half - (s * (half + (a + b)) + k * 1.90821492927058770002e-10)) - f);
  r = (x > 0.0) & (x < __builtin_inf()) ? r : x * x;
  r = x < 0.0 ? all(__builtin_nan("")) : r;
  return x == 0.0 ? all(-__builtin_inf()) : r;
}
LARGE D d_log1p(D x) {
  D u = 1.0 + x;
  D r = d_log(u) - ((u - 1.0) - x) / u;
  r = (u > 0.0) & (u < __builtin_inf()) ? r : d_log(u);
  return u == 1.0 ? x : r;
}
LARGE D d_expm1(D x) {
  D u = d_exp(x), v = u - 1.0, r = v * x / d_log(u);
  r = (u == 0.0) | (u == __builtin_inf()) ? v : r;
  return u == 1.0 ? x : r;
}
LARGE D d_sigmoid(D x) { return 1.0 / (1.0 + d_exp(-x)); }
INLINE D d_abs(D x) { return (D)((I)x & 0x7fffffffffffffffLL); }
LARGE D d_tanh(D x) {
  D a = d_abs(x), z = x * x;
  D p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z
        - 1.61468768441708447952e3;
  D q = (((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z
         + 4.84406305325125486048e3);
  D far = 1.0 - 2.0 / (d_exp(2.0 * a) + 1.0);
  far = x < 0.0 ? -far : far;
  return a < 0.625 ? x + x * z * (p / q) : far;
}
// sin(x + turns pi/2) for |x| < 2^20; beyond, and for what is not finite, libm's.
INLINE D wave(D x, long long turns, double (*libm)(double)) {
  const D big = all(0x1.8p52);
  D k = x * 6.36619772367581382433e-01 + big;
  I n = (I)k - (I)big + turns;
  k -= big;
  D r = x - k * 1.57079632673412561417e+00;
  r = r - k * 6.07710050630396597660e-11;
  r = r - k * 2.02226624879595063154e-21;
  D z = r * r;
  D s = z * (-1.98412698298579493134e-04 + z * (2.75573137070700676789e-06
        + z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)));
  s = r + r * z * (-1.66666666666666324348e-01 + z * (8.33333333332248946124e-03 + s));
  D c = z * (2.48015872894767294178e-05 + z * (-2.75573143513906633035e-07
        + z * (2.08757232129817482790e-09 - z * 1.13596475577881948265e-11)));
  c = z * z * (4.16666666666666019037e-02 + z * (-1.38888888888741095749e-03 + c));
  D half = 0.5 * z, w = 1.0 - half;
  c = w + (((1.0 - w) - half) + c);
  D y = (n & 1) != 0 ? c : s;
  y = (n & 2) != 0 ? -y : y;
  if (__builtin_expect(any(~(d_abs(x) < 1048576.0)), 0))
    for (int l = 0; l < L; ++l) y[l] = libm(x[l]);
  return y;
}
extern "C" double sin(double) noexcept;
extern "C" double cos(double) noexcept;
LARGE D d_sin(D x) { return wave(x, 0, sin); }
LARGE D d_cos(D x) { return wave(x, 1, cos); }

#define LANEWISE(f)                                                       \
  INLINE D d_##f(D x) {                                                   \
    D r;                                                                  \
    for (int l = 0; l < L; ++l) r[l] = __builtin_##f(x[l]);               \
    return r;                                                             \
  }
LANEWISE(tan) LANEWISE(asin) LANEWISE(acos) LANEWISE(atan) LANEWISE(sinh) LANEWISE(cosh)
LANEWISE(erf)

#define LIFT(f)                                                           \
  INLINE V f_##f(V x) { return __builtin_convertvector(d_##f(__builtin_convertvector(x, D)), V); } \
  INLINE T f_##f(T x) { return f_##f(splat(x))[0]; }
LIFT(sqrt) LIFT(exp) LIFT(log) LIFT(log1p) LIFT(expm1) LIFT(sigmoid) LIFT(tanh) LIFT(sin) LIFT(cos)
LIFT(rsqrt) LIFT(tan) LIFT(asin) LIFT(acos) LIFT(atan) LIFT(sinh) LIFT(cosh) LIFT(erf)

INLINE V f_abs(V x) { return x < T(0) ? -x : x + T(0); }
INLINE T f_abs(T x) { return x < 0 ? -x : x + T(0); }
INLINE V f_sign(V x) { return sel(x > T(0), splat(T(1)), sel(x < T(0), splat(T(-1)), x)); }
INLINE V f_max(V a, V b) { return (a > b) | (a != a) ? a : b; }
INLINE V f_min(V a, V b) { return (a < b) | (a != a) ? a : b; }
INLINE V f_pow(V a, V b) {
  V r{};
  for (int l = 0; l < L; ++l) r[l] = __builtin_pow(a[l], b[l]);
  return r;
}
INLINE V f_atan2(V a, V b) {
  V r{};
  for (int l = 0; l < L; ++l) r[l] = __builtin_atan2(a[l], b[l]);
  return r;
}
"""


# Newtonian gravity of N bodies, SIMD over the bodies; one trajectory at a time.
# c[0]: masses (N), c[1]: G, c[2]: softening.
_GRAVITY = r"""
enum { W = (N + L - 1) / L };
struct Bodies { V x[3][W]; };
union Flat { V v[W]; T t[W * L]; };

INLINE M is_body(int a, int j) {
  M lane;
  for (int l = 0; l < L; ++l) lane[l] = a * L + l;
  return lane == j;
}
static void read(Bodies &b, const T *x) {
  b = Bodies{};
  for (int i = 0; i < N; ++i)
    for (int k = 0; k < 3; ++k) b.x[k][i / L][i % L] = x[3 * i + k];
}
static void write(const Bodies &b, T *x) {
  for (int i = 0; i < N; ++i)
    for (int k = 0; k < 3; ++k) x[3 * i + k] = b.x[k][i / L][i % L];
}
static Flat masses(const T *c) {
  Flat m{};
  for (int i = 0; i < N; ++i) m.t[i] = c[i];
  return m;
}
// f_i = m_i sum_j G m_j (q_j - q_i) / (r^2 + eps^2)^(3/2)
static void force(const Bodies &q, const Flat &m, T G, T eps, Bodies &f) {
  const T *x = (const T *)q.x[0], *y = (const T *)q.x[1], *z = (const T *)q.x[2];
  for (int a = 0; a < W; ++a) {
    V xi = q.x[0][a], yi = q.x[1][a], zi = q.x[2][a], fx{}, fy{}, fz{};
    for (int j = 0; j < N; ++j) {
      V dx = x[j] - xi, dy = y[j] - yi, dz = z[j] - zi;
      V r2 = dx * dx + dy * dy + (dz * dz + eps * eps);
      r2 = is_body(a, j) ? splat(T(1)) : r2;
      V s = f_rsqrt(r2);
      V w = s * s * (s * m.t[j]);
      fx += w * dx, fy += w * dy, fz += w * dz;
    }
    V scale = G * m.v[a];
    f.x[0][a] = scale * fx, f.x[1][a] = scale * fy, f.x[2][a] = scale * fz;
  }
}
INLINE void move(Bodies &x, const Bodies &step, T h) {
  for (int k = 0; k < 3; ++k)
    for (int a = 0; a < W; ++a) x.x[k][a] += h * step.x[k][a];
}
static void velocity(const Bodies &p, const V *inverse, Bodies &v) {
  for (int k = 0; k < 3; ++k)
    for (int a = 0; a < W; ++a) v.x[k][a] = p.x[k][a] * inverse[a];
}
INLINE void inverses(const Flat &m, V *inverse) {
  for (int a = 0; a < W; ++a) inverse[a] = sel(m.v[a] == T(0), V{}, T(1) / m.v[a]);
}
"""

_GRAVITY_FORWARD = r"""
INLINE void advance(Bodies &x, const Bodies &step, T h, Bodies &lost, bool careful) {
  if (!careful) return move(x, step, h);
  for (int k = 0; k < 3; ++k)
    for (int a = 0; a < W; ++a) kahan(x.x[k][a], h * step.x[k][a], lost.x[k][a]);
}
extern "C" void run(T *q_, T *p_, T *lost_q, T *lost_p, const T *const *c, const Plan *plan,
                    long begin, long end) {
  Flat m = masses(c[0]);
  V inverse[W];
  inverses(m, inverse);
  const T G = c[1][0], eps = c[2][0];
  for (long b = begin; b < end; ++b) {
    Bodies q, p, f, lq{}, lp{};
    const bool careful = lost_q;
    read(q, q_ + 3 * N * b), read(p, p_ + 3 * N * b);
    if (careful) read(lq, lost_q + 3 * N * b), read(lp, lost_p + 3 * N * b);
    if (plan->head) velocity(p, inverse, f), advance(q, f, plan->rows[1], lq, careful);
    long left = plan->repeats;
    for (long i = 1; i < plan->count;) {
      force(q, m, G, eps, f);
      advance(p, f, plan->rows[4 * i], lp, careful);
      velocity(p, inverse, f);
      advance(q, f, plan->rows[4 * i + 1], lq, careful);
      if (++i == plan->end_mid && --left > 0) i = plan->mid;
    }
    write(q, q_ + 3 * N * b), write(p, p_ + 3 * N * b);
    if (careful) write(lq, lost_q + 3 * N * b), write(lp, lost_p + 3 * N * b);
  }
}
"""

# With Phi = sum_i w_i . f_i, u = w_i - w_j and d = q_j - q_i, a pair gives
# dPhi/dd = G m_i m_j (s^3 u - 3 s^5 (u.d) d), and every body meets each pair from its own side.
_GRAVITY_BACKWARD = r"""
struct Sums { Flat m; double G, eps, dt; };

static void undo_kick(const Bodies &q, Bodies &p, Bodies &qb, const Bodies &pb, const Flat &m, T G,
                      T eps, T h, T rate, Sums &sums) {
  const T *x = (const T *)q.x[0], *y = (const T *)q.x[1], *z = (const T *)q.x[2];
  const T *u = (const T *)pb.x[0], *v = (const T *)pb.x[1], *w = (const T *)pb.x[2];
  V phi{}, soft{};
  for (int a = 0; a < W; ++a) {
    V xi = q.x[0][a], yi = q.x[1][a], zi = q.x[2][a], fx{}, fy{}, fz{};
    V ui = pb.x[0][a], vi = pb.x[1][a], wi = pb.x[2][a], gx{}, gy{}, gz{}, body{}, e5{};
    for (int j = 0; j < N; ++j) {
      V dx = x[j] - xi, dy = y[j] - yi, dz = z[j] - zi;
      V ux = ui - u[j], uy = vi - v[j], uz = wi - w[j];
      V r2 = dx * dx + dy * dy + (dz * dz + eps * eps);
      r2 = is_body(a, j) ? splat(T(1)) : r2;
      V s = f_rsqrt(r2), s2 = s * s, s3 = s2 * (s * m.t[j]);
      V along = (ux * dx + uy * dy + uz * dz) * s3, pull = T(3) * along * s2;
      fx += s3 * dx, fy += s3 * dy, fz += s3 * dz;
      gx += s3 * ux - pull * dx, gy += s3 * uy - pull * dy, gz += s3 * uz - pull * dz;
      body += along, e5 += pull;
    }
    V scale = G * m.v[a];
    V hs = h * scale;
    p.x[0][a] -= hs * fx, p.x[1][a] -= hs * fy, p.x[2][a] -= hs * fz;
    qb.x[0][a] -= hs * gx, qb.x[1][a] -= hs * gy, qb.x[2][a] -= hs * gz;
    sums.m.v[a] += h * G * body;
    phi += m.v[a] * body, soft += m.v[a] * e5;
  }
  double total = 0, softened = 0;
  for (int l = 0; l < L; ++l) total += phi[l], softened += soft[l];
  // Each pair was met twice.
  sums.G += h * total / 2;
  sums.eps -= h * G * eps * softened / 2;
  sums.dt += rate * G * total / 2;
}
static void undo_drift(Bodies &q, const Bodies &p, const Bodies &qb, Bodies &pb, const V *inverse,
                       T h, T rate, Sums &sums) {
  double total = 0;
  for (int a = 0; a < W; ++a) {
    V body{};
    for (int k = 0; k < 3; ++k) {
      V v = p.x[k][a] * inverse[a];
      q.x[k][a] -= h * v;
      pb.x[k][a] += h * inverse[a] * qb.x[k][a];
      body += v * qb.x[k][a];
    }
    sums.m.v[a] -= h * body * inverse[a];
    for (int l = 0; l < L; ++l) total += body[l];
  }
  sums.dt += rate * total;
}
extern "C" void run(T *q_, T *p_, T *qb_, T *pb_, double *bars, const T *const *c,
                    const Plan *plan, long begin, long end) {
  Flat m = masses(c[0]);
  V inverse[W];
  inverses(m, inverse);
  const T G = c[1][0], eps = c[2][0];
  for (long b = begin; b < end; ++b) {
    Bodies q, p, qb, pb;
    Sums sums{};
    read(q, q_ + 3 * N * b), read(p, p_ + 3 * N * b);
    read(qb, qb_ + 3 * N * b), read(pb, pb_ + 3 * N * b);
    long left = plan->repeats;
    for (long i = plan->count; i > 1;) {
      --i;
      const double *row = plan->rows + 4 * i;
      undo_drift(q, p, qb, pb, inverse, row[1], row[3], sums);
      undo_kick(q, p, qb, pb, m, G, eps, row[0], row[2], sums);
      if (i == plan->mid && --left > 0) i = plan->end_mid;
    }
    if (plan->head) undo_drift(q, p, qb, pb, inverse, plan->rows[1], plan->rows[3], sums);
    write(q, q_ + 3 * N * b), write(p, p_ + 3 * N * b);
    write(qb, qb_ + 3 * N * b), write(pb, pb_ + 3 * N * b);
    for (int i = 0; i < N; ++i) bars[i] += sums.m.t[i];
    bars[N] += sums.G, bars[N + 1] += sums.eps, bars[N + 2] += sums.dt;
  }
}
"""


def gravity_source(bodies: int, scalar: str, backward: bool) -> str:
    """Return the kernel of ``bodies`` bodies; ``scalar`` is ``double`` or ``float``."""
    last = _GRAVITY_BACKWARD if backward else _GRAVITY_FORWARD
    return f"#define T {scalar}\n{HEADER}enum {{ N = {bodies} }};\n{_GRAVITY}{last}"


@dataclass(frozen=True)
class Native:
    """A hand-written kernel of a system, for the attribute ``native`` of a :class:`Separable`.

    ``source(scalar, backward)`` is the C++, ``tensors()`` the values that it takes, by which it
    also gives gradients; ``wanted(batch)`` says whether it beats a generated one.
    """

    event: tuple[int, ...]
    source: Callable[[str, bool], str]
    tensors: Callable[[], Sequence[Tensor]]
    wanted: Callable[[int], bool] = lambda batch: True


def gravity_kernel(masses: Tensor, constant: float | Tensor, softening: float | Tensor) -> Native:
    """Return the kernel of Newtonian gravity of ``masses (n,)``, vectorised over the bodies."""
    n = masses.numel()
    return Native(
        (n, 3),
        lambda scalar, backward: gravity_source(n, scalar, backward),
        lambda: (masses, *(torch.as_tensor(x, dtype=masses.dtype) for x in (constant, softening))),
        # Few bodies in many copies are faster with one copy in each lane.
        lambda batch: n > LANES or batch < LANES,
    )
