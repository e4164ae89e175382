"""Every command and every line of code of the README runs; what it links to and names is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from .hub import fill_hub
from .run_document import ROOT, blocks

README = ROOT / "README.md"
RUN = Path(__file__).parent / "run_document.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of it has run, in the README's order, on photos of two classes."""
    folder = tmp_path_factory.mktemp("readme")
    from skimage import data

    Image.fromarray(data.chelsea()).save(folder / "photo.jpg")
    (folder / "photos").mkdir()
    for name, values in {"cat": data.chelsea(), "astronaut": data.astronaut(), "coffee": data.coffee()}.items():
        Image.fromarray(values).save(folder / "photos" / f"{name}.jpg")
    environment = {**os.environ, **fill_hub(folder / "hub", "deit_tiny_patch16_224"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, RUN, README], cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return folder


def test_commands_and_code_run(folder: Path) -> None:
    code = "\n".join(block.code for block in blocks(README.read_text()))
    for output in re.findall(r"--output (\S+)|save\(\"(\S+)\"\)", code):
        assert (folder / (output[0] or output[1])).exists()


def test_maps_of_a_folder_of_photos_are_pictures(folder: Path) -> None:
    assert {path.name for path in (folder / "maps").iterdir()} == {
        f"{name}_explained.png" for name in ("cat", "astronaut", "coffee")
    }
    for path in (folder / "maps").iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) > 300


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README.read_text()):
        assert "://" in link or (ROOT / link).exists(), link


def test_make_targets_in_the_text_exist() -> None:
    targets = set(re.findall(r"`make ([a-z-]+)`", README.read_text()))
    for target in targets:
        subprocess.run(["make", "-n", "-C", ROOT, target], check=True, capture_output=True)
