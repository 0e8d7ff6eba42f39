"""Laplace-Beltrami spectra: discretise, solve, differentiate, perturb.

To add a discretisation, write a function that returns an :class:`Operator`; everything below
it works from the two matrices alone.
"""

from darboux.manifolds.spectral.bases import Basis, Fourier, galerkin
from darboux.manifolds.spectral.bounds import davis_kahan, enclose, form_bounds, kato_temple, weyl
from darboux.manifolds.spectral.bumps import (
    StreamingSpectrum,
    bump_elements,
    low_rank_elements,
    periodised,
)
from darboux.manifolds.spectral.connection import connection_laplacian
from darboux.manifolds.spectral.eigen import Spectrum, eigenpairs
from darboux.manifolds.spectral.exact import exact_spectrum
from darboux.manifolds.spectral.families import derivatives, track
from darboux.manifolds.spectral.finite_elements import stiffness_mass
from darboux.manifolds.spectral.functions import apply, diagonal, kernel, projector, trace
from darboux.manifolds.spectral.graphs import graph_laplacian, point_cloud_laplacian
from darboux.manifolds.spectral.harmonics import Harmonics
from darboux.manifolds.spectral.heat_method import divergence, geodesic_distance, gradient
from darboux.manifolds.spectral.hodge import exterior_derivative, hodge_laplacian
from darboux.manifolds.spectral.kernels import (
    diffuse,
    diffusion_distance,
    heat_kernel,
    heat_kernel_signature,
    heat_trace,
    spectral_filter,
    wave_kernel_signature,
)
from darboux.manifolds.spectral.laplacian import laplacian
from darboux.manifolds.spectral.operator import Operator, Pattern, Sparse
from darboux.manifolds.spectral.perturbation import (
    Perturbation,
    perturb,
    rayleigh_ritz,
    schrieffer_wolff,
)
from darboux.manifolds.spectral.polynomials import Legendre, ProductBasis
from darboux.manifolds.spectral.rank_one import rank_one

__all__ = [
    "Basis",
    "Fourier",
    "Harmonics",
    "Legendre",
    "Operator",
    "Pattern",
    "Perturbation",
    "ProductBasis",
    "Sparse",
    "Spectrum",
    "StreamingSpectrum",
    "apply",
    "bump_elements",
    "connection_laplacian",
    "davis_kahan",
    "derivatives",
    "diagonal",
    "diffuse",
    "diffusion_distance",
    "divergence",
    "eigenpairs",
    "enclose",
    "exact_spectrum",
    "exterior_derivative",
    "form_bounds",
    "galerkin",
    "geodesic_distance",
    "gradient",
    "graph_laplacian",
    "heat_kernel",
    "heat_kernel_signature",
    "heat_trace",
    "hodge_laplacian",
    "kato_temple",
    "kernel",
    "laplacian",
    "low_rank_elements",
    "periodised",
    "perturb",
    "point_cloud_laplacian",
    "projector",
    "rank_one",
    "rayleigh_ritz",
    "schrieffer_wolff",
    "spectral_filter",
    "stiffness_mass",
    "trace",
    "track",
    "wave_kernel_signature",
    "weyl",
]
