"""Films: frames written as GIF or MP4, whole or not at all."""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from darboux._plot_input import need


def film_path(where: str, path: str | os.PathLike[str], fps: int, width: int) -> Path:
    """Return the path of a film that can be written, or say why not before anything is drawn."""
    target = Path(path)
    need(target.suffix in (".gif", ".mp4"),
          f"{where}: {target.name!r} ends in neither .gif nor .mp4")  # fmt: skip
    if target.suffix == ".mp4":
        _load_ffmpeg(where)
    need(1 <= fps <= 50 and width >= 64,
          f"{where}: fps is {fps} and width {width}, expected 1 to 50 and at least 64")  # fmt: skip
    return target


def write_film(target: Path, images: list[np.ndarray], fps: int, *, dither: bool = True) -> Path:
    """Write images ``(height, width, 3)`` of one shape; the file appears whole or not at all.

    ``dither`` mixes the few colours of a GIF from dots, which suits shaded surfaces.
    """
    write = _gif if target.suffix == ".gif" else _mp4
    handle, name = tempfile.mkstemp(suffix=target.suffix, dir=target.parent)
    os.close(handle)
    try:
        write(name, images, fps, dither)
        os.chmod(name, 0o644)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
    return target


def _gif(name: str, images: list[np.ndarray], fps: int, dither: bool) -> None:
    from PIL import Image

    # One palette for all frames: with one each, what stands still would flicker.
    some = np.concatenate([i[::3, ::3] for i in images[:: 1 + len(images) // 8]])
    palette = Image.fromarray(some).quantize(255, method=Image.Quantize.MAXCOVERAGE)
    entries = np.array(palette.getpalette()).reshape(-1, 3)
    entries[(entries > 248).all(1)] = 255  # the background stays white
    palette.putpalette(entries.ravel().tolist())
    how = Image.Dither.FLOYDSTEINBERG if dither else Image.Dither.NONE
    pages = [Image.fromarray(i).quantize(palette=palette, dither=how) for i in images]
    pages[0].save(name, save_all=True, append_images=pages[1:], duration=1000 // fps, loop=0)


def _load_ffmpeg(where: str) -> Any:
    try:
        import imageio_ffmpeg  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"{where}: MP4 needs the extra: pip install darboux[animate]") from error
    return imageio_ffmpeg


def _mp4(name: str, images: list[np.ndarray], fps: int, dither: bool) -> None:
    height, width = images[0].shape[:2]
    film = _load_ffmpeg("film").write_frames(
        name, (width, height), fps=fps, quality=8, macro_block_size=2, codec="libx264"
    )
    film.send(None)
    for image in images:
        film.send(np.ascontiguousarray(image))
    film.close()
