"""Every public method on a GPU gives what it gives on the CPU."""

import pytest
import torch
from cases import MANIFOLDS, points, reachable
from test_transforms import GEODESIC, POINTWISE

from darboux.flows import geodesic_flow
from darboux.manifolds import TorusOfRevolution

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("case", MANIFOLDS, ids=lambda c: c.name)
def test_methods_on_the_device(case):
    manifold, x = points(case, 8)
    v, y = reachable(case, manifold, x)
    here = [z.detach() for z in (x, v, y)]
    there = [z.cuda() for z in here]
    twin = case.make().to(torch.float64).cuda()
    for name, call in (POINTWISE | GEODESIC).items():
        try:
            value = call(twin, *there)
            assert value.is_cuda
            torch.testing.assert_close(value.cpu(), call(manifold, *here), atol=1e-8, rtol=1e-8)
        except Exception as error:
            error.add_note(f"in {case.name}.{name}")
            raise


def test_flow_on_the_device():
    x = torch.tensor([[0.3, 0.0], [1.0, 2.0]], dtype=torch.float64)
    v = torch.tensor([[0.5, 0.4], [-0.2, 0.6]], dtype=torch.float64)
    torus = TorusOfRevolution()
    runs = [
        geodesic_flow(torus, a, b, dt=0.05, steps=50, method="gauss6")
        for a, b in ((x, v), (x.cuda(), v.cuda()))
    ]
    assert runs[1].q.is_cuda
    torch.testing.assert_close(runs[1].q.cpu(), runs[0].q, atol=1e-10, rtol=0)
