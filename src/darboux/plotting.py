"""Pictures with PyVista: surfaces, geodesics, vectors, learned metrics, orbits, spectra, particles.

Each function takes torch tensors (with gradients, on any device), adds to ``plotter=`` or to a
new one, and returns the plotter; :func:`save` writes PNG or HTML, :func:`show` opens a
window. A *surface* is any two-dimensional manifold with ``embedding(x): (..., 2) -> (..., 3)``.
PyVista is imported where the first thing is drawn, and only after a look for a display or an
OpenGL library, without which VTK kills the process; then ``RuntimeError`` is raised. The legend
of :func:`curves`, the names of :func:`orbits` and the labels of :func:`functions` appear in PNG
only, all else in HTML too; :func:`heat` and :func:`particle_film` write films.
"""

from darboux._plot_chart import audit, lines, section
from darboux._plot_particles import particle_film, particles
from darboux._plot_plane import filmstrip, latent
from darboux._plot_scene import save, show
from darboux._plot_space import curves, geodesics, orbits, surface, vectors
from darboux._plot_spectrum import functions, heat, spectrum

__all__ = [
    "audit",
    "curves",
    "filmstrip",
    "functions",
    "geodesics",
    "heat",
    "latent",
    "lines",
    "orbits",
    "particle_film",
    "particles",
    "save",
    "section",
    "show",
    "spectrum",
    "surface",
    "vectors",
]
