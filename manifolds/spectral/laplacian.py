"""One door to every discretisation of the Laplace-Beltrami operator of a mesh or a metric."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from darboux.manifolds._mesh import Mesh
from darboux.manifolds.base import Manifold
from darboux.manifolds.spectral.bases import Basis, galerkin
from darboux.manifolds.spectral.finite_elements import stiffness_mass
from darboux.manifolds.spectral.operator import Operator


def laplacian(
    space: Mesh | Manifold | Callable[[Tensor], Tensor],
    on: Mesh | Basis | None = None,
    **options: Any,
) -> Operator:
    r"""Return the Laplace-Beltrami operator of a mesh, or of a metric on a mesh or in a basis.

    ``laplacian(mesh)`` takes the metric that the embedding induces; ``laplacian(metric, mesh)`` a
    metric, given as a callable ``(..., d) -> (..., d, d)`` or a manifold, on a mesh of its chart:
    both are sparse, with the ``options`` of
    :func:`~darboux.manifolds.spectral.finite_elements.stiffness_mass`. ``laplacian(metric,
    basis)`` is dense, with the ``options`` of
    :func:`~darboux.manifolds.spectral.bases.galerkin`. Differentiable in vertices and metric.

    Raises ``TypeError`` where there is nothing to discretise on, and what those functions raise.

    >>> import darboux as dx
    >>> from darboux.manifolds.spectral import Fourier
    >>> torus = laplacian(dx.TorusOfRevolution(R=2.0, r=0.8), Fourier(8))
    >>> [round(float(v), 4) for v in dx.eigenpairs(torus, 3).values.abs()]
    [0.0, 0.2572, 0.2572]
    """
    if isinstance(space, Mesh):
        if on is not None:
            raise TypeError(
                f"laplacian: a mesh has its own metric, got {type(on).__name__} beside it; "
                "laplacian(metric, mesh) takes the metric first"
            )
        return stiffness_mass(space, **options)
    if not callable(getattr(space, "metric", space)):
        raise TypeError(
            f"laplacian: space is a {type(space).__name__}, expected a Mesh, a Manifold or a "
            "callable metric"
        )
    if isinstance(on, Mesh):
        return stiffness_mass(on, metric=space, **options)
    if isinstance(on, Basis):
        return galerkin(space, on, **options)
    raise TypeError(
        f"laplacian: on is {type(on).__name__}, expected a Mesh of the chart or a Basis to "
        "discretise the metric on"
    )
