"""The native source of a head's motion: forces, drifts and couplings by name, and the loops."""

# E numbers a head, HEADS heads a unit, N = E HEADS; SIZE rank of the potential or the low rank or
# width of the networks; RANK rank of the coupling (0: none).
COMMON = r"""
enum { N = E * HEADS, WIDE = PERIODIC ? 2 * N : N };
// exp(x) = the result times 2^n, to 1e-7 in single precision (Cephes)
INLINE V exp_parts(V x, M &n) {
  const V big = splat(T(0x1.8p23));
  V k = x * T(1.44269504088896341) + big;
  n = (M)k - (M)big;
  k -= big;
  V r = x - k * T(0.693359375) + k * T(2.12194440e-4);
  V y = T(1.9875691500e-4) * r + T(1.3981999507e-3);
  y = y * r + T(8.3334519073e-3);
  y = y * r + T(4.1665795894e-2);
  y = y * r + T(1.6666665459e-1);
  y = y * r + T(5.0000001201e-1);
  return T(1) + (r + r * r * y);
}
INLINE V exp_of(V x) {
  if (sizeof(T) == 8) return f_exp(x);
  M n;
  V y = exp_parts(sel(x > T(89), splat(T(89)), sel(x < T(-104), splat(T(-104)), x)), n);
  M half = n >> 1;  // in two factors, for results that are no normal numbers
  return y * (V)((half + 127) << 23) * (V)((n - half + 127) << 23);
}
INLINE V tanh_of(V x) {
  if (sizeof(T) == 8) return f_tanh(x);
  // in single precision to 1e-7: a series fitted below 0.9, then 1 - 2 / (exp(2 |x|) + 1)
  V z = x * x, size = x < T(0) ? -x : x;
  V y = T(-4.524849850e-04) * z + T(2.574164282e-03);
  y = y * z - T(8.254990166e-03);
  y = y * z + T(2.165822214e-02);
  y = y * z - T(5.392778587e-02);
  y = y * z + T(1.333295801e-01);
  y = y * z - T(3.333332133e-01);
  y = x + x * z * y;
  M n;
  V e = exp_parts(T(2) * sel(size > T(10), splat(T(10)), size), n);
  V far = T(1) - T(2) / (e * (V)((n + 127) << 23) + T(1));
  return sel(size < T(0.9), y, sel(x < T(0), -far, far));
}
INLINE V wrap(V x) {
  if (!PERIODIC) return x;
  V turns = x * T(1.0 / PERIOD);
  V whole = __builtin_convertvector(__builtin_convertvector(turns, M), V);
  return x - T(PERIOD) * (whole - sel(whole > turns, splat(T(1)), V{}));
}
INLINE void transpose(V *r) {
#define SWAP(i, j, lo, hi) { V a = r[i], b = r[j]; r[i] = lo; r[j] = hi; }
#define ONE(i, j) SWAP(i, j, __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14), \
                             __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15))
#define TWO(i, j) SWAP(i, j, __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13), \
                             __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15))
#define FOUR(i, j) SWAP(i, j, __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11), \
                              __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15))
  ONE(0, 1) ONE(2, 3) ONE(4, 5) ONE(6, 7)
  TWO(0, 2) TWO(1, 3) TWO(4, 6) TWO(5, 7)
  FOUR(0, 4) FOUR(1, 5) FOUR(2, 6) FOUR(3, 7)
}
// N numbers of each of eight rows, one row a lane
INLINE void read(V *to, const T *x, long row, long valid) {
  int i = 0;
  for (; i + 8 <= N; i += 8) {
    for (int l = 0; l < L; ++l)
      __builtin_memcpy(&to[i + l], x + (l < valid ? l : valid - 1) * row + i, sizeof(V));
    transpose(to + i);
  }
  for (; i < N; ++i)
    for (int l = 0; l < L; ++l) to[i][l] = x[(l < valid ? l : valid - 1) * row + i];
}
INLINE void write(T *x, const V *from, long row, long valid) {
  int i = 0;
  for (; i + 8 <= N; i += 8) {
    V r[8];
    for (int l = 0; l < L; ++l) r[l] = from[i + l];
    transpose(r);
    for (int l = 0; l < L; ++l)
      if (l < valid) __builtin_memcpy(x + l * row + i, &r[l], sizeof(V));
  }
  for (; i < N; ++i)
    for (int l = 0; l < L; ++l)
      if (l < valid) x[l * row + i] = from[i][l];
}
// y_j = sum_i m[A j + B i] x_i, eight sums at a time: so many stay in registers
template <int OUT, int IN, int A, int B> INLINE void sums(const T *m, const V *x, V *y) {
  int j = 0;
  for (; j + 8 <= OUT; j += 8, m += 8 * A) {
    V a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{};
    for (int i = 0; i < IN; ++i) {
      const T *n = m + B * i;
      V z = x[i];
      a += n[0] * z, b += n[A] * z, c += n[2 * A] * z, d += n[3 * A] * z;
      e += n[4 * A] * z, f += n[5 * A] * z, g += n[6 * A] * z, h += n[7 * A] * z;
    }
    y[j] = a, y[j + 1] = b, y[j + 2] = c, y[j + 3] = d;
    y[j + 4] = e, y[j + 5] = f, y[j + 6] = g, y[j + 7] = h;
  }
  for (; j < OUT; ++j, m += A) {
    V sum{};
    for (int i = 0; i < IN; ++i) sum += m[B * i] * x[i];
    y[j] = sum;
  }
}
template <int R, int C> INLINE void times(const T *m, const V *x, V *y) {
  sums<R, C, C, 1>(m, x, y);
}
template <int R, int C> INLINE void transposed(const T *m, const V *x, V *y) {
  sums<C, R, 1, C>(m, x, y);
}
// g += x y^T + z w^T
template <int R, int C>
INLINE void outer(V *g, const V *x, const V *y, const V *z, const V *w) {
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) g[r * C + c] += x[r] * y[c] + z[r] * w[c];
}
template <int R, int C> INLINE void bent(const T *k, const T *b, const V *x, V *t) {
  times<R, C>(k, x, t);
  for (int r = 0; r < R; ++r) t[r] = tanh_of(t[r] + b[r]);
}
// the gradient of a force -K^T tanh(K x + b): u its cotangent, dx += what x gets
template <int R, int C>
INLINE void attract_back(const T *k, const V *t, const V *x, const V *u, V *dx, V *gk, V *gb) {
  V w[R], z[R], minus[R], back[C];
  times<R, C>(k, u, w);
  for (int r = 0; r < R; ++r) {
    z[r] = -(T(1) - t[r] * t[r]) * w[r];
    minus[r] = -t[r];
    gb[r] += z[r];
  }
  transposed<R, C>(k, z, back);
  for (int c = 0; c < C; ++c) dx[c] += back[c];
  outer<R, C>(gk, minus, u, z, x);
}
"""

# Each force: add to f what it is at (q, p); then the slopes. c: its tensors, from this head on.
FORCES = {
    "": "",
    "potential": r"""
INLINE void force(const T *const *c, int head, const V *q, const V *p, V *f) {
  V t[SIZE], y[E];
  const T *k = c[0] + head * SIZE * E;
  bent<SIZE, E>(k, c[1] + head * SIZE, q, t);
  transposed<SIZE, E>(k, t, y);
  for (int i = 0; i < E; ++i) f[i] -= y[i];
}
INLINE void force_back(const T *const *c, V *const *g, int head, const V *q, const V *p,
                       const V *u, V *dq, V *dp) {
  V t[SIZE];
  const T *k = c[0] + head * SIZE * E;
  bent<SIZE, E>(k, c[1] + head * SIZE, q, t);
  attract_back<SIZE, E>(k, t, q, u, dq, g[0] + head * SIZE * E, g[1] + head * SIZE);
}
""",
    "oscillator": r"""
INLINE void force(const T *const *c, int head, const V *q, const V *p, V *f) {
  for (int i = 0; i < E; ++i) f[i] -= c[0][head * E + i] * q[i];
}
INLINE void force_back(const T *const *c, V *const *g, int head, const V *q, const V *p,
                       const V *u, V *dq, V *dp) {
  for (int i = 0; i < E; ++i) {
    dq[i] -= c[0][head * E + i] * u[i];
    g[0][head * E + i] -= q[i] * u[i];
  }
}
""",
    "pendulum": r"""
INLINE void force(const T *const *c, int head, const V *q, const V *p, V *f) {
  for (int i = 0; i < E; ++i) f[i] -= c[0][head * E + i] * f_sin(q[i]);
}
INLINE void force_back(const T *const *c, V *const *g, int head, const V *q, const V *p,
                       const V *u, V *dq, V *dp) {
  for (int i = 0; i < E; ++i) {
    dq[i] -= c[0][head * E + i] * f_cos(q[i]) * u[i];
    g[0][head * E + i] -= f_sin(q[i]) * u[i];
  }
}
""",
    "low_rank": r"""
INLINE V length(const V *s) {
  V sum{};
  for (int r = 0; r < SIZE; ++r) sum += s[r] * s[r];
  V root;
  for (int l = 0; l < L; ++l) root[l] = __builtin_sqrt(sum[l]);
  return root;
}
INLINE void force(const T *const *c, int head, const V *q, const V *p, V *f) {
  V s[SIZE], y[E];
  transposed<E, SIZE>(c[0] + head * E * SIZE, p, s);
  V scale = T(1) / (T(1) + length(s));
  for (int r = 0; r < SIZE; ++r) s[r] = s[r] * s[r] * scale;
  times<E, SIZE>(c[1] + head * E * SIZE, s, y);
  for (int i = 0; i < E; ++i) f[i] -= y[i];
}
INLINE void force_back(const T *const *c, V *const *g, int head, const V *q, const V *p,
                       const V *u, V *dq, V *dp) {
  V s[SIZE], w[SIZE], ds[SIZE], phi[SIZE], back[E], zero[E];
  const T *a = c[0] + head * E * SIZE, *b = c[1] + head * E * SIZE;
  transposed<E, SIZE>(a, p, s);
  transposed<E, SIZE>(b, u, w);
  V size = length(s), scale = T(1) / (T(1) + size), dot{};
  for (int r = 0; r < SIZE; ++r) {
    phi[r] = -(s[r] * s[r] * scale);
    dot += w[r] * s[r] * s[r];
  }
  V over = sel(size > T(0), dot * scale * scale / size, V{});
  for (int r = 0; r < SIZE; ++r) ds[r] = s[r] * (over - T(2) * scale * w[r]);
  times<E, SIZE>(a, ds, back);
  for (int i = 0; i < E; ++i) dp[i] += back[i], zero[i] = V{};
  V *gu = g[0] + head * E * SIZE, *gw = g[1] + head * E * SIZE;
  for (int i = 0; i < E; ++i)
    for (int r = 0; r < SIZE; ++r)
      gu[i * SIZE + r] += p[i] * ds[r], gw[i * SIZE + r] += u[i] * phi[r];
}
""",
}
FORCES["low_rank_literal"] = FORCES["low_rank"]

# KEEP numbers that a drift leaves to the next one at the same q; ready makes the first.
NOTHING = r"""
enum { KEEP = 1 };
INLINE void ready(const T *const *c, int head, const V *q, V *keep) {}
"""

PLAIN_DRIFT = r"""
INLINE void drift(const T *const *c, int head, V *q, V *p, T h, V *keep) {
  for (int i = 0; i < E; ++i) q[i] += h * p[i];
}
INLINE void drift_back(const T *const *c, V *const *g, int head, const V *q, const V *p,
                       V *gq, V *gp, T h, V *keep) {
  for (int i = 0; i < E; ++i) gp[i] += h * gq[i];
}
"""

DRIFTS = {
    "revolution": r"""
INLINE void drift(const T *const *c, int head, V *q, V *p, T h, V *keep) {
  for (int k = 0; k < E / 2; ++k) {
    T r = c[0][head * (E / 2) + k], big = c[1][head * (E / 2) + k], half = h / 2 / (r * r);
    V x = q[2 * k] + half * p[2 * k], v = p[2 * k + 1];
    V s = big + r * f_cos(x), one = T(1) / s;
    q[2 * k + 1] += h * v * one * one;
    p[2 * k] -= h * r * v * v * f_sin(x) * one * one * one;
    q[2 * k] = x + half * p[2 * k];
  }
}
INLINE void drift_back(const T *const *c, V *const *g, int head, const V *q, const V *p,
                       V *gq, V *gp, T h, V *keep) {
  for (int k = 0; k < E / 2; ++k) {
    T r = c[0][head * (E / 2) + k], big = c[1][head * (E / 2) + k], half = h / 2 / (r * r);
    V u = p[2 * k], x = q[2 * k] + half * u, v = p[2 * k + 1];
    V sine = f_sin(x), cosine = f_cos(x);
    V one = T(1) / (big + r * cosine), two = one * one, three = two * one;
    V after = u - h * r * v * v * sine * three;
    V gx = gq[2 * k], gy = gq[2 * k + 1];
    V ghalf = gx * after;                      // x'' = x' + half u'
    V gu = gp[2 * k] + half * gx;
    V gs = T(-2) * h * v * three * gy + T(3) * h * r * v * v * sine * three * one * gu;
    V gr = -h * v * v * sine * three * gu + cosine * gs;
    gp[2 * k + 1] += h * two * gy - T(2) * h * r * v * sine * three * gu;
    gx += -h * r * v * v * cosine * three * gu - r * sine * gs;
    ghalf += gx * u;                           // x' = x + half u
    gp[2 * k] = gu + half * gx;
    gq[2 * k] = gx;
    g[0][head * (E / 2) + k] += gr - T(2) * half / r * ghalf;
    g[1][head * (E / 2) + k] += gs;
  }
}
""",
    "metric": r"""
enum { HALF = E / 2 };
struct Net { const T *w1, *b1, *w2, *b2; V *g1, *h1, *g2, *h2; };
INLINE Net net(const T *const *c, V *const *g, int head, int n) {
  long k = 2 * head + n, m = k * SIZE * HALF;
  Net a{c[0] + m, c[1] + k * SIZE, c[2] + m, c[3] + k * HALF, 0, 0, 0, 0};
  if (g) a.g1 = g[0] + m, a.h1 = g[1] + k * SIZE, a.g2 = g[2] + m, a.h2 = g[3] + k * HALF;
  return a;
}
enum { KEEP = SIZE + HALF };
INLINE void weigh(const Net &a, const V *y, V *t) {
  V *w = t + SIZE;
  bent<SIZE, HALF>(a.w1, a.b1, y, t);
  times<HALF, SIZE>(a.w2, t, w);
  for (int i = 0; i < HALF; ++i) w[i] = exp_of(w[i] + a.b2[i]);
}
INLINE void slide(const Net &a, V *x, const V *u, const V *t, V *v, T h) {
  V e[HALF], d[SIZE], back[HALF];
  const V *w = t + SIZE;
  for (int i = 0; i < HALF; ++i) x[i] += h * w[i] * u[i], e[i] = w[i] * u[i] * u[i];
  transposed<HALF, SIZE>(a.w2, e, d);
  for (int m = 0; m < SIZE; ++m) d[m] *= T(1) - t[m] * t[m];
  transposed<SIZE, HALF>(a.w1, d, back);
  for (int i = 0; i < HALF; ++i) v[i] -= h / 2 * back[i];
}
INLINE void slide_back(const Net &a, const V *u, const V *y, const V *t, V *gx, V *gu, V *gy,
                       V *gv, T h) {
  V e[HALF], d[SIZE], g[SIZE], gg[SIZE], gd[SIZE], gt[SIZE], ge[HALF], gl[HALF];
  const V *w = t + SIZE;
  for (int i = 0; i < HALF; ++i) e[i] = w[i] * u[i] * u[i];
  transposed<HALF, SIZE>(a.w2, e, d);
  times<SIZE, HALF>(a.w1, gv, gg);
  for (int m = 0; m < SIZE; ++m) {
    V s = T(1) - t[m] * t[m];
    gg[m] *= -h / 2;
    g[m] = -h / 2 * s * d[m];
    gd[m] = s * gg[m];
    gt[m] = T(-2) * t[m] * d[m] * gg[m];
  }
  times<HALF, SIZE>(a.w2, gd, ge);
  for (int i = 0; i < HALF; ++i) {
    gl[i] = w[i] * (h * u[i] * gx[i] + u[i] * u[i] * ge[i]);
    gu[i] += w[i] * (h * gx[i] + T(2) * u[i] * ge[i]);
    a.h2[i] += gl[i];
  }
  outer<HALF, SIZE>(a.g2, e, gd, gl, t);
  V more[SIZE], back[HALF];
  transposed<HALF, SIZE>(a.w2, gl, more);
  for (int m = 0; m < SIZE; ++m) {
    gt[m] = (gt[m] + more[m]) * (T(1) - t[m] * t[m]);
    a.h1[m] += gt[m];
  }
  outer<SIZE, HALF>(a.g1, g, gv, gt, y);
  transposed<SIZE, HALF>(a.w1, gt, back);
  for (int i = 0; i < HALF; ++i) gy[i] += back[i];
}
INLINE void drift(const T *const *c, int head, V *q, V *p, T h, V *keep) {
  Net a = net(c, 0, head, 0), b = net(c, 0, head, 1);
  V t[KEEP];
  slide(a, q, p, keep, p + HALF, h / 2);
  weigh(b, q, t);
  slide(b, q + HALF, p + HALF, t, p, h);
  weigh(a, q + HALF, keep);
  slide(a, q, p, keep, p + HALF, h / 2);
}
INLINE void ready(const T *const *c, int head, const V *q, V *keep) {
  weigh(net(c, 0, head, 0), q + HALF, keep);
}
INLINE void drift_back(const T *const *c, V *const *g, int head, const V *q0, const V *p0,
                       V *gq, V *gp, T h, V *keep) {
  Net a = net(c, g, head, 0), b = net(c, g, head, 1);
  V q[E], p[E], v[HALF], before[KEEP], t[KEEP];
  for (int i = 0; i < E; ++i) q[i] = q0[i], p[i] = p0[i];
  weigh(a, q + HALF, before);
  slide(a, q, p, before, p + HALF, h / 2);
  for (int i = 0; i < HALF; ++i) v[i] = p[HALF + i];
  weigh(b, q, t);
  slide(b, q + HALF, v, t, p, h);
  slide_back(a, p, q + HALF, keep, gq, gp, gq + HALF, gp + HALF, h / 2);
  slide_back(b, v, q, t, gq + HALF, gp + HALF, gq, gp, h);
  slide_back(a, p0, q0 + HALF, before, gq, gp, gq + HALF, gp + HALF, h / 2);
  for (int i = 0; i < KEEP; ++i) keep[i] = before[i];
}
""",
}

# The coupling of all heads: a unit then holds them all. FREE: w tanh(k phi + b).
ALL_HEADS = r"""
INLINE void phi_of(const V *q, V *x) {
  for (int i = 0; i < N; ++i)
    if (PERIODIC) x[i] = f_cos(T(OMEGA) * q[i]), x[N + i] = f_sin(T(OMEGA) * q[i]);
    else x[i] = q[i];
}
INLINE void couple(const T *const *c, const V *q, V *f) {
  static thread_local V x[WIDE], t[RANK], y[WIDE];
  phi_of(q, x);
  bent<RANK, WIDE>(c[0], c[1], x, t);
  if (FREE) {
    times<N, RANK>(c[2], t, y);
    for (int i = 0; i < N; ++i) f[i] += y[i];
    return;
  }
  transposed<RANK, WIDE>(c[0], t, y);
  for (int i = 0; i < N; ++i)
    f[i] -= PERIODIC ? (x[i] * y[N + i] - x[N + i] * y[i]) / T(OMEGA) : y[i];
}
INLINE void couple_back(const T *const *c, V *const *g, const V *q, const V *u, V *dq) {
  static thread_local V x[WIDE], t[RANK], y[WIDE], cot[WIDE], dx[WIDE], z[RANK], back[WIDE];
  phi_of(q, x);
  bent<RANK, WIDE>(c[0], c[1], x, t);
  for (int i = 0; i < WIDE; ++i) dx[i] = V{};
  if (FREE) {
    transposed<N, RANK>(c[2], u, z);
    for (int r = 0; r < RANK; ++r) z[r] *= T(1) - t[r] * t[r], g[1][r] += z[r];
    for (int i = 0; i < N; ++i)
      for (int r = 0; r < RANK; ++r) g[2][i * RANK + r] += u[i] * t[r];
    for (int r = 0; r < RANK; ++r)
      for (int i = 0; i < WIDE; ++i) g[0][r * WIDE + i] += z[r] * x[i];
    transposed<RANK, WIDE>(c[0], z, dx);
  } else {
    if (PERIODIC) {
      transposed<RANK, WIDE>(c[0], t, y);
      for (int i = 0; i < N; ++i) {
        V v = u[i] / T(OMEGA);
        cot[i] = -x[N + i] * v, cot[N + i] = x[i] * v;
        dx[i] = -v * y[N + i], dx[N + i] = v * y[i];
      }
    } else
      for (int i = 0; i < N; ++i) cot[i] = u[i];
    attract_back<RANK, WIDE>(c[0], t, x, cot, dx, g[0], g[1]);
  }
  for (int i = 0; i < N; ++i)
    dq[i] += PERIODIC ? T(OMEGA) * (x[i] * dx[N + i] - x[N + i] * dx[i]) : dx[i];
}
"""

# data: f, q0, p0, the path of (q, p) | slopes of the path, then of f, q0, p0; sizes: batch, time,
# units, h, a.
RUN = r"""
// before a kick: f is one token's force, its gates follow
INLINE void contract(const T *f, V *q, V *p, T a, long wide, long valid) {
  V gate[N];
  for (int i = 0; i < N; ++i) p[i] *= a;
#if GATES
  read(gate, f + wide, (1 + GATES) * wide, valid);
  for (int i = 0; i < N; ++i) p[i] *= gate[i];
#endif
#if GATES == 2
  read(gate, f + 2 * wide, (1 + GATES) * wide, valid);
  for (int i = 0; i < N; ++i) q[i] *= gate[i];
#endif
}
INLINE void contract_back(const T *f, T *gf, const V *q, const V *p, V *gq, V *gp, T a, long wide,
                          long valid) {
  V gate[N], slope[N];
  for (int i = 0; i < N; ++i) gp[i] *= a;
#if GATES
  for (int i = 0; i < N; ++i) slope[i] = gp[i] * p[i];
  write(gf + wide, slope, (1 + GATES) * wide, valid);
  read(gate, f + wide, (1 + GATES) * wide, valid);
  for (int i = 0; i < N; ++i) gp[i] *= gate[i];
#endif
#if GATES == 2
  for (int i = 0; i < N; ++i) slope[i] = gq[i] * q[i];
  write(gf + 2 * wide, slope, (1 + GATES) * wide, valid);
  read(gate, f + 2 * wide, (1 + GATES) * wide, valid);
  for (int i = 0; i < N; ++i) gq[i] *= gate[i];
#endif
}
INLINE void kick(const T *const *c, const V *q, const V *p0, V *f, long first) {
#if RANK
  couple(c + COUPLING, q, f);
#endif
#if FORCED
  for (int k = 0; k < HEADS; ++k) force(c, first + k, q + k * E, p0 + k * E, f + k * E);
#endif
}
static void forward(T *const *d, const T *const *c, const double *sizes, long unit) {
  const long time = sizes[1], units = sizes[2], batch = sizes[0];
  const T h = sizes[3], a = sizes[4];
  const long b = unit / units * L, first = unit % units * HEADS;
  const long valid = batch - b < L ? batch - b : L;
  const long wide = units * N, next = batch * wide, start = b * wide + first * E;
  const long row = (1 + GATES) * wide;
  const long pair = 2 * wide, later = batch * pair;
  const T *f = d[0] + b * row + first * E;
  T *path = d[3] + b * pair + first * E;
  V q[N], p[N], push[N];
  V keep[HEADS * KEEP];
  read(q, d[1] + start, wide, valid);
  read(p, d[2] + start, wide, valid);
  for (int k = 0; k < HEADS; ++k) ready(c + DRIFTING, first + k, q + k * E, keep + k * KEEP);
  for (long t = 0; t < time; ++t) {
    const T *now = f + t * (1 + GATES) * next;
    read(push, now, row, valid);
    contract(now, q, p, a, wide, valid);
    for (int k = 0; k < HEADS && GATES == 2; ++k)
      ready(c + DRIFTING, first + k, q + k * E, keep + k * KEEP);
    kick(c, q, p, push, first);
    for (int i = 0; i < N; ++i) p[i] += h * push[i];
    for (int k = 0; k < HEADS; ++k)
      drift(c + DRIFTING, first + k, q + k * E, p + k * E, h, keep + k * KEEP);
    for (int i = 0; i < N; ++i) {
      q[i] = wrap(q[i]);
      if (CIRCULAR) p[i] = wrap(p[i]);
    }
    write(path + t * later, q, pair, valid);
    write(path + t * later + wide, p, pair, valid);
  }
}
static void backward(T *const *d, const T *const *c, V *const *g, const double *sizes, long unit) {
  const long time = sizes[1], units = sizes[2], batch = sizes[0];
  const T h = sizes[3], a = sizes[4];
  const long b = unit / units * L, first = unit % units * HEADS;
  const long valid = batch - b < L ? batch - b : L;
  const long wide = units * N, next = batch * wide, start = b * wide + first * E;
  const long row = (1 + GATES) * wide, pair = 2 * wide, later = batch * pair;
  const T *path = d[3] + b * pair + first * E, *slopes = d[4] + b * pair + first * E;
  V q[N], p[N], push[N], gq[N], gp[N], slope[N], old_q[N], old_p[N];
  V keep[HEADS * KEEP];
  if (time) read(q, path + (time - 1) * later, pair, valid);
  for (int k = 0; k < HEADS && time; ++k)
    ready(c + DRIFTING, first + k, q + k * E, keep + k * KEEP);
  for (int i = 0; i < N; ++i) gq[i] = gp[i] = V{};
  for (long t = time - 1; t >= 0; --t) {
    read(slope, slopes + t * later, pair, valid);
    for (int i = 0; i < N; ++i) gq[i] += slope[i];
    read(slope, slopes + t * later + wide, pair, valid);
    for (int i = 0; i < N; ++i) gp[i] += slope[i];
    if (valid < L)
      for (int l = valid; l < L; ++l)
        for (int i = 0; i < N; ++i) gq[i][l] = gp[i][l] = 0;
    if (t) {
      read(q, path + (t - 1) * later, pair, valid);
      read(p, path + (t - 1) * later + wide, pair, valid);
    } else {
      read(q, d[1] + start, wide, valid);
      read(p, d[2] + start, wide, valid);
    }
    const long in = b * row + first * E + t * (1 + GATES) * next;
    for (int i = 0; i < N; ++i) old_q[i] = q[i], old_p[i] = p[i];
    contract(d[0] + in, q, p, a, wide, valid);
#if CURVED
    read(push, d[0] + in, row, valid);
    kick(c, q, p, push, first);
    for (int i = 0; i < N; ++i) push[i] = p[i] + h * push[i];
#endif
    for (int k = 0; k < HEADS; ++k)
      drift_back(c + DRIFTING, g + DRIFTING, first + k, q + k * E, push + k * E, gq + k * E,
                 gp + k * E, h, keep + k * KEEP);
    for (int i = 0; i < N; ++i) push[i] = h * gp[i];
    write(d[5] + in, push, row, valid);
#if FORCED
    for (int k = 0; k < HEADS; ++k)
      force_back(c, g, first + k, q + k * E, p + k * E, push + k * E, gq + k * E, gp + k * E);
#endif
#if RANK
    couple_back(c + COUPLING, g + COUPLING, q, push, gq);
#endif
    contract_back(d[0] + in, d[5] + in, old_q, old_p, gq, gp, a, wide, valid);
#if GATES == 2
    for (int k = 0; k < HEADS && t; ++k)
      ready(c + DRIFTING, first + k, old_q + k * E, keep + k * KEEP);
#endif
  }
  write(d[6] + start, gq, wide, valid);
  write(d[7] + start, gp, wide, valid);
}
// all: 8 pointers of data, COUNT of tensors, COUNT of lane-wise slopes for each group of eight
extern "C" void run(void *const *all, const double *sizes, long first, long last) {
  for (long unit = first; unit < last; ++unit) {
    T *const *d = (T *const *)all;
    const T *const *c = (const T *const *)(all + 8);
    if (!sizes[5]) { forward(d, c, sizes, unit); continue; }
    V *g[COUNT + 1];
    const long block = unit / (long)sizes[2];
    for (int k = 0; k < COUNT; ++k) g[k] = (V *)all[8 + COUNT + k] + block * (long)sizes[6 + k];
    backward(d, c, g, sizes, unit);
  }
}
"""

WAVES = r"""
// cos and sin of x RATE: by quarter turns, then their series, to single precision
extern "C" void run(void *const *all, const double *sizes, long first, long last) {
  const T *x = (const T *)all[0];
  T *cosine = (T *)all[1], *sine = (T *)all[2];
  const T rate = sizes[0];
  for (long i = first; i < last; i += L) {
    const long valid = last - i < L ? last - i : L;
    V y{};
    if (valid == L) __builtin_memcpy(&y, x + i, sizeof y);
    else for (long l = 0; l < valid; ++l) y[l] = x[i + l];
    y *= rate;  // quarter turns
    V up = sel(y < T(0), splat(T(-0.5)), splat(T(0.5)));
    M k = __builtin_convertvector(y + up, M);
    V z = (y - __builtin_convertvector(k, V)) * T(1.5707963267948966), w = z * z;
    V s = T(2.7557319e-6) * w - T(1.9841270e-4);
    s = s * w + T(8.3333333e-3);
    s = s * w - T(1.6666667e-1);
    s = z + z * w * s;
    V c = T(-2.7557319e-7) * w + T(2.4801587e-5);
    c = c * w - T(1.3888889e-3);
    c = c * w + T(4.1666667e-2);
    c = T(1) - T(0.5) * w + w * w * c;
    M odd = (k & 1) != 0;
    V a = sel(odd, s, c), b = sel(odd, c, s);
    a = sel(((k + 1) & 2) != 0, -a, a);
    b = sel((k & 2) != 0, -b, b);
    if (valid == L) {
      __builtin_memcpy(cosine + i, &a, sizeof a);
      __builtin_memcpy(sine + i, &b, sizeof b);
    } else
      for (long l = 0; l < valid; ++l) cosine[i + l] = a[l], sine[i + l] = b[l];
  }
}
"""
