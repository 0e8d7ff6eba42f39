r"""The reduced resolvent of a pencil: the sum over all states but one block, never truncated.

.. math:: S(\lambda)\,r = \sum_{j\notin P} \varphi_j\,\frac{\varphi_j^Tr}{\lambda - \lambda_j}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from darboux._checks import GeometryError
from darboux.manifolds.spectral.adjoint import Modes, beyond

# Values closer than this, relative to their size, are one.
_EQUAL = 1e-9


def reduced_resolvent(spectrum: Any, blocks: Sequence[slice], rhs: Tensor) -> Tensor:
    """Return the columns ``S(lambda_a) r_a``, a running over all states of the ``blocks``.

    ``rhs (n, m)`` has one column for each state in order, and S leaves out the block that the state
    is in. Computed states, guards included, are summed by hand, what lies beyond them by a solve.
    Raises ``GeometryError`` where an eigenvalue of a block occurs outside it too: a cut cluster.
    """
    modes: Modes = spectrum._modes
    values, functions = modes.cast(rhs)
    states = torch.cat([torch.arange(b.start, b.stop, device=rhs.device) for b in blocks])
    outside = torch.ones(len(values), len(states), dtype=torch.bool, device=rhs.device)
    start = 0
    for block in blocks:
        stop = start + block.stop - block.start
        outside[block, start:stop] = False
        start = stop
    gaps = values[states] - values[:, None]
    # a small multiple of the rounding errors of the values, of which the highest has the largest
    floor = 32 * torch.finfo(values.dtype).eps * values.abs().max()
    near = outside & (gaps.abs() <= _EQUAL * values[states].abs() + floor)
    if bool(near.any()):
        worst = int(states[near.any(0).nonzero()[0, 0]])
        block = next(b for b in blocks if b.start <= worst < b.stop)
        raise GeometryError(
            f"perturbation: the eigenvalue {float(values[worst]):.12g} of states {block.start} to "
            f"{block.stop - 1} occurs outside this block too; take the whole cluster, or compute "
            "more eigenpairs"
        )
    weights = torch.where(outside, 1 / torch.where(outside, gaps, 1.0), 0.0)
    found = functions @ (weights * (functions.mT @ rhs))
    if functions.shape[1] < functions.shape[0]:
        found = found - beyond(modes, states, rhs)
    return found
