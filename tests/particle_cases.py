"""Six particles in the plane and the energies that they move in."""

import torch

from darboux.flows import energies as en, gaussian as ga

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


Q = torch.tensor([[1.0, 0.3], [0.3, 0.6]], dtype=F64)
B = torch.tensor([0.4, -0.2], dtype=F64)
X = 0.7 * draw(6, 2) + 0.5


def potential(x):
    z = x - B
    return (z @ ga.inverse(Q) * z).sum(-1) / 2


def mahalanobis(x):
    m, S = ga.moments(x)
    z = x - m.unsqueeze(-2)
    return (z @ ga.inverse(S) * z).sum(-1)


V = en.Potential(potential)
KL = en.KL(lambda x: -potential(x), "gaussian")
# a convex target of all degrees, for what must hold without a closed form
QUARTIC = en.Potential(lambda x: (x**4).sum(-1) / 4 + x.square().sum(-1)) + en.Entropy("blob", 0.5)
