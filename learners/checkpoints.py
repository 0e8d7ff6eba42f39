"""Files of tensors that are whole or not there: safetensors, written beside and then renamed."""

import contextlib
import hashlib
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class CheckpointError(RuntimeError):
    """A file of tensors that cannot be read, or is not what was asked for."""


def write(path: str | Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write ``tensors`` and ``about`` (anything JSON holds) to ``path``, whole or not at all.

    A kill or a full disk leaves the file that was there: the new one is written beside it, flushed
    to the disk and renamed over it.
    """
    path = Path(path)
    whole = {name: _plain(tensor) for name, tensor in tensors.items()}
    text = json.dumps(about)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        # safetensors' own save_file does not flush to the disk
        with open(beside, "wb") as file:
            file.write(_safetensors().save(whole, {"about": text, "digest": _digest(whole, text)}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _flush_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def read(path: str | Path, device: Any = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what :func:`write` wrote; ``CheckpointError`` where the file is not whole."""
    path = Path(path)
    _safetensors()
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            text, digest = header["about"], header["digest"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if _digest(tensors, text) != digest:
            raise ValueError("its checksum is wrong")
        return {name: tensor.to(device) for name, tensor in tensors.items()}, json.loads(text)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole file of this library ({type(error).__name__}: {error}); "
            "nothing was changed"
        ) from error


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the modules of ``model``, their parameters and buffers, to the last bit."""
    tensors = {name: _plain(value) for name, value in model.state_dict().items()}
    return _digest(tensors, repr(model))


def flatten(tree: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of nested tuples, lists and dictionaries by their dotted path."""
    if isinstance(tree, dict):
        items: Any = tree.items()
    elif isinstance(tree, tuple | list):
        items = zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True)
    else:
        return {name: tree}
    leaves = {}
    for key, value in items:
        leaves.update(flatten(value, f"{name}.{key}" if name else str(key)))
    return leaves


def unflatten(like: Any, leaves: dict[str, Any], name: str = "") -> Any:
    """Return nested tuples built as ``like`` from ``leaves``, which it empties."""
    if not isinstance(like, tuple | list):
        if name not in leaves:
            raise CheckpointError(f"no {name} in the file: the state of another model")
        return leaves.pop(name)
    keys = getattr(like, "_fields", range(len(like)))
    parts = [
        unflatten(part, leaves, f"{name}.{key}" if name else str(key))
        for key, part in zip(keys, like, strict=True)
    ]
    return type(like)(*parts) if hasattr(like, "_fields") else type(like)(parts)


# The checkpoints of a training


def find(path: str | Path) -> Path | None:
    """Return ``path``, or the one kept before it where a kill fell between two renames."""
    path = Path(path)
    return next((p for p in (path, _previous(path)) if p.exists()), None)


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")


def save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    losses: list[float],
    random_states: list[dict[str, Tensor]],
    rank: int = 0,
) -> None:
    """Write all that the next step depends on; keep the file before.

    All processes call this, the first one writes.
    """
    leaves = flatten(optimizer.state_dict()["state"], "optimizer")
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    for name, value in tensors.items():
        if hasattr(value, "full_tensor"):
            value = whole(value)
            if rank == 0:
                tensors[name] = value.cpu()
    if rank != 0:
        return
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    for rank, state in enumerate(random_states):
        tensors |= {f"random.{rank}.{name}": value for name, value in state.items()}
    about = {
        "kind": "checkpoint",
        "settings": settings,
        "rest": {name: leaf for name, leaf in leaves.items() if name not in tensors},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    write(beside, tensors, about)
    if path.exists():
        os.replace(path, _previous(path))
    os.replace(beside, path)


def restore(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    rank: int = 0,
) -> list[float]:
    """Put a checkpoint back and return its losses; change nothing where it does not fit."""
    try:
        tensors, about = read(path)
    except CheckpointError as error:
        kept = _previous(path)
        hint = f"; the one before it is {kept}: rename it to go on from there"
        raise CheckpointError(
            f"fit: {error}{hint if kept.exists() and kept != path else ''}"
        ) from error
    if about.get("kind") != "checkpoint":
        raise CheckpointError(f"fit: {path} holds a {about.get('kind')}")
    for name, seen in about["settings"].items():
        if settings[name] != seen:
            raise ValueError(
                f"fit: {name} is {settings[name]}, expected {seen} to go on from {path}"
            )
    _load_parameters(path, model, tensors)
    leaves = {n: t for n, t in tensors.items() if n.startswith("optimizer.")} | about["rest"]
    state: dict[int, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        _, number, key = name.split(".", 2)
        state.setdefault(int(number), {})[key] = leaf
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parts in state.items():
        like = parameters[number]
        parts |= {
            k: _part(t, like) for k, t in parts.items() if getattr(t, "shape", 0) == like.shape
        }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    for number, parts in state.items():
        own = optimizer.state[parameters[number]]
        for key, leaf in parts.items():
            if not isinstance(leaf, Tensor):  # Adam makes its count of steps a float32
                own[key] = leaf
    start = f"random.{rank}."
    _set_random_state({n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)})
    return tensors["losses"].tolist()


def load_parameters(path: str | Path, model: nn.Module) -> nn.Module:
    """Load the parameters of a checkpoint that :func:`fit` wrote into ``model``; return it."""
    tensors, about = read(path)
    if about.get("kind") != "checkpoint":
        raise CheckpointError(f"{path} holds a {about.get('kind')}")
    _load_parameters(Path(path), model, tensors)
    return model


def _load_parameters(path: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    stored = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    own = model.state_dict()
    for name in own.keys() | stored.keys():
        parts = [f"{t.dtype} {tuple(t.shape)}" for t in map(own.get, [name]) if t is not None]
        other = [f"{t.dtype} {tuple(t.shape)}" for t in map(stored.get, [name]) if t is not None]
        if parts != other:
            raise CheckpointError(
                f"{path} is of another model: {name} is {(other or ['absent'])[0]} there and "
                f"{(parts or ['absent'])[0]} here; nothing was changed"
            )
    model.load_state_dict({name: _part(value, own[name]) for name, value in stored.items()})


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the global generators of torch and of Python."""
    version, numbers, rest = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *numbers]),
        "python_gauss": torch.tensor(math.nan if rest is None else rest, dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    version, *numbers = state["python"].tolist()
    rest = float(state["python_gauss"])
    random.setstate((version, tuple(numbers), None if math.isnan(rest) else rest))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


# Parts


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor of which processes may hold parts; all of them call this."""
    return getattr(tensor, "full_tensor", lambda: tensor)()


def _part(tensor: Tensor, like: Any) -> Tensor:
    """Return what this process holds of a whole tensor where that of ``like`` is sharded."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # slow to import

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def _plain(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU that shares its memory with nothing."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    """Return a hash of a text and of names, kinds and bits of tensors."""
    seen = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        seen.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        seen.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()


def _flush_folder(folder: Path) -> None:
    """Flush the new name to the disk, where the system has a way to."""
    with contextlib.suppress(OSError, AttributeError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _safetensors() -> Any:
    """Import safetensors or say which extra holds it."""
    try:
        import safetensors.torch
    except ImportError:
        raise RuntimeError(
            "states and checkpoints need safetensors: pip install 'darboux[train]'"
        ) from None
    return safetensors.torch
