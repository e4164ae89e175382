"""Runs of the command that are killed, or run out of disk, at 20 random moments and more: in the end the store is the same.

Every run works on the same photos, some of which cannot be read; what one undisturbed run has written is what all others have
to have written, byte for byte.
"""

from __future__ import annotations

import errno
import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from vitexplain import dataset
from vitexplain.cli import app
from vitexplain.dataset import MapStore

from . import forked
from .conftest import Program, in_session, is_running, make_photos, session, wait_until

pytestmark = pytest.mark.xdist_group("ray")  # one undisturbed run for all of them, and one at a time on Ray

COUNT, BATCH, SHARD = 203, 2, 8
NUM_SHARDS = -(-COUNT // SHARD)
UNREADABLE = {0: b"", 17: b"no photo", 88: b"GIF89a", 89: b"", 202: b"\xff\xd8\xff\xe0"}
OPTIONS = ["--method=iba", "--method=rollout", f"--batch={BATCH}", f"--shard={SHARD}", "--device=cpu", "--json"]
END = 300.0  # seconds after which a run is taken to hang


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing has happened to.

    Attributes:
        photos: what it has explained, as all other runs do.
        files: the store's, see ``files``.
        index: a row an image.
        maps: by method, (203, 8, 8).
    """

    photos: Path
    files: dict[str, bytes]
    index: list[dict]
    maps: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    photos = make_photos(folder / "photos", COUNT)
    for row, content in UNREADABLE.items():
        sorted(photos.iterdir())[row].write_bytes(content)
    output = folder / "maps.zarr"
    report = finished(command(photos, output, 0))
    assert (report["ok"], report["unreadable"], report["not_finite"]) == (COUNT - len(UNREADABLE), len(UNREADABLE), 0)
    store = dataset.open(output)
    assert [row["row"] for row in store.index.to_pylist() if row["status"] == "unreadable"] == list(UNREADABLE)
    maps = {method: store.maps(None, method) for method in store.methods}
    return Undisturbed(photos, files(output), store.index.to_pylist(), maps)


def command(photos: Path, output: Path, workers: int, *options: object, cold: bool = False) -> Program:
    """Start ``vitexplain dataset``; cold is a start in which it imports what it needs, as it does for everyone else."""
    output.parent.mkdir(exist_ok=True)
    begin = in_session if cold else forked.start
    return begin(arguments(photos, output, workers, *options), photos.parent)


def arguments(photos: Path, output: Path, workers: int, *options: object) -> tuple[object, ...]:
    """Python's."""
    return "-m", "vitexplain", "dataset", photos, "--output", output, "--workers", workers, *OPTIONS, *options


def wait_for(run: Program, condition: Callable[[], object]) -> None:
    """Until something is so, or the run has ended."""
    wait_until(lambda: condition() or run.poll() is not None, END)


def finished(run: Program) -> dict:
    """The report of a run that has to succeed."""
    output, errors = run.communicate(timeout=END)
    assert run.returncode == 0, errors
    return json.loads(output)


def parts(output: Path) -> int:
    """How many shards stand."""
    return len(list(output.with_suffix(".parquet").glob("part-*.parquet")))


def files(output: Path) -> dict[str, bytes]:
    """Everything of a store but the log of its runs and its lock."""
    folders = (output, output.with_suffix(".parquet"))
    found = {path.relative_to(output.parent): path for folder in folders for path in folder.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in found.items() if name.name not in ("_runs.jsonl", "_lock")}


def check_whole(output: Path, undisturbed: Undisturbed) -> None:
    """See that a store is what an undisturbed run has written, and that there is nothing else."""
    found = files(output)
    assert sorted(found) == sorted(undisturbed.files)
    assert [name for name in found if found[name] != undisturbed.files[name]] == []
    assert {path.name for path in output.parent.iterdir()} == {"maps.zarr", "maps.parquet"}
    store = dataset.open(output)
    assert store.is_complete
    assert len(set(store.ids)) == len(store.ids) == COUNT
    assert store.verify() == []


def check_part(output: Path, undisturbed: Undisturbed) -> None:
    """See that what stands of a store can be read, and is what it will be."""
    if not output.exists():
        assert parts(output) == 0, "killed before there was a store"
        return
    store: MapStore = dataset.open(output)
    index = store.index.to_pylist()
    assert len(index) == images(output)
    assert index == [undisturbed.index[row["row"]] for row in index]
    rows = [row["row"] for row in index]
    for method, expected in undisturbed.maps.items():
        assert np.array_equal(store.maps(rows, method), expected[rows], equal_nan=True)
    assert [problem for problem in store.verify() if "shards are not done" not in problem] == []


def images(output: Path) -> int:
    """How many stand."""
    is_last_there = (output.with_suffix(".parquet") / f"part-{NUM_SHARDS - 1:06d}.parquet").exists()
    return parts(output) * SHARD - is_last_there * (NUM_SHARDS * SHARD - COUNT)


def spread(chance: random.Random, count: int, last: int) -> list[int]:
    """Random numbers of shards from 1 to ``last``, one in each of as many stretches, and not close to each other."""
    stretch = last // count
    return [1 + stretch * i + chance.randrange(stretch - stretch // 3) for i in range(count)]


# -- the run itself ----------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_at_10_moments_goes_on_each_time(undisturbed, tmp_path) -> None:
    chance = random.Random(0)
    output = tmp_path / "out" / "maps.zarr"
    lock = tmp_path / "out" / "maps.parquet" / "_lock"

    def while_it_writes(run: Program, shard: int, num_workers: int) -> None:
        shard = max(shard, parts(output) + 1)
        wait_for(run, lambda: parts(output) >= shard and len(workers(run)) >= num_workers)

    moments: list[Callable[[Program, int], object]] = [
        lambda _run, _workers: time.sleep(chance.uniform(0, 1)),  # it imports what it needs
        lambda run, _workers: wait_for(run, lambda: children(run.pid)),  # what starts processes does so
        lambda run, _workers: wait_for(run, lock.exists),
    ]
    near_the_end = [NUM_SHARDS - chance.randint(4, 6), NUM_SHARDS - 3]
    for shard in (*spread(chance, 5, NUM_SHARDS - 8), *near_the_end):
        moments.append(lambda run, workers, shard=shard: while_it_writes(run, shard, workers))
    runs: list[Program] = []
    for moment in moments:
        num_workers, cold = 2 * (len(runs) % 2), len(runs) < 3
        runs.append(command(undisturbed.photos, output, num_workers, cold=cold))
        moment(runs[-1], num_workers)
        time.sleep(chance.uniform(0, 0.03))
        runs[-1].kill()
        runs[-1].communicate(timeout=END)
        check_part(output, undisturbed)
    assert [run.returncode for run in runs] == [-signal.SIGKILL] * 10, "one has ended before it was killed"
    before = images(output)
    report = finished(command(undisturbed.photos, output, 2))
    assert (report["found"], report["images"]) == (before, COUNT - before)
    check_whole(output, undisturbed)
    wait_until(lambda: not any(map(session, runs)))


def test_a_run_whose_workers_are_killed_at_6_moments_goes_on(undisturbed, tmp_path) -> None:
    chance = random.Random(1)
    output = tmp_path / "out" / "maps.zarr"
    run = command(undisturbed.photos, output, 2)
    for number, shard in enumerate(spread(chance, 6, NUM_SHARDS - 8)):
        wait_for(run, lambda shard=shard: parts(output) >= shard and workers(run))
        time.sleep(chance.uniform(0, 0.03))
        for worker in workers(run)[: 1 + number % 2]:
            kill(worker)
    report = finished(run)
    assert report["images"] == COUNT
    assert report["replaced_workers"] >= 3
    check_whole(output, undisturbed)
    wait_until(lambda: not session(run))


def workers(run: Program) -> list[psutil.Process]:
    """The processes that decode: children of what starts them."""
    starts = [process for process in children(run.pid) if any("forkserver" in text for text in command_line(process))]
    return [process for start in starts for process in children(start.pid) if is_running(process)]


def children(pid: int, recursive: bool = False) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive)
    except psutil.Error:  # it has just ended
        return []


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:  # ended with another one
        return


def test_a_run_on_ray_whose_actors_are_killed_at_4_moments_goes_on(undisturbed, tmp_path) -> None:
    pytest.importorskip("ray")
    chance = random.Random(2)
    output = tmp_path / "out" / "maps.zarr"
    run = command(undisturbed.photos, output, 0, "--engine", "ray", "--actors", 2, cold=True)
    for shard in spread(chance, 4, NUM_SHARDS - 8):
        wait_for(run, lambda shard=shard: parts(output) >= shard and actors(run))
        time.sleep(chance.uniform(0, 0.03))
        for actor in actors(run)[:1]:
            kill(actor)
    report = finished(run)
    assert report["images"] == COUNT
    assert report["engine"] == "ray"
    check_whole(output, undisturbed)


def actors(run: Program) -> list[psutil.Process]:
    found = children(run.pid, recursive=True)
    return [process for process in found if is_running(process) and "".join(command_line(process)).startswith("ray::MapWorker")]


# -- two runs, and a full disk -----------------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_the_first_one_is_undisturbed(undisturbed, tmp_path) -> None:
    output = tmp_path / "out" / "maps.zarr"
    run = command(undisturbed.photos, output, 0)
    wait_for(run, lambda: parts(output))
    stop(run)  # so that it is at work for as long as this takes
    before = files(output)
    for more in ((), ("--overwrite",), ("--target", "top2")):
        second = CliRunner().invoke(app, list(map(str, arguments(undisturbed.photos, output, 0, *more)[2:])))
        assert second.exit_code == 1
        assert f"error: output: another run is writing into {str(output)!r}" in second.stderr
    assert files(output) == before
    run.send_signal(signal.SIGCONT)
    assert finished(run)["images"] == COUNT
    check_whole(output, undisturbed)


def stop(run: Program) -> None:
    """Until every thread stands still: one that is writing comes to its end first."""
    run.send_signal(signal.SIGSTOP)
    threads = Path(f"/proc/{run.pid}/task")
    wait_until(lambda: all(state(thread) == "T" for thread in threads.iterdir()), END)


def state(thread: Path) -> str:
    """A letter, as the system has it: T is stopped."""
    return (thread / "stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[tuple[Path, list[object]]]:
    """A folder on a file system of 32 MiB, as everyone sees it, and what has to stand before a command that is to see it."""
    unshare, enter = shutil.which("unshare"), shutil.which("nsenter")
    if unshare is None or enter is None:
        pytest.skip("a file system of its own needs unshare and nsenter")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = 'mount -t tmpfs -o size=32m tmpfs "$0" && echo mounted && exec sleep 1000'
    holder = subprocess.Popen(
        [unshare, "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(disk)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if holder.stdout.readline() != "mounted\n":
            pytest.skip(f"a file system of its own cannot be mounted here: {holder.communicate()[1].strip()}")
        inside = [enter, f"--target={holder.pid}", "--user", "--mount", "--preserve-credentials", f"--wd={tmp_path}"]
        yield Path(f"/proc/{holder.pid}/root{disk}"), inside
    finally:
        holder.kill()
        holder.communicate()


def test_a_disk_that_fills_up_is_told_and_the_same_command_goes_on_when_there_is_room(undisturbed, tmp_path, small_disk) -> None:
    disk, inside = small_disk
    there, seen = tmp_path / "disk" / "out" / "maps.zarr", disk / "out" / "maps.zarr"
    seen.parent.mkdir()
    run = in_session(arguments(undisturbed.photos, there, 0), tmp_path, inside)
    wait_for(run, lambda: parts(seen) >= NUM_SHARDS // 3)
    stop(run)
    fill(disk / "filler")
    run.send_signal(signal.SIGCONT)
    output, errors = run.communicate(timeout=END)
    assert run.returncode == 1
    assert output == ""
    message = errors.strip().splitlines()[-1]
    assert message.startswith(f"error: output: cannot write '{there.parent}/")
    assert message.endswith("No space left on device")
    assert NUM_SHARDS // 3 <= parts(seen) < NUM_SHARDS
    assert not any(path.name.endswith(".partial") for path in seen.parent.rglob("*"))
    check_part(seen, undisturbed)
    full = in_session(arguments(undisturbed.photos, there, 0), tmp_path, inside)
    assert "free in" in full.communicate(timeout=END)[1]
    assert full.returncode == 1
    (disk / "filler").unlink()
    report = finished(in_session(arguments(undisturbed.photos, there, 0), tmp_path, inside))
    assert 0 < report["found"] < COUNT
    check_whole(seen, undisturbed)


def fill(path: Path) -> None:
    """Take all the room that a disk has."""
    size = 1 << 20
    with path.open("wb", buffering=0) as stream:
        while size:
            try:
                stream.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                size //= 2
