"""What moves: points (``geodesic``), metrics and measures.

Metrics: ``ricci_reduced``, ``ricci_warped``, ``ricci_conformal``, ``ricci_grid``,
``learned_ricci``. Measures: ``energies``, ``sinkhorn``, ``wasserstein``, ``accelerated``,
``interaction`` (attention as particles), ``gaussian`` (closed forms), on ``kernel_sums``.
"""

from darboux.flows.geodesic import geodesic_flow, geodesic_hamiltonian

__all__ = ["geodesic_flow", "geodesic_hamiltonian"]
