"""The code of the guides runs as it stands: the blocks of a page one after the other."""

import re
from pathlib import Path

import pytest
import torch

import darboux as dx
from darboux import _plot_scene

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("flows.md", "learners.md")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[int, str]]:
    """Return the Python of a page with the lines on which it starts."""
    return [(text.count("\n", 0, m.start(1)), m.group(1)) for m in BLOCK.finditer(text)]


def test_blocks_are_found_with_their_lines():
    page = "a\n```python\nx = 1\n```\n```sh\nls\n```\n```python\ny = 2\nz = 3\n```\n"
    assert blocks(page) == [(2, "x = 1\n"), (8, "y = 2\nz = 3\n")]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # pictures and checkpoints fall here
    try:
        _plot_scene.load_pyvista()
    except (RuntimeError, ImportError):
        for name in dx.plotting.__all__:
            monkeypatch.setattr(dx.plotting, name, lambda *args, **options: None)
    text = (DOCS / page).read_text("utf-8")
    found, dtype = blocks(text), torch.get_default_dtype()
    assert len(found) > 3
    scope = {"__name__": "page"}
    try:
        for line, code in found:
            # lines of a traceback are those of the page
            exec(compile("\n" * line + code, str(DOCS / page), "exec"), scope)
    finally:
        torch.set_default_dtype(dtype)
