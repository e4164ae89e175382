"""Actors on a Ray cluster write what one process writes, whatever becomes of them, and leave nothing running."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from vitexplain.dataset import Progress, Report, on_ray, run
from vitexplain.dataset.layout import Layout
from vitexplain.dataset.on_ray import _begin_attempt, _marks, _pool, _tasks
from vitexplain.dataset.store import StoreWriter
from vitexplain.dataset.work import Counter
from vitexplain.errors import InputError
from vitexplain.loading import LoadedModel, load_model

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.xdist_group("ray"),  # one cluster for all of them
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

ROOT = Path(__file__).resolve().parent.parent.parent
NUM_IMAGES, BATCH = 24, 2
OPTIONS = dict(batch=BATCH, shard=BATCH, workers=0)
SOON = 20.0  # seconds that the system may take to end processes


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two CPUs, so that two actors run."""
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20, logging_level=50
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("demo", device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of noise, and of a file that is no photo."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for index in range(NUM_IMAGES):
        Image.fromarray(generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(folder / f"{index:02d}.jpg")
    (folder / "07.jpg").write_bytes(b"no photo")
    return folder


@pytest.fixture(scope="module")
def expected(model: LoadedModel, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What this process alone writes."""
    output = tmp_path_factory.mktemp("local") / "maps.zarr"
    run(model, photos, output, "tokentm", **OPTIONS)
    return digests(output)


def digests(output: Path) -> dict[str, str]:
    """Of every file of a store but those that tell of its runs."""
    return {
        str(path.relative_to(output.parent)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in (output, output.with_suffix(".parquet"))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("_lock", "_runs.jsonl")
    }


def actors() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            found += [process] if " ".join(process.cmdline()).startswith("ray::MapWorker") else []
        except psutil.Error:  # it has just ended
            continue
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def once(action: Callable[[], None]) -> Callable[[Progress], None]:
    """For ``progress``: do something when the first images are explained."""
    done: list[bool] = []

    def progress(progress: Progress) -> None:
        if progress.images and not done:
            done.append(True)
            action()

    return progress


class Stopped(Exception):
    """What a caller's own code raises."""


@pytest.mark.usefixtures("cluster")
def test_a_run_that_was_stopped_goes_on_also_where_an_actor_is_killed_and_writes_what_one_process_writes(
    model: LoadedModel, photos: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    output, told = tmp_path / "maps.zarr", []

    def call(action: Callable[[], None]) -> Report:
        when_begun = once(action)

        def progress(progress: Progress) -> None:
            told.append(progress.done)
            when_begun(progress)

        return run(model, photos, output, "tokentm", engine="ray", actors=2, progress=progress, **OPTIONS)

    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        call(stop)
    wait_until(lambda: not actors())
    assert ray.is_initialized(), "it is the caller's cluster"
    assert not (output.with_suffix(".parquet") / "_attempts").exists()

    told.clear()
    report = call(lambda: actors()[0].kill())
    assert 0 < report.found < NUM_IMAGES
    assert report.found + report.images == NUM_IMAGES == told[-1]
    assert told == sorted(told)
    assert report.unreadable <= 1 <= report.ok
    assert (report.engine, report.devices) == ("ray", ("cpu", "cpu"))
    assert digests(output) == expected
    assert call(stop).images == 0


@pytest.mark.usefixtures("cluster")
def test_what_an_actor_cannot_do_is_told_in_its_own_words(model: LoadedModel, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "maps.zarr"

    def put_a_file_in_the_way() -> None:
        shutil.rmtree(output / "tokentm/maps")
        (output / "tokentm/maps").write_text("not a folder")

    with pytest.raises(InputError, match=r"^output: cannot write '.*/maps.zarr/tokentm/maps/c\.[0-9.]+': .*$"):
        run(model, photos, output, "tokentm", engine="ray", actors=1, progress=once(put_a_file_in_the_way), **OPTIONS)
    wait_until(lambda: not actors())


def test_images_that_kill_every_process_end_the_run(tmp_path: Path) -> None:
    layout = Layout(10, 4, {"a": (2, 2)})
    settings = {"methods": {"a": {"name": "a", "options": {}}}}
    writer = StoreWriter.prepare(tmp_path / "maps.zarr", settings, layout)
    with _marks(writer):
        for _ in range(on_ray.ATTEMPTS):
            mark = _begin_attempt(writer, (1, 2), on_ray.ATTEMPTS)
        with pytest.raises(
            InputError, match=r"^ray: 5 processes were killed, each at the images 4 to 9, perhaps for want of memory"
        ):
            _begin_attempt(writer, (1, 2), on_ray.ATTEMPTS)
        assert mark.exists()
    assert not mark.parent.exists()


@pytest.mark.usefixtures("cluster")
def test_more_actors_than_the_cluster_holds_are_refused(model: LoadedModel, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="actors: expected at most 2, one for each CPU of the cluster, received 8"):
        run(model, photos, tmp_path / "maps.zarr", "tokentm", engine="ray", actors=8, **OPTIONS)


CTRL_C = """
import json, os, signal, sys, time
import psutil
from vitexplain.loading import load_model
from vitexplain.dataset import run

def interrupt(progress):
    if progress.images:
        everything = psutil.Process().children(recursive=True)
        actor = next(process for process in everything if process.cmdline()[0].startswith("ray::MapWorker"))
        decoding = actor.children(recursive=True)
        actor.kill()
        gone, left = psutil.wait_procs(decoding, timeout=20)
        print(json.dumps([len(gone) > 0, len(left)]), flush=True)
        os.killpg(0, signal.SIGINT)
        time.sleep(60)

if __name__ == "__main__":
    photos, output = sys.argv[1:]
    try:
        run(
            load_model("demo", device="cpu"), photos, output, "tokentm",
            engine="ray", batch=2, shard=2, workers=1, progress=interrupt,
        )
    except KeyboardInterrupt:
        end = time.monotonic() + 20
        while psutil.Process().children(recursive=True) and time.monotonic() < end:
            time.sleep(0.1)
        import ray
        left = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
        print(json.dumps([ray.is_initialized(), left]))
"""


def test_a_cluster_of_its_own_is_quiet_and_ends_with_the_run(photos: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CTRL_C)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    result = subprocess.run(
        [sys.executable, str(script), str(photos), str(tmp_path / "maps.zarr")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,  # from where ``kernels`` is a folder, not the package of that name
        env=environment,
        start_new_session=True,  # Ctrl-C is sent to all processes of a terminal
    )
    assert result.stderr == ""
    of_a_killed_actor, of_the_run = map(json.loads, result.stdout.splitlines())
    assert of_a_killed_actor == [True, 0], "processes that decoded have ended, and none is left"
    assert of_the_run == [False, []], "no connection is left, and no process"


def test_what_does_not_fit_is_refused_before_any_work(
    model: LoadedModel, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(**options) -> None:
        run(model, photos, tmp_path / "maps.zarr", "tokentm", engine="ray", **OPTIONS, **options)

    with pytest.raises(InputError, match="actors: expected 1 or more actors, received 0"):
        call(actors=0)
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(InputError, match="engine: 'ray' starts its processes itself, received 2 that torchrun"):
            call()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'vitexplain\[ray\]'"):
        call()
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_is_not_there_is_told_at_once(
    model: LoadedModel, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(InputError, match=r"^ray: cannot connect to RAY_ADDRESS='127.0.0.1:1': Connection refused$"):
        run(model, photos, tmp_path / "maps.zarr", "tokentm", engine="ray", **OPTIONS)


def test_actors_are_placed_where_each_of_them_fits() -> None:
    node = {"CPU": 4.0, "GPU": 2.0}
    assert _pool([node], "cpu", None) == on_ray._Pool(1, 4, 0)
    assert _pool([node], "cpu", 3) == on_ray._Pool(3, 1, 0)
    assert _pool([node, node, node], "cpu", 2) == on_ray._Pool(2, 4, 0), "6 of 12 CPUs would stand on no node"
    assert _pool([node, {"CPU": 7.0}], "cpu", 3) == on_ray._Pool(3, 3, 0)
    assert _pool([node, {}, node], "cuda", None) == on_ray._Pool(4, 0, 1)
    with pytest.raises(InputError, match="actors: expected at most 2, one for each GPU of the cluster, received 3"):
        _pool([node], "cuda", 3)
    with pytest.raises(InputError, match="ray: expected at least one GPU in the cluster, received none; load"):
        _pool([{"CPU": 4.0}], "cuda", None)


def test_tasks_hold_every_shard_once_and_leave_enough_for_all_actors() -> None:
    missing = [1, *range(4, 90)]
    assert [number for task in _tasks(missing, 2, 8) for number in task] == missing
    assert max(map(len, _tasks(missing, 2, 8))) == 8
    assert len(_tasks(missing, 8, 8)) >= 32
    assert _tasks([3, 5], 4, 8) == [(3,), (5,)]


def test_nothing_is_started_where_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "_import_ray", lambda: pytest.fail("not needed"))
    assert on_ray.explain_shards(None, 1, None, [], None, Counter(4, 0, None)).tally.images == 0
