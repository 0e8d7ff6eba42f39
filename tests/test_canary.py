"""What torch gets wrong and we avoid: these tests fail on the day that torch is mended.

``torch.linalg.solve``, ``det`` and ``slogdet`` return silently wrong derivatives under
``vmap(jacfwd(.))`` and nested forward mode in torch 2.13, so nothing in darboux differentiates
through them. When a test here fails, the rule in ``manifolds/linalg.py`` may be reconsidered.
"""

from pathlib import Path

import pytest
import torch
from torch.func import jacfwd, jacrev, vmap

from darboux.manifolds.linalg import log_det, solve_vector

ROOT = Path(__file__).parent.parent


def matrix(x):
    a = torch.stack([torch.sin(x), torch.cos(2 * x), x * x.flip(-1)], -1)
    return a @ a.mT + 2 * torch.eye(3, dtype=x.dtype)


def relative_error(f):
    x = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = torch.stack([jacrev(jacrev(f))(row) for row in x])
    found = vmap(jacfwd(jacfwd(f)))(x)
    return float((found - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize(
    ("broken", "ours"),
    [
        (lambda x: torch.linalg.solve(matrix(x), x), lambda x: solve_vector(matrix(x), x)),
        (lambda x: torch.linalg.det(matrix(x)).log(), lambda x: log_det(matrix(x))),
        (lambda x: torch.linalg.slogdet(matrix(x))[1], lambda x: log_det(matrix(x))),
    ],
    ids=["solve", "det", "slogdet"],
)
def test_torch_linalg_derivatives_are_still_wrong(broken, ours):
    assert relative_error(broken) > 1e-3, "torch is mended: reconsider the rule"
    assert relative_error(ours) < 1e-10


def test_nothing_differentiates_through_them():
    for folder in ("manifolds", "flows", "learners", "src/darboux"):
        for path in (ROOT / folder).glob("*.py"):
            text = path.read_text()
            for name in ("solve(", "solve_ex(", "det(", "slogdet(", "lu_solve("):
                assert f"torch.linalg.{name}" not in text, path
