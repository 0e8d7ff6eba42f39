r"""Symplectic attention: heads that are points moving on manifolds, pushed by tokens.

.. math:: (q, p)_t = \Phi_{f_t}(q, p)_{t-1}, \qquad f_t = W x_t, \qquad
          y_t = O\,\phi((q, p)_t)

After Stuertz, "Symplectic Attention" (2026), with its mathematics mended: that text's rule
:math:`v \mathrel{+}= h(F - \Gamma(x, v))` is neither symplectic nor volume preserving
(:math:`\det = \det(I - h\,\partial\Gamma/\partial v)`); the maps here are, each as its
:meth:`~SymplecticAttention.conserves` declares and :func:`audit` measures. What is not promised:
a volume-preserving map forgets no *state*, but its *inputs* it does. On a compact space every
state has one predecessor for each token, and in finite precision a state holds finitely many bits.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from darboux.learners import _coordinate_kernel, _motion_kernel, base
from darboux.learners._motion_kernel import kernel_of, waves
from darboux.learners.heads import (
    KINDS,
    Conserves,
    Motion,
    Rotation,
    rotation_matrix,
    snap,
    unit,
)
from darboux.learners.recurrence import ENGINES, Cell, State, choose, run

MANIFOLDS = (*KINDS, "rotation")
COUPLINGS = (None, "gradient", "free")
GATES = (None, "momenta", "phase")

_PIECE = 16384  # tokens whose features the caches hold


class Phase(NamedTuple):
    """Positions ``q`` and momenta ``p``, ``(batch, heads, dim)``; quaternions have no ``p``."""

    q: Tensor
    p: Tensor


class SymplecticAttention(nn.Module):
    r"""Recurrent heads on a manifold, with a state of constant size.

    ======================= =====================================================================
    ``"torus"``             flat circles, in turns: ``p += f``, ``q += p``; without friction ``p``
                            is an angle too, and the map a shear of the torus
    ``"oscillator"``        :math:`p^2/2 + A q^2/2` for each coordinate (LinOSS-IMEX)
    ``"pendulum"``          :math:`p^2/2 - k\cos q` for each coordinate (the standard map)
    ``"potential"``         :math:`|p|^2/2 + \sum\log\cosh(Kq + b)`: geodesics of a Jacobi metric
    ``"revolution"``        tori of revolution, pairs of coordinates
    ``"metric"``            :math:`\sum a_i p_i^2/2`, learned :math:`a_i > 0`, those of each half
                            of the coordinates depending on the other half
    ``"rotation"``          unit quaternions, which tokens turn
    ``"low_rank"``          the text's ``(x, v)`` form, :math:`v \mathrel{-}= h W\varphi(U^T v)`,
                            with :math:`U^T W = 0`: volume preserving, not symplectic
    ``"low_rank_literal"``  the same with free ``W``: neither
    ======================= =====================================================================

    ``coupling`` adds a force on all heads that depends on the positions of all: ``"gradient"`` is
    that of a potential, ``"free"`` the text's projection, which keeps volumes only. ``friction`` is
    :math:`\mu`: momenta shrink by exactly :math:`e^{-\mu h}` a token, ``h`` being ``step``, and the
    map is conformally symplectic. With ``gate`` the tokens choose what is kept of each coordinate's
    momentum (``"momenta"``), or of its position and its momentum (``"phase"``, not for angles):
    :math:`J^T\Omega J` is then :math:`\Omega` with each plane times its gates. A head has ``dim``
    coordinates: ``width / heads``, half of that where they are angles, four numbers for a rotation.
    ``size`` is the rank of potentials and of the coupling and the width of the networks. ``engine``
    is one of those in :mod:`darboux.learners.recurrence`. On the flat torus ``grid`` snaps forces
    to multiples of ``1/grid`` turn while ``snapped`` is true: sums on that grid are exact at any
    length.

    The state is a :class:`Phase`. Raises ``ValueError`` for what does not fit together.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        dim: int | None = None,
        manifold: str = "potential",
        coupling: str | None = None,
        friction: float = 0.0,
        gate: str | None = None,
        step: float | None = None,
        size: int | None = None,
        grid: int | None = None,
        engine: str = "auto",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        where = "SymplecticAttention"
        for name, value, known in (
            ("manifold", manifold, MANIFOLDS),
            ("coupling", coupling, COUPLINGS),
            ("gate", gate, GATES),
            ("engine", engine, ENGINES),
        ):
            if value not in known:
                raise ValueError(
                    f"{where}: {name} is {value!r}, expected one of {', '.join(map(str, known))}"
                )
        turning = manifold == "rotation"
        angles = 2 if not turning and KINDS[manifold].period else 1
        if width < 1 or heads < 1 or (dim is None and not turning and width % (angles * heads)):
            raise ValueError(
                f"{where}: width {width} and heads {heads}, expected the first to be a positive "
                f"multiple of {'twice ' if angles == 2 else ''}the second, or dim"
            )
        # an angle is read by its cosine and its sine
        dim = 4 if turning else width // (angles * heads) if dim is None else dim
        if turning and (coupling or friction or gate or dim != 4):
            raise ValueError(
                f"{where}: rotations have no coupling, no friction, no gate, and a dim of 4"
            )
        if gate == "phase" and angles == 2:
            raise ValueError(
                f"{where}: gate is 'phase', expected 'momenta' where positions are "
                f"angles, as on {manifold!r}"
            )
        if not turning and (dim < 1 or (KINDS[manifold].even and dim % 2)):
            raise ValueError(f"{where}: dim is {dim}, expected a positive, even number")
        flat = manifold == "torus"
        if step is None:
            step = 1.0 if flat or turning else 0.5
        if not (math.isfinite(step) and step > 0 and (step == 1 or not flat)):
            raise ValueError(
                f"{where}: step is {step}, expected {'1 on the torus' if flat else 'positive'}"
            )
        if not 0 <= friction < math.inf:
            raise ValueError(f"{where}: friction is {friction}, expected at least 0")
        if grid is not None and (not flat or friction or coupling or gate or grid < 1):
            raise ValueError(
                f"{where}: grid is {grid}, expected None, or a positive number on the torus "
                "without friction, coupling or gate"
            )
        self.width, self.heads, self.dim, self.manifold = width, heads, dim, manifold
        self.coupling, self.engine, self.grid, self.snapped = coupling, engine, grid, False
        self.friction, self.step, self.gate = float(friction), float(step), gate
        n, bound = heads * dim, 1 / math.sqrt(width)
        self.drive = nn.Linear(width, n, bias=False)
        nn.init.uniform_(self.drive.weight, -bound, bound, generator=generator)
        if gate is not None:
            self.keep = nn.Linear(width, GATES.index(gate) * n)
            nn.init.uniform_(self.keep.weight, -bound, bound, generator=generator)
            nn.init.zeros_(self.keep.bias)
        self.geometry = nn.ParameterDict()
        if not turning:
            kind = KINDS[manifold]
            size = min(16, max(1, dim // 2) if kind.velocity else 16) if size is None else size
            for name, x in kind.make(heads, dim, size, generator=generator).items():
                self.geometry[name] = nn.Parameter(x.to(self.drive.weight))
        self.field = nn.ParameterDict()
        if coupling is not None:
            size = 16 if size is None else size
            wide = n * (2 if KINDS[manifold].period else 1)
            shapes = {"k": (size, wide), "b": (size,), "w": (n, size)}
            for name, shape in shapes.items():
                if name == "w" and coupling == "gradient":
                    continue
                x = torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
                self.field[name] = nn.Parameter(x.to(self.drive.weight))
        self.out = nn.Linear(self._features(), width)

    def _features(self) -> int:
        if self.manifold == "rotation":
            return 9 * self.heads
        n = self.heads * self.dim
        return n * (2 + (self.motion().circular or 0) + bool(KINDS[self.manifold].period))

    def motion(self) -> Motion:
        """Return the map of one token, on phase points and tensors."""
        decay = math.exp(-self.friction * self.step)
        grid = self.grid if self.snapped else None
        coupled, gates = self.coupling is not None, GATES.index(self.gate)
        return Motion(self.manifold, self.step, decay, coupled, grid, gates)

    def cell(self) -> Cell:
        """Return the cell that the engines move, with the parameters of now."""
        if self.manifold == "rotation":
            turn = Rotation()
            return Cell(step=turn, inverse=turn.inverse, scan=turn.scan)
        motion = self.motion()
        tensors = KINDS[self.manifold].tensors(self.geometry, self.step)
        coupling = tuple(self.field[name] for name in ("k", "b", "w") if name in self.field)
        linear = self.manifold in ("torus", "oscillator") and not coupling
        return Cell(
            step=motion,
            parameters=(*tensors, *coupling),
            # gates may forget at once all that an inverse would have to find again
            inverse=motion.inverse if motion.kind.volume and not motion.gates else None,
            wrap=motion.wrap if motion.kind.period is not None else None,
            scan=motion.scan if linear else None,
            kernel=kernel_of(motion),
            blocks=motion.kind.blocks and not coupling,
        )

    def conserves(self) -> Conserves:
        """Return what one token's map keeps."""
        if self.manifold == "rotation":
            return Conserves(False, True, 1.0)
        return self.motion().conserves(self.coupling == "free")

    def start(self, batch: int, like: Tensor) -> Phase:
        """Return the state before the first token: at rest at the origin, or not turned."""
        q = like.new_zeros(batch, self.heads, self.dim)
        if self.manifold == "rotation":
            q[..., 0] = 1
            return Phase(q, q[..., :0])
        return Phase(q, torch.zeros_like(q))

    def forces(self, x: Tensor) -> Tensor:
        """Return the inputs of the motion, from tokens ``(batch, time, width)``.

        Forces ``(batch, time, heads, dim)``, or turns; with gates ``(batch, time, parts, heads,
        dim)``, the forces and what is kept of momenta and positions.
        """
        # times outside, as the kernel of coupled coordinates wants them
        outside = not self._alone()
        x = x.transpose(0, 1).contiguous() if outside else x
        f = self.drive(x)
        if self.gate is not None:
            f = torch.cat([f, self.keep(x).sigmoid()], -1)
        f = (f.transpose(0, 1) if outside else f).to(self.drive.weight.dtype)
        parts = (1 + GATES.index(self.gate),) if self.gate else ()
        f = f.unflatten(-1, (*parts, self.heads, self.dim))
        if self.manifold == "rotation":
            one = torch.zeros_like(f)
            one[..., 0] = 1
            return unit(f + one)
        return snap(f, self.grid) if self.snapped and self.grid is not None else f

    def _alone(self) -> bool:
        return self.manifold != "rotation" and _coordinate_kernel.fits(self.motion())

    def orbit(self, x: Tensor, state: Phase | None = None) -> tuple[Phase, Phase]:
        """Return the phase points after each token ``(batch, time, heads, dim)``, and the last."""
        at = self._start(x, state)
        path, last = run(self.cell(), self.forces(x), at, self.engine)
        return Phase(*path), Phase(*last)

    def _start(self, x: Tensor, state: Phase | None) -> State:
        where = "SymplecticAttention"
        base.check_input(where, x, self.width)
        base.check_dtype(where, x, self.drive.weight)
        turning = self.manifold == "rotation"
        if state is not None:
            momenta = 0 if turning else self.dim
            shapes = (self.heads, self.dim), (self.heads, momenta)
            base.check_state(where, state, Phase, *shapes, x=x)
            if state.q.dtype != self.drive.weight.dtype:
                raise TypeError(
                    f"{where}: the state has dtype {state.q.dtype}, expected "
                    f"{self.drive.weight.dtype}, that of the parameters"
                )
        else:
            state = self.start(x.shape[0], self.drive.weight)
        return (unit(state.q), state.p) if turning else tuple(state)

    def read(self, path: Phase) -> list[Tensor]:
        """Return the features of phase points ``(..., heads, dim)``, in rows that ``out`` takes."""
        q, p = path
        if self.manifold == "rotation":
            return [rotation_matrix(unit(q)).flatten(-3)]
        period, circular = KINDS[self.manifold].period, self.motion().circular
        q, p = q.flatten(-2), p.flatten(-2)
        if period is None:
            return [q, p]
        rows = [*_waves(q, period)]
        return [*rows, *_waves(p, period)] if circular else [*rows, p]

    def forward(self, x: Tensor, state: Phase | None = None) -> tuple[Tensor, Phase]:
        """Return ``(batch, time, width)`` and the state after it.

        Without gradients the native kernel takes long sequences in pieces, so that what is held
        besides ``x`` and ``y`` does not grow.
        """
        at, cell = self._start(x, state), self.cell()
        kernel = self.engine == "kernel" or (
            self.engine == "auto" and choose(cell, x.to(self.drive.weight.dtype)) == "kernel"
        )
        plain = not (torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type))
        if kernel and plain and self._alone() and self.gate is None:
            maps = self.drive.weight, self.out.weight, self.out.bias
            y, at = _coordinate_kernel.layer(self.motion(), cell.parameters, x, at, *maps)
            return y, Phase(*at)
        # shorter pieces would not be the kernel's
        count = min(x.shape[0] * x.shape[1] // _PIECE, x.shape[1] // 128)
        if not (kernel and plain and count > 1):
            y, at = self._one(cell, x, at, kernel)
            return y, Phase(*at)
        y, begin = x.new_empty(x.shape), 0
        for piece in x.tensor_split(count, 1):
            y[:, begin : begin + piece.shape[1]], at = self._one(cell, piece, at, True)
            begin += piece.shape[1]
        return y, Phase(*at)

    def _one(self, cell: Cell, x: Tensor, at: State, kernel: bool) -> tuple[Tensor, State]:
        f = self.forces(x)
        if kernel and self._alone():
            features, last = _coordinate_kernel.features(self.motion(), cell.parameters, f, at)
            return self.out(features), last
        if kernel and KINDS[self.manifold].period is None:
            rows = _motion_kernel.features(self.motion(), cell.parameters, f.transpose(0, 1), at)
            q, p = rows[-1].unflatten(-1, (2, self.heads, self.dim)).unbind(1)
            return self.out(rows).transpose(0, 1), (q.clone(), p.clone())
        path, last = run(cell, f, at, "kernel" if kernel else self.engine)
        rows = self.read(Phase(*(part.transpose(0, 1) for part in path)))
        # out(cat(rows)) without the copy
        weights = self.out.weight.split([row.shape[-1] for row in rows], -1)
        y = torch.mm(rows[0].flatten(0, 1), weights[0].mT).add_(self.out.bias)
        for row, weight in zip(rows[1:], weights[1:], strict=True):
            y = torch.addmm(y, row.flatten(0, 1), weight.mT)
        return y.unflatten(0, rows[0].shape[:2]).transpose(0, 1), last

    def extra_repr(self) -> str:
        return (
            f"{self.width}, {self.heads}, dim={self.dim}, manifold={self.manifold!r}, "
            f"coupling={self.coupling!r}, friction={self.friction:g}, gate={self.gate!r}, "
            f"step={self.step:g}"
        )


def _waves(x: Tensor, period: float) -> tuple[Tensor, Tensor]:
    single = x.dtype == torch.float32
    if (
        single
        and choose(Cell(step=Rotation(), kernel=lambda *_: ()), x.transpose(0, 1)) == "kernel"
    ):
        return waves(x, period)
    angle = 2 * math.pi / period * x
    return angle.cos(), angle.sin()


class Audit(NamedTuple):
    r"""What :func:`audit` measured, the worst of all states.

    ``symplectic`` is :math:`\max|J^T\Omega J - c\,\Omega|` (NaN where there are no momenta),
    ``volume`` :math:`|\det J/c^n - 1|`, ``factor`` the measured :math:`c`, ``det`` that of the
    state where it is farthest off, and ``declared`` what the layer says of itself. With gates
    :math:`\Omega` has the product of its gates in each plane, and :math:`c^n` that of them all.
    """

    symplectic: float
    volume: float
    factor: float
    det: float
    declared: Conserves

    def holds(self, tolerance: float) -> bool:
        """Say whether everything declared is there to the ``tolerance``."""
        kept = self.symplectic <= tolerance or not self.declared.symplectic
        return kept and (self.volume <= tolerance or not self.declared.volume)


def audit(
    layer: SymplecticAttention,
    x: Tensor | None = None,
    *,
    states: int = 4,
    generator: torch.Generator | None = None,
) -> Audit:
    r"""Measure what one token's map keeps, by its exact Jacobian in ``(q, p)``.

    At the last states after the tokens ``x (batch, time, width)``, under the last token's force,
    or at random ``states`` under random forces. The Jacobian is that of the layer as it is, in its
    own precision; only products and determinants of it are in float64.
    """
    weight = layer.drive.weight
    h, d = layer.heads, layer.dim
    with torch.no_grad():
        if x is None:
            gates = GATES.index(layer.gate)
            shape = (states, 3 + gates, h, d)
            x = torch.randn(shape, generator=generator, device=weight.device).to(weight)
            f, q, p = x[:, 0], x[:, 1], x[:, 2]
            if gates:
                f = torch.cat([x[:, :1], x[:, 3:].sigmoid()], 1)
            if layer.manifold == "rotation":
                f, q, p = unit(f), unit(q), q[..., :0]
        else:
            f, (q, p) = layer.forces(x)[:, -1], layer.orbit(x)[1]
        cell = layer.cell()
        n = h * d

        def step(z: Tensor, f: Tensor) -> Tensor:
            state = (z[:n].unflatten(-1, (h, d)), z[n:].unflatten(-1, (h, p.shape[-1])))
            return torch.cat([part.flatten() for part in cell.step(cell.parameters, f, state)])

        z = torch.cat([q.flatten(1), p.flatten(1)], -1)
        j = torch.func.vmap(torch.func.jacfwd(step))(z, f).double()
    declared = layer.conserves()
    # of each plane
    kept = f[:, 1:].double().prod(1).flatten(1) if layer.gate else j.new_ones(len(j), n)
    if p.shape[-1] == 0:
        defect = factor = float("nan")
    else:
        upper = j.new_zeros(len(j), 2 * n, 2 * n)
        upper[:, :n, n:] = kept.diag_embed()
        wanted, one = upper - upper.mT, upper.sign() - upper.sign().mT
        carried = j.mT @ one @ j
        factors = (carried * wanted).sum((-2, -1)) / wanted.square().sum((-2, -1))
        factor = float(factors[(factors - declared.factor).abs().argmax()])
        defect = float((carried - declared.factor * wanted).abs().max())
    values = torch.linalg.eigvals(j)
    size = values.abs().log().sum(-1)
    sign = (values / values.abs()).prod(-1).real
    det = sign * size.exp()
    expected = kept.log().sum(-1) + n * math.log(declared.factor) if p.shape[-1] else 0
    ratio = sign * (size - expected).exp()
    worst = (ratio - 1).abs().argmax()
    return Audit(defect, float((ratio - 1).abs()[worst]), factor, float(det[worst]), declared)
