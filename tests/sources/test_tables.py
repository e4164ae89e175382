"""Tables of paths: what comes back, and what is refused in one line."""

from __future__ import annotations

import sys

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from vitexplain import InputError
from vitexplain.sources import open_source

from .made import cut_photo, make_table, put, reds, refused


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables(tmp_path, demo, kind: str) -> None:
    put(tmp_path, "b.png", "deep/a.jpg", "elsewhere/c.png")
    folder = tmp_path / "tables"
    folder.mkdir()
    paths = ["../b.png", str(tmp_path / "deep" / "a.jpg"), "./../elsewhere/c.png"]
    source = open_source(make_table(folder, {"path": paths, "label": ["cat", "ship", "Cat"]}, kind), classes=demo)
    assert (source.kind, source.name) == (kind, f"table.{kind}")
    assert source.ids == ("../b.png", "../deep/a.jpg", "../elsewhere/c.png")
    assert source.labels == (3, 8, 3)
    assert reds(source) == [0, 1, 2]
    table = make_table(folder, {"id": ["x", "y", "z"], "label": [7, 0, 9], "path": paths}, kind)
    assert open_source(table, classes=demo).ids == ("x", "y", "z")
    assert open_source(table, classes=demo).labels == open_source(table).labels == (7, 0, 9)
    assert open_source(make_table(folder, {"path": paths}, kind)).labels is None


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_with_masks(tmp_path, kind: str) -> None:
    put(tmp_path, "a.png")
    mask = np.zeros((8, 12), np.uint8)
    mask[2:4, 5:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    source = open_source(make_table(tmp_path, {"path": ["a.png"], "mask": ["mask.png"]}, kind))
    assert source.has_masks
    assert source.sample(0).mask.dtype == bool
    np.testing.assert_array_equal(source.sample(0).mask, mask > 0)
    Image.new("L", (8, 12)).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match=r"size of the upright photo, 12 × 8, received 8 × 12 for 'a.png' in 'table"):
        source.sample(0)
    (tmp_path / "mask.png").write_bytes(cut_photo())
    with pytest.raises(InputError, match=r"^mask: cannot read .*mask.png.*truncated"):
        source.sample(0)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_with_and_without_a_mark_of_byte_order(tmp_path, demo, encoding: str) -> None:
    put(tmp_path, "é, ü.png")
    (tmp_path / "t.csv").write_bytes('path, label\r\n"é, ü.png", dog \r\n\r\n'.encode(encoding))
    source = open_source(tmp_path / "t.csv", classes=demo)
    assert (source.ids, source.labels) == (("é, ü.png",), (5,))
    (tmp_path / "t.csv").write_bytes('path, label\r\n"é, ü.png", 7 \r\n'.encode(encoding))
    assert open_source(tmp_path / "t.csv", classes=demo).labels == (7,)


def test_parquet_as_pandas_and_others_write_it(tmp_path, demo) -> None:
    put(tmp_path, "a.png", "b.png")
    columns = {
        "path": pa.array(["a.png", "b.png"], pa.large_string()),
        "label": pa.array(["cat", "dog"]).dictionary_encode(),
        "__index_level_0__": [5, 6],
    }
    assert open_source(make_table(tmp_path, columns, "parquet"), classes=demo).labels == (3, 5)
    small = {"path": ["a.png", "b.png"], "label": pa.array([3, 5], pa.uint8()), "mask": pa.nulls(2, pa.string())}
    source = open_source(make_table(tmp_path, small, "parquet"), classes=demo)
    assert (source.labels, source.has_masks) == ((3, 5), False)


def test_a_label_column_with_nothing_in_it(tmp_path) -> None:
    put(tmp_path, "a.png")
    (tmp_path / "t.csv").write_text("path,label\na.png,\n")
    assert open_source(tmp_path / "t.csv").labels is None


CSVS = {
    "another delimiter": (
        "path;label\na.png;1\n",
        "columns path and, if wanted, label, mask, id in 't.csv', received path;label",
    ),
    "no path": ("label\n1\n", "received label"),
    "unknown": ("path,label,colour\na.png,1,red\n", "received path, label, colour"),
    "twice": ("path,path\na.png,a.png\n", "received path, path"),
    "no columns": ("\n\n", "received none"),
    "no rows": ("path,label\n", "expected images in .* received none"),
    "short row": ("path,label\na.png,1\na.png\n", "expected 2 values in row 2 of 't.csv', received 1"),
    "long row": ("path,label\na.png,1,2\n", "expected 2 values in row 1 of 't.csv', received 3"),
    "some labels": (
        "path,label\na.png,1\na.png,\n",
        "expected a label in every row of 't.csv' or in none, received none in row 2",
    ),
    "some paths": ("path,label\n,1\na.png,1\n,1\n", "expected a path in every row .* rows 1, 3"),
    "some masks": ("path,mask\na.png,a.png\na.png,\n", "expected a mask in every row"),
    "missing file": ("path\na.png\nb.png\n", "files named in 't.csv' do not exist: '.*b.png'"),
    "missing mask": ("path,mask\na.png,c.png\n", "do not exist: '.*c.png'"),
    "ids twice": ("path,id\na.png,x\na.png,y\na.png,x\n", "id: expected each once in 't.csv', received several times 'x'"),
    "quotes": ('path\n"a.png\n', "as a table in UTF-8: unexpected end of data"),
    "encoding": (b"path\n\xe9.png\n", "as a table in UTF-8: "),
}


@pytest.mark.parametrize("case", CSVS)
def test_bad_csv(tmp_path, case: str) -> None:
    text, match = CSVS[case]
    put(tmp_path, "a.png")
    (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(match, tmp_path / "t.csv")


def test_only_files_that_are_wanted_must_exist(tmp_path) -> None:
    put(tmp_path, "a.png")
    (tmp_path / "t.csv").write_text("path\na.png\nb.png\n")
    assert open_source(tmp_path / "t.csv", images=":1").ids == ("a.png",)
    refused("do not exist", tmp_path / "t.csv", images="1:")


def test_the_same_path_twice_gets_ids_of_its_own(tmp_path) -> None:
    put(tmp_path, "a.png")
    (tmp_path / "t.csv").write_text("path\na.png\n./a.png\na.png\n")
    assert open_source(tmp_path / "t.csv").ids == ("a.png", "a.png #2", "a.png #3")


PARQUETS = {
    "no path": ({"file": ["a.png"], "label": [1]}, "^data: expected the columns path and, .* received file, label$"),
    "images inside": ({"image": [b"x"], "label": [1]}, "received image, label; name the folder of a Hugging Face dataset"),
    "numbers for paths": ({"path": [1]}, "expected text in the column path .* received 1"),
    "fractions": ({"path": ["a.png"], "label": [1.0]}, r"expected class indices or names .* received 1.0 \(float\)"),
    "truth values": ({"path": ["a.png"], "label": [True]}, r"received True \(bool\)"),
    "some labels": ({"path": ["a.png"] * 2, "label": [None, 1]}, "expected a label in every row .* row 1"),
    "ids twice": ({"path": ["a.png"] * 2, "id": [1, 1]}, "received several times '1'"),
}


@pytest.mark.parametrize("case", PARQUETS)
def test_bad_parquet(tmp_path, case: str) -> None:
    columns, match = PARQUETS[case]
    put(tmp_path, "a.png")
    refused(match, make_table(tmp_path, columns, "parquet"))


def test_parquet_that_cannot_be_read(tmp_path, monkeypatch) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and nothing more")
    refused("data: cannot read .*t.parquet", tmp_path / "t.parquet")
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(r"'t.parquet' needs pyarrow.*pip install 'vitexplain\[evaluate\]'", tmp_path / "t.parquet")
