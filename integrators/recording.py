"""Runs written to disk as they go, which can be interrupted, resumed and read without loading.

A recording is a folder with ``t.npy (time,)``, ``q.npy`` and ``p.npy (time, ..., d)``, complete
NumPy files once the run has ended, and ``manifest.json``, which says what ran and how many states
are written. States are appended in chunks; the manifest counts a chunk only when it is on the
disk, and is replaced in one piece, so that a run killed at any moment resumes at its last chunk.
Each chunk starts afresh from its first state, without what a method remembers, so that a resumed
run writes the very bytes of an uninterrupted one.
"""

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from darboux._checks import ConvergenceError
from darboux.integrators.base import Trajectory
from darboux.integrators.march import Bar, Run

_FORMAT = "darboux recording 1"
# A chunk holds at most so many bytes and, beyond one state, so many steps.
_BYTES = 2**26
_STEPS = 2**16
_NUMPY = {torch.float64: "<f8", torch.float32: "<f4", torch.float16: "<f2"}


def record(
    run: Run,
    q: Tensor,
    p: Tensor,
    *,
    t0: float | Tensor,
    steps: int,
    save_every: int,
    path: str | os.PathLike[str],
    bar: Bar | None = None,
) -> Trajectory:
    """Write the states of a run from the lifted state ``q, p``, or go on with it; return a view.

    Raises ``ValueError`` when the folder holds something else, and leaves that as it is.
    """
    if q.dtype not in _NUMPY:
        raise TypeError(f"save_to: q has dtype {q.dtype}, expected one that NumPy has")
    with torch.no_grad():
        folder = Path(path)
        manifest = _describe(run, q, p, t0, steps, save_every)
        done = _open(folder, manifest)
        total = manifest["states"]
        while done < total:
            if done == 0:
                states = _lowered(run, [q], [p])
            else:
                states = _more(run, folder, manifest, done, t0, bar)
            _append(folder, manifest, done, *states)
            done += len(states[0])
        return load_trajectory(folder)


def load_trajectory(path: str | os.PathLike[str]) -> Trajectory:
    """Return what is written of a recorded run, mapped into memory: read when it is looked at.

    Slices cost what they hold. The tensors are the files: do not write to them. Raises
    ``ValueError`` where there is no recording.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    if manifest is None:
        raise ValueError(f"load_trajectory: {folder} holds no recording, expected a manifest.json")
    done = manifest["done"]
    t, q, p = (_view(folder / f"{x}.npy", manifest[x], done) for x in "tqp")
    return Trajectory(t, q, p)


# --- Chunks ----------------------------------------------------------------------------------


def _more(
    run: Run, folder: Path, manifest: dict[str, Any], done: int, t0: float | Tensor, bar: Any
) -> tuple[Tensor, Tensor]:
    # The next chunk of states, from the last one on the disk.
    here = load_trajectory(folder)
    every, steps, states = manifest["save_every"], manifest["steps"], manifest["states"]
    end = min(done - (done - 1) % manifest["chunk"] + manifest["chunk"], states)
    stops = [min(i * every, steps) for i in range(done - 1, end)]
    t = t0 + stops[0] * run.dt
    q, p = (x[-1].to(manifest["device"], copy=True) for x in (here.q, here.p))
    q, p = run.system.lift(q, p, t)
    qs, ps = [q], [p]
    if bar is not None:
        bar.first = bar.first or stops[0]
    try:
        run.march(stops, qs, ps, None, bar)
    except ConvergenceError as error:
        if len(qs) > 1:
            _append(folder, manifest, done, *_lowered(run, qs[1:], ps[1:]))
        error.trajectory = load_trajectory(folder)
        raise
    return _lowered(run, qs[1:], ps[1:])


def _lowered(run: Run, qs: list[Tensor], ps: list[Tensor]) -> tuple[Tensor, Tensor]:
    q, p, own_times = run.system.lower(torch.stack(qs), torch.stack(ps))
    if own_times is not None:
        raise ValueError(
            f"save_to: every copy of a {type(run.system).__name__} keeps a time of its own, which "
            "a recording has no place for: leave save_to out"
        )
    return q, p


def _append(folder: Path, manifest: dict[str, Any], done: int, q: Tensor, p: Tensor) -> None:
    # Data first, then the count: what lies beyond the count is overwritten by the next attempt.
    first, last = done, done + len(q)
    steps = np.minimum(np.arange(first, last) * manifest["save_every"], manifest["steps"])
    t = float.fromhex(manifest["t0"]) + steps.astype(float) * float.fromhex(manifest["dt"])
    for name, x in (("t", t), ("q", q.cpu().numpy()), ("p", p.cpu().numpy())):
        shape, kind = manifest[name]["shape"], np.dtype(manifest[name]["dtype"])
        start = len(_header(manifest[name]))
        with open(folder / f"{name}.npy", "r+b") as file:
            file.seek(start + done * kind.itemsize * int(np.prod(shape[1:], dtype=int)))
            file.truncate()
            file.write(np.ascontiguousarray(x, kind).tobytes())
            file.flush()
            os.fsync(file.fileno())
    manifest["done"] = last
    _write_manifest(folder, manifest)


def _view(path: Path, entry: dict[str, Any], done: int) -> Tensor:
    shape, kind = (done, *entry["shape"][1:]), np.dtype(entry["dtype"])
    if 0 in shape:
        return torch.from_numpy(np.empty(shape, kind))
    # Copy on write: a careless caller cannot spoil the file.
    return torch.from_numpy(np.memmap(path, kind, "c", len(_header(entry)), shape))


def _header(entry: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    about = {"descr": entry["dtype"], "fortran_order": False, "shape": tuple(entry["shape"])}
    np.lib.format.write_array_header_1_0(buffer, about)
    return buffer.getvalue()


# --- The manifest ----------------------------------------------------------------------------


def _describe(
    run: Run, q: Tensor, p: Tensor, t0: float | Tensor, steps: int, save_every: int
) -> dict[str, Any]:
    start_q, start_p = _lowered(run, [q], [p])
    states = len(range(0, steps, save_every)) + 1
    width = (start_q.numel() + start_p.numel()) * q.element_size()
    slopes = run.system.field(q, p)
    kind = _NUMPY[q.dtype]
    digest = hashlib.sha256()
    for x in (start_q, start_p):
        digest.update(x.detach().cpu().contiguous().numpy().tobytes())
    return {
        "format": _FORMAT,
        "system": type(run.system).__name__,
        "method": run.method.name,
        "options": _options(run),
        "dt": float(run.dt).hex(),
        "t0": float(t0).hex(),
        "steps": steps,
        "save_every": save_every,
        "start": digest.hexdigest(),
        "speed": [float(x.double().norm()) for x in slopes],  # tells other forces and parameters
        "chunk": max(1, min(_BYTES // max(width, 1), _STEPS // save_every)),
        "states": states,
        "t": {"shape": [states], "dtype": kind},
        "q": {"shape": [states, *start_q.shape[1:]], "dtype": kind},
        "p": {"shape": [states, *start_p.shape[1:]], "dtype": kind},
        "device": str(q.device),
        "done": 0,
    }


def _options(run: Run) -> list[str]:
    compensated = getattr(run.method, "compensated", False)
    spacings = getattr(run.method, "spacings", None)
    found = ["compensated"] if compensated else []
    return found + ([f"lattice {spacings[0]!r} {spacings[1]!r}"] if spacings else [])


def _open(folder: Path, manifest: dict[str, Any]) -> int:
    # Make the folder, or find how far the same run has come in it.
    found = _read_manifest(folder)
    if found is not None:
        tolerance = 1e-3 if manifest["q"]["dtype"] != "<f8" else 1e-8
        for key, value in manifest.items():
            if key in ("done", "device", "chunk"):
                continue
            same = found.get(key) == value
            if key == "speed":
                same = np.allclose(found.get(key, np.nan), value, tolerance, 0)
            if not same:
                had: Any = found.get(key)
                want: Any = value
                if key in ("dt", "t0"):
                    had, want = float.fromhex(had), float.fromhex(want)
                raise ValueError(
                    f"save_to: {folder} holds a run whose {key} is {had}, not {want}: "
                    "resume with the arguments it was begun with, or name another folder"
                )
        manifest.update(done=found["done"], chunk=found["chunk"])
        return found["done"]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"save_to: {folder} holds no recording and is left alone: name another folder"
        )
    # The manifest comes last: without it there is nothing to resume.
    work = folder.with_name(f".{folder.name}.{os.getpid()}")
    work.mkdir(parents=True, exist_ok=True)
    for name in "tqp":
        (work / f"{name}.npy").write_bytes(_header(manifest[name]))
    _write_manifest(work, manifest)
    os.replace(work, folder)
    return 0


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    if manifest.get("format") != _FORMAT:
        raise ValueError(
            f"{folder}: the manifest has format {manifest.get('format')!r}, expected {_FORMAT!r}"
        )
    return manifest


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    draft = folder / "manifest.json.new"
    with open(draft, "w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, folder / "manifest.json")
