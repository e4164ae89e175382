"""``vitexplain evaluate`` and ``vitexplain protocols``: what they write and print, and one-line errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from vitexplain.cli import app
from vitexplain.evaluate import PROTOCOLS
from vitexplain.evaluate.results import Results

Run = Callable[..., Result]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current directory, with pictures in folders by class, and masks of them in a table."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    lines = ["path,label,mask"]
    for i in range(4):
        name = ("cat", "dog")[i % 2]
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((40, 30)).save(f"photos/{name}/{i}.png")
        Image.fromarray(rng.integers(0, 2, (30, 40), dtype=np.uint8) * 255).save(f"mask{i}.png")
        lines.append(f"photos/{name}/{i}.png,{name},mask{i}.png")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def run(folder) -> Run:  # noqa: ARG001 (it is the current directory)
    return lambda *arguments: CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_tables_on_screen_and_everything_in_the_folder(run, folder) -> None:
    result = run(
        *(
            "table.csv",
            "--output",
            "out",
            "-m",
            "rollout",
            "-m",
            "gmar:norm=l2",
            "-p",
            "perturbation",
            "-p",
            "localisation",
        ),
        *("--explain", "pred", "--explain", "gt", "--bootstrap", "20", "--gallery", "2", "--dtype", "bfloat16"),
    )
    assert result.exit_code == 0, result.output
    for text in ("rollout", "GMAR", "centre prior", "mIoU", "out/report.html"):
        assert text in result.stdout, text
    results = Results.read(folder / "out" / "results.json")
    assert list(results.methods)[:2] == ["rollout", "gmar:norm=l2"]
    assert results.settings["dtype"] == "bfloat16"
    assert {column.explained for column in results.columns} == {"pred", "gt"}
    for name in ("results.md", "report.html", "per_image/settings.json", "curves"):
        assert (folder / "out" / name).exists(), name


def test_options_reach_the_evaluation(run, folder) -> None:
    options = {
        "--images": "1:3",
        "--resize": "squash",
        "--batch": "1",
        "--forward-batch": "9",
        "--explain-dtype": "bfloat16",
        "--seed": "5",
        "--backend": "torch",
        "--device": "cpu",
    }
    flags = [text for pair in options.items() for text in pair]
    result = run("photos", "--output", "out", "-m", "rollout", "-p", "saco", "--no-controls", "--bootstrap", "7", *flags)
    assert result.exit_code == 0, result.output
    results = Results.read(folder / "out" / "results.json")
    settings = results.settings
    assert list(results.methods) == ["rollout"]
    assert settings["data"]["images"] == 2
    assert settings["model"]["resize"] == "squash"
    wanted = {"batch": 1, "forward_batch": 9, "explain_dtype": "bfloat16", "seed": 5, "backend": "torch", "bootstrap": 7}
    assert {name: settings[name] for name in wanted} == wanted
    again = run("photos", "--output", "out", "-m", "rollout", "-p", "saco", "--seed", "6")
    assert again.exit_code == 1
    assert "holds an evaluation with other settings" in again.stderr
    assert run("photos", "--output", "out", "-m", "rollout", "-p", "saco", "--seed", "6", "--overwrite").exit_code == 0


def test_all_means_the_methods_of_this_library(run, folder) -> None:
    result = run("photos", "--output", "out", "-m", "all", "-p", "average_drop", "--images", ":1", "--bootstrap", "5")
    assert result.exit_code == 0, result.output
    labels = list(Results.read(folder / "out" / "results.json").methods)
    assert {"tokentm", "iba", "lrp", "random"} <= set(labels)
    assert "smoothgrad" not in labels
    result = run("photos", "--output", "out", "-m", "gmar", "-m", "all", "-m", "typo")
    assert "unknown method 'typo'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--output", "out"], "nowhere"),
        (["photos", "--output", "x" * 300], "output: cannot use the folder"),
        (["photos", "--output", "table.csv"], "output: expected a folder, received the file 'table.csv'"),
        (["photos", "--output", "out", "-m", "tokentn"], "unknown method 'tokentn': did you mean tokentm"),
        (["photos", "--output", "out", "-m", "gmar:norm=l3"], "expected one of 'l1', 'l2', received 'l3'"),
        (["photos", "--output", "out", "-p", "sacco"], "unknown protocol 'sacco': did you mean saco"),
        (["photos", "--output", "out", "-p", "localisation"], "needs masks, and 'photos' (imagefolder) has none"),
        (["photos/cat", "--output", "out", "--explain", "gt"], "'gt' needs labels, and 'cat' (folder) has none"),
        (["photos", "--output", "out", "--explain", "label"], "expected pred or gt, received 'label'"),
        (["photos", "--output", "out", "--split", "test"], "split"),
        (["photos", "--output", "out", "--images", "9:"], "images"),
        (["photos", "--output", "out", "--model", "vit_smal_patch16_224"], "unknown model 'vit_smal_patch16_224'"),
        (["photos", "--output", "out", "--dtype", "int8"], "dtype: expected one of float32"),
    ],
)
def test_errors_are_one_line(run, folder, arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (folder / "out").exists()


def test_a_photo_that_cannot_be_read_is_named_and_left_out(run, folder) -> None:
    (folder / "photos" / "cat" / "broken.jpg").write_bytes(b"no")
    result = run("photos", "--output", "out", "-m", "rollout", "-p", "average_drop", "--bootstrap", "5")
    assert result.exit_code == 0, result.output
    assert "left out: cat/broken.jpg" in result.stderr


def test_an_interruption_says_how_to_go_on(run, monkeypatch) -> None:
    import vitexplain.evaluate

    def interrupted(*arguments: object, progress: Callable[[int, int], None], **settings: object) -> None:  # noqa: ARG001
        progress(3, 4)
        raise KeyboardInterrupt

    monkeypatch.setattr(vitexplain.evaluate, "evaluate", interrupted)
    result = run("photos", "--output", "out")
    assert result.exit_code == 1
    assert "error: interrupted after 3 of 4 images; the same command goes on from there" in result.stderr


def test_protocols_are_listed_with_source_and_options() -> None:
    result = CliRunner().invoke(app, ["protocols"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for name, kind in PROTOCOLS.items():
        assert name in result.stdout
        for option in kind.options():
            assert f"{option.name}={option.default}" in result.stdout
    listed = json.loads(CliRunner().invoke(app, ["protocols", "--json"]).stdout)
    assert [row["name"] for row in listed] == list(PROTOCOLS)
    for row, kind in zip(listed, PROTOCOLS.values(), strict=True):
        assert row["source"] == kind.source
        assert [option["name"] for option in row["options"]] == [option.name for option in kind.options()]
