"""The demo model, a folder of small photos, and programs in sessions of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from vitexplain.loading import LoadedModel, load_model

from . import forked

Program = subprocess.Popen[str] | forked.Forked

NUM_PHOTOS = 45
SOON = 60.0  # seconds that a busy machine may take for what it does at once


@pytest.fixture(scope="session")
def demo() -> LoadedModel:
    """On the CPU."""
    return load_model("demo", device="cpu")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of JPEGs and PNGs of different sizes, all of which can be read."""
    return make_photos(tmp_path_factory.mktemp("photos"), NUM_PHOTOS)


def make_photos(folder: Path, count: int) -> Path:
    """Write ``000.jpg``, ``001.png``, …, each a picture of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        photo = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((40 + i % 7, 36 + i % 5))
        photo.save(folder / f"{i:03d}.{('jpg', 'png')[i % 2]}")
    return folder


def wait_until(condition: Callable[[], object], seconds: float = SOON) -> None:
    """Fail where that takes longer."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def in_session(arguments: Sequence[object], folder: Path, inside: Sequence[object] = ()) -> subprocess.Popen[str]:
    """Start Python in a folder, and in a session of its own, as a terminal does; ``inside`` is a command that starts it."""
    return subprocess.Popen(
        [*map(str, inside), sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=forked.base_environment(),
        start_new_session=True,
    )


def session(leader: Program) -> list[psutil.Process]:
    """The processes of a session that run, also when its leader has ended."""
    found = []
    for process in psutil.process_iter():
        try:
            found += [process] if os.getsid(process.pid) == leader.pid and is_running(process) else []
        except ProcessLookupError:
            continue
    return found


def is_running(process: psutil.Process) -> bool:
    """Neither ended nor waiting to be forgotten."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
