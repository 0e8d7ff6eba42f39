"""Names for the shapes that go in and out of public calls; all are plain tensors.

Leading dimensions are a batch and broadcast as in torch; the last dimension never does.
"""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

Point: TypeAlias = Tensor  # (..., n) chart or ambient coordinates
Tangent: TypeAlias = Tensor  # (..., n) components of a vector at a point
Covector: TypeAlias = Tensor  # (..., n)
Scalar: TypeAlias = Tensor  # (...)
Function: TypeAlias = Callable[[Tensor], Tensor]  # (..., n) -> (...)
VectorField: TypeAlias = Callable[[Tensor], Tensor]  # (..., n) -> (..., n)

__all__ = ["Covector", "Function", "Point", "Scalar", "Tangent", "VectorField"]
