"""Pictures with PyVista: surfaces, geodesics, tangent vectors, learned metrics, orbits.

Each function takes torch tensors (with gradients, on any device), adds to ``plotter=`` or to a
new one, and returns the plotter; :func:`save` writes PNG or HTML, :func:`show` opens a
window. A *surface* is any two-dimensional manifold with ``embedding(x): (..., 2) -> (..., 3)``.
PyVista is imported where the first thing is drawn, and only after a look for a display or an
OpenGL library, without which VTK kills the process; then ``RuntimeError`` is raised. The legend
of :func:`curves` and the names of :func:`orbits` appear in PNG only, all else in HTML too.
"""

from darboux._plot_chart import audit, section
from darboux._plot_plane import filmstrip, latent
from darboux._plot_scene import save, show
from darboux._plot_space import curves, geodesics, orbits, surface, vectors

__all__ = [
    "audit",
    "curves",
    "filmstrip",
    "geodesics",
    "latent",
    "orbits",
    "save",
    "section",
    "show",
    "surface",
    "vectors",
]
