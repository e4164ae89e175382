"""Every file of examples/ runs as its documentation says, without a network, and shows what it promises."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
GUIDES = EXAMPLES.parent / "docs"


@dataclass(frozen=True)
class Example:
    """How a script is run, and what is looked at afterwards.

    Attributes:
        check: of the folder it ran in and what it printed; raises where something is missing.
        arguments: of the command line; the defaults are what a newcomer runs, and the tests with them.
        needs: packages of extras.
        marks: of pytest.
    """

    check: Callable[[Path, str], None]
    arguments: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    marks: tuple[pytest.MarkDecorator, ...] = field(default=())


def number(printed: str, pattern: str) -> float:
    """The one group of a pattern that must be in what was printed."""
    found = re.search(pattern, printed, re.MULTILINE)
    assert found, f"{pattern!r} is not in:\n{printed}"
    return float(found.group(1))


def colours(path: Path) -> int:
    """Of a picture; one that is blank has few."""
    with Image.open(path) as picture:
        return len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0))


def explain_a_photo(folder: Path, printed: str) -> None:
    assert "cat (" in printed
    assert "(8, 8) patches by tokentm" in printed
    with Image.open(folder / "explained.png") as picture:
        assert picture.size == (673, 448)  # the photo's own proportions


def compare_methods(folder: Path, printed: str) -> None:
    assert "5 maps from 1 forward" in printed
    assert colours(folder / "compared.png") > 5000


def pictures(folder: Path, printed: str) -> None:
    assert "cat rather than dog" in printed
    for name in ("overlay", "contrast", "evolution"):
        assert colours(folder / "pictures" / f"{name}.png") > 2000


def own_model(folder: Path, printed: str) -> None:
    assert number(printed, r"right on (\d+)%") >= 95
    for method in ("tokentm", "transformer_mm", "rollout"):  # one patch of 25 by chance
        assert number(printed, rf"{method}: .* on (\d+)%") >= 70
    assert colours(folder / "own_model.png") > 2000


def own_method(folder: Path, printed: str) -> None:
    assert number(printed, r"dense formula: (\S+) of") < 1e-4
    assert colours(folder / "own_method.png") > 2000


def hugging_face(folder: Path, printed: str) -> None:
    assert "Dinov2ForImageClassification says" in printed
    assert "(8, 8) patches" in printed
    with Image.open(folder / "hugging_face.png") as picture:
        assert picture.size == (448, 448)


def text(folder: Path, printed: str) -> None:
    for label, word in {"friendly: 'the": "great", "unfriendly: 'a": "dull", "friendly: 'lovely": "lovely"}.items():
        assert re.search(rf"^{label}.*\n  gmar: {word}\n  legrad: {word}\n  conservative_lrp: {word}$", printed, re.MULTILINE)
    assert colours(folder / "text.png") > 100


def similarity(folder: Path, printed: str) -> None:
    values = {prompt: number(printed, rf"{prompt}: (-?[\d.]+)") for prompt in ("cat", "dog", "airplane")}
    assert values["cat"] > values["dog"] > values["airplane"]
    assert "maps (1, 3, 8, 8)" in printed
    assert (folder / "similarity.png").exists()


def high_resolution(folder: Path, printed: str) -> None:
    assert "168 × 112 pixels, 28 × 42 patches, 1,177 tokens" in printed
    assert number(printed, r"two maps: (\S+) of") < 1e-4
    assert number(printed, r"checkpoint=True: (\S+) s, peak memory so far [\d,]+ MiB") >= 0
    with Image.open(folder / "high_resolution.png") as picture:
        assert picture.size == (451, 300)


def data_set(folder: Path, printed: str) -> None:
    assert "6 explained, 0 found" in printed
    assert "maps (6, 2, 8, 8)" in printed
    assert printed.count("'maps': (3, 2, 8, 8)") == 2
    assert printed.count("streamed ") == 2
    assert (folder / "maps.zarr" / "zarr.json").exists()


def cluster(folder: Path, printed: str) -> None:
    assert "4 images by 1 actor(s); complete: True" in printed
    assert (folder / "cluster.zarr" / "zarr.json").exists()


def evaluate_methods(folder: Path, printed: str) -> None:
    mean = r"(-?[\d.]+)"
    least_first = number(printed, rf"^negative: tokentm {mean}")
    assert number(printed, rf"^positive: .*negated tokentm {mean}") == least_first  # the same patches in the same order
    results = json.loads((folder / "results" / "results.json").read_text())
    assert {"tokentm", "rollout"} <= set(results["methods"])
    assert (folder / "results" / "report.html").stat().st_size > 10_000


def side_by_side(folder: Path, printed: str) -> None:
    assert number(printed, r"vitexplain: (\S+) apart") < 1e-4
    assert -1 <= number(printed, r"correlation (-?[\d.]+)") <= 1
    assert math.isfinite(number(printed, r"Pixel-Flipping: legrad (\S+),"))
    assert math.isfinite(number(printed, r"a random map (\S+)\n"))
    assert colours(folder / "side_by_side.png") > 5000


def fast_loop(folder: Path, printed: str) -> None:  # noqa: ARG001
    assert number(printed, r"([\d.,]+) images/s") > 0
    assert "maps (2, 8, 8)" in printed


RAY = (
    pytest.mark.xdist_group("ray"),  # beside tests/dataset/test_on_ray.py, in one process
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
)
# Named here, or a test fails: a script that nobody runs is a script that no longer runs.
SCRIPTS: dict[str, Example] = {
    "explain_a_photo": Example(explain_a_photo),
    "compare_methods": Example(compare_methods),
    "pictures": Example(pictures),
    "own_model": Example(own_model),
    "own_method": Example(own_method),
    "hugging_face": Example(hugging_face, needs=("transformers",)),
    "text": Example(text, needs=("transformers",)),
    "similarity": Example(similarity),
    "high_resolution": Example(high_resolution),
    "data_set": Example(data_set, needs=("zarr", "pyarrow")),
    "cluster": Example(cluster, needs=("ray", "zarr", "pyarrow"), marks=RAY),
    "evaluate_methods": Example(evaluate_methods, needs=("sklearn", "pyarrow", "jinja2")),
    "side_by_side": Example(side_by_side, needs=("captum", "pytorch_grad_cam", "quantus")),
    "fast_loop": Example(fast_loop, ("--batch", "2", "--batches", "2")),
}
# It trains a model on data and with a teacher that are not part of the repository, for a quarter of an hour.
NOT_RUN = {"train_demo_model"}
NOTEBOOKS = {"first_hour"}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SCRIPTS) | NOT_RUN
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == NOTEBOOKS
    assert {path.suffix for path in EXAMPLES.iterdir() if path.name != "__pycache__"} == {".py", ".ipynb"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=example.marks) for name, example in SCRIPTS.items()])
def test_a_script_shows_what_it_promises(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = SCRIPTS[name]
    for package in example.needs:
        pytest.importorskip(package, reason=f"{package} is an extra, and is not installed")
    pytest.importorskip("skimage", reason="scikit-image, whose photos are explained, is an extra, and is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *example.arguments])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    example.check(tmp_path, capsys.readouterr().out)


@pytest.mark.parametrize("name", sorted({*SCRIPTS, *NOT_RUN}))
def test_a_script_says_how_it_is_run(name: str) -> None:
    documentation = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8")))
    assert documentation
    assert f"python examples/{name}.py" in documentation


def test_a_network_is_asked_for_by_name_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["explain_a_photo.py", "--model", "no_such_model"])
    with pytest.raises(Exception, match="no_such_model"):
        runpy.run_path(str(EXAMPLES / "explain_a_photo.py"), run_name="__main__")
    assert "wrote" not in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(NOTEBOOKS))
def test_a_notebook_runs_to_its_end(name: str, tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="scikit-image, whose photo is explained, is an extra, and is not installed")
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells), "outputs are not kept in the repository"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # tests run in parallel processes
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=environment)  # a cell that fails fails the test
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    printed = "".join(output.text for cell in cells for output in cell.outputs if output.output_type == "stream")
    assert len(pictures) == 5
    assert "cat (1, 8, 8)" in printed
    assert number(printed, r"attcat, the 20 largest hidden: (\d+)%") < number(printed, r"20 at random hidden: (\d+)%")
    with np.load(tmp_path / "explanation.npz") as arrays:
        assert arrays["maps"].shape == (1, 8, 8)


def test_guides_show_parts_that_are_there() -> None:
    shown = {
        (file, part)
        for page in GUIDES.rglob("*.md")
        for file, part in re.findall(r'--8<-- "examples/([\w.]+):(\w+)"', page.read_text(encoding="utf-8"))
    }
    assert shown
    for file, part in sorted(shown):
        source = (EXAMPLES / file).read_text(encoding="utf-8")
        for end in ("start", "end"):
            assert source.count(f"# --8<-- [{end}:{part}]") == 1, f"{file}: {end} of {part}"
