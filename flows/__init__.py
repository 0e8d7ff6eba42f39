"""What moves: points, and later metrics, measures and functions."""

from darboux.flows.geodesic import geodesic_flow, geodesic_hamiltonian

__all__ = ["geodesic_flow", "geodesic_hamiltonian"]
