"""Mesh files, read and written by PyVista."""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from darboux.manifolds._mesh import Mesh, compact


def load(path: str | os.PathLike[str], *, dtype: Any = None, device: Any = None) -> Mesh:
    """Return the mesh of a file: its tetrahedra, else its triangles, else its segments.

    Any format that PyVista reads (STL, PLY, OBJ, VTK, VTP, VTU; with meshio also MSH, OFF, ...).
    Equal points are merged, polygons cut into triangles, points without a cell dropped. Raises
    ``FileNotFoundError``, or ``ValueError`` where there is no cell.
    """
    import pyvista as pv

    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"load: there is no file {str(source)!r}")
    data: Any = pv.read(source)
    if isinstance(data, pv.MultiBlock):
        data = data.combine()
    cells: Any = None
    if isinstance(data, pv.UnstructuredGrid):
        data = data.clean() if data.n_points else data
        cells = data.cells_dict.get(int(pv.CellType.TETRA))
    if cells is None:
        data = data if isinstance(data, pv.PolyData) else data.extract_surface()
        data = data.clean()
        if data.faces.size:
            cells = data.triangulate().regular_faces
        elif data.lines.size:
            lines = np.split(data.lines, np.cumsum(_line_sizes(data.lines))[:-1])
            cells = np.concatenate([np.stack([line[1:-1], line[2:]], 1) for line in lines])
    if cells is None or not len(cells):
        raise ValueError(f"load: {source.name!r} has no tetrahedra, triangles or segments")
    vertices = torch.tensor(np.asarray(data.points), dtype=dtype or torch.float64, device=device)
    return compact(vertices, torch.tensor(np.asarray(cells, np.int64), device=device))


def _line_sizes(lines: np.ndarray) -> list[int]:
    sizes, at = [], 0
    while at < len(lines):
        sizes.append(int(lines[at]) + 1)
        at += sizes[-1]
    return sizes


def save(mesh: Mesh, path: str | os.PathLike[str]) -> Path:
    """Write a mesh in R^1, R^2 or R^3 to a file; the ending of its name chooses the format.

    Triangles and segments as VTP or VTK, triangles also as PLY, STL or OBJ (in float32),
    tetrahedra as VTU or VTK. An existing file is replaced whole or not at all. Gluing is not
    written.
    """
    import pyvista as pv

    target, d = Path(path), mesh.dim
    endings = {
        1: (".vtp", ".vtk"),
        2: (".vtp", ".vtk", ".ply", ".stl", ".obj"),
        3: (".vtu", ".vtk"),
    }
    if target.suffix not in endings[d]:
        raise ValueError(
            f"save: {target.name!r} with cells of dimension {d}, expected {endings[d]}"
        )
    x = mesh.vertices.detach().cpu().numpy()
    if x.shape[1] > 3:
        raise ValueError(f"save: vertices lie in R^{x.shape[1]}, expected R^3 at most")
    x = np.concatenate([x, np.zeros((len(x), 3 - x.shape[1]), x.dtype)], 1)
    cells = mesh.cells.cpu().numpy()
    sized = np.concatenate([np.full((len(cells), 1), d + 1), cells], 1).reshape(-1)
    if d == 3:
        data: Any = pv.UnstructuredGrid({pv.CellType.TETRA: cells}, x)
    else:
        data = pv.PolyData(x, faces=sized) if d == 2 else pv.PolyData(x, lines=sized)
    handle, name = tempfile.mkstemp(suffix=target.suffix, dir=target.parent)
    os.close(handle)
    try:
        data.save(name)
        os.chmod(name, 0o644)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
    return target
