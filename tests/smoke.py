"""A first run of the installed package, from any folder: ``python smoke.py``, or ``python smoke.py --bare``.

``--bare`` does as if nothing were there beyond what the package requires, on a system that is not POSIX: no extra, no Triton,
none of Python's modules for Unix alone. Every module of the package must then import, but for those that say what they need.
"""

from __future__ import annotations

import argparse
import builtins
import importlib
import io
import json
import os
import pkgutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

EXTRAS = {
    "captum", "datasets", "gradio", "jinja2", "pyarrow", "quantus", "ray", "skimage", "sklearn", "transformers", "triton", "zarr",
}  # fmt: skip
POSIX = {"fcntl", "grp", "pwd", "resource", "termios"}
POSIX_CALLS = ("sched_getaffinity", "sysconf", "fork", "getuid")
# Whole modules for what an extra brings; whoever imports them has asked whether it is there.
NEED_AN_EXTRA = {"triton": "vitexplain.kernels.", "gradio": "vitexplain.serve.page"}


class _Without:
    """A finder of modules that does not find some."""

    def __init__(self, finder: Any, absent: set[str]) -> None:
        self._finder, self._absent = finder, absent

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        return None if name.partition(".")[0] in self._absent else self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def pretend_bare() -> None:
    """Nothing beyond the package's requirements; what only POSIX has is refused to the package itself, not to torch."""
    sys.meta_path[:] = [_Without(finder, EXTRAS) for finder in sys.meta_path]
    for package in ("timm", "matplotlib.figure", "safetensors.torch", "typer", "rich.console", "PIL.Image"):
        importlib.import_module(package)
    plain_import = builtins.__import__

    def refuse(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> ModuleType:
        if name in POSIX and str((globals or {}).get("__name__")).startswith("vitexplain"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return plain_import(name, globals, locals, fromlist, level)

    builtins.__import__ = refuse
    for call in POSIX_CALLS:
        if hasattr(os, call):
            delattr(os, call)


def import_everything() -> int:
    """Import every module of the package; how many there are."""
    import vitexplain

    names = [module.name for module in pkgutil.walk_packages(vitexplain.__path__, "vitexplain.", onerror=_raise)]
    for name in names:
        if name == "vitexplain.__main__":
            continue
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not name.startswith(NEED_AN_EXTRA.get(str(error.name), "-")):
                raise
    return len(names)


def _raise(name: str) -> None:
    raise ImportError(f"cannot import {name}")


def make_photo(path: Path) -> None:
    """A picture with something in it."""
    import numpy as np
    from PIL import Image

    rows, columns = np.mgrid[0:96, 0:128]
    disc = ((rows - 40) ** 2 + (columns - 70) ** 2 < 900)[..., None] * np.array([150, 60, 20])
    Image.fromarray((disc + (rows + columns)[..., None] // 3).astype(np.uint8)).save(path)


def explain_by_api(photo: Path) -> None:
    """The demo's model on a photo, by the library's own functions."""
    import torch

    import vitexplain

    model = vitexplain.load_model("demo")
    images = model.transform(vitexplain.load_photo(photo)).unsqueeze(0)
    explanation = vitexplain.explain(model.model, images, backend="torch")
    assert explanation.maps.shape == (1, 8, 8), explanation.maps.shape
    assert torch.isfinite(explanation.maps).all()
    assert explanation.maps.std() > 0, "a map says something"


def explain_by_command(photo: Path) -> None:
    """The same by the command that is installed with the package."""
    (command,) = entry_points(group="console_scripts", name="vitexplain")
    output = photo.with_name("map.png")
    sys.argv = ["vitexplain", "explain", str(photo), "--backend", "torch", "--json", "--output", str(output)]
    said, code = io.StringIO(), 0
    try:
        with redirect_stdout(said):
            command.load()()
    except SystemExit as end:
        code = end.code
    assert not code, f"exit code {code}"
    assert json.loads(said.getvalue()), "the command says what it found"
    assert output.stat().st_size > 1000, "the command writes a picture"


def main() -> None:
    """Run all of it and print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bare", action="store_true")
    bare = parser.parse_args().bare
    if bare:
        pretend_bare()
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder) / "photo.png"
        make_photo(photo)
        explain_by_api(photo)
        explain_by_command(photo)
    import vitexplain

    modules = import_everything() if bare else None
    loaded = sorted(set(sys.modules) & EXTRAS)
    print(json.dumps({"file": vitexplain.__file__, "version": vitexplain.__version__, "modules": modules, "loaded": loaded}))


if __name__ == "__main__":
    main()
