"""A store is whole after every way of ending a run, refuses what is not its own, and is what other libraries read."""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.dataset
import pyarrow.parquet
import pytest
import zarr

from vitexplain.dataset.layout import Layout, Row, ShardContent, index_schema
from vitexplain.dataset.lock import locked
from vitexplain.dataset.standing import parts, read_part_summary, read_settings
from vitexplain.dataset.store import StoreWriter
from vitexplain.errors import InputError

from . import forked

LAYOUTS = {
    "one image": Layout(1, 4, {"a": (4, 4)}),
    "a last shard that is not full": Layout(10, 4, {"a": (7, 5), "b:depth=2": (32, 32)}),
    "whole shards": Layout(8, 4, {"a": (4, 4)}),
    "several targets": Layout(5, 2, {"a": (3, 7, 5), "b": (3, 4, 4)}, num_targets=3),
    "a shard of one": Layout(3, 1, {"a": (4, 4)}),
}
SMALL = Layout(3, 2, {"a": (2, 2)})


def settings_of(layout: Layout, **changes: object) -> dict:
    methods = {label: {"name": label, "options": {"depth": 1}} for label in layout.maps}
    return {"format": 1, "methods": methods, "shard": layout.shard, "batch": (1, 2), **changes}


def content_of(layout: Layout, number: int, *, nothing: bool = False) -> ShardContent:
    """What a shard might hold: every third image is unreadable, or all are."""
    rows = layout.rows(number)
    lost = np.array([nothing or row % 3 == 2 for row in rows])
    generator = np.random.default_rng(number)
    maps = {label: generator.standard_normal((len(rows), *shape)).astype(np.float16) for label, shape in layout.maps.items()}
    factors = () if layout.num_targets is None else (layout.num_targets,)
    scales = {label: 2.0 ** generator.integers(-3, 4, (len(rows), *factors)).astype(np.float32) for label in layout.maps}
    for values in (*maps.values(), *scales.values()):
        values[lost] = np.nan
    return ShardContent(maps, scales, [_row(layout, row, bool(bad)) for row, bad in zip(rows, lost, strict=True)])


def _row(layout: Layout, row: int, lost: bool) -> Row:
    several = layout.num_targets is not None
    found = (None,) * 4 if lost else (row % 7, 0.5, (3, 2, 1) if several else 3, (0.5, 0.25, 0.125) if several else 0.5)
    path = None if row % 2 else f"/photos/{row}.jpg"
    status, reason = ("unreadable", "not an image") if lost else ("ok", None)
    return Row(f"é/{row}", path, None if row == 0 else row, *found, row=row, status=status, reason=reason)


def fill(output: Path, layout: Layout, **changes: object) -> StoreWriter:
    """A store with all its shards."""
    writer = StoreWriter.prepare(output, settings_of(layout, **changes), layout)
    for number in writer.missing():
        writer.write(number, content_of(layout, number))
    return writer


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("_lock", "_runs.jsonl")
    }


# -- what stands at the end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_libraries_read_what_was_written(tmp_path, name) -> None:
    layout = LAYOUTS[name]
    output = tmp_path / "new" / "maps.zarr"
    writer = fill(output, layout)
    assert writer.missing() == []
    contents = [content_of(layout, number) for number in range(layout.num_shards)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root = zarr.open_group(output, mode="r")
        assert sorted(dict(root.members())) == sorted(layout.maps)
        assert sorted(name for name, _ in root.members(max_depth=None)) == sorted([*layout.maps, *layout.arrays])
        for label, shape in layout.maps.items():
            assert dict(root[label].attrs) == {"name": label, "options": {"depth": 1}}
            maps, scale = root[label]["maps"], root[label]["scale"]
            targets = () if layout.num_targets is None else ("target",)
            assert maps.metadata.dimension_names == ("image", *targets, "row", "column")
            assert scale.metadata.dimension_names == ("image", *targets)
            assert (dict(maps.attrs), dict(scale.attrs)) == ({"multiply_by": "scale"}, {"multiplies": "maps"})
            assert maps.shape == (layout.num_images, *shape)
            assert maps.shards == (layout.shard, *shape)
            assert (maps.dtype, scale.dtype) == (np.float16, np.float32)
            assert np.array_equal(maps[:], np.concatenate([content.maps[label] for content in contents]), equal_nan=True)
            assert np.array_equal(scale[:], np.concatenate([content.scales[label] for content in contents]), equal_nan=True)
    rows = [vars(row) for content in contents for row in content.rows]
    expected = [{name: list(value) if isinstance(value, tuple) else value for name, value in row.items()} for row in rows]
    dataset = pyarrow.dataset.dataset(output.with_suffix(".parquet"))
    assert dataset.to_table().to_pylist() == expected
    assert dataset.schema.names == list(vars(contents[0].rows[0]))
    types = {field.name: str(field.type) for field in dataset.schema}
    several = layout.num_targets is not None
    assert types["row"] == "int64"
    assert types["label"] == types["prediction"] == "int32"
    assert types["target"] == ("list<element: int32>" if several else "int32")
    assert types["target_score"] == ("list<element: float>" if several else "float")


def test_pandas_reads_the_index_beside_lock_and_log(tmp_path) -> None:
    pandas = pytest.importorskip("pandas")
    output = tmp_path / "k=v" / "maps.zarr"
    with locked(output):
        fill(output, LAYOUTS["several targets"]).log({"images": 5})
        frame = pandas.read_parquet(output.with_suffix(".parquet"))
    assert list(frame["row"]) == [0, 1, 2, 3, 4]
    assert list(frame["target"][0]) == [3, 2, 1]
    assert "k" not in frame


def test_the_same_maps_give_the_same_bytes(tmp_path) -> None:
    for folder in ("one", "two"):
        layout = LAYOUTS["several targets"]
        writer = StoreWriter.prepare(tmp_path / folder / "maps.zarr", settings_of(layout), layout)
        for number in writer.missing()[:: 1 if folder == "one" else -1]:
            writer.write(number, content_of(layout, number))
        writer.log({"folder": folder})
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert len(digests(tmp_path / "one")) == 1 + 2 + 4 + 3 * (4 + 1)


def test_the_same_maps_give_the_same_bytes_in_another_process(tmp_path) -> None:
    fill(tmp_path / "here" / "maps.zarr", SMALL)
    program = "import sys; from pathlib import Path; from tests.dataset.test_store import *; fill(Path(sys.argv[1]), SMALL)"
    _python(program, tmp_path / "there" / "maps.zarr")
    assert digests(tmp_path / "here") == digests(tmp_path / "there")


def test_a_shard_without_any_map_is_written_too(tmp_path) -> None:
    layout = LAYOUTS["a last shard that is not full"]
    writer = StoreWriter.prepare(tmp_path / "maps.zarr", settings_of(layout), layout)
    for number in range(3):
        writer.write(number, content_of(layout, number, nothing=True))
    assert writer.missing() == []
    part = read_part_summary(tmp_path / "maps.parquet" / "part-000002.parquet")
    files = part.files
    assert part.rows == (2, 8, 9)
    assert sorted(files) == ["a/maps/c.2.0.0", "a/scale/c.2", "b:depth=2/maps/c.2.0.0", "b:depth=2/scale/c.2"]
    for name, (size, digest) in files.items():
        data = (tmp_path / "maps.zarr" / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (size, digest)


def test_inner_chunks_are_near_128_kib_and_divide_the_shard(tmp_path) -> None:
    layout = Layout(5000, 4096, {"grid": (14, 14), "pixels": (224, 224)})
    StoreWriter.prepare(tmp_path / "maps.zarr", settings_of(layout), layout)
    root = zarr.open_group(tmp_path / "maps.zarr", mode="r")
    assert root["grid/maps"].chunks == (256, 14, 14)
    assert root["pixels/maps"].chunks == (1, 224, 224)
    assert root["grid/scale"].chunks == (4096,)


def test_names_that_are_not_text_can_be_kept(tmp_path) -> None:
    writer = StoreWriter.prepare(tmp_path / "maps.zarr", settings_of(SMALL), SMALL)
    content = content_of(SMALL, 1)
    odd = Row("\udcff", "/\udcff.jpg", None, 1, 0.5, 1, 0.5, 2, "ok", None)
    writer.write(1, ShardContent(content.maps, content.scales, [odd]))
    table = pyarrow.parquet.read_table(tmp_path / "maps.parquet" / "part-000001.parquet")
    assert table["id"].to_pylist() == ["\\udcff"]


# -- going on ----------------------------------------------------------------------------------------------------------


def test_only_what_is_missing_is_named(tmp_path) -> None:
    layout = LAYOUTS["a last shard that is not full"]
    output, index = tmp_path / "maps.zarr", tmp_path / "maps.parquet"
    whole = digests(fill(output, layout).output.parent)
    writer = StoreWriter(output, layout)
    (index / "part-000000.parquet").unlink()
    assert writer.missing() == [0]
    part = index / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    assert writer.missing() == [0, 1]
    shard = output / "a" / "maps" / "c.2.0.0"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert writer.missing() == [0, 1, 2]
    assert fill(output, layout).missing() == []
    assert digests(tmp_path) == whole
    shard.unlink()
    assert writer.missing() == [2]
    shutil.copy(index / "part-000002.parquet", part)
    assert writer.missing() == [1, 2], "a part of another shard"
    pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), part)
    assert writer.missing() == [1, 2], "a part of somebody else"


@pytest.mark.parametrize("name", ["part-0000001.parquet", "part-1.parquet", "part-00000\u0661.parquet"])
def test_only_the_name_of_a_part_counts(tmp_path, name) -> None:
    writer = fill(tmp_path / "maps.zarr", SMALL)
    part = writer.index / "part-000001.parquet"
    part.rename(part.with_name(name))
    assert list(parts(writer.index)) == [0]
    assert writer.missing() == [1]


def _with_files(part: Path, change: Callable[[dict], object]) -> None:
    """A part that says other things of itself."""
    table = pyarrow.parquet.read_table(part)
    about = json.loads(table.schema.metadata[b"vitexplain"])
    change(about)
    pyarrow.parquet.write_table(table.replace_schema_metadata({"vitexplain": json.dumps(about)}), part)


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about["files"].clear(),
        lambda about: about["files"].popitem(),
        lambda about: about["files"].update({"a/notes": [1, "00"]}),
        lambda about: about.update(settings="00"),
        lambda about: about.pop("settings"),
        lambda about: about.update(files=None),
    ],
)
def test_a_part_that_says_other_things_is_not_done(tmp_path, change) -> None:
    writer = fill(tmp_path / "maps.zarr", SMALL)
    _with_files(writer.index / "part-000001.parquet", change)
    assert writer.missing() == [1]


def test_what_cannot_be_read_is_not_taken_for_damage(tmp_path, monkeypatch) -> None:
    writer = fill(tmp_path / "maps.zarr", SMALL)
    before = digests(tmp_path)
    ill, error = writer.index / "part-000001.parquet", OSError(errno.EIO, os.strerror(errno.EIO))
    read, stat = pyarrow.parquet.read_metadata, Path.stat

    def failing(operation: Callable) -> Callable:
        def tried(path: Path, *args: object, **keywords: object) -> object:
            if path == ill:
                raise error
            return operation(path, *args, **keywords)

        return tried

    monkeypatch.setattr(pyarrow.parquet, "read_metadata", failing(read))
    with pytest.raises(InputError, match=r"store: cannot read '.*000001.parquet': Input/output error"):
        writer.missing()
    error = MemoryError()
    with pytest.raises(InputError, match=r"store: cannot read '.*000001.parquet': out of memory"):
        writer.missing()
    error = FileNotFoundError(errno.ENOENT, "")
    assert writer.missing() == [1]
    ill, error = writer.output / "a" / "scale" / "c.0", OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    monkeypatch.setattr(Path, "stat", failing(stat))
    with pytest.raises(InputError, match=r"store: cannot read '.*a/scale/c.0': Stale file handle"):
        writer.missing()
    monkeypatch.undo()
    assert digests(tmp_path) == before


def test_a_store_that_is_removed_during_a_run_is_not_made_again(tmp_path) -> None:
    (tmp_path / "disk").mkdir()
    writer = StoreWriter.prepare(tmp_path / "disk" / "maps.zarr", settings_of(SMALL), SMALL)
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    (tmp_path / "disk").mkdir()
    with pytest.raises(InputError, match=r"maps.zarr/zarr.json' is gone: No such file or directory"):
        writer.write(0, content_of(SMALL, 0))
    with pytest.raises(InputError, match=r"cannot write '.*_runs.jsonl': No such file or directory"):
        writer.log({})
    assert not list((tmp_path / "disk").iterdir())
    writer = StoreWriter(tmp_path / "unmounted" / "maps.zarr", SMALL)
    for folder in (writer.output / "a" / "maps", writer.index):
        folder.rename(tmp_path / "away")
        with pytest.raises(InputError, match=rf"cannot write '{folder}/.*': No such file or directory"):
            writer.write(0, content_of(SMALL, 0))
        assert not folder.exists()
        (tmp_path / "away").rename(folder)
    writer.write(0, content_of(SMALL, 0))
    assert writer.missing() == [1]


def test_a_writer_of_an_earlier_run_cannot_write_into_a_store_with_other_settings(tmp_path, monkeypatch) -> None:
    output = tmp_path / "maps.zarr"
    earlier = StoreWriter.prepare(output, settings_of(SMALL), SMALL)
    StoreWriter.prepare(output, settings_of(SMALL, batch=7), SMALL, overwrite=True)
    before = digests(tmp_path)
    for writer in (earlier, pickle.loads(pickle.dumps(earlier))):
        with pytest.raises(InputError, match=r"output: '.*maps.zarr' is another run's by now"):
            writer.write(0, content_of(SMALL, 0))
    assert digests(tmp_path) == before
    StoreWriter.prepare(output, settings_of(SMALL), SMALL, overwrite=True)
    encoded = StoreWriter._encoded

    def made_anew(self: StoreWriter, name: str, number: int, values: np.ndarray) -> tuple[str, bytes]:
        if name == "a/scale":
            StoreWriter.prepare(output, settings_of(SMALL, batch=7), SMALL, overwrite=True)
        return encoded(self, name, number, values)

    monkeypatch.setattr(StoreWriter, "_encoded", made_anew)
    with pytest.raises(InputError, match="is another run's by now"):
        earlier.write(0, content_of(SMALL, 0))
    assert StoreWriter(output, SMALL).missing() == [0, 1]


def test_an_option_that_is_no_number_can_be_gone_on_with(tmp_path) -> None:
    changes = {"methods": {"a": {"name": "a", "options": {"depth": float("nan")}}}}
    fill(tmp_path / "maps.zarr", SMALL, **changes)
    assert fill(tmp_path / "maps.zarr", SMALL, **changes).missing() == []


def test_a_shard_is_not_done_while_it_is_written_anew(tmp_path, monkeypatch) -> None:
    writer = fill(tmp_path / "maps.zarr", SMALL)
    monkeypatch.setattr(os, "replace", _refuse)
    with pytest.raises(InputError, match=r"cannot write .*a/maps/c\.1\.0\.0': No space left on device"):
        writer.write(1, content_of(SMALL, 1))
    assert writer.missing() == [1]


def test_a_writer_goes_to_other_processes(tmp_path) -> None:
    writer = StoreWriter.prepare(tmp_path / "maps.zarr", settings_of(SMALL), SMALL)
    pickle.loads(pickle.dumps(writer)).write(1, content_of(SMALL, 1))
    StoreWriter(tmp_path / "maps.zarr", SMALL).write(0, content_of(SMALL, 0))
    assert writer.missing() == []


def test_other_settings_are_refused_by_name(tmp_path) -> None:
    output = tmp_path / "maps.zarr"
    fill(output, SMALL)
    before = digests(tmp_path)
    with pytest.raises(
        InputError, match=r"holds maps with other settings \(batch: \[1, 2\] there, 3 asked for; dtype: null there"
    ):
        StoreWriter.prepare(output, settings_of(SMALL, batch=3, dtype="float32"), SMALL)
    with pytest.raises(
        InputError, match=r"a/maps/zarr.json' describes another array \(shape: \[3, 2, 2\] there, \[4, 2, 2\] asked"
    ):
        StoreWriter.prepare(output, settings_of(SMALL), Layout(4, 2, {"a": (2, 2)}))
    assert digests(tmp_path) == before
    assert read_settings(output) == json.loads(json.dumps(settings_of(SMALL)))


def test_overwriting_begins_anew_and_keeps_nothing(tmp_path) -> None:
    output = tmp_path / "maps.zarr"
    fill(output, LAYOUTS["a last shard that is not full"]).log({"run": 1})
    (output / "notes.txt").write_text("of the store")
    writer = StoreWriter.prepare(output, settings_of(SMALL), SMALL, overwrite=True)
    assert writer.missing() == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maps.parquet", "maps.zarr"]
    assert not list((tmp_path / "maps.parquet").iterdir())
    assert sorted(path.name for path in output.iterdir()) == ["a", "zarr.json"]


def test_an_index_without_its_maps_is_not_taken_for_this_run(tmp_path) -> None:
    output = tmp_path / "maps.zarr"
    fill(output, LAYOUTS["a last shard that is not full"])
    shutil.rmtree(output)
    with pytest.raises(InputError, match=r"maps.parquet' is an index whose maps are gone"):
        StoreWriter.prepare(output, settings_of(SMALL), SMALL)
    assert StoreWriter.prepare(output, settings_of(SMALL), SMALL, overwrite=True).missing() == [0, 1]
    assert not list((tmp_path / "maps.parquet").iterdir())


def test_an_empty_folder_is_used(tmp_path) -> None:
    (tmp_path / "maps.zarr").mkdir()
    (tmp_path / "maps.parquet").mkdir()
    assert read_settings(tmp_path / "maps.zarr") is None
    assert fill(tmp_path / "maps.zarr", SMALL).missing() == []


def test_a_worker_needs_the_store_of_the_run(tmp_path) -> None:
    with pytest.raises(InputError, match="a folder that all of them share"):
        StoreWriter(tmp_path / "maps.zarr", SMALL)
    fill(tmp_path / "maps.zarr", SMALL)
    shutil.rmtree(tmp_path / "maps.zarr" / "a" / "scale")
    with pytest.raises(InputError, match=r"cannot read '.*a/scale/zarr.json': No such file"):
        StoreWriter(tmp_path / "maps.zarr", SMALL)


def test_content_that_does_not_fit_is_refused(tmp_path) -> None:
    writer = StoreWriter.prepare(tmp_path / "maps.zarr", settings_of(SMALL), SMALL)
    content = content_of(SMALL, 0)
    with pytest.raises(InputError, match=r"expected arrays .*float16"):
        writer.write(0, ShardContent({"a": content.maps["a"].astype(np.float32)}, content.scales, content.rows))
    with pytest.raises(InputError, match="expected the rows 0 to 1 in their order"):
        writer.write(0, ShardContent(content.maps, content.scales, content.rows[::-1]))
    with pytest.raises(InputError, match="expected arrays"):
        writer.write(1, content)


def test_layouts_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="shard: expected at least 1, received 0"):
        Layout(3, 0, {"a": (2, 2)})
    for label in ("", "a/b", "..", "__a", "a\nb", "a\0", "zarr.json", "é" * 101):
        with pytest.raises(InputError, match="labels that can name a folder"):
            Layout(3, 1, {label: (2, 2)})
    with pytest.raises(InputError, match="more than upper and lower case, received 'a' and 'A'"):
        Layout(3, 1, {"a": (2, 2), "A": (2, 2)})
    Layout(3, 1, {"é" * 100: (2, 2), "a b": (2, 2)})


# -- killed, and full --------------------------------------------------------------------------------------------------


class _Dead(BaseException):
    """The process has been killed: nothing catches it."""


class _Operations:
    """Counts what changes files, and ends it at the n-th one: once with an error of the system, or for good as by a kill."""

    NAMES = ("open", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, killed: bool) -> None:
        self.count, self.at, self.killed = 0, at, killed
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))
        monkeypatch.setattr(io, "open", self._counted(builtins.open, opens=True))

    @property
    def reached(self) -> bool:
        return self.count >= self.at

    def _counted(self, operation: Callable, opens: bool = False) -> Callable:
        def counted(*args: object, **keywords: object) -> object:
            if opens and "r" in (*args, "r")[1]:
                return operation(*args, **keywords)
            self.count += 1
            if self.count == self.at and not self.killed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.count >= self.at and self.killed:
                raise _Dead
            return operation(*args, **keywords)

        return counted


@contextmanager
def _ending(at: int, killed: bool) -> Iterator[_Operations]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        operations = _Operations(monkeypatch, at, killed)
        yield operations


def _refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _until_whole(tmp_path: Path, killed: bool, before: Callable[[Path], None], run: Callable[[Path], None]) -> Iterator[Path]:
    """A folder for each n: what stands after ``run`` was ended at its n-th operation, until it is not ended any more."""
    for at in range(1, 1000):
        folder = tmp_path / str(at)
        folder.mkdir()
        before(folder / "maps.zarr")
        with _ending(at, killed) as operations:
            received = _error_of(run, folder / "maps.zarr")
        if not operations.reached:
            assert received is None
            assert at > 10, "operations were counted"
            return
        if killed:
            assert isinstance(received, _Dead)
        elif received is not None:  # else a folder was to be made that stands
            assert re.search(rf"{folder}/\.?maps\..*: No space left on device", str(received))
        yield folder
        shutil.rmtree(folder)
    raise AssertionError("it never ended")


def _error_of(run: Callable[[Path], None], output: Path) -> BaseException | None:
    try:
        with locked(output):
            run(output)
    except (_Dead, InputError) as error:
        return error
    return None


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("whole")
    fill(folder / "maps.zarr", SMALL)
    return digests(folder)


@pytest.mark.parametrize("killed", [False, True], ids=["error", "kill"])
def test_a_run_that_ends_anywhere_is_made_whole_by_the_next(tmp_path, whole, killed) -> None:
    for folder in _until_whole(tmp_path, killed, lambda _: None, lambda output: fill(output, SMALL)):
        output = folder / "maps.zarr"
        if not killed:
            assert not list(folder.rglob("*.partial"))
        settings = read_settings(output)  # whole, or nothing
        if settings is not None:
            writer = StoreWriter(output, SMALL)
            done = set(range(SMALL.num_shards)) - set(writer.missing())
            found = digests(folder)
            for number in done:
                part = f"maps.parquet/part-{number:06d}.parquet"
                assert found[part] == whole[part]
                for name, (_, digest) in read_part_summary(folder / part).files.items():
                    assert found[f"maps.zarr/{name}"] == digest
        fill(output, SMALL)
        assert digests(folder) == whole


@pytest.mark.parametrize("killed", [False, True], ids=["error", "kill"])
def test_overwriting_that_ends_anywhere_leaves_nothing_mistaken(tmp_path, whole, killed) -> None:
    old = Layout(7, 2, {"a": (2, 2), "b": (3, 3)})
    template = tmp_path / "template"
    fill(template / "maps.zarr", old)
    parts_then = {name: digest for name, digest in digests(template).items() if "part-" in name}

    def before(output: Path) -> None:
        shutil.copytree(template, output.parent, dirs_exist_ok=True)

    def run(output: Path) -> None:
        StoreWriter.prepare(output, settings_of(SMALL), SMALL, overwrite=True)

    def check_old(folder: Path) -> None:
        found = digests(folder)
        standing = [name for name in found if "part-" in name]
        assert all(found[name] == parts_then[name] for name in standing)
        for name in standing:
            for path, (_, digest) in read_part_summary(folder / name).files.items():
                assert found[f"maps.zarr/{path}"] == digest

    for folder in _until_whole(tmp_path, killed, before, run):
        output = folder / "maps.zarr"
        settings = read_settings(output)
        if settings == json.loads(json.dumps(settings_of(old))):
            check_old(folder)
            with pytest.raises(InputError, match="other settings"):
                StoreWriter.prepare(output, settings_of(SMALL), SMALL)
            StoreWriter.prepare(output, settings_of(SMALL), SMALL, overwrite=True)
        else:
            assert not list((folder / "maps.parquet").glob("part-*"))
        fill(output, SMALL)
        assert digests(folder) == whole


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files are needed")
def test_files_last_before_what_names_them(tmp_path, monkeypatch) -> None:
    """Each file is synced before it gets its name, and a shard's files have theirs for good before its part is written."""
    synced: set[str] = set()  # files, and folders since something in them changed last
    named: list[Path] = []
    fsync, replace = os.fsync, os.replace

    def synchronise(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))

    def rename(old: Path, new: Path) -> None:
        assert str(old) in synced, new
        if Path(new).name.startswith("part-"):
            unsynced = [path for path in named if str(path.parent) not in synced]
            assert not unsynced
        replace(old, new)
        synced.discard(str(Path(new).parent))
        named.append(Path(new))

    monkeypatch.setattr(os, "fsync", synchronise)
    monkeypatch.setattr(os, "replace", rename)
    writer = fill(tmp_path / "maps.zarr", SMALL)
    assert [path.name for path in named[-6:]] == [
        *("c.0.0.0", "c.0", "part-000000.parquet"),
        *("c.1.0.0", "c.1", "part-000001.parquet"),
    ]
    assert {str(tmp_path), str(writer.index)} <= synced


def test_a_full_disk_leaves_what_was_written_whole(tmp_path) -> None:
    inside = f"mount -t tmpfs -o size=3m none {tmp_path} && exec {sys.executable} -c '{_FILL_A_DISK}' {tmp_path}"
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting a small disk is not permitted here")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", inside], capture_output=True, text=True, check=False, env=_environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused", "whole"]


_FILL_A_DISK = """
import sys
from pathlib import Path
from tests.dataset.test_store import *
folder = Path(sys.argv[1])
layout = Layout(400, 100, {"a": (32, 32)})
with locked(folder / "maps.zarr"):
    writer = StoreWriter.prepare(folder / "maps.zarr", settings_of(layout), layout)
    writer.write(0, content_of(layout, 0))
    filler = folder / "filler"
    with pytest.raises(OSError), filler.open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass
    with filler.open("r+b") as stream:
        stream.truncate(filler.stat().st_size - 65536)
    try:
        writer.write(1, content_of(layout, 1))
    except InputError as error:
        assert "a/maps/c.1.0.0" in str(error) and "No space left on device" in str(error), error
        print("refused")
    assert not list(folder.rglob("*.partial"))
    assert writer.missing() == [1, 2, 3]
    filler.unlink()
    assert fill(folder / "maps.zarr", layout).missing() == []
    print("whole")
"""


def test_a_disk_that_is_too_full_is_refused_before_any_work(tmp_path, monkeypatch) -> None:
    layout = Layout(1000, 100, {"a": (100, 100)})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=10**6))
    with pytest.raises(InputError, match=r"output: expected about 15.3 MiB free in '.*' for the maps, received 976.6 KiB"):
        StoreWriter.prepare(tmp_path / "new" / "maps.zarr", settings_of(layout), layout)
    assert not (tmp_path / "new" / "maps.zarr").exists()
    assert fill(tmp_path / "maps.zarr", SMALL).missing() == []


# -- what is not ours --------------------------------------------------------------------------------------------------


def _zarr_group(path: Path) -> None:
    zarr.create_group(path, attributes={"mine": 1})


def _zarr_array(path: Path) -> None:
    zarr.create_array(path, shape=(2,), dtype="float32")[:] = 1


def _zarr_2(path: Path) -> None:
    zarr.create_group(path, zarr_format=2)


def _files(path: Path) -> None:
    (path / "data").mkdir(parents=True)


def _broken(path: Path) -> None:
    path.mkdir()
    (path / "zarr.json").write_text("{")


def _list(path: Path) -> None:
    path.mkdir()
    (path / "zarr.json").write_text("[]")


def _no_attributes(path: Path) -> None:
    path.mkdir()
    (path / "zarr.json").write_text('{"node_type": "group", "attributes": null}')


FOREIGN = {
    "no attributes": (_no_attributes, "received a Zarr group of something else"),
    "a file": (lambda path: path.write_text(""), "received a file"),
    "other files": (_files, "received a folder that holds 'data'"),
    "a group": (_zarr_group, "received a Zarr group of something else"),
    "an array": (_zarr_array, "received a Zarr array of something else"),
    "version 2": (_zarr_2, "received a Zarr store of version 2"),
    "broken": (_broken, "zarr.json' is damaged: expected JSON"),
    "a list": (_list, "zarr.json' is damaged: expected a JSON object"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_ours_is_never_touched(tmp_path, name) -> None:
    make, message = FOREIGN[name]
    output = tmp_path / "maps.zarr"
    make(output)
    before = digests(tmp_path)
    with pytest.raises(InputError, match=message), locked(output):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maps.zarr"]
    for overwrite in (False, True):
        with pytest.raises(InputError, match=message):
            StoreWriter.prepare(output, settings_of(SMALL), SMALL, overwrite=overwrite)
        assert digests(tmp_path) == before


def _index_file(path: Path) -> None:
    path.write_text("")


def _index_folder(path: Path) -> None:
    path.mkdir()
    (path / "data.txt").write_text("")


def _index_of_others(path: Path) -> None:
    path.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), path / "part-000000.parquet")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_index_file, "expected no file at"),
        (_index_folder, "holds other things"),
        (_index_of_others, "holds other things"),
    ],
)
def test_what_stands_where_the_index_is_to_be_is_never_touched(tmp_path, make, message) -> None:
    make(tmp_path / "maps.parquet")
    before = digests(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(InputError, match=message):
            StoreWriter.prepare(tmp_path / "maps.zarr", settings_of(SMALL), SMALL, overwrite=overwrite)
    with pytest.raises(InputError, match=message), locked(tmp_path / "maps.zarr"):
        pass
    assert digests(tmp_path) == before


def test_an_index_that_was_copied_without_its_lock_is_known(tmp_path) -> None:
    with locked(tmp_path / "maps.zarr"):
        fill(tmp_path / "maps.zarr", SMALL)
    (tmp_path / "maps.parquet" / "_lock").unlink()
    with locked(tmp_path / "maps.zarr"):
        assert fill(tmp_path / "maps.zarr", SMALL).missing() == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maps", "expected a name that ends in .zarr"),
        (".zarr", "expected a name that ends in .zarr"),
        ("s3://bucket/maps.zarr", "expected a path of a file system"),
        ("/proc/maps.zarr", "cannot write '/proc/maps.*No such file"),
        ("/proc/version/maps.zarr", "cannot write '/proc/version/maps.*Not a directory"),
        (f"/tmp/{'x' * 300}.zarr", "File name too long"),
    ],
)
def test_places_that_cannot_be_written_are_refused(name, message) -> None:
    with pytest.raises(InputError, match=message):
        StoreWriter.prepare(Path(name), settings_of(SMALL), SMALL)
    with pytest.raises(InputError, match=message), locked(Path(name)):
        pass


def test_a_link_is_refused(tmp_path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "maps.zarr").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="received the link"):
        StoreWriter.prepare(tmp_path / "maps.zarr", settings_of(SMALL), SMALL)


def test_what_is_not_installed_is_named(tmp_path, monkeypatch) -> None:
    fill(tmp_path / "maps.zarr", SMALL)
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(InputError, match=r"need zarr, which is not installed: pip install 'vitexplain\[dataset\]'"):
        StoreWriter(tmp_path / "maps.zarr", SMALL)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"need pyarrow, which is not installed: pip install 'vitexplain\[dataset\]'"):
        index_schema(None)


def test_neither_zarr_nor_pyarrow_is_needed_to_import() -> None:
    program = "import sys; import vitexplain.dataset.store; print({'zarr', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=_environment())
    assert done.stdout.strip() == "set()"


# -- one run at a time -------------------------------------------------------------------------------------------------

_HOLD = """
import os, sys, time
from pathlib import Path
from vitexplain.dataset.lock import locked
with locked(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path) -> None:
    output = tmp_path / "maps.zarr"
    with locked(output):
        with pytest.raises(InputError, match="another run is writing into"), locked(output):
            pass
        with pytest.raises(InputError, match="another run is writing into"), locked(tmp_path / "x" / ".." / "maps.zarr"):
            pass
        tried = "import sys; from pathlib import Path; from vitexplain.dataset.lock import locked\n"
        tried += "try:\n    with locked(Path(sys.argv[1])): print('free')\nexcept ValueError as error: print(error)"
        assert "another run is writing into" in _python(tried, output)
        with locked(tmp_path / "others.zarr"):
            pass
    with locked(output):
        pass


def test_an_error_inside_is_passed_on_and_the_lock_freed(tmp_path) -> None:
    with pytest.raises(FileExistsError), locked(tmp_path / "maps.zarr"):
        raise FileExistsError
    with locked(tmp_path / "maps.zarr"):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_run_holds_nothing_though_its_children_live(tmp_path) -> None:
    holder = forked.start(["-c", _HOLD, tmp_path / "maps.zarr"], tmp_path)
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(InputError, match="another run is writing into"), locked(tmp_path / "maps.zarr"):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(child, 0)
        with locked(tmp_path / "maps.zarr"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


ROOT = Path(__file__).parents[2]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def _python(program: str, *args: object) -> str:
    """What a program prints in a process of its own, from where the tests are found."""
    done = forked.start(["-c", program, *args], ROOT)
    output, errors = done.communicate(timeout=60)
    assert done.returncode == 0, errors
    return output.strip()
