r"""Spectral attention: a memory in the eigenfunctions of a metric that the tokens deform.

.. math:: y_t = \frac{\sum_{j\le t} F(q_t, \mu_j)\,V_j}{\sum_{j\le t} F(q_t, \mu_j)}, \qquad
          F = \varphi(x)^T f(M^{-1}A)\,M^{-1}\varphi(y)

on a torus or sphere with functions :math:`\varphi`, where A and M are stiffness and mass of the
metric :math:`g = I + \langle\alpha_i\theta_i v_iv_i^T\rangle` (Galerkin, to first order in the
bumps). The metric is the *mean* of the tokens' bumps: of a sum, A is indefinite after a few tokens
at one place. The state is K moments of the values and the two K x K matrices.

What the literature claims of such a memory, and what holds: all K functions unfiltered (f = 1) are
linear attention with the features :math:`\varphi` and the preconditioner :math:`M^{-1}`, the
eigenfunctions drop out; K d numbers cannot hold more than K independent values of d numbers, so
that exact recall needs :math:`K \ge N`; a projection on K functions converges at the rate
:math:`\lambda_K^{-s/2}` of :math:`H^s`, so :math:`\lambda_K^{-1}` only in :math:`H^2`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from darboux.learners import _spectral_basis as parts, _spectral_state as memory, base as doors
from darboux.learners._spectral_basis import Bumps
from darboux.learners._spectral_state import PerturbedMemory, Relaxation, SpectralMemory
from darboux.learners.attention import check_heads, join_heads, split_heads
from darboux.manifolds import FlatTorus, Manifold
from darboux.manifolds.spectral import Operator

State = SpectralMemory | PerturbedMemory
MODES = ("exact", "perturbative")
TOGETHER = 64  # chunks whose pencils are solved in one batch: it bounds the memory


class SpectralAttention(nn.Module):
    r"""Attention through the heat kernel of a metric on ``base``, with a state of constant size.

    ``modes`` is K: :math:`(2N + 1)^d` on a ``FlatTorus`` of d dimensions (of three unless told),
    :math:`(L + 1)^2` on ``Sphere(2)``. Each of ``heads`` has a base and a metric of its own.

    - ``mode="exact"`` solves the pencil at the end of every ``chunk`` tokens, counted from the
      first: the metric of a chunk is that of all tokens before it. ``"perturbative"`` reads every
      token in the metric up to itself, O(K²): the kernel to first order from the last solve, by
      divided differences, which degenerate spectra do not disturb. At the ends of chunks the first
      order is measured against the kernel (``drift``) and above ``tolerance`` all is solved anew;
      the error is of the order of its square. Solves are expansion points without gradient.
    - ``filter``: ``"heat"``, :math:`e^{-\tau\lambda}`, or ``"band"``,
      :math:`e^{-a\lambda} - e^{-(a + b)\lambda}`, their times learned for each head; ``None`` is
      f = 1; in exact mode any function of eigenvalues ``(..., heads, K)``, elementwise.
    - ``normalize`` divides by the sum of the kernel, where this is above 1 % of the mean of its
      diagonal; by default for "heat", whose kernel is positive up to truncation. Others change
      sign and are not to be divided by.
    - ``strength`` below 2 bounds the deformation: A is at least 1 - strength/2 times that of the
      base whatever the tokens. Zero freezes the base: translation-invariant kernels, no solves.
      ``inertia`` is the weight of the base in the mean, in tokens.
    - ``nodes``: bumps as Gauss-Hermite sums of that many points a dimension; ``None``, the closed
      form, is the default of a torus in exact mode; otherwise 1, a point mass, the only choice on
      the sphere.
    - ``rotary`` moves tokens with time along the axes of a torus, as rotary positions do.
    - ``relaxation``: see :class:`Relaxation`.

    Gradients are exact at degenerate spectra. Raises ``ValueError`` or ``TypeError`` for sizes that
    do not fit and for the state of another layer.

    >>> layer = SpectralAttention(8, 27, heads=2)
    >>> y, state = layer(torch.zeros(1, 70, 8))
    >>> y.shape, state.moments.shape
    (torch.Size([1, 70, 8]), torch.Size([1, 2, 27, 5]))
    """

    times: nn.Parameter | None
    log_rate: nn.Parameter | None
    rates: Tensor

    def __init__(
        self,
        width: int,
        modes: int,
        base: Manifold | None = None,
        *,
        heads: int = 1,
        mode: str = "exact",
        filter: str | Callable[[Tensor], Tensor] | None = "heat",
        chunk: int = 64,
        normalize: bool | None = None,
        strength: float = 1.0,
        inertia: float = 1.0,
        nodes: int | None = None,
        tolerance: float = 0.1,
        rotary: bool = False,
        relaxation: Relaxation | None = None,
        bias: bool = False,
    ):
        super().__init__()
        where = "SpectralAttention"
        check_heads(where, width, heads, False)
        self.plan = parts.plan(where, FlatTorus(3) if base is None else base, modes)
        torus = self.plan.lattice is not None
        if mode not in MODES:
            raise ValueError(f"{where}: mode is {mode!r}, expected one of {', '.join(MODES)}")
        if isinstance(filter, str) and filter not in parts.FILTERS:
            raise ValueError(
                f"{where}: filter is {filter!r}, expected one of {', '.join(parts.FILTERS)}, None "
                "or a function of eigenvalues"
            )
        exact = mode == "exact"
        if not exact and strength == 0:
            raise ValueError(f"{where}: strength is 0 in perturbative mode, expected exact mode")
        if not exact and not isinstance(filter, str):
            raise ValueError(
                f"{where}: filter is {filter!r} in perturbative mode, expected one of "
                f"{', '.join(parts.FILTERS)}"
            )
        if normalize and filter != "heat":
            raise ValueError(
                f"{where}: normalize=True, expected the heat filter, which is positive"
            )
        for name, value in (("chunk", chunk), ("nodes", 1 if nodes is None else nodes)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{where}: {name} is {value}, expected a positive integer")
        if not 0 <= strength < 2:
            raise ValueError(f"{where}: strength is {strength}, expected 0 <= strength < 2")
        for name, value in (("inertia", inertia), ("tolerance", tolerance)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{where}: {name} is {value}, expected a positive number")
        if not torus and (nodes or 1) > 1:
            raise ValueError(f"{where}: nodes is {nodes} on the sphere, expected 1")
        if rotary and not torus:
            raise ValueError(f"{where}: rotary=True on the sphere, expected a torus")
        if relaxation is not None and not (exact and strength > 0 and _rectangular(self.plan)):
            raise ValueError(
                f"{where}: a relaxation in {mode} mode with strength {strength}, expected exact "
                "mode, strength > 0 and a torus with a rectangular lattice"
            )
        self.width, self.modes, self.heads, self.mode = width, modes, heads, mode
        self.filter, self.chunk, self.strength = filter, chunk, float(strength)
        self.normalize = filter == "heat" if normalize is None else normalize
        self.inertia, self.tolerance = float(inertia), float(tolerance)
        self.nodes = nodes if torus and exact else nodes or 1
        self.relaxation = relaxation
        numbers = self.plan.coordinates
        self.keys = nn.Linear(width, heads * numbers, bias=bias)
        self.queries = nn.Linear(width, heads * numbers, bias=bias)
        self.values = nn.Linear(width, width, bias=bias)
        self.bumps = nn.Linear(width, heads * (numbers + 1)) if strength else None
        self.out = nn.Linear(width, width, bias=bias)
        with torch.no_grad():
            # tokens of unit variance spread over the whole base, and a token asks where it put
            self.keys.weight.normal_(0, (0.5 if torus else 1.0) / math.sqrt(width))
            self.queries.weight.copy_(self.keys.weight)
            if bias:
                self.queries.bias.copy_(self.keys.bias)
        basis = parts.basis_of(self.plan, torch.float64, torch.device("cpu"))
        top = float(parts.flat_levels(basis)[-1 if not torus else 0 :].max())
        times = torch.full((2 if filter == "band" else 1, heads), math.log(3 / top))
        self.times = nn.Parameter(times) if isinstance(filter, str) else None
        # as wide as the length that K functions resolve
        resolved = (parts.volume(basis) / modes) ** (1 / self.plan.dim)
        resolved = resolved if self.nodes is None else resolved / 2  # a sum of points
        sigma = torch.full((heads,), math.log(resolved))
        self.log_sigma = nn.Parameter(sigma) if strength and self.nodes != 1 else None
        self.log_rate = None
        if relaxation is not None:
            self.log_rate = nn.Parameter(torch.full((heads,), math.log(relaxation.rate)))
        rates = torch.zeros(heads, numbers)
        if rotary:  # turns a token, geometric from 1 / 2 pi over heads and axes
            share = torch.arange(heads * numbers) / (heads * numbers)
            rates = (1e4**-share / (2 * math.pi)).reshape(numbers, heads).T.contiguous()
        self.register_buffer("rates", rates)

    # -- places and the setting ------------------------------------------------------------

    def places(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """Return the points ``(batch, heads, time, D)`` of the base where tokens ask and store."""
        found = []
        for u in (self.queries(x), self.keys(x)):
            u = split_heads(u, self.heads)
            if self.plan.lattice is None:
                size = u.square().sum(-1, keepdim=True)
                pole = torch.tensor([0.0, 0.0, 1.0]).to(u)
                u = torch.where(size > 0, u, pole) * torch.where(size > 0, size, 1.0).rsqrt()
            else:
                t = torch.arange(start, start + x.shape[1], device=x.device, dtype=torch.float64)
                turns = (t[:, None] * self.rates.double()[:, None]).fmod(1.0)
                u = (u + turns.to(u)) @ torch.tensor(
                    self.plan.lattice, dtype=u.dtype, device=u.device
                )
            found.append(u)
        return found[0], found[1]

    def _bumps(self, x: Tensor, centers: Tensor) -> Bumps | None:
        if self.bumps is None:
            return None
        out = split_heads(self.bumps(x), self.heads)
        v, logit = out[..., :-1], out[..., -1]
        if self.plan.lattice is None:  # tangent; zero where it cannot be
            v = v - (v * centers).sum(-1, keepdim=True) * centers
        v = v * (v.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
        sigma = v.new_ones(self.heads) if self.log_sigma is None else self.log_sigma.exp()
        most = self.strength * parts.largest_mass(self.basis(x), sigma, self.nodes)
        return Bumps(centers, v, most[..., None] * torch.sigmoid(logit), sigma)

    def basis(self, like: Tensor) -> Any:
        """Return the functions of the base."""
        return parts.basis_of(self.plan, like.dtype, like.device)

    def response(self, values: Tensor) -> Tensor:
        """Return the filter at eigenvalues ``(..., heads, K)``."""
        if self.times is not None:
            return parts.respond(str(self.filter), self.times.exp(), values)
        return torch.ones_like(values) if self.filter is None else self.filter(values)  # pyright: ignore[reportCallIssue]

    def setting(self, like: Tensor) -> memory.Setting:
        """Return all that reading a state needs."""
        basis, times = self.basis(like), self.times
        return memory.Setting(
            basis,
            parts.flat_levels(basis),
            self.response,
            None
            if times is None
            else lambda v: parts.differences(str(self.filter), times.exp(), v),
            self.nodes,
            self.inertia,
            self.tolerance,
            self.relaxation,
            None if self.log_rate is None else self.log_rate.exp(),
            self.bumps is None,
        )

    def operator(self, state: State) -> Operator:
        """Return the pencil of each head, ``(batch, heads, K, K)``, after the last token."""
        setting = self.setting(state.moments)
        if isinstance(state, SpectralMemory):
            return Operator(*memory.pencil(setting, state), setting.basis)
        weight = setting.weight(int(state.position[0]))
        inverse = torch.linalg.inv(state.frame)
        stiffness, mass = (
            inverse.mT @ (flat + weight * change) @ inverse
            for flat, change in (
                (state.flat_stiffness, state.stiffness),
                (state.flat_mass, state.mass),
            )
        )
        return Operator(stiffness, mass, setting.basis)

    # -- forward ---------------------------------------------------------------------------

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return ``(batch, time, width)`` and the state after it."""
        where = "SpectralAttention"
        doors.check_input(where, x, self.width)
        doors.check_dtype(where, x, self.out.weight)
        exact, e = self.mode == "exact", self.width // self.heads
        values = split_heads(self.values(x), self.heads)
        setting = self.setting(values)
        if state is None:
            begin = memory.start_exact if exact else memory.start_perturbed
            state = begin(setting, len(x), self.heads, e)
        else:
            self._check_state(where, state, values)
        start = int(state.position[0])
        q, k = self.places(x, start)
        bumps = self._bumps(x, k)
        q, k = (setting.basis.evaluate(u) for u in (q, k))
        v = torch.cat([values, torch.ones_like(values[..., :1])], -1)
        read: Any = memory.read_exact if exact else memory.read_perturbed
        turn: Any = memory.turn_exact if exact else memory.turn_perturbed
        chunks = exact and self.relaxation is None  # whose metrics are sums, all known at once
        pieces, i, c = [], 0, self.chunk
        while i < x.shape[1]:
            done, left = (start + i) % c, x.shape[1] - i
            whole = chunks and done == 0 and left >= c
            j = i + (min(left // c, TOGETHER) * c if whole else min(c - done, left))
            part = None if bumps is None else bumps.part(i, j)
            cut = (q[:, :, i:j], k[:, :, i:j], v[:, :, i:j], part)
            if whole and isinstance(state, SpectralMemory):
                y, state = memory.read_chunks(setting, state, *cut, c)
            else:
                if part is not None and done == 0 and start + i > 0:
                    state = turn(setting, state, start + i, c)
                y, state = read(setting, state, *cut)
            pieces.append(y)
            i = j
        y = torch.cat(pieces, 2)
        y, total = y[..., :-1], y[..., -1:]
        if self.normalize:
            at_home = self.response(setting.levels.expand(self.heads, -1)).sum(-1)
            least = 0.01 * at_home / parts.volume(setting.basis)
            y = y / torch.maximum(total, least[:, None, None])
        assert state is not None
        return self.out(join_heads(y)), state

    def _check_state(self, where: str, state: State, x: Tensor) -> None:
        size, heads, e = self.modes, self.heads, self.width // self.heads
        square = (heads, size, size)
        if self.mode == "exact":
            kind: Any = SpectralMemory
            nodes, d = (0, 0) if self.relaxation is None else self.basis(x).points.shape
            grid = (heads, nodes, d, d)
            square = square if self.strength else (heads, 0, 0)
            shapes = [(), (heads, size, e + 1), *[square] * 3, grid, grid]
        else:
            kind = PerturbedMemory
            shapes = [(), (heads, size, e + 1), *[square] * 5, (heads, size), (heads,), (heads,)]
        doors.check_state(where, state, kind, *shapes, x=x)
        if state.moments.dtype != x.dtype:
            raise TypeError(
                f"{where}: the state has dtype {state.moments.dtype}, expected {x.dtype} like x"
            )
        if bool((state.position != state.position[0]).any()):
            raise ValueError(
                f"{where}: position of the state is {state.position.tolist()}, expected one number "
                "for the whole batch"
            )


@functools.lru_cache(maxsize=32)
def _rectangular(plan: parts.Plan) -> bool:
    if plan.lattice is None:
        return False
    rows = torch.tensor(plan.lattice, dtype=torch.float64)
    return bool((rows == torch.diag(rows.diagonal())).all() and (rows.diagonal() > 0).all())
