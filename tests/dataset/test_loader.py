"""Photos decoded by worker processes: nothing is lost or doubled, whatever the photos are and whatever becomes of a worker."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch import Tensor

from vitexplain.dataset import loader
from vitexplain.dataset.loader import IMAGES_A_TASK, LEAST_SLOTS, Decoder, Outcome
from vitexplain.errors import InputError
from vitexplain.loading import LoadedModel, Preprocess
from vitexplain.photos import Photo
from vitexplain.sources import Source, open_source
from vitexplain.sources.base import Reader

from . import forked
from .conftest import NUM_PHOTOS, SOON, Program, in_session, is_running, make_photos, session, wait_until

Wanted = list[range]


@pytest.fixture(scope="module")
def preprocess(demo: LoadedModel) -> Preprocess:
    return demo.preprocess()


@pytest.fixture(scope="module")
def source(photos: Path) -> Source:
    return open_source(photos)


@pytest.fixture(scope="module")
def expected(source: Source, preprocess: Preprocess) -> Tensor:
    """(45, 3, 32, 32) uint8: what the model sees of the photos."""
    return torch.stack([preprocess.seen(source.sample(i).photo) for i in range(len(source))])


@pytest.fixture
def decoder(source: Source, preprocess: Preprocess) -> Callable[..., Decoder]:
    """A decoder of the photos, two processes and batches of two if nothing else is said."""

    def make(source: Source = source, *, batch: int = 2, workers: int = 2) -> Decoder:
        return Decoder(source, preprocess, (32, 32), batch, workers)

    return make


def batches(count: int, batch: int) -> Wanted:
    return [range(start, min(start + batch, count)) for start in range(0, count, batch)]


def read(decoder: Decoder, wanted: Iterable[range], after: Callable[[int], object] = lambda _number: None) -> Iterator[tuple]:
    """Rows, a copy of the photos, and outcomes of each batch, which is released at once; ``after`` is called after each."""
    for number, decoded in enumerate(decoder.batches(wanted)):
        photos = decoded.photos.clone()
        decoded.release()
        after(number)
        yield decoded.rows, photos, decoded.outcomes


def check(found: Iterable[tuple], wanted: Wanted, expected: Tensor, odd: Iterable[int] = ()) -> dict[int, Outcome]:
    """See that batches are those that were wanted, each as expected; the outcomes of the odd rows, which must be black."""
    found = list(found)
    assert [rows for rows, _, _ in found] == wanted
    outcomes: dict[int, Outcome] = {}
    for rows, photos, given in found:
        assert len(given) == len(rows)
        assert not photos[len(rows) :].any(), "padding is black"
        for row, photo, outcome in zip(rows, photos, given, strict=False):
            if row in odd:
                outcomes[row] = outcome
                assert outcome.failure is not None
                assert not photo.any()
            else:
                assert outcome == Outcome()
                assert torch.equal(photo, expected[row])
    return outcomes


# -- order and content -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("batch", [1, 7, IMAGES_A_TASK + 4, NUM_PHOTOS + 5])
def test_batches_come_in_order_with_what_the_model_sees(decoder, expected, batch: int, workers: int) -> None:
    wanted = batches(NUM_PHOTOS, batch)
    with decoder(batch=batch, workers=workers) as it:
        check(read(it, wanted), wanted, expected)
        assert it.replaced == 0


def test_any_rows_can_be_asked_for_more_than_once(decoder, expected) -> None:
    with decoder() as it:
        for wanted in ([range(8, 10), range(2, 4), range(8, 9)], [], [range(2)]):
            check(read(it, wanted), wanted, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_place_that_held_a_full_batch_is_padded_with_black_when_it_is_used_again(decoder, expected, workers: int) -> None:
    wanted = [*batches(40, 4), range(40, 41)]
    with decoder(batch=4, workers=workers) as it:
        places = []
        for decoded in it.batches(wanted):
            places.append(decoded.photos.data_ptr())
            assert not decoded.photos[len(decoded.rows) :].any()
            assert torch.equal(decoded.photos[: len(decoded.rows)], expected[decoded.rows.start : decoded.rows.stop])
            decoded.release()
        assert places[-1] in places[:-1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_place_is_used_again_only_when_it_is_released(decoder, expected, workers: int) -> None:
    with decoder(workers=workers) as it:
        found = it.batches(batches(NUM_PHOTOS, 2))
        kept = [next(found) for _ in range(LEAST_SLOTS - 1)]
        later = []
        for decoded in found:
            later.append(decoded.photos.data_ptr())
            decoded.release()
        assert len(later) == -(-NUM_PHOTOS // 2) - len(kept)
        for decoded in kept:
            assert decoded.photos.data_ptr() not in later
            assert torch.equal(decoded.photos, expected[decoded.rows.start : decoded.rows.stop])


def test_asking_for_more_than_there_is_room_for_is_an_error_and_no_end(decoder) -> None:
    with decoder(workers=0) as it:
        found = it.batches(batches(2 * LEAST_SLOTS + 2, 2))
        kept = [next(found) for _ in range(LEAST_SLOTS)]
        with pytest.raises(RuntimeError, match="release"):
            next(found)
        assert len(kept) == LEAST_SLOTS
    with decoder(workers=0) as it:
        assert len(list(it.batches(batches(2 * LEAST_SLOTS, 2)))) == LEAST_SLOTS, "nothing more was wanted"


# -- what photos are like ----------------------------------------------------------------------------------------------


@pytest.fixture
def odd_folder(tmp_path) -> Path:
    """Twelve photos that cannot be read for one reason or another, between some that can."""
    folder = make_photos(tmp_path / "odd", 24)
    (folder / "000.jpg").write_bytes(b"")
    whole = (folder / "003.png").read_bytes()
    (folder / "003.png").write_bytes(whole[: len(whole) // 2])
    (folder / "008.jpg").write_bytes((folder / "008.jpg").read_bytes()[:100])
    (folder / "009.png").write_text("no picture")
    (folder / "016.jpg").write_bytes(bytes(range(256)) * 40)
    return folder


ODD = {0: "is empty (0 bytes)", 3: "003.png", 8: "008.jpg", 9: "is not an image in a known format", 16: "016.jpg", 23: "no file"}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_told_and_stops_nothing(decoder, expected, odd_folder, workers: int) -> None:
    source = open_source(odd_folder)
    (odd_folder / "023.png").unlink()
    wanted = batches(24, 5)
    with decoder(source, batch=5, workers=workers) as it:
        outcomes = check(read(it, wanted), wanted, expected, ODD)
        assert it.replaced == 0
    for row, message in ODD.items():
        assert message in outcomes[row].failure
        assert "\n" not in outcomes[row].failure


def test_photos_that_cannot_be_read_leave_black_where_others_were(decoder, odd_folder, expected) -> None:
    """The place of an unreadable photo held a readable one before."""
    source = open_source(odd_folder)
    wanted = [range(10, 12), range(12, 14), range(14, 16), range(8, 10), range(2, 4), range(16, 18)]
    with decoder(source, workers=0) as it:
        check(read(it, wanted), wanted, expected, ODD)


@pytest.mark.parametrize("workers", [0, 1])
def test_conversions_are_noted(decoder, preprocess, tmp_path, workers: int) -> None:
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8))
    photo.convert("CMYK").save(tmp_path / "0.jpg")
    photo.convert("L").save(tmp_path / "1.png")
    Image.fromarray(rng.integers(0, 65536, (36, 40), dtype=np.uint16)).save(tmp_path / "2.png")
    photo.save(tmp_path / "3.gif", save_all=True, append_images=[photo.rotate(90), photo.rotate(180)])
    photo.save(tmp_path / "4.png")
    source = open_source(tmp_path)
    with decoder(source, batch=5, workers=workers) as it:
        ((_, photos, outcomes),) = read(it, [range(5)])
    assert [outcome.note for outcome in outcomes] == [source.sample(i).note for i in range(5)]
    assert all(
        part in outcome.note for part, outcome in zip(("CMYK", "grayscale", "16-bit", "of 3 frames"), outcomes, strict=False)
    )
    assert outcomes[4] == Outcome()
    for i in range(5):
        assert torch.equal(photos[i], preprocess.seen(source.sample(i).photo))


# -- what is the machine's trouble -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """Reads as another reader does, but for some positions; writes down what it has read where it is told to.

    Attributes:
        home: the process that has to survive.
        kills: positions that end any other process that reads them.
        raises: what is raised instead, by position; an OSError becomes the cause of an error of ours, as real readers do it.
        log: gets a line for each photo.
        is_whole: sent to every process once, and no parts of it with each task.
    """

    reader: Reader
    home: int
    kills: tuple[int, ...] = ()
    raises: Mapping[int, Exception] = field(default_factory=dict)
    log: Path | None = None
    is_whole: bool = False

    def read(self, position: int, name: str, masks: bool) -> tuple[Photo, np.ndarray | None]:
        if position in self.kills and os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        error = self.raises.get(position)
        if isinstance(error, OSError):
            raise InputError(f"photo: cannot read {name}") from error
        if error is not None:
            raise error
        if self.log is not None:
            with self.log.open("a") as stream:
                stream.write(f"{name}\n")
        return self.reader.read(position, name, masks)

    def path_of(self, position: int) -> str | None:
        return self.reader.path_of(position)

    def part(self, positions: Sequence[int]) -> Watched | None:
        if self.is_whole:
            return None
        kills = tuple(place for place, position in enumerate(positions) if position in self.kills)
        raises = {place: self.raises[position] for place, position in enumerate(positions) if position in self.raises}
        return replace(self, reader=self.reader.part(positions), kills=kills, raises=raises)


def watched(source: Source, **given: object) -> Source:
    return replace(source, _reader=Watched(source._reader, os.getpid(), **given))


def test_photos_are_read_ahead_and_once(decoder, source, tmp_path) -> None:
    log = tmp_path / "log"
    wanted = batches(NUM_PHOTOS, 2)
    with decoder(watched(source, log=log)) as it:
        found = it.batches(wanted)
        first = next(found)
        wait_until(lambda: len(log.read_text().splitlines()) >= 2 * LEAST_SLOTS)
        first.release()
        for decoded in found:
            decoded.release()
    assert sorted(log.read_text().splitlines()) == sorted(f"{name!r} in {source.name!r}" for name in source.ids)


def test_a_photo_that_the_model_cannot_be_given_is_told(decoder, source, expected) -> None:
    wanted = batches(8, 2)
    with decoder(watched(source, raises={5: ValueError("too odd\nfor words")})) as it:
        outcomes = check(read(it, wanted), wanted, expected, [5])
    assert outcomes[5].failure == "photo: cannot be made the model's input: ValueError: too odd"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_trouble_of_the_machine_stops_and_is_not_recorded(decoder, source, expected, number: int, workers: int) -> None:
    trouble = watched(source, raises={7: OSError(number, os.strerror(number))})
    found: list[tuple] = []
    with decoder(trouble, workers=workers) as it, pytest.raises(InputError, match=r"'007\.png'.*; nothing is recorded of it"):
        found.extend(read(it, batches(NUM_PHOTOS, 2)))
    check(found, batches(6, 2), expected)


def test_a_trouble_that_no_reader_has_told_of_stops_too(decoder, source) -> None:
    error = RuntimeError("the codec")
    error.__cause__ = OSError(errno.EIO, "Input/output error")
    with (
        decoder(watched(source, raises={1: error}), workers=0) as it,
        pytest.raises(InputError, match="RuntimeError: the codec; nothing is recorded"),
    ):
        list(read(it, batches(4, 2)))


def test_one_file_that_is_gone_is_recorded_and_a_folder_that_is_gone_is_not(decoder, tmp_path) -> None:
    folder = make_photos(tmp_path / "photos", 8)
    source = open_source(folder)
    (folder / "003.png").unlink()
    with decoder(source) as it:
        outcomes = [outcome.failure for _, _, given in read(it, batches(8, 2)) for outcome in given]
    assert [i for i, failure in enumerate(outcomes) if failure] == [3]
    folder.rename(tmp_path / "elsewhere")
    with decoder(source) as it, pytest.raises(InputError, match="the same command again"):
        list(read(it, batches(8, 2)))
    folder.mkdir()  # as a disk leaves it that is no longer mounted
    with decoder(source) as it, pytest.raises(InputError, match="the same command again"):
        list(read(it, batches(8, 2)))


def test_a_source_that_goes_away_in_the_middle_stops(decoder, expected, tmp_path) -> None:
    folder = make_photos(tmp_path / "photos", NUM_PHOTOS)
    found: list[tuple] = []
    with decoder(open_source(folder)) as it, pytest.raises(InputError, match="the same command again"):
        found.extend(read(it, batches(NUM_PHOTOS, 2), lambda number: number or folder.rename(tmp_path / "elsewhere")))
    assert found
    check(found, batches(NUM_PHOTOS, 2)[: len(found)], expected)


def test_a_tar_that_is_gone_stops_and_a_bad_photo_in_it_does_not(decoder, photos, tmp_path) -> None:
    (tmp_path / "a::b").mkdir()
    shard = tmp_path / "a::b" / "shard.tar"
    with tarfile.open(shard, "w") as tar:
        for path in sorted(photos.iterdir())[:4]:
            tar.add(path, path.name)
        empty = tmp_path / "zzz.jpg"
        empty.write_bytes(b"no photo")
        tar.add(empty, empty.name)
    source = open_source(shard)
    with decoder(source, batch=5) as it:
        ((_, _, outcomes),) = read(it, [range(5)])
    assert [outcome.failure is None for outcome in outcomes] == [True] * 4 + [False]
    shard.rename(tmp_path / "elsewhere.tar")
    with decoder(source, batch=5) as it, pytest.raises(InputError, match="the same command again"):
        list(read(it, [range(5)]))


@pytest.mark.parametrize("name", ["a::b", os.fsdecode(b"caf\xe9")])
def test_a_bad_photo_in_a_folder_with_an_odd_name_stops_nothing(decoder, tmp_path, name: str) -> None:
    folder = make_photos(tmp_path / name, 4)
    (folder / "002.jpg").write_bytes(b"no photo")
    with decoder(open_source(folder)) as it:
        outcomes = [outcome.failure for _, _, given in read(it, batches(4, 2)) for outcome in given]
    assert [i for i, failure in enumerate(outcomes) if failure] == [2]


def test_too_little_shared_memory_is_told_before_any_work(decoder, monkeypatch) -> None:
    batch, size = 1024, 1024 * 3 * 32 * 32
    free = shutil.disk_usage("/")._replace(free=LEAST_SLOTS * size - (1 << 20))
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda _path: free)
    monkeypatch.setattr(loader, "_SHARED_MEMORY", Path("/dev"))  # there everywhere
    with pytest.raises(InputError, match=r"expected 9 MiB of shared memory for 3 batches of 1024, received 8 MiB free in /dev"):
        decoder(batch=batch)
    decoder(batch=batch, workers=0)
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda _path: free._replace(free=LEAST_SLOTS * size))
    assert len(decoder(batch=batch, workers=300)._slots) == LEAST_SLOTS


# -- what is killed ----------------------------------------------------------------------------------------------------


def kill(decoder: Decoder, whom: str) -> bool:
    """End processes of a decoder, and wait until it can know; whether there were any."""
    pool = decoder._pool
    if pool._broken:
        return False
    victims = sorted(pool._processes)
    if whom == "one":
        victims = victims[:1]
    if whom == "all and what starts them":
        victims.append(forkserver._forkserver._forkserver_pid)
    for pid in victims:
        with suppress(ProcessLookupError):  # ended with the others
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: pool._broken)
    return True


@pytest.mark.parametrize("whom", ["one", "all", "all and what starts them"])
def test_killed_workers_are_replaced_and_nothing_is_lost(decoder, expected, whom: str) -> None:
    wanted = batches(NUM_PHOTOS, 2)
    with decoder() as it:
        found = list(read(it, wanted, lambda number: kill(it, whom) if number == 4 else None))
        assert it.replaced == 1
    check(found, wanted, expected)


def test_workers_that_are_killed_again_and_again_are_replaced_each_time(decoder, expected) -> None:
    wanted = batches(NUM_PHOTOS, 2)
    kills: list[bool] = []
    with decoder() as it:
        found = list(read(it, wanted, lambda number: kills.append(number < 12 and kill(it, ("one", "all")[number % 2]))))
        assert it.replaced == sum(kills) >= 2
    check(found, wanted, expected)


def test_workers_that_are_killed_when_all_is_done_are_not_missed(decoder, expected) -> None:
    wanted = batches(4, 2)
    with decoder() as it:
        list(read(it, wanted))
        kill(it, "one")
        check(read(it, wanted), wanted, expected)
        kill(it, "all")
    assert it.replaced == 1


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize(("batch", "kills"), [(2, (9,)), (IMAGES_A_TASK, (0, 5, 6, NUM_PHOTOS - 1))])
def test_photos_that_end_every_process_are_recorded_and_all_others_are_right(
    decoder, source, expected, batch: int, kills: tuple[int, ...], is_whole: bool
) -> None:
    wanted = batches(NUM_PHOTOS, batch)
    with decoder(watched(source, kills=kills, is_whole=is_whole), batch=batch) as it:
        outcomes = check(read(it, wanted), wanted, expected, kills)
    assert {outcome.failure for outcome in outcomes.values()} == {"photo: reading it ended the process that read it"}
    assert set(outcomes) == set(kills)


def test_a_trouble_of_the_machine_stops_also_beside_a_photo_that_ends_processes(decoder, source) -> None:
    odd = watched(source, kills=(0,), raises={1: OSError(errno.EIO, "Input/output error")})
    with decoder(odd, workers=1) as it, pytest.raises(InputError, match="nothing is recorded"):
        list(read(it, batches(NUM_PHOTOS, 2)))


class Unreadable:
    """Ends the process that it is sent to, as a script does that starts its work when it is imported."""

    def __reduce__(self) -> tuple:
        return os._exit, (1,)


def test_processes_that_end_before_they_begin_are_told_and_no_photo_is_blamed(source) -> None:
    with Decoder(source, Unreadable(), (32, 32), 2, 2) as it, pytest.raises(InputError, match="__name__ == '__main__'"):
        list(read(it, batches(NUM_PHOTOS, 2)))


def test_leaving_early_ends_all_processes(decoder) -> None:
    with decoder(batch=1, workers=3) as it:
        next(it.batches(batches(NUM_PHOTOS, 1)))
        workers = [psutil.Process(pid) for pid in it._pool._processes]
        assert workers
    wait_until(lambda: not any(map(is_running, workers)))


# -- programs ----------------------------------------------------------------------------------------------------------

FOR_EVER = """
import sys
from vitexplain.dataset.loader import Decoder
from vitexplain.loading import load_model
from vitexplain.sources import open_source

def work():
    source = open_source(sys.argv[1])
    rows = [range(start, start + 2) for start in range(0, len(source) - 1, 2)]
    with Decoder(source, load_model("demo", device="cpu").preprocess(), (32, 32), 2, 2) as decoder:
        print("begun", flush=True)
        while True:
            for decoded in decoder.batches(rows):
                decoded.release()
            print("working", flush=True)

if __name__ == "__main__":
    work()
"""


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Program]]:
    """Start Python in a session of its own, on request where everything is imported; whatever it leaves is ended."""
    started: list[Program] = []

    def begin(*arguments: object, cold: bool = True) -> Program:
        started.append((in_session if cold else forked.start)(arguments, tmp_path))
        return started[-1]

    yield begin
    for process in started:
        for left in session(process):
            left.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("moment", "number"), [("begun", signal.SIGKILL), ("working", signal.SIGKILL), ("working", signal.SIGTERM)]
)
def test_a_parent_that_is_killed_leaves_no_process(start, photos, tmp_path, moment: str, number: int) -> None:
    (tmp_path / "script.py").write_text(FOR_EVER)
    process = start("script.py", photos, cold=False)
    while moment not in process.stdout.readline():
        assert process.poll() is None
    if moment == "working":
        assert len(session(process)) >= 4, "itself, two that decode, and what starts them"
    process.send_signal(number)
    assert process.wait(SOON) == -number
    wait_until(lambda: not session(process))


NO_GUARD = """
import sys
from vitexplain import dataset
from vitexplain.loading import load_model

{work}
"""


@pytest.mark.parametrize(
    "work",
    [
        "dataset.run(load_model('demo', device='cpu'), sys.argv[1], 'maps.zarr', 'iba', batch=2, workers=2)",
        "print(len(list(dataset.stream(load_model('demo', device='cpu'), sys.argv[1], 'iba', batch=2, workers=2))))",
    ],
)
def test_a_script_that_works_when_it_is_imported_gets_an_error(start, photos, tmp_path, work: str) -> None:
    (tmp_path / "script.py").write_text(NO_GUARD.format(work=work))
    process = start("script.py", photos)
    output, errors = process.communicate(timeout=2 * SOON)
    assert process.returncode == 1
    assert output == ""
    assert "expected a script whose work stands under if __name__ == '__main__'" in errors.strip().splitlines()[-1]
    wait_until(lambda: not session(process))


@pytest.mark.parametrize("moment", ["zarr/zarr.json", "parquet/part-000001.parquet"])
def test_an_interrupted_command_says_so_in_one_line_and_leaves_no_process(start, tmp_path, moment: str) -> None:
    """Ctrl-C reaches all processes of a terminal: before they have imported what they need, and at work."""
    photos = make_photos(tmp_path / "photos", 400)
    options = ["--output", "maps.zarr", "--method", "iba", "--batch", 1, "--shard", 1, "--workers", 2]
    process = start("-m", "vitexplain", "dataset", photos, *options, cold=moment.startswith("zarr"))
    wait_until(lambda: (tmp_path / f"maps.{moment}").exists() or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=SOON)
    assert process.returncode == 1, errors
    assert output == ""
    *bar, message = errors.strip().splitlines()
    assert message == "error: interrupted; the same command goes on from the last shard that is whole"
    assert all(line.startswith("explaining") for line in bar)
    wait_until(lambda: not session(process))
