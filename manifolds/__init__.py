"""Spaces: their metric, connection, curvature, geodesics and operators.

To add a space, subclass :class:`Chart` and write ``metric(x)``; override the methods that begin
with an underscore for what you know in closed form; add a line to ``tests/cases.py``.
"""

from typing import TYPE_CHECKING

from darboux.manifolds.base import Connection, Manifold
from darboux.manifolds.chart import Chart
from darboux.manifolds.combine import Conformal, Warped
from darboux.manifolds.decoder import DecoderPullback, RBFUncertainty
from darboux.manifolds.embedded import Embedded
from darboux.manifolds.euclidean import Euclidean, FlatTorus
from darboux.manifolds.fisher import FisherGaussian
from darboux.manifolds.learned import (
    CholeskyNetwork,
    ConformalNetwork,
    DiagonalNetwork,
    LowRankNetwork,
    TokenBumps,
)
from darboux.manifolds.product import Product
from darboux.manifolds.pullback import Pullback
from darboux.manifolds.space_forms import HalfSpace, Hyperbolic, Stereographic
from darboux.manifolds.sphere import Sphere
from darboux.manifolds.surfaces import Ellipsoid, SurfaceOfRevolution, TorusOfRevolution

if TYPE_CHECKING:
    from darboux.manifolds.geoopt_bridge import Geoopt, from_geoopt
else:

    def __getattr__(name: str):
        # on first use: importing geoopt takes more than a second
        if name in ("Geoopt", "from_geoopt"):
            from darboux.manifolds import geoopt_bridge

            return getattr(geoopt_bridge, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Chart",
    "CholeskyNetwork",
    "Conformal",
    "ConformalNetwork",
    "Connection",
    "DecoderPullback",
    "DiagonalNetwork",
    "Ellipsoid",
    "Embedded",
    "Euclidean",
    "FisherGaussian",
    "FlatTorus",
    "Geoopt",
    "HalfSpace",
    "Hyperbolic",
    "LowRankNetwork",
    "Manifold",
    "Product",
    "Pullback",
    "RBFUncertainty",
    "Sphere",
    "Stereographic",
    "SurfaceOfRevolution",
    "TokenBumps",
    "TorusOfRevolution",
    "Warped",
    "from_geoopt",
]
