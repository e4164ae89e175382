"""The command line: what it writes and prints, its options, and one-line errors with exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import vitexplain
from vitexplain import visualize
from vitexplain.cli import app
from vitexplain.methods import REGISTRY, own_methods
from vitexplain.models import FAMILIES

Run = Callable[..., Result]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current directory, with a few photos."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (60, 40)), ("b.jpg", (30, 50)), ("c.png", (40, 40))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(name)
    (tmp_path / "bad.jpg").write_text("not a picture")
    return tmp_path


@pytest.fixture
def run(folder) -> Run:  # noqa: ARG001 (it is the current directory)
    """Runs the command in the folder of photos."""
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def _one_line_error(result: Result, message: str, code: int = 1) -> None:
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]


def test_one_photo(run, folder) -> None:
    result = run("explain", "a.png", "--top", "3")
    assert result.exit_code == 0, result.output
    assert "a_explained.png" in result.stdout
    assert result.stdout.count(" %") == 3
    assert "explained" in result.stdout
    with Image.open(folder / "a_explained.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height


@pytest.mark.parametrize("name", ["out.png", "out.jpg", "out.svg", "out.pdf", "OUT.PNG"])
def test_the_output_decides_the_format(run, folder, name: str) -> None:
    assert run("explain", "a.png", "--output", name).exit_code == 0
    assert (folder / name).stat().st_size > 1000


def test_the_folder_of_a_picture_is_made(run, folder) -> None:
    assert run("explain", "a.png", "--output", "deep/er/out.jpg").exit_code == 0
    assert (folder / "deep" / "er" / "out.jpg").exists()


def test_the_likeliest_classes(run) -> None:
    record = json.loads(run("explain", "a.png", "--target", "top3", "--json").stdout)[0]
    assert [entry["class"] for entry in record["target"]] == [entry["class"] for entry in record["top"][:3]]
    contrast = json.loads(run("explain", "a.png", "--contrast", "--target", "top2", "--json").stdout)[0]
    assert contrast["target"] == record["target"][:2]


def test_one_method_with_several_options(run, folder) -> None:
    record = json.loads(run("explain", "a.png", "-m", "gmar", "-m", "gmar:norm=l2", "--output", "o.npz", "--json").stdout)[0]
    assert record["methods"] == ["gmar", "gmar:norm=l2"]
    with np.load(folder / "o_gmar.npz") as one, np.load(folder / "o_gmar-norm-l2.npz") as other:
        assert not np.array_equal(one["maps"], other["maps"])


def test_a_directory_as_output_of_one_photo(run, folder) -> None:
    (folder / "out").mkdir()
    assert run("explain", "a.png", "--output", "out").exit_code == 0
    assert (folder / "out" / "a_explained.png").exists()


def test_arrays_of_one_and_of_several_methods(run, folder) -> None:
    assert run("explain", "a.png", "--output", "out.npz", "--target", "cat").exit_code == 0
    with np.load(folder / "out.npz") as arrays:
        assert arrays["maps"].shape == (1, 1, 8, 8)
        assert arrays["target"].tolist() == [[3]]
    assert run("explain", "a.png", "--output", "two.npz", "-m", "gmar", "-m", "rollout").exit_code == 0
    for method in ("gmar", "rollout"):
        with np.load(folder / f"two_{method}.npz") as arrays:
            assert str(arrays["method"]) == method


def test_json_is_all_there_is_on_standard_output(run) -> None:
    result = run("explain", "a.png", "b.jpg", "--json", "--top", "2", "--method", "all", "--target", "3", "--target", "Dog")
    assert result.exit_code == 0
    records = json.loads(result.stdout)
    assert [record["image"] for record in records] == ["a.png", "b.jpg"]
    for record in records:
        assert record["methods"] == own_methods()
        assert [entry["name"] for entry in record["target"]] == ["cat", "dog"]
        assert len(record["top"]) == 2
        assert 1 >= record["top"][0]["probability"] >= record["top"][1]["probability"] >= 0
        assert all(Path(path).exists() for path in record["output"])


def test_many_photos_go_to_a_directory_and_a_bad_one_does_not_stop_the_others(run, folder) -> None:
    Path("sub").mkdir()
    Image.new("L", (20, 20)).save("sub/a.tif")
    result = run(
        "explain", "a.png", "bad.jpg", "b.jpg", "none.png", "sub/a.tif", "--output", "deep/maps", "--batch", "2", "--json"
    )
    assert result.exit_code == 1
    assert [Path(r["output"][0]).name for r in json.loads(result.stdout)] == [
        "a_explained.png",
        "b_explained.png",
        "a_2_explained.png",
    ]
    assert len(list((folder / "deep" / "maps").iterdir())) == 3
    assert "error: photo: 'bad.jpg' is not an image" in result.stderr
    assert "error: photo: there is no file 'none.png'" in result.stderr
    assert "2 of 5 photos could not be explained" in result.stderr


def test_the_batch_size_does_not_change_the_result(run) -> None:
    records = []
    for batch in (1, 3):
        result = run("explain", "a.png", "b.jpg", "c.png", "--json", "--batch", batch, "--output", "maps")
        records.append([entry for record in json.loads(result.stdout) for entry in record["top"]])
    for one, three in zip(*records, strict=True):
        assert one["class"] == three["class"]
        assert one["probability"] == pytest.approx(three["probability"], abs=1e-4)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("tokentm:aggregate=false", {"aggregate": False}),
        ("tokentm:necc_scale=1", {"necc_scale": "1"}),
        ("gmar:alpha=2,norm=l2", {"alpha": 2, "norm": "l2"}),
        ("rollout:start_block=2", {"start_block": 2}),
        ("iba:relevance=gain", {"relevance": "gain"}),
    ],
)
def test_options_reach_the_method(run, monkeypatch, method: str, expected: dict[str, object]) -> None:
    seen = []
    save = vitexplain.Explanation.save
    monkeypatch.setattr(vitexplain.Explanation, "save", lambda self, *a, **k: (seen.append(self.options), save(self, *a, **k))[1])
    result = run("explain", "a.png", "--method", method, "--output", "o.npz")
    assert result.exit_code == 0, result.output
    assert expected.items() <= seen[0].items()


@pytest.mark.parametrize("backend", ["auto", "torch", "dense"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_backends_and_dtypes(run, backend: str, dtype: str) -> None:
    result = run("explain", "a.png", "--backend", backend, "--dtype", dtype, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[0]["top"]


def test_weights_from_a_file(run, shared) -> None:
    weights = shared("data/deit_tiny_patch16_224_fp16.safetensors")
    result = run("explain", "a.png", "--model", "deit_tiny_patch16_224", "--weights", weights, "--target", "tabby", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[0]["target"][0]["class"] == 281


# -- figures ---------------------------------------------------------------------------------------------------------


def _record(result: Result) -> dict:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)[0]


@pytest.mark.parametrize("asked", [[], ["cat"], ["9", "cat"]])
def test_a_contrast_is_of_the_classes_asked_for_or_with_the_likeliest_rival(run, folder, asked: list[str]) -> None:
    record = _record(run("explain", "a.png", "--contrast", "--json", *(part for name in asked for part in ("-t", name))))
    assert record["output"] == ["a_contrast.png"]
    likeliest = [entry["class"] for entry in record["top"]]
    wanted = [{"cat": 3, "9": 9}[name] for name in asked] or likeliest[:1]
    rival = next(index for index in likeliest if index != wanted[0])
    assert [entry["class"] for entry in record["target"]] == (wanted if len(wanted) == 2 else [*wanted, rival])
    with Image.open(folder / "a_contrast.png") as picture:
        assert picture.width > 4 * 448


def test_figures_of_several_methods_and_classes_have_a_file_each(run, folder) -> None:
    (folder / "maps").mkdir()
    record = _record(run("explain", "a.png", "--contrast", "-m", "gmar", "-m", "attcat", "--output", "out.jpg", "--json"))
    assert record["output"] == ["out_gmar.jpg", "out_attcat.jpg"]
    many = ("-t", "cat", "-t", "dog", "-m", "gmar", "-m", "iba", "--output", "maps")
    record = _record(run("explain", "c.png", "--by-block", "--json", *many))
    assert [Path(path).name for path in record["output"]] == [
        f"c_by_block_{method}_{name}.png" for method in ("gmar", "iba") for name in ("cat", "dog")
    ]
    assert len(list((folder / "maps").iterdir())) == 4


def test_all_methods_by_block_are_those_that_have_more_than_one(run, folder) -> None:
    record = _record(run("explain", "a.png", "--by-block", "-m", "all", "--output", "out.npz", "--json"))
    assert {"tokentm", "gmar", "iba", "attcat"} <= set(record["methods"]) < set(own_methods())
    assert not {"raw_attention", "lrp"} & set(record["methods"])
    with np.load(folder / "out_gmar.npz") as arrays:
        assert arrays["by_block"].shape == (1, 6, 8, 8)


def test_share_and_colours_of_the_maps_reach_the_picture(run, monkeypatch) -> None:
    seen = []
    save_panel = visualize.save_panel
    monkeypatch.setattr(visualize, "save_panel", lambda *a, **k: (seen.append(k), save_panel(*a, **k))[1])
    assert run("explain", "a.png", "--alpha", "0.25", "--colormap", "viridis").exit_code == 0
    assert {"alpha": 0.25, "colormap": "viridis"}.items() <= seen[0].items()


INPUT_ERRORS = {
    "missing": (["none.png"], "there is no file 'none.png'"),
    "directory": (["."], "received the directory"),
    "not an image": (["bad.jpg"], "not an image"),
    "model": (["a.png", "--model", "vit_tiny_patch16_22"], "unknown model .* did you mean .*vit_tiny_patch16_224"),
    "method": (["a.png", "--method", "tokentn"], "unknown method 'tokentn': did you mean tokentm"),
    "method twice": (["a.png", "-m", "gmar", "-m", "gmar"], "each method once"),
    "option name": (["a.png", "-m", "tokentm:lenght=true"], "unknown option of tokentm 'lenght': did you mean length"),
    "option value": (["a.png", "-m", "tokentm:length=maybe"], "option 'length' of tokentm: expected bool, received 'maybe'"),
    "option form": (["a.png", "-m", "tokentm:length"], "expected NAME=VALUE, received 'length'"),
    "class name": (["a.png", "--target", "catt"], "unknown class 'catt': did you mean cat"),
    "class index": (["a.png", "--target", "10"], "from 0 to 9, received 10"),
    "too many classes": (["a.png", "--target", "top11"], "expected at most top10, .* received 'top11'"),
    "top beside another": (["a.png", "-t", "top2", "-t", "cat"], "--target: expected 'top2' alone, received 2 targets"),
    "contrast of more": (["a.png", "--contrast", "-t", "top3", "--model", "none"], "expected at most two classes .* 'top3'"),
    "weights missing": (["a.png", "--weights", "none.pth"], "weights: there is no file"),
    "weights bad": (["a.png", "--weights", "bad.pth"], "not a file of weights, or damaged"),
    "weights of another model": (["a.png", "--weights", "other.pth"], "does not fit model 'demo': missing"),
    "output suffix": (["a.png", "--output", "out.txt"], "output: expected a file ending in .png"),
    "output folder in the way": (["a.png", "--output", "bad.jpg/out.png", "--model", "none"], "output: cannot make the folder"),
    "output file of many": (["a.png", "b.jpg", "--output", "out.png"], "expected a folder for several photos"),
    "output in the way": (["a.png", "b.jpg", "--output", "bad.jpg/maps"], "cannot make the folder"),
    "output not writable": (["a.png", "--output", "taken"], "cannot write .*Is a directory"),
    "colour map": (["a.png", "--colormap", "virids", "--model", "none"], "unknown colour map 'virids': did you mean viridis"),
    "two figures": (["a.png", "--contrast", "--by-block"], "--contrast: expected one figure at a time"),
    "three classes": (["a.png", "--contrast", "-t", "1", "-t", "2", "-t", "3"], "expected at most two classes .* received 3"),
    "a class against itself": (["a.png", "--contrast", "-t", "cat", "-t", "3"], "expected two classes, received 'cat' twice"),
    "last block by block": (["a.png", "--by-block", "-m", "all", "-m", "cdam"], "several blocks, received 'cdam'"),
    "dense by block": (["a.png", "--by-block", "--backend", "dense"], "own kernels, received 'dense'"),
    "device": (["a.png", "--device", "tpu"], "device: expected one that is available here, received 'tpu'"),
    "dtype": (
        ["a.png", "--dtype", "int8"],
        r"expected one of float32 \(fp32\), bfloat16 \(bf16\), float16 \(fp16\), received 'int8'",
    ),
    "backend": (["a.png", "--backend", "numpy"], "backend: expected one of"),
}


@pytest.mark.parametrize("case", INPUT_ERRORS)
def test_bad_input_is_one_line_and_exit_code_1(run, folder, case: str) -> None:
    (folder / "bad.pth").write_text("hello world")
    torch.save({"a": torch.zeros(1)}, folder / "other.pth")
    (folder / "taken" / "a_explained.png").mkdir(parents=True)  # a directory stands where the picture should go
    result = run("explain", *INPUT_ERRORS[case][0])
    _one_line_error(result, INPUT_ERRORS[case][1])
    assert result.stdout == ""


def test_cuda_without_a_gpu_is_refused(run) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    _one_line_error(run("explain", "a.png", "--device", "cuda"), "device: expected one that is available here, received 'cuda'")


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain"],
        ["explain", "a.png", "--batch", "0"],
        ["explain", "a.png", "--alpha", "1.5"],
        ["explain", "a.png", "--top", "x"],
        ["explian"],
        ["methods", "-x"],
        ["list"],
    ],
)
def test_usage_errors_have_exit_code_2(run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""


def test_the_list_of_methods(run) -> None:
    rows = json.loads(run("methods", "--json").stdout)
    assert [row["name"] for row in rows] == list(REGISTRY)
    for row, info in zip(rows, vitexplain.methods(), strict=True):
        assert row["paper"] == info.paper
        assert row["cost"] == info.cost
        assert [option["name"] for option in row["options"]] == [option.name for option in info.options]
    text = run("methods").stdout
    assert all(name in text for name in REGISTRY)


def test_the_list_of_models(run) -> None:
    listed = json.loads(run("models", "--json").stdout)
    assert listed["families"] == [family.FAMILY for family in FAMILIES]
    assert list(listed["names"]) == ["demo", "NAME", "transformers:NAME"]
    text = run("models").stdout
    assert all(name in text for name in (*listed["names"], "timm Eva"))


@pytest.mark.parametrize("name", ["demo", "test_vit", "test_vit3.r160_in1k"])
def test_a_model_that_is_explained(run, monkeypatch, name: str) -> None:
    monkeypatch.setattr("vitexplain.hugging_face.within_reach", lambda: pytest.fail("nothing is to be downloaded"))
    about = json.loads(run("models", name, "--json").stdout)
    assert about["explained"]
    assert (about["name"], about["family"]) == (name, "timm VisionTransformer")
    assert {method for method, reason in about["methods"].items() if reason is None} >= {"gmar", "rollout"}
    assert "explained by: " in run("models", name).stdout


@pytest.mark.parametrize(
    ("name", "reason"),
    [("resnet18", "convolutional"), ("vit_tiny_patch16_224.nope", None), ("eva02_tiny_patch14_224", "no class")],
)
def test_a_model_that_is_not_explained_has_its_reason(run, name: str, reason: str | None) -> None:
    result = run("models", name)
    if reason is None:
        _one_line_error(result, "unknown model .* did you mean vit_tiny_patch16_224")
        return
    assert result.exit_code == 0
    assert re.search(f"not explained: .*{reason}", result.stdout)
    about = json.loads(run("models", name, "--json").stdout)
    assert not about["explained"]
    assert reason in about["reason"]


def test_the_demo(run, folder) -> None:
    pytest.importorskip("skimage", reason="the demo's photo comes with scikit-image")
    result = run("demo")
    assert result.exit_code == 0, result.output
    assert "vitexplain_demo.png" in result.stdout
    assert "cat" in result.stdout
    with Image.open(folder / "vitexplain_demo.png") as picture:
        assert picture.width > 5 * 400


def test_the_demo_without_scikit_image(run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    _one_line_error(run("demo"), r"pip install 'vitexplain\[demo\]'")


def test_help_and_version(run) -> None:
    assert run("--version").stdout == f"vitexplain {vitexplain.__version__}\n"
    for command in ("explain", "methods", "models", "protocols", "demo"):
        result = run(command, "--help")
        assert result.exit_code == 0
        assert command in result.stdout
    assert "transformers:NAME" in run("explain", "--help").stdout


@pytest.mark.usefixtures("folder")
def test_the_installed_command_and_that_help_does_not_load_torch() -> None:
    command = Path(sysconfig.get_path("scripts")) / "vitexplain"
    done = subprocess.run([command, "explain", "a.png", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)[0]["output"] == ["a_explained.png"]
    done = subprocess.run([command, "explain", "none.png"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: photo: there is no file 'none.png'\n")
    code = "import sys, vitexplain.cli; assert not {'torch', 'timm', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_that_does_not_suffice_is_one_line_and_a_defect_is_not_hidden(run, monkeypatch) -> None:
    def failing(message: str) -> Callable[..., None]:
        def attribute(*_: object) -> None:
            raise RuntimeError(message)

        return attribute

    monkeypatch.setattr("vitexplain.explainer.Explainer.attribute", failing("can't allocate memory: you tried 9 bytes"))
    _one_line_error(run("explain", "a.png"), "a smaller --batch needs less")
    monkeypatch.setattr("vitexplain.explainer.Explainer.attribute", failing("a defect"))
    result = run("explain", "a.png")
    assert isinstance(result.exception, RuntimeError)
    assert not isinstance(result.exception, SystemExit)
