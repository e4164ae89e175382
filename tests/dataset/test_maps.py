"""Maps come back as they were made, by image or many at once, and what is missing or damaged is named."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
import zarr
from torch.utils.data import DataLoader

from vitexplain.dataset import maps
from vitexplain.dataset.layout import Layout
from vitexplain.dataset.maps import MapStore, open_maps
from vitexplain.dataset.store import StoreWriter
from vitexplain.errors import InputError, UnknownNameError

from .test_store import LAYOUTS, content_of, fill, settings_of

ODD = LAYOUTS["a last shard that is not full"]  # 10 images in shards of 4; every third one has no map
SEVERAL = LAYOUTS["several targets"]


def expected_of(layout: Layout, label: str) -> np.ndarray:
    """All maps, float32, scale applied."""
    contents = [content_of(layout, number) for number in range(layout.num_shards)]
    values = np.concatenate([content.maps[label] for content in contents]).astype(np.float32)
    scale = np.concatenate([content.scales[label] for content in contents])
    return values * scale[..., None, None]


@pytest.fixture
def odd(tmp_path) -> MapStore:
    fill(tmp_path / "maps.zarr", ODD)
    return open_maps(tmp_path / "maps.zarr")


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_everything_comes_back_as_it_was_made(tmp_path, name) -> None:
    layout = LAYOUTS[name]
    fill(tmp_path / "maps.zarr", layout)
    found = open_maps(str(tmp_path / "maps.zarr"))
    assert (len(found), found.num_targets, found.is_complete) == (layout.num_images, layout.num_targets, True)
    assert found.methods == tuple(layout.maps)
    assert found.settings["batch"] == [1, 2]
    assert found.verify() == []
    for label, shape in layout.maps.items():
        expected = expected_of(layout, label)
        values = found.maps(method=label)
        assert values.dtype == np.float32
        assert np.array_equal(values, expected, equal_nan=True)
        assert np.array_equal(found.maps(0, label), expected[0], equal_nan=True)
        assert found.maps(0, label).shape == shape
        assert np.array_equal(found.maps("é/0", label), expected[0], equal_nan=True)


def test_rows_are_chosen_as_in_python(odd) -> None:
    expected = expected_of(ODD, "a")
    assert np.array_equal(odd.maps(-1, "a"), expected[-1])
    assert np.array_equal(odd.maps(np.int64(3), "a"), expected[3])
    assert np.array_equal(odd.maps(np.array(3), "a"), expected[3])
    slices = [slice(2, 7), slice(None), slice(9, None, -4), slice(-3, None), slice(1, 9, 3), slice(5, 5), slice(8, 99)]
    for which in slices:
        assert np.array_equal(odd.maps(which, "a"), expected[which], equal_nan=True), which
    rows = [9, 0, 4, 4, -2]
    many = [rows, tuple(rows), np.array(rows), torch.tensor(rows), iter(rows), [9, "é/0", 4, "é/4", "é/8"]]
    for which in many:
        assert np.array_equal(odd.maps(which, "a"), expected[rows], equal_nan=True)
    for which in ([], np.array([], dtype=np.int64)):
        assert odd.maps(which, "a").shape == (0, 7, 5)
    assert np.array_equal(odd.maps(odd.index["id"], "b:depth=2"), expected_of(ODD, "b:depth=2"), equal_nan=True)


def test_rows_of_a_table_can_be_asked_for(odd) -> None:
    pytest.importorskip("pandas")
    frame = odd.index.to_pandas()
    chosen = frame[frame["status"] == "ok"]
    expected = expected_of(ODD, "a")[[0, 1, 3, 4, 6, 7, 9]]
    assert np.array_equal(odd.maps(chosen["row"], "a"), expected)
    assert np.array_equal(odd.maps(chosen["id"], "a"), expected)


def test_a_tensor_shares_the_values(odd, monkeypatch) -> None:
    values = np.ones((2, 7, 5), dtype=np.float32)
    monkeypatch.setattr(odd, "_read", lambda *_: values)
    tensor = odd.maps([0, 1], "a", as_torch=True)
    assert tensor.dtype == torch.float32
    assert tensor.data_ptr() == values.ctypes.data


def test_only_the_chunks_of_the_rows_are_read(tmp_path, monkeypatch) -> None:
    layout = Layout(4096, 1024, {"a": (14, 14)})
    fill(tmp_path / "maps.zarr", layout)
    found = open_maps(tmp_path / "maps.zarr")
    assert len(found.index) == 4096
    read: list[int] = []
    get = zarr.storage.LocalStore.get

    async def counted(self, key, prototype, byte_range=None):
        value = await get(self, key, prototype, byte_range)
        read.append(0 if value is None or "maps/c." not in str(self.root / key) else len(value))
        return value

    monkeypatch.setattr(zarr.storage.LocalStore, "get", counted)
    values = found.maps([5, 1500, 7], "a")
    assert np.array_equal(values, expected_of(layout, "a")[[5, 1500, 7]], equal_nan=True)
    whole = sum(path.stat().st_size for path in (tmp_path / "maps.zarr" / "a" / "maps").glob("c.*"))
    assert 0 < sum(read) < whole / 4


def test_the_index_has_a_row_an_image(odd) -> None:
    assert odd.ids == [f"é/{row}" for row in range(10)]
    row = odd.row("é/4")
    assert (row["row"], row["path"], row["label"], row["prediction"], row["target"]) == (4, "/photos/4.jpg", 4, 4, 3)
    assert odd.row(-1)["id"] == "é/9"
    assert odd.row(0)["label"] is None
    assert odd.row(2) == {**dict.fromkeys(row), "id": "é/2", "path": "/photos/2.jpg", "label": 2, "row": 2,
                          "status": "unreadable", "reason": "not an image"}  # fmt: skip
    assert np.isnan(odd.maps(2, "a")).all()


def test_a_store_says_what_it_is(odd) -> None:
    assert repr(odd).endswith("maps.zarr': 10 images, methods a, b:depth=2)")
    assert odd.runs() == []
    writer = StoreWriter(odd.path, ODD)
    writer.log({"images_per_second": 3.5, "é": None})
    writer.log({"run": 2})
    assert odd.runs() == [{"images_per_second": 3.5, "é": None}, {"run": 2}]


@pytest.mark.parametrize(
    ("which", "method", "error", "message"),
    [
        ("é/44", "a", UnknownNameError, r"unknown id 'é/44': did you mean é/4"),
        (10, "a", InputError, "expected a row from 0 to 9, received 10"),
        (-11, "a", InputError, "expected a row from 0 to 9, received -11"),
        ([0, 10], "a", InputError, "expected a row from 0 to 9, received 10"),
        (1.5, "a", InputError, "expected an id or a row, received float"),
        (True, "a", InputError, "expected an id or a row, received bool"),
        (np.ones(10, dtype=bool), "a", InputError, "expected an id or a row, received bool"),
        (np.ones((2, 2), dtype=int), "a", InputError, "expected an id or a row, received ndarray"),
        (slice("x", "y"), "a", InputError, "expected a slice of rows, received slice"),
        (0, None, InputError, "method: expected one of a, b:depth=2, as there are several"),
        (0, "aa", UnknownNameError, "unknown method 'aa': did you mean a"),
        (0, "zzz", UnknownNameError, "unknown method 'zzz': expected one of a, b:depth=2"),
    ],
)
def test_what_is_not_there_is_refused_by_name(odd, which, method, error, message) -> None:
    with pytest.raises(error, match=message):
        odd.maps(which, method)


def test_an_unknown_id_among_very_many_is_answered_at_once(odd, monkeypatch) -> None:
    monkeypatch.setattr(maps, "_NEAR_AMONG", 5)
    with pytest.raises(InputError, match="expected one of 10 ids such as 'é/0', received 'x'"):
        odd.row("x")


# -- unfinished, and damaged -------------------------------------------------------------------------------------------


def test_a_store_that_is_being_written_can_be_read(tmp_path) -> None:
    writer = StoreWriter.prepare(tmp_path / "maps.zarr", settings_of(ODD), ODD)
    found = open_maps(tmp_path / "maps.zarr")
    assert (len(found), found.ids, found.is_complete) == (10, [], False)
    assert np.isnan(found.maps(slice(0, 3), "a")).all()
    writer.write(2, content_of(ODD, 2))
    writer.write(0, content_of(ODD, 0))
    writer.write(1, content_of(ODD, 1))
    (tmp_path / "maps.parquet" / "part-000001.parquet").unlink()  # a run was killed between its files and its part
    found = open_maps(tmp_path / "maps.zarr")
    assert (len(found), found.is_complete) == (10, False)
    assert found.index["row"].to_pylist() == [0, 1, 2, 3, 8, 9]
    expected = expected_of(ODD, "a")
    expected[4:8] = np.nan
    assert np.array_equal(found.maps(None, "a"), expected, equal_nan=True)
    assert np.array_equal(found.maps([9, 0], "a"), expected[[9, 0]])
    assert found.row("é/9")["row"] == 9
    for which in (5, [0, 5]):
        with pytest.raises(InputError, match="the shard of row 5 is not done yet; run the same command again"):
            found.maps(which, "a")
    with pytest.raises(InputError, match="the shard of row 5 is not done yet"):
        found.row(5)
    assert found.verify() == [], "what is not done yet is no damage"


def test_what_is_no_store_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match=r"received nothing: there is no such folder"):
        open_maps(tmp_path / "maps.zarr")
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(InputError, match="received a Zarr group of something else"):
        open_maps(tmp_path / "other.zarr")
    fill(tmp_path / "maps.zarr", ODD, format=2)
    with pytest.raises(InputError, match=r"expected format 1 in '.*maps.zarr', received 2"):
        open_maps(tmp_path / "maps.zarr")
    shutil.rmtree(tmp_path / "maps.zarr")
    shutil.rmtree(tmp_path / "maps.parquet")
    fill(tmp_path / "maps.zarr", ODD)
    shutil.rmtree(tmp_path / "maps.parquet")
    with pytest.raises(InputError, match=r"expected the index '.*maps.parquet' beside"):
        open_maps(tmp_path / "maps.zarr")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def _corrupt(path: Path) -> None:
    """Change a byte among the values."""
    content = bytearray(path.read_bytes())
    content[50] ^= 0xFF
    path.write_bytes(content)


DAMAGES = {
    "a shard is gone": ("maps.zarr/a/maps/c.1.0.0", Path.unlink, r"c.1.0.0' is absent: run the same", r"c.1.0.0' is absent"),
    "a scale is gone": ("maps.zarr/a/scale/c.1", Path.unlink, r"scale/c.1' is absent: run the same", r"scale/c.1' is absent"),
    "a shard is cut": ("maps.zarr/a/maps/c.1.0.0", _truncate, r"a file of '.*a/maps' is damaged", r"expected \d+: run the same"),
    "a shard is changed": ("maps.zarr/a/maps/c.1.0.0", _corrupt, r"a file of '.*a/maps' is damaged", "is not what was written"),
    "a part is cut": (
        "maps.parquet/part-000001.parquet",
        _truncate,
        "000001.parquet' is damaged: delete",
        "000001.parquet' is damaged",
    ),
    "a part is changed": (
        "maps.parquet/part-000001.parquet",
        _corrupt,
        None,
        "000001.parquet' is damaged: delete",
    ),
    "metadata are gone": (
        "maps.zarr/a/scale/zarr.json",
        Path.unlink,
        "scale/zarr.json' is absent or damaged",
        "scale/zarr.json' is absent",
    ),
    "metadata are cut": (
        "maps.zarr/a/maps/zarr.json",
        _truncate,
        "maps/zarr.json' is absent or damaged",
        r"maps/zarr.json' has \d+ bytes, expected \d+: take it from a copy of the store, or make the store anew",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(odd, name) -> None:
    path, damage, message, problem = DAMAGES[name]
    damage(odd.path.parent / path)
    found = open_maps(odd.path)
    if message is None:  # the maps are whole
        with pytest.raises(InputError, match=problem):
            _ = found.index
    else:
        with pytest.raises(InputError, match=message):
            found.maps(None, "a")
    problems = found.verify()
    assert len(problems) == 1
    assert problems[0].startswith("'")
    assert re.search(problem, problems[0])


def _copy_part(store: MapStore) -> None:
    shutil.copy(_part(store, 0), _part(store, 1))


def _add_part(store: MapStore) -> None:
    shutil.copy(_part(store, 0), _part(store, 3))


def _rewrite_part(store: MapStore, change: Callable[[pyarrow.Table], pyarrow.Table]) -> None:
    table = pyarrow.parquet.read_table(_part(store, 1))
    pyarrow.parquet.write_table(change(table), _part(store, 1))


def _name_no_files(table: pyarrow.Table) -> pyarrow.Table:
    about = json.loads(table.schema.metadata[b"vitexplain"])
    return table.replace_schema_metadata({"vitexplain": json.dumps({**about, "files": {}})})


def _other_settings(table: pyarrow.Table) -> pyarrow.Table:
    about = json.loads(table.schema.metadata[b"vitexplain"])
    return table.replace_schema_metadata({"vitexplain": json.dumps({**about, "settings": "0" * 64})})


def _part(store: MapStore, number: int) -> Path:
    return store.path.with_suffix(".parquet") / f"part-{number:06d}.parquet"


WRONG_PARTS = {
    "another's": (_copy_part, "000001.parquet' holds other rows than 4 to 7: delete it"),
    "beyond the last shard": (_add_part, "000003.parquet' belongs to no shard, as there are 3: delete it"),
    "without files": (lambda store: _rewrite_part(store, _name_no_files), "000001.parquet' names other files"),
    "of other settings": (lambda store: _rewrite_part(store, _other_settings), "000001.parquet' is of a run with other settings"),
    "in another order": (
        lambda store: _rewrite_part(store, lambda table: table.take([0, 2, 1, 3])),
        "000001.parquet' holds rows that are not its own",
    ),
}


@pytest.mark.parametrize("name", WRONG_PARTS)
def test_a_part_that_is_not_a_shards_own_is_refused(odd, name) -> None:
    change, message = WRONG_PARTS[name]
    change(odd)
    found = open_maps(odd.path)
    (problem,) = found.verify()
    assert re.search(message, problem)
    with pytest.raises(InputError, match=message):
        _ = found.index
    if "000001" in message:
        for read in (lambda: found.row(5), lambda: found.maps(5, "a"), lambda: found.maps(None, "a")):
            with pytest.raises(InputError, match=message):
                read()


@pytest.mark.parametrize("name", ["a", "a/maps", "b:depth=2/scale"])
def test_metadata_that_were_changed_are_named(odd, name) -> None:
    path = odd.path / name / "zarr.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "attributes": {}}))
    (problem,) = open_maps(odd.path).verify()
    assert problem.startswith(f"{str(path)!r} has ")
    (odd.path / "zarr.json").write_text(
        json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {"vitexplain": odd.settings}})
    )
    assert any("does not name 'a/maps/zarr.json'" in problem for problem in open_maps(odd.path).verify())


def test_settings_that_were_changed_are_no_longer_those_of_the_maps(odd) -> None:
    root = odd.path / "zarr.json"
    root.write_text(root.read_text().replace('"shard": 4', '"shard": 5'))
    problems = open_maps(odd.path).verify()
    assert len(problems) == 3
    assert all("is of a run with other settings" in problem for problem in problems)


@pytest.mark.parametrize("error", [OSError(errno.EIO, os.strerror(errno.EIO)), MemoryError()])
def test_what_cannot_be_read_is_not_called_damaged(odd, monkeypatch, error) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    odd.maps(0, "a")
    reason = "Input/output error" if isinstance(error, OSError) else "out of memory"
    with monkeypatch.context() as patch:
        patch.setattr(zarr.Array, "__getitem__", fail)
        with pytest.raises(InputError, match=f"store: cannot read '.*a/maps': {reason}"):
            odd.maps(0, "a")
    with monkeypatch.context() as patch:
        patch.setattr(pyarrow.parquet, "ParquetFile", fail)
        with pytest.raises(InputError, match=f"store: cannot read '.*000002.parquet': {reason}"):
            odd.row(9)
    with monkeypatch.context() as patch:
        patch.setattr(zarr, "open_array", fail)
        with pytest.raises(InputError, match=f"store: cannot read '.*zarr.json': {reason}"):
            open_maps(odd.path).maps(0, "a")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        assert all(re.search(f"cannot read '.*': {reason}", problem) for problem in odd._verify_part(0, _part(odd, 0)))


def test_a_log_that_cannot_be_read_is_not_called_damaged(odd) -> None:
    (odd.path.with_suffix(".parquet") / "_runs.jsonl").mkdir()
    with pytest.raises(InputError, match=r"store: cannot read '.*_runs.jsonl': Is a directory"):
        odd.runs()


def test_a_log_that_is_damaged_is_named(odd) -> None:
    (odd.path.parent / "maps.parquet" / "_runs.jsonl").write_text("{\n")
    with pytest.raises(InputError, match=r"_runs.jsonl' is damaged"):
        odd.runs()


# -- places ------------------------------------------------------------------------------------------------------------


def test_a_store_stays_the_same_when_the_current_folder_changes(odd, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = open_maps("maps.zarr")
    fill(tmp_path / "other" / "maps.zarr", SEVERAL)
    monkeypatch.chdir(tmp_path / "other")
    assert found.row(9)["id"] == "é/9"
    assert np.array_equal(pickle.loads(pickle.dumps(found)).maps(0, "a"), odd.maps(0, "a"))


def test_a_link_to_a_store_is_read(odd, tmp_path) -> None:
    (tmp_path / "latest").symlink_to(odd.path)
    assert open_maps(tmp_path / "latest").row(9)["id"] == "é/9"
    (tmp_path / "links").mkdir()
    for name in ("maps.zarr", "maps.parquet"):
        (tmp_path / "links" / f"of_{name}").symlink_to(tmp_path / name)
    found = open_maps(tmp_path / "links" / "of_maps.zarr")
    assert (found.path.name, found.verify(), found.is_complete) == ("of_maps.zarr", [], True)


# -- much of it --------------------------------------------------------------------------------------------------------


def test_one_image_takes_one_part_of_the_index(odd, monkeypatch) -> None:
    for number in (0, 2):
        _part(odd, number).write_bytes(b"not looked at")
    monkeypatch.setattr(MapStore, "index", property(lambda _: pytest.fail("all of it was read")))
    found = open_maps(odd.path)
    assert found.row(5)["id"] == "é/5"
    assert found.maps(4, "a").shape == (7, 5)
    assert found.maps(slice(4, 8), "a").shape == (4, 7, 5)
    assert found.maps([4, 7], "a").shape == (2, 7, 5)
    assert found.is_complete


def test_items_for_torch_take_the_parts_of_their_images(tmp_path, monkeypatch) -> None:
    layout = Layout(60, 2, {"a": (2, 2)})
    fill(tmp_path / "maps.zarr", layout)
    dataset = open_maps(tmp_path / "maps.zarr").torch_dataset()
    read: list[int] = []
    checked = MapStore._checked_part

    def counted(self: MapStore, number: int, part: Path, columns: object = None) -> pyarrow.Table:
        read.append(number)
        return checked(self, number, part, columns)

    monkeypatch.setattr(MapStore, "_checked_part", counted)
    monkeypatch.setattr(MapStore, "index", property(lambda _: pytest.fail("all of it was read")))
    assert [item["id"] for item in dataset.__getitems__([0, 1])] == ["é/0", "é/1"]
    assert set(read) == {0}
    ids = [dataset[place]["id"] for place in range(len(dataset))]
    assert ids == [f"é/{row}" for row in range(60) if row % 3 != 2]
    assert len(dataset.store._read_parts) <= 16
    assert len(read) <= 2 * layout.num_shards


def test_a_slice_takes_no_memory_for_the_images_that_it_leaves_out(odd, monkeypatch) -> None:
    made = []
    arange = np.arange
    monkeypatch.setattr(np, "arange", lambda *bounds: made.append(bounds) or arange(*bounds))
    odd.maps(slice(4, 6), "a")
    assert made == [(4, 6, 1)]


def test_text_of_the_index_may_be_larger_than_2_gib(odd) -> None:
    types = {name: str(odd.index.schema.field(name).type) for name in ("id", "path", "reason")}
    assert set(types.values()) == {"large_string"}


# -- for torch ---------------------------------------------------------------------------------------------------------


def test_the_torch_data_set_has_the_images_with_maps(odd) -> None:
    dataset = odd.torch_dataset("a")
    expected = expected_of(ODD, "a")
    assert len(dataset) == 7
    items = [dataset[place] for place in range(len(dataset))]
    assert [item["row"] for item in items] == [0, 1, 3, 4, 6, 7, 9]
    assert [item["label"] for item in items] == [-1, 1, 3, 4, 6, 7, 9]
    assert (items[1]["id"], items[1]["prediction"], items[1]["target"]) == ("é/1", 1, 3)
    assert all(np.array_equal(item["maps"], expected[item["row"]]) for item in items)
    both = odd.torch_dataset()[3]["maps"]
    assert {label: tuple(values.shape) for label, values in both.items()} == {"a": (7, 5), "b:depth=2": (32, 32)}
    with pytest.raises(UnknownNameError, match="unknown method"):
        odd.torch_dataset("c")
    with pytest.raises(IndexError):
        dataset[7]


@pytest.mark.parametrize("context", [name for name in ("fork", "spawn") if name in multiprocessing.get_all_start_methods()])
def test_workers_read_for_themselves(tmp_path, context) -> None:
    fill(tmp_path / "maps.zarr", SEVERAL)
    found = open_maps(tmp_path / "maps.zarr")
    assert not np.isnan(found.maps(0, "a")).any()  # what this process has open is not what the workers use
    loader = DataLoader(found.torch_dataset("a"), batch_size=2, num_workers=2, multiprocessing_context=context, timeout=60)
    batches = list(loader)
    rows = torch.cat([batch["row"] for batch in batches]).tolist()
    assert rows == [0, 1, 3, 4]
    assert np.array_equal(torch.cat([batch["maps"] for batch in batches]), expected_of(SEVERAL, "a")[rows])
    assert batches[0]["target"].tolist() == [[3, 2, 1], [3, 2, 1]]


def test_a_store_is_pickled_without_what_was_read(odd) -> None:
    size = len(pickle.dumps(odd))
    odd.maps(0, "a")
    assert len(pickle.dumps(odd)) == size
    again = pickle.loads(pickle.dumps(odd))
    assert np.array_equal(again.maps(0, "a"), odd.maps(0, "a"))
