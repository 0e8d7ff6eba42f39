"""What the pictures are made from: tensors and manifolds, checked and turned into float64."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darboux._checks import check_finite, check_last, check_tensor
from darboux._plot_scene import INK, load_pyvista

# Okabe & Ito (2008), safe for colour-blind readers; black first, yellow (weak on white) last.
PALETTE = (INK, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#0072B2", "#F0E442")

Range = tuple[float, float]


def need(ok: Any, message: str) -> None:
    if not ok:
        raise ValueError(message)


def to_numbers(where: str, name: str, x: Any, size: int | None = None) -> Tensor:
    """Return ``x`` as a detached finite float64 tensor on the CPU, of shape ``(..., size)``."""
    x = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
    check_tensor(where, name, x) if size is None else check_last(where, name, x, size)
    check_finite(where, **{name: x})
    return x.detach().to("cpu", torch.float64)


def need_method(where: str, manifold: Any, method: str) -> None:
    if not callable(getattr(manifold, method, None)):
        raise TypeError(
            f"{where}: manifold is a {type(manifold).__name__} without {method}(x), "
            "expected a two-dimensional manifold that has it"
        )
    dim = getattr(manifold, "dim", 2)
    need(dim == 2, f"{where}: manifold has dimension {dim}, expected 2")


def match(manifold: Any, x: Tensor) -> Tensor:
    """Move ``x`` to the dtype and device of the manifold's parameters and buffers, if any."""
    module = isinstance(manifold, torch.nn.Module)
    tensors = [*manifold.parameters(), *manifold.buffers()] if module else []
    return next((x.to(t) for t in tensors if t.is_floating_point()), x)


def read_domain(where: str, manifold: Any, u: Any = None, v: Any = None) -> tuple[Range, Range]:
    bounds = getattr(manifold, "bounds", None)
    bounds = (None, None) if bounds is None else bounds
    sides: Any = (bounds[0] if u is None else u, bounds[1] if v is None else v)
    need(None not in sides, f"{where}: the manifold has no bounds, so give u and v as (lo, hi)")
    (a, b), (c, d) = (tuple(float(s) for s in side) for side in sides)
    ok = -math.inf < a < b < math.inf and -math.inf < c < d < math.inf
    need(ok, f"{where}: the domain is ({a}, {b}) x ({c}, {d}), expected finite lo < hi")
    return (a, b), (c, d)


def rectangle(domain: tuple[Range, Range], resolution: tuple[int, int]) -> Tensor:
    """Return the points of a rectangle, ``(nv, nu, 2)``: u runs fastest, as VTK wants it."""
    u = torch.linspace(*domain[0], resolution[0], dtype=torch.float64)
    v = torch.linspace(*domain[1], resolution[1], dtype=torch.float64)
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), -1)


def push_forward(where: str, manifold: Any, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the embedded point and the pushforward of ``v``, each ``(..., 3)``."""
    at, along = match(manifold, x), match(manifold, v)
    point, vector = torch.func.jvp(manifold.embedding, (at,), (along,))[:2]
    name = "manifold.embedding(x)"
    return to_numbers(where, name, point, 3), to_numbers(where, f"derivative of {name}", vector, 3)


def extent(points: Tensor) -> float:
    flat = points.reshape(-1, points.shape[-1])
    return float((flat.amax(0) - flat.amin(0)).norm()) or 1.0


def read_colors(where: str, color: Any, n: int, palette: Sequence[str] = PALETTE) -> np.ndarray:
    """Return ``(n, 3)`` bytes: one colour for all, or ``n`` of them, or the palette."""
    names = [color] * n if isinstance(color, str) else color
    names = [palette[i % len(palette)] for i in range(n)] if names is None else list(names)
    need(len(names) == n, f"{where}: color has {len(names)} entries, expected one or {n}")
    return np.array([load_pyvista().Color(c).int_rgb for c in names], np.uint8).reshape(n, 3)


def read_names(where: str, names: Sequence[str] | None, n: int) -> list[str]:
    ok = names is None or len(names) == n
    need(ok, f"{where}: {len(names or ())} names, expected {n}, one for each")
    return [str(name) for name in names or ()]


def read_values(where: str, name: str, values: Any, x: Tensor) -> Tensor:
    values, expected = to_numbers(where, name, values), tuple(x.shape[:-1])
    seen = tuple(values.shape)
    need(seen == expected, f"{where}: {name} has shape {seen}, expected {expected}")
    return values


def color_limits(values: Tensor) -> tuple[float, float, bool]:
    """Return the colour limits, and whether the values change sign."""
    low, high = float(values.min()), float(values.max())
    top = max(-low, high)
    if low < -1e-3 * top and high > 1e-3 * top:
        return -top, top, True
    if high - low <= 1e-5 * max(abs(low), abs(high)):  # a constant: show no round-off noise
        return low - (0.5 * abs(low) or 1.0), high + (0.5 * abs(high) or 1.0), False
    return low, high, False
