"""``vitexplain show`` and ``vitexplain summary``: what they print and draw, and one-line errors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from tests.dataset.made_store import GRID, make_photos, make_store
from vitexplain.cli import app

Run = Callable[..., Result]

FIRST, SECOND = "class_00/photo 0.jpg", "class_00/photo 1.jpg"
LOST = {5: ("unreadable", "photo: cannot read '{path}': broken data"), 6: ("not_finite", None)}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


@pytest.fixture
def make(folder) -> Callable[..., Path]:
    """A store ``maps.zarr`` of photos in ``photos``."""
    photos = make_photos(folder / "photos")
    lost = {
        row: (status, reason and reason.format(path=photos / "class_01" / "photo 1.jpg"))
        for row, (status, reason) in LOST.items()
    }
    return lambda **options: make_store(folder / "maps.zarr", photos, lost=lost, **options)


@pytest.fixture
def run(folder) -> Run:  # noqa: ARG001 (it is the current directory)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def _one_line_error(result: Result, message: str) -> None:
    assert result.exit_code == 1, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert re.search(f"^error: .*{message}", lines[0]), lines[0]


def _drawn(result: Result) -> list[str]:
    return re.findall(r"^heat maps: (.*)$", result.stdout, re.MULTILINE)


def _size(path: Path | str) -> tuple[int, int]:
    with Image.open(path) as picture:
        picture.load()
        return picture.size


# -- show --------------------------------------------------------------------------------------------------------------


def test_one_image_in_the_current_folder(run, make, folder) -> None:
    make()
    result = run("show", "maps.zarr", "--id", FIRST)
    assert result.exit_code == 0, result.output
    assert _drawn(result) == ["class_00_photo_0_explained.png"]
    assert result.stderr == ""
    width, height = _size(folder / "class_00_photo_0_explained.png")
    assert width > height


def test_a_file_or_a_folder_for_one_image(run, make, folder) -> None:
    make()
    assert _drawn(run("show", "maps.zarr", "--row", "1", "--output", "a.pdf")) == ["a.pdf"]
    assert _drawn(run("show", "maps.zarr", "--row", "-1", "--output", "new/folder")) == [
        "new/folder/class_02_photo_3_explained.png"
    ]
    (folder / "dir.png").mkdir()
    assert _drawn(run("show", "maps.zarr", "--row", "1", "--output", "dir.png")) == ["dir.png/class_00_photo_1_explained.png"]


def test_several_images_and_methods_each_image_once(run, make) -> None:
    make(methods={"a": (GRID, False), "b": (GRID, True), "c": (GRID, False)})
    result = run("show", "maps.zarr", "--id", SECOND, "--row", "1", "--row", "0", "-m", "c", "-m", "b", "--output", "out")
    assert result.exit_code == 0, result.output
    assert _drawn(result) == ["out/class_00_photo_1_explained.png", "out/class_00_photo_0_explained.png"]
    three, four = _size(_drawn(result)[0]), _size(_drawn(run("show", "maps.zarr", "--row", "0"))[0])
    assert four[0] > three[0] > 3 * 448  # the photo, and two or three methods


def test_names_that_no_file_can_have(run, folder) -> None:
    data = folder / "photos"
    (data / "x").mkdir(parents=True)
    for name in ("a b", "a:b", "-.JPG", "*", "é" * 120, "A?b"):
        Image.new("RGB", (64, 64), "teal").save(data / "x" / f"{name}.png")
    make_store(folder / "maps.zarr", data)
    result = run("show", "maps.zarr", *(f"--row={row}" for row in range(6)))
    assert result.exit_code == 0, result.output
    names = _drawn(result)
    assert {path.name for path in folder.glob("*.png")} == set(names)
    assert len({name.casefold() for name in names}) == 6
    assert all(re.fullmatch(r"[\w.-]+", name) and len(name.encode()) < 255 for name in names)


def test_a_map_for_each_target_or_for_one(run, make) -> None:
    make(num_targets=3)
    every = _size(_drawn(run("show", "maps.zarr", "--row", "0"))[0])
    one = _size(_drawn(run("show", "maps.zarr", "--row", "0", "--target-index", "2"))[0])
    assert every[0] > one[0]
    _one_line_error(run("show", "maps.zarr", "--row", "0", "--target-index", "3"), "target-index: expected 0 to 2, received 3")


def test_photos_that_have_moved_are_given_anew(run, make, folder) -> None:
    make()
    first = run("show", "maps.zarr", "--row", "0", "--output", "there.png")
    shutil.move(folder / "photos", folder / "moved")
    without = run("show", "maps.zarr", "--row", "0", "--output", "without.png")
    found = run("show", "maps.zarr", "--row", "0", "--source", "moved", "--output", "found.png")
    assert [result.exit_code for result in (first, without, found)] == [0, 0, 0]
    assert re.fullmatch(r"note: the maps are drawn without photos: data: .*photos'.*--source\n", without.stderr)
    assert found.stderr == ""
    assert (folder / "found.png").read_bytes() == (folder / "there.png").read_bytes()
    assert _size("without.png")[0] < _size("found.png")[0]


def test_another_photo_is_not_drawn_under_the_maps(run, make, folder) -> None:
    make()
    (folder / "photos" / "class_00" / "photo 0.jpg").unlink()
    result = run("show", "maps.zarr", *(f"--row={row}" for row in (0, 1, 2, 3, 4)), "--output", "out")
    assert result.exit_code == 0, result.output
    assert result.stderr == (
        "note: 'class_00/photo 0.jpg' is drawn without its photo: photo: expected 'class_00/photo 0.jpg' in 'photos', "
        "received none of that name\n"
    )
    assert len(_drawn(result)) == 5


def test_many_photos_that_are_gone_are_counted(run, make, folder) -> None:
    make()
    shutil.copytree(folder / "photos" / "class_02", folder / "few" / "class_02")
    result = run("show", "maps.zarr", "--source", "few", *(f"--row={row}" for row in (0, 1, 2, 3, 4, 8)), "--output", "out")
    notes = result.stderr.splitlines()
    assert len(notes) == 4
    assert notes[-1] == "note: 2 more are drawn without their photos"
    assert len(_drawn(result)) == 6


def test_an_archive_with_another_content_is_not_drawn(run, folder) -> None:
    def archive(colour: int) -> None:
        np.savez("data.npz", images=np.full((5, 64, 64, 3), colour, dtype=np.uint8))

    archive(10)
    make_store(folder / "maps.zarr", folder / "data.npz", labels=False)
    assert run("show", "maps.zarr", "--row", "0", "--row", "1", "--output", "out").stderr == ""
    archive(11)
    result = run("show", "maps.zarr", "--row", "0", "--row", "1", "--output", "out")
    assert result.exit_code == 0
    assert re.fullmatch(r"note: the maps are drawn without photos: .*'data.npz' .* its content has changed; .*\n", result.stderr)


def test_the_share_of_the_maps(run, make) -> None:
    make()
    colours = {}
    for alpha in ("0", "1"):
        path = f"{alpha}.png"
        assert run("show", "maps.zarr", "--row", "0", "--alpha", alpha, "--output", path).exit_code == 0
        with Image.open(path) as picture:
            inside = np.asarray(picture.convert("RGB"))[-400:-200, 48:-48].astype(float)
        colours[alpha] = [half.mean((0, 1)) for half in np.array_split(inside, 2, axis=1)]
    assert np.abs(colours["0"][0] - colours["0"][1]).max() < 3  # the photo twice
    assert np.abs(colours["1"][0] - colours["1"][1]).max() > 50
    assert run("show", "maps.zarr", "--row", "0", "--alpha", "2").exit_code == 2


def test_images_without_maps_do_not_stop_the_others(run, make) -> None:
    make()
    wanted = ("--id", "class_00/photo_0.jpg", "--row", "5", "--row", "6", "--row", "12", "--row", "1")
    result = run("show", "maps.zarr", *wanted, "--output", "out")
    assert result.exit_code == 1
    assert _drawn(result) == ["out/class_00_photo_1_explained.png"]
    lines = result.stderr.splitlines()
    assert re.search("unknown id 'class_00/photo_0.jpg': did you mean .*class_00/photo 0.jpg", lines[0])
    assert re.fullmatch(
        r"error: 'class_01/photo 1.jpg' has no maps: unreadable \(photo: cannot read '.*': broken data\)", lines[1]
    )
    assert lines[2] == "error: 'class_01/photo 2.jpg' has no maps: not_finite"
    assert "expected a row from 0 to 11, received 12" in lines[3]
    assert lines[4] == "error: 4 of 5 images could not be drawn"
    _one_line_error(run("show", "maps.zarr", "--row", "5"), "has no maps: unreadable")


def test_an_image_that_a_run_has_not_come_to(run, make) -> None:
    make(shards=[0])
    _one_line_error(run("show", "maps.zarr", "--row", "7"), "row 7 is not done")
    assert run("show", "maps.zarr", "--row", "3").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected --id or --row"),
        (("--row", "0", "--method", "rolout"), "unknown method 'rolout': did you mean rollout"),
        (("--row", "0", "--target-index", "1"), "expected none, as one class was explained an image, received 1"),
        (("--row", "0", "--output", "a.txt"), "expected a file ending in .png, .*received 'a.txt'"),
        (("--row", "0", "--output", "photos/class_00/photo 0.jpg/a.png"), "cannot make the folder .*photo 0.jpg"),
        (("--row", "0", "--row", "1", "--output", "a.png"), "expected a folder for several images, received 'a.png'"),
        (("--row", "0", "--row", "1", "--output", "photos/class_00/photo 0.jpg/x"), "cannot make the folder .*Not a directory"),
        (("--row", "0", "--output", "maps.zarr"), "expected a place outside the store"),
        (("--row", "0", "--output", "maps.parquet/a.png"), "expected a place outside the store"),
    ],
)
def test_bad_requests_are_refused(run, make, folder, arguments: tuple[str, ...], message: str) -> None:
    make()
    before = sorted(folder.rglob("*"))
    _one_line_error(run("show", "maps.zarr", *arguments), message)
    assert sorted(folder.rglob("*")) == before


def test_the_folder_of_a_picture_is_made(run, make, folder) -> None:
    make()
    assert run("show", "maps.zarr", "--row", "0", "--output", "deep/er/a.png").exit_code == 0
    assert (folder / "deep" / "er" / "a.png").exists()


@pytest.mark.parametrize("command", [("show", "--row", "0"), ("summary",)])
def test_what_is_not_a_store(run, folder, command: tuple[str, ...]) -> None:
    name, *options = command
    _one_line_error(run(name, "absent.zarr", *options), "there is no such folder")
    (folder / "other.zarr").mkdir()
    (folder / "other.zarr" / "x").touch()
    _one_line_error(run(name, "other.zarr", *options), "store: ")


# -- summary -----------------------------------------------------------------------------------------------------------


def _log(folder: Path, *runs: dict[str, object]) -> None:
    (folder / "maps.parquet" / "_runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))


RUN = {
    "started": "2026-01-02T03:04:05.678901+00:00",
    "finished": "2026-01-02T03:05:05+00:00",
    "images": 12345,
    "unreadable": 1,
    "seconds": 60.04,
    "images_per_second": 205.75,
    "waiting_share": 0.0312,
    "bare_images_per_second": 210.0,
    "ratio_to_bare": 0.98,
    "engine": "local",
    "workers": 8,
    "device": "cuda",
    "memory_mib": {"10%": 900, "90%": 905},
}


def test_everything_on_screen(run, make, folder) -> None:
    make(methods={"gmar:norm=l2": (GRID, False), "b": (GRID, True)})
    _log(folder, RUN, {"started": "2026-02-03T04:05:06", "images": None, "ratio_to_bare": None}, {})
    result = run("summary", "maps.zarr")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for line in (
        r"model +small_vit, weights 0123456789ab, resize model",
        r"data +photos \(imagefolder\), .*photos",
        r"methods +gmar:norm=l2, b",
        r"target +pred",
        r"computed +float32 on cpu, backend auto, batches of 4",
        r"versions +python 3.12, torch 2.9.0",
        r"done +12 of 12 images, 3 of 3 shards",
        r"status +ok 10, unreadable 1, not_finite 1",
        r"reasons +1 × unreadable: photo: cannot read '…': broken data",
        r"accuracy +72.73 % \(8 of 11 labelled images\)",
        r"on disk +\d+\.\d KiB \(maps .*, index .*\)",
        r"2026-01-02 03:04 +12,345 +60.0 +205.8 +3.1% +0.98 +local, cuda, 8 workers",
        r"2026-02-03 04:05 +– +– +– +– +– +–",
    ):
        assert re.search(line, result.stdout), line
    assert not list(folder.glob("*.png"))


def test_json_is_all_there_is_on_standard_output(run, make, folder) -> None:
    make()
    _log(folder, RUN)
    result = run("summary", "maps.zarr", "--json", "--output", "pictures", "--verify")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["store"] == "maps.zarr"
    assert content["model"]["weights_sha256"] == "0123456789abcdef" * 4
    assert content["data"]["path"] == str(folder / "photos")
    assert content["progress"] == {"images": 12, "images_of": 12, "shards": 3, "shards_of": 3, "complete": True}
    assert content["status"] == {"ok": 10, "unreadable": 1, "not_finite": 1}
    assert content["reasons"] == [{"status": "unreadable", "reason": "photo: cannot read '…': broken data", "images": 1}]
    assert content["accuracy"] == {"value": 8 / 11, "correct": 8, "images": 11}
    files = {name: [path for path in (folder / f"maps.{name}").rglob("*") if path.is_file()] for name in ("zarr", "parquet")}
    sizes = {name: sum(path.stat().st_size for path in paths) for name, paths in files.items()}
    assert content["bytes"] == {"maps": sizes["zarr"], "index": sizes["parquet"], "all": sum(sizes.values())}
    assert content["runs"] == [RUN]
    assert (content["verified"], content["problems"]) == (True, [])
    assert content["pictures"] == ["pictures/class_means.png", "pictures/contact_sheet.png"]
    assert json.loads(run("summary", "maps.zarr", "--json").stdout)["verified"] is None


def test_files_that_are_not_what_was_written(run, make, folder) -> None:
    make()
    whole = run("summary", "maps.zarr", "--verify")
    assert whole.exit_code == 0, whole.output
    assert "every file is as it was written" in whole.stdout
    files = sorted(path for path in (folder / "maps.zarr" / "rollout" / "maps").iterdir() if path.name != "zarr.json")
    files[0].write_bytes(files[0].read_bytes()[:-1] + b"?")
    files[1].unlink()
    result = run("summary", "maps.zarr", "--verify")
    assert result.exit_code == 1
    assert "done" in result.stdout
    problems = result.stderr.splitlines()
    assert len(problems) == 2
    for path, problem in zip(files, problems, strict=False):
        assert problem.startswith("error: ")
        assert path.name in problem
    as_json = run("summary", "maps.zarr", "--verify", "--json")
    assert as_json.exit_code == 1
    content = json.loads(as_json.stdout)
    assert content["verified"] is False
    assert [f"error: {problem}" for problem in content["problems"]] == problems


def test_the_last_of_many_runs(run, make, folder) -> None:
    make()
    _log(folder, *({**RUN, "images": number} for number in range(1001, 1013)))
    result = run("summary", "maps.zarr")
    assert "Runs, the last 10 of 12" in result.stdout
    assert "1,012" in result.stdout
    assert "1,002" not in result.stdout


def test_how_runs_ended(run, make, folder, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    make()
    ends = ("whole", "interrupted", "output: [full]")
    _log(folder, {**RUN, "images": 0, "started": "2020-01-01T00:00"}, *({**RUN, "ended": end} for end in ends))
    lines = [line.strip() for line in run("summary", "maps.zarr").stdout.splitlines() if "local, cuda" in line]
    assert [line.partition("workers")[2] for line in lines] == ["", ", ended: interrupted", ", ended: output: [full]"]
    _log(folder, {**RUN, "images": 0})
    assert "Runs" not in run("summary", "maps.zarr").stdout


def test_a_damaged_file_does_not_hide_the_rest(run, make, folder) -> None:
    make()
    file = next(path for path in (folder / "maps.zarr" / "rollout" / "maps").iterdir() if path.name != "zarr.json")
    file.unlink()
    result = run("summary", "maps.zarr", "--verify", "--output", "pictures", "--json")
    assert result.exit_code == 1
    content = json.loads(result.stdout)
    assert content["pictures"] == []
    assert len(content["problems"]) == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 2  # the file that is absent, and that no picture can be drawn without it
    assert all(line.startswith("error: ") and file.name in line for line in lines)
    shown = run("show", "maps.zarr", *(f"--row={row}" for row in range(12)), "--output", "out")
    assert shown.exit_code == 1
    assert len(_drawn(shown)) == 6
    assert shown.stderr.splitlines()[-1] == "error: 6 of 12 images could not be drawn"


def test_pictures_over_those_of_before(run, make, folder) -> None:
    make(methods={"a": (GRID, False), "b": (GRID, True)})
    first = run("summary", "maps.zarr", "--output", "deep/pictures", "--count", "2")
    assert first.exit_code == 0, first.output
    paths = [folder / "deep" / "pictures" / name for name in ("class_means.png", "contact_sheet.png")]
    assert first.stdout.splitlines()[-2:] == [str(path.relative_to(folder)) for path in paths]
    before = [path.read_bytes() for path in paths]
    assert run("summary", "maps.zarr", "--output", "deep/pictures", "--count", "2").exit_code == 0
    assert [path.read_bytes() for path in paths] == before
    assert run("summary", "maps.zarr", "--output", "deep/pictures", "--method", "b", "--count", "8").exit_code == 0
    assert all(path.read_bytes() != content for path, content in zip(paths, before, strict=True))
    assert _size(paths[1])[1] > 800


def test_pictures_without_photos(run, make, folder) -> None:
    make()
    shutil.move(folder / "photos", folder / "moved")
    result = run("summary", "maps.zarr", "--output", "pictures")
    assert result.exit_code == 0, result.output
    assert len(result.stderr.splitlines()) == 1
    assert "without photos" in result.stderr
    without = (folder / "pictures" / "contact_sheet.png").read_bytes()
    found = run("summary", "maps.zarr", "--output", "pictures", "--source", "moved")
    assert found.stderr == ""
    assert (folder / "pictures" / "contact_sheet.png").read_bytes() != without


def test_a_run_that_goes_on(run, make) -> None:
    make(shards=[1, 2], num_targets=2)
    result = run("summary", "maps.zarr", "--output", "pictures")
    assert result.exit_code == 0, result.output
    assert re.search("done +8 of 12 images, 2 of 3 shards", result.stdout)
    assert re.search("target +top2", result.stdout)
    verified = run("summary", "maps.zarr", "--verify")
    assert verified.exit_code == 0
    assert "verified: every file of the shards that are done is as it was written; 1 are not done yet" in verified.stdout


def test_a_store_without_any_shard(run, make, folder) -> None:
    make(shards=[])
    result = run("summary", "maps.zarr", "--output", "pictures")
    assert result.exit_code == 0, result.output
    assert re.search("done +0 of 12 images, 0 of 3 shards", result.stdout)
    assert "No shard is done yet" in result.stdout
    assert result.stderr == "note: no pictures, as no image has maps yet\n"
    assert not list((folder / "pictures").iterdir())
    content = json.loads(run("summary", "maps.zarr", "--json").stdout)
    assert content["progress"] == {"images": 0, "images_of": 12, "shards": 0, "shards_of": 3, "complete": False}
    assert content["accuracy"] is None


def test_no_labels_no_names(run, make) -> None:
    make(labels=False, names=None)
    result = run("summary", "maps.zarr", "--output", "pictures")
    assert result.exit_code == 0, result.output
    assert "accuracy" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "rolout"), "unknown method 'rolout': did you mean rollout"),
        (("--output", "file"), "cannot make the folder 'file': File exists"),
        (("--output", "maps.parquet/pictures"), "expected a place outside the store"),
        (("--output", "taken"), "cannot write 'taken/class_means.png': Is a directory"),
    ],
)
def test_bad_summaries_are_refused(run, make, folder, arguments: tuple[str, ...], message: str) -> None:
    make()
    (folder / "file").touch()
    (folder / "taken" / "class_means.png").mkdir(parents=True)
    _one_line_error(run("summary", "maps.zarr", *arguments), message)


def test_names_with_brackets_are_not_taken_for_styles(run, folder) -> None:
    photos = make_photos(folder / "[bold]photos[/bold]")
    make_store(folder / "[red]maps.zarr", photos, methods={"[i]a": (GRID, False)})
    result = run("summary", "[red]maps.zarr")
    assert result.exit_code == 0, result.output
    for text in ("[red]maps.zarr", "[bold]photos[/bold]", "[i]a"):
        assert text in result.stdout
