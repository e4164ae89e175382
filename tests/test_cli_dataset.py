"""``vitexplain dataset``: what it writes and prints, and one-line errors."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from vitexplain import dataset
from vitexplain.cli import app
from vitexplain.loading import load_model

Run = Callable[..., Result]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current directory, with photos in class folders, one of which cannot be read."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(7):
        path = tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((40, 30)).save(path)
    (tmp_path / "photos" / "cat" / "empty.jpg").touch()
    return tmp_path


@pytest.fixture
def run(folder) -> Run:  # noqa: ARG001 (it is the current directory)
    return lambda *arguments: CliRunner().invoke(app, ["dataset", *map(str, arguments)])


def test_maps_index_and_a_few_lines_on_screen(run) -> None:
    result = run("photos", "--output", "out/maps.zarr", "--batch", "2", "--workers", "0")
    assert result.exit_code == 0, result.output
    assert "8 images in" in result.stdout
    assert "images/s, batch 2, on cpu" in result.stdout
    assert "the device waited for data" in result.stdout
    assert "1 images could not be read: reasons in the index" in result.stderr
    lines = result.stdout.splitlines()
    assert lines[-2].endswith("out/maps.zarr")
    assert lines[-1].endswith("out/maps.parquet")
    store = dataset.open("out/maps.zarr")
    assert store.methods == ("tokentm",)
    assert len(store) == 8
    again = run("photos", "--output", "out/maps.zarr", "--workers", "0")
    assert again.exit_code == 0, again.output
    assert "8 of 8 images stood in the store already" in again.stdout
    assert "images/s" not in again.stdout


def test_every_option_does_something(run, folder) -> None:
    torch.save(load_model("demo").model.state_dict(), "weights.pt")
    changes = {
        "--weights": "weights.pt",
        "--method": "gmar:norm=l2",
        "--target": "top2",
        "--batch": 3,
        "--dtype": "bf16",
        "--images": ":5",
        "--resize": "squash",
        "--shard": 4,
        "--backend": "torch",
        "--no-deterministic": None,
    }
    assert run("photos", "--output", "maps.zarr", "--batch", "2", "--workers", "0").exit_code == 0
    before = dataset.open("maps.zarr").settings
    for number, (option, value) in enumerate(changes.items()):
        batch = () if option == "--batch" else ("--batch", 2)
        given = (option,) if value is None else (option, value)
        result = run("photos", "--output", f"{number}.zarr", "--workers", "1", *batch, *given)
        assert result.exit_code == 0, result.output
        after = dataset.open(f"{number}.zarr").settings
        if option == "--weights":
            assert after["model"] == before["model"]
        else:
            assert after != before, option
    named = {f"--{name.replace('_', '-')}" for name in inspect.signature(dataset.run).parameters} | {"--images", "--weights"}
    assert set(changes) - {"--method", "--no-deterministic"} <= named
    assert (folder / "0.parquet").is_dir()


def test_the_report_as_json_and_nothing_else(run) -> None:
    result = run(
        "photos", "--output", "maps.zarr", "--batch", "2", "--workers", "0", "--json", "--no-cuda-graph", "--device", "cpu"
    )
    report = json.loads(result.stdout)
    assert (report["total"], report["ok"], report["unreadable"]) == (8, 7, 1)
    assert report["output"].endswith("maps.zarr")


def test_overwrite_begins_anew(run) -> None:
    assert run("photos", "--output", "maps.zarr", "--batch", "2", "--workers", "0").exit_code == 0
    refused = run("photos", "--output", "maps.zarr", "--target", "label", "--workers", "0")
    assert refused.exit_code == 1
    assert 'target: "pred" there, "label" asked for' in refused.stderr
    assert "--overwrite" in refused.stderr
    result = run("photos", "--output", "maps.zarr", "--target", "label", "--workers", "0", "--overwrite", "--split-nothing")
    assert result.exit_code == 2, "an unknown option"
    result = run("photos", "--output", "maps.zarr", "--target", "label", "--workers", "0", "--overwrite", "--batch", "2")
    assert result.exit_code == 0, result.output
    assert dataset.open("maps.zarr").settings["target"] == "label"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "--output", "maps.zarr"), "there is no file or folder "),
        (("photos", "--output", "maps"), "expected a name that ends in .zarr, received"),
        (("photos", "--output", "s3://bucket/maps.zarr"), "expected a path of a file system"),
        (("photos", "--output", "maps.zarr", "--method", "tokenm"), "did you mean tokentm"),
        (("photos", "--output", "maps.zarr", "--model", "vit_base_patch16_225"), "unknown model"),
        (("photos", "--output", "maps.zarr", "--target", "topp"), "target: expected"),
        (
            ("photos", "--output", "maps.zarr", "--dtype", "fp8"),
            "dtype: expected one of float32 (fp32), bfloat16 (bf16), float16 (fp16), received 'fp8'",
        ),
        (("photos", "--output", "maps.zarr", "--batch", "none"), "batch: expected a number or 'auto', received 'none'"),
        (("photos", "--output", "maps.zarr", "--split", "test"), "split: expected none"),
        (("photos", "--output", "maps.zarr", "--images", "5"), "images: expected a slice"),
        (("photos", "--output", "maps.zarr", "--actors", "2"), "actors: expected them with engine 'ray' alone"),
        (("photos", "--output", "photos/cat/0.png/maps.zarr"), "output: "),
        (("photos", "--output", "/proc/none/maps.zarr"), "output: "),
    ],
)
def test_errors_are_one_line(run, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not Path("maps.zarr").exists()


def test_an_interrupted_run_says_that_it_goes_on(run, monkeypatch) -> None:
    def interrupted(*_arguments, progress, **_settings):
        progress(dataset.Progress(3, 8, 3, 1.0, 0.0))
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "run", interrupted)
    result = run("photos", "--output", "maps.zarr")
    assert result.exit_code == 1
    assert "interrupted; the same command goes on from the last shard that is whole" in result.stderr


def test_a_source_of_which_nothing_can_be_read_is_an_error(run, folder) -> None:
    (folder / "broken").mkdir()
    (folder / "broken" / "a.jpg").write_bytes(b"no picture")
    result = run("broken", "--output", "maps.zarr", "--batch", "1", "--workers", "0")
    assert result.exit_code == 1
    assert "none of the 1 images could be read" in result.stderr
    assert dataset.open("maps.zarr").row(0)["status"] == "unreadable"
