"""A whole evaluation: the same result however it is cut up, shared work, and refusals before any work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitexplain.errors import InputError, UnknownNameError, UnsupportedModelError
from vitexplain.evaluate import Evaluation, evaluate
from vitexplain.evaluate.batch import RankedMaps
from vitexplain.evaluate.gallery import choose_gallery, disagreement
from vitexplain.evaluate.protocols.ablation import VARIANTS
from vitexplain.evaluate.results import Results
from vitexplain.loading import LoadedModel, load_model
from vitexplain.methods import GMAR
from vitexplain.sources import Source, open_source

from ..dataset import forked

PERTURBATION = "perturbation:convention=chefer"
PROTOCOLS = (PERTURBATION, "insertion_deletion:step=25", "average_drop", "saco:groups=4")
CLASSES = ("airplane", "cat", "ship")
EVERYTHING = {"explained": ("pred", "gt"), "batch": 2, "bootstrap": 50}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six pictures in folders by class."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(6):
        place = root / CLASSES[i % 3]
        place.mkdir(exist_ok=True)
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((50, 40)).save(place / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    """Of its six blocks the first two: what is evaluated here need not be good."""
    demo = load_model("demo")
    demo.model.blocks = demo.model.blocks[:2]
    return demo


@pytest.fixture(scope="module")
def source(folder, demo) -> Source:
    return open_source(folder, classes=demo)


@pytest.fixture(scope="module")
def whole(demo, source, tmp_path_factory) -> Evaluation:
    """An evaluation that ran undisturbed."""
    evaluation = Evaluation(demo, source, tmp_path_factory.mktemp("whole"), ["tokentm", "attcat"], PROTOCOLS, **EVERYTHING)
    evaluation.run()
    return evaluation


def _lasting(results: Results) -> Results:
    """What does not differ from run to run."""
    return replace(results, timing={})


def test_every_row_has_every_figure(whole) -> None:
    results = whole.summary()
    assert list(results.methods) == ["tokentm", "attcat", "random", "centre prior", "negated tokentm"]
    assert [entry.kind for entry in results.methods.values()] == ["method"] * 2 + ["control"] * 3
    for column in results.columns:
        for label in results.methods:
            figure = results.figure(label, column)
            assert figure.low <= figure.mean <= figure.high
            assert figure.count == 6
    shown = {(column.protocol, column.metric, column.explained) for column in results.columns}
    assert (PERTURBATION, "positive", "gt") in shown
    assert (PERTURBATION, "AOPC", "pred") in shown
    assert (PERTURBATION, "AOPC", "gt") not in shown
    assert results.settings["dtype"] == "float32"
    assert results.settings["data"]["images"] == 6
    assert "torch" in results.environment["versions"]
    assert results.timing["changed_images"] > 6 * 5 * 18


def test_results_come_back_from_their_file(whole) -> None:
    results = whole.summary()
    again = Results.from_json(results.to_json())
    assert again == replace(results, settings=again.settings)
    assert again.settings == json.loads(json.dumps(results.settings)), "tuples become lists"
    assert again.settings["methods"]["tokentm"]["name"] == "tokentm"


def test_the_negated_map_swaps_positive_and_negative(whole) -> None:
    results = whole.summary()
    found = {c.metric: c for c in results.columns if c.protocol == PERTURBATION and c.explained == "pred"}
    for one, other in (("positive", "negative"), ("negative", "positive")):
        figure = results.figure("tokentm", found[one])
        negated = results.figure("negated tokentm", found[other])
        assert (figure.mean, figure.low, figure.high) == (negated.mean, negated.low, negated.high)


def test_what_is_shared_between_predicted_and_true_class_is_what_each_gives_alone(whole, demo, source, tmp_path) -> None:
    alone = Evaluation(demo, source, tmp_path, ["tokentm", "attcat"], PROTOCOLS, **{**EVERYTHING, "explained": ("gt",)})
    figures = {(f.method, f.protocol, f.metric): f for f in alone.run().figures}
    together = [f for f in whole.summary().figures if f.explained == "gt"]
    assert len(together) == len(figures)
    assert all(figures[f.method, f.protocol, f.metric] == f for f in together)
    arrays, _ = whole.journal.read(0)
    assert (arrays["predicted"] != arrays["labels"]).any(), "some image's true class is not the predicted one"
    key = "tokentm|insertion_deletion:step=25|{}|deletion"
    assert not np.array_equal(arrays[key.format("pred")], arrays[key.format("gt")])


def test_the_true_class_of_a_row_is_measured_as_if_it_stood_alone(whole, demo, source) -> None:
    """One image, by hand: its map for its label, deleted step by step."""
    arrays, _ = whole.journal.read(0)
    row = int(np.flatnonzero(arrays["predicted"] != arrays["labels"])[0])
    image = whole.preprocess.image(source.sample(row).photo)[None]
    label = int(arrays["labels"][row])
    from vitexplain import explain

    order = explain(demo.model, image, label, method="tokentm").to_image(demo.input_size)[0].flatten().argsort(descending=True)
    changed = image.clone()
    changed.flatten(2)[:, :, order[: 3 * len(order) // 4]] = 0
    with torch.no_grad():
        wanted = float(demo.model(changed).softmax(-1)[0, label])
    found = arrays["tokentm|insertion_deletion:step=25|gt|deletion"][row, 3]
    assert found == pytest.approx(wanted, abs=0.02), "ties at the border come in another order"


def test_another_batch_gives_the_same_figures_up_to_rounding(whole, demo, source, tmp_path) -> None:
    other = Evaluation(demo, source, tmp_path, ["tokentm", "attcat"], PROTOCOLS, **{**EVERYTHING, "batch": 6, "forward_batch": 5})
    for figure, again in zip(whole.summary().figures, other.run().figures, strict=True):
        assert again.mean == pytest.approx(figure.mean, abs=2e-3), figure


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_an_interrupted_run_goes_on_with_the_same_result(whole, demo, source, tmp_path, finished: int) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(done: int, total: int) -> None:  # noqa: ARG001
        if done >= 2 * finished:
            raise Interrupted

    arguments = (demo, source, tmp_path, ["tokentm", "attcat"], PROTOCOLS)
    with pytest.raises(Interrupted):
        Evaluation(*arguments, **EVERYTHING).run(interrupt)
    assert len(list((tmp_path / "per_image").glob("chunk*"))) == finished
    measured: list[int] = []
    results = Evaluation(*arguments, **EVERYTHING).run(lambda done, total: measured.append(done))  # noqa: ARG005
    assert measured[0] == 2 * finished
    assert measured[-1] == 6
    assert _lasting(results) == _lasting(whole.summary())


def test_a_killed_process_loses_at_most_the_chunk_it_was_at(folder, tmp_path) -> None:
    command = ["-m", "vitexplain", "evaluate", folder, "--batch", "1", "--bootstrap", "20"]
    command += ["-m", "tokentm", "-p", "saco", "--gallery", "2"]

    def chunks(output: Path) -> int:
        return len(list((output / "per_image").glob("chunk_*.npz")))

    cold = [sys.executable, *command, "--output", tmp_path / "a"]
    process = subprocess.Popen(cold, env=forked.base_environment(), stderr=subprocess.DEVNULL, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while chunks(tmp_path / "a") < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= chunks(tmp_path / "a") <= 6
    for name in ("a", "b"):
        done = forked.start([*command, "--output", tmp_path / name], tmp_path)
        _, errors = done.communicate(timeout=300)
        assert done.returncode == 0, errors
    interrupted, undisturbed = (Results.read(tmp_path / name / "results.json") for name in ("a", "b"))
    assert _lasting(interrupted) == _lasting(undisturbed)


def test_methods_share_a_forward_and_each_map_is_ranked_once(demo, source, tmp_path, monkeypatch) -> None:
    forwards: list[int] = []
    ranked: list[str] = []
    handle = demo.model.blocks[0].attn.qkv.register_forward_hook(lambda _, args, out: forwards.append(len(args[0])))  # noqa: ARG005
    original = RankedMaps.of.__func__

    def counted(cls: type, maps: torch.Tensor, batch: object, label: str) -> RankedMaps:
        ranked.append(label)
        return original(cls, maps, batch, label)

    monkeypatch.setattr(RankedMaps, "of", classmethod(counted))
    methods = ["tokentm", "transformer_mm", "rollout", "gmar"]
    evaluation = Evaluation(demo, source.select(slice(0, 4)), tmp_path, methods, PROTOCOLS, batch=4, forward_batch=1000)
    evaluation.run()
    handle.remove()
    clean, explaining = 1, 1
    assert forwards[: clean + explaining] == [4, 4]
    levels = 9  # of ten: nothing is forwarded where nothing is removed
    assert forwards.count(4 * levels) == 2 * len(evaluation.rows)
    assert ranked == [*methods, "random", "centre prior"]


def test_what_cannot_be_read_is_left_out_and_named(demo, folder, tmp_path) -> None:
    table = tmp_path / "table.csv"
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    paths = sorted(str(path) for path in folder.rglob("*.png"))[:3]
    table.write_text("path\n" + "\n".join([paths[0], "broken.jpg", *paths[1:]]) + "\n")
    results = Evaluation(demo, open_source(table, classes=demo), tmp_path / "out", ["rollout"], ["perturbation"], batch=2).run()
    assert [left["id"] for left in results.left_out] == ["broken.jpg"]
    assert "not an image" in results.left_out[0]["reason"]
    assert {figure.count for figure in results.figures} == {3}
    assert [column.metric for column in results.columns] == ["AOPC", "LOdds"], "there are no labels"


def test_nothing_readable_is_an_error(demo, tmp_path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"no")
    evaluation = Evaluation(demo, open_source(tmp_path / "in"), tmp_path / "out", ["rollout"], ["saco"])
    with pytest.raises(InputError, match="none of the 1 images of 'in' could be read"):
        evaluation.run()


def test_masks_follow_the_photo_through_either_geometry(demo, tmp_path) -> None:
    photo = np.zeros((60, 120, 3), np.uint8)
    photo[20:40, 30:60] = 255
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(photo[..., 0]).save(tmp_path / "mask.png")
    (tmp_path / "table.csv").write_text("path,mask\nphoto.png,mask.png\n")
    source = open_source(tmp_path / "table.csv")
    for resize in ("model", "squash"):
        preprocess = demo.preprocess(resize)
        sample = source.sample(0)
        mask, seen = preprocess.mask(sample.mask), preprocess.seen(sample.photo)
        assert mask.shape == seen.shape[1:]
        assert ((seen[0] > 127) == mask).float().mean() > 0.9
    results = Evaluation(demo, source, tmp_path / "out", ["rollout"], ["localisation"]).run()
    assert results.settings["model"]["resize"] == "squash"
    assert {column.metric for column in results.columns} == {"pixel accuracy", "mIoU", "mAP", "AUROC"}


def test_the_ablation_has_rows_of_its_own(demo, source, tmp_path) -> None:
    results = Evaluation(demo, source.select(slice(0, 2)), tmp_path, ["rollout"], ["perturbation", "ablation"]).run()
    rows = {protocol: {f.method for f in results.figures if f.protocol == protocol} for protocol in ("perturbation", "ablation")}
    assert rows["ablation"] == {*VARIANTS, "random", "centre prior", "negated rollout"}
    assert rows["perturbation"] == {"rollout", "random", "centre prior", "negated rollout"}


def test_an_ablation_by_itself_has_controls_and_a_gallery(demo, source, tmp_path) -> None:
    evaluation = Evaluation(demo, source.select(slice(0, 2)), tmp_path, ["rollout"], "ablation")
    results = evaluation.run()
    assert list(results.methods) == [*VARIANTS, "random", "centre prior", "negated + NECC (tokentm)"]
    assert set(choose_gallery(evaluation, 1)[0].maps) == set(VARIANTS)


@pytest.mark.parametrize("metric", ["Sparseness", "Complexity"])
def test_quantus_beside_the_controls_it_can_take(demo, source, tmp_path, metric: str) -> None:
    protocols = ["average_drop", f"quantus:metric={metric}"]
    results = Evaluation(demo, source.select(slice(0, 2)), tmp_path, "tokentm", protocols, bootstrap=5).run()
    rows = {column.metric: [f.method for f in results.figures if f.metric == column.metric] for column in results.columns}
    assert rows["average drop"] == ["tokentm", "random", "centre prior", "negated tokentm"]
    assert rows[metric] == ["tokentm", "random", "centre prior"]


def test_a_metric_that_has_a_number_for_no_image_has_no_figure(demo, source, tmp_path, monkeypatch) -> None:
    from vitexplain.evaluate.protocols import quantus

    def scores(metric: object, model: object, images: torch.Tensor, *rest: object, **keywords: object) -> np.ndarray:  # noqa: ARG001
        return np.array([np.nan, 2.0][: len(images)]) if rest[1].min() >= 0 else np.full(len(images), np.nan)

    monkeypatch.setattr(quantus, "quantus_scores", scores)
    results = Evaluation(demo, source.select(slice(0, 2)), tmp_path, ["tokentm", "attcat"], "quantus", controls=False).run()
    ((figure,), (column,)) = results.figures, results.columns
    assert (figure.method, figure.mean, figure.count) == ("tokentm", 2.0, 1)
    assert column.contenders == ("tokentm",)
    Results.from_json(results.to_json())


def test_a_model_that_overflows_on_changed_images_is_an_error_before_anything_is_kept(demo, source, tmp_path) -> None:
    def overflow(module: object, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
        black = (args[0] == args[0].flatten(2)[:, :, :1].unsqueeze(-1)).flatten(1).all(1)
        return output.masked_fill(black.unsqueeze(1), float("nan"))

    handle = demo.model.register_forward_hook(overflow)
    evaluation = Evaluation(demo, source, tmp_path, "rollout", "perturbation")
    with pytest.raises(InputError, match=r"expected finite logits, received NaN or infinity \(model in torch.float32\)"):
        evaluation.run()
    handle.remove()
    assert not evaluation.journal.has(0)


def test_another_order_of_methods_is_another_evaluation(demo, source, tmp_path) -> None:
    Evaluation(demo, source, tmp_path, ["rollout", "raw_attention"], "saco")
    with pytest.raises(InputError, match=r"rows: \[\"rollout\", .* there, \[\"raw_attention\", .* asked for"):
        Evaluation(demo, source, tmp_path, ["raw_attention", "rollout"], "saco")


def test_another_preprocessing_is_another_evaluation(demo, source, tmp_path) -> None:
    Evaluation(demo, source, tmp_path, "rollout", "saco")
    other = replace(demo, config={**demo.config, "mean": (0.1, 0.2, 0.3)})
    with pytest.raises(InputError, match=r"model.preprocessing.mean: .* there, \[0.1, 0.2, 0.3\] asked for"):
        Evaluation(other, source, tmp_path, "rollout", "saco")


def test_masks_are_read_only_where_a_protocol_asks_for_them(demo, folder, tmp_path) -> None:
    photo = next(folder.rglob("*.png"))
    (tmp_path / "mask.png").write_bytes(b"broken")
    (tmp_path / "table.csv").write_text(f"path,mask\n{photo},mask.png\n")
    source = open_source(tmp_path / "table.csv")
    assert Evaluation(demo, source, tmp_path / "a", "rollout", "average_drop").run().left_out == ()
    with pytest.raises(InputError, match="none of the 1 images"):
        Evaluation(demo, source, tmp_path / "b", "rollout", "localisation").run()


def test_single_texts_are_as_good_as_lists(demo, source, tmp_path) -> None:
    evaluation = Evaluation(demo, source, tmp_path, "gmar:norm=l2", "saco", explained="gt")
    assert list(evaluation.methods) == ["gmar:norm=l2"]
    assert evaluation.explained == ("gt",)
    mapped = Evaluation(demo, source, tmp_path / "other", {"mine": "gmar:norm=l2"}, "saco")
    assert mapped.methods == {"mine": GMAR(norm="l2")}


@pytest.mark.parametrize("package", ["jinja2", "sklearn"])
def test_an_extra_that_is_absent_is_named_before_any_work(demo, folder, tmp_path, monkeypatch, package: str) -> None:
    import vitexplain.evaluate as evaluate_module
    from vitexplain.evaluate import runner

    for module in (evaluate_module, runner):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name == package else object())
    photo = next(folder.rglob("*.png"))
    (tmp_path / "table.csv").write_text(f"path,mask\n{photo},{photo}\n")
    with pytest.raises(InputError, match=r"pip install 'vitexplain\[evaluate\]'"):
        evaluate(demo, open_source(tmp_path / "table.csv"), tmp_path / "out", "rollout", "localisation")
    assert not (tmp_path / "out").exists()


def test_methods_with_options_stand_under_the_text_they_were_asked_by(demo, source, tmp_path) -> None:
    methods = ["gmar", "gmar:norm=l2", GMAR(alpha=2.0)]
    with pytest.raises(InputError, match="expected each method once"):
        Evaluation(demo, source, tmp_path, methods, ["saco"])
    evaluation = Evaluation(demo, source, tmp_path, methods[:2], ["saco"], controls=False)
    assert evaluation.methods == {"gmar": GMAR(), "gmar:norm=l2": GMAR(norm="l2")}
    assert list(evaluation.run().methods) == ["gmar", "gmar:norm=l2"]


def test_bfloat16_forwards_are_reported_and_near(whole, demo, source, tmp_path) -> None:
    settings = {**EVERYTHING, "dtype": "bfloat16", "explain_dtype": "bfloat16"}
    results = Evaluation(demo, source, tmp_path, ["tokentm", "attcat"], PROTOCOLS, **settings).run()
    assert (results.settings["dtype"], results.settings["explain_dtype"]) == ("bfloat16", "bfloat16")
    assert next(demo.model.parameters()).dtype == torch.float32
    for figure, again in zip(whole.summary().figures, results.figures, strict=True):
        if figure.metric == "AOPC":
            assert again.mean == pytest.approx(figure.mean, abs=0.05)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"methods": ["tokentn"]}, UnknownNameError, "unknown method 'tokentn': did you mean tokentm"),
        ({"methods": []}, InputError, "expected at least one method"),
        ({"methods": {"a|b": "gmar"}}, InputError, "expected a label without '|'"),
        ({"protocols": ["localisation"]}, InputError, "protocol 'localisation' needs masks, and .* has none"),
        ({"explained": ("true",)}, InputError, "explained: expected pred or gt, received 'true'"),
        ({"explained": ()}, InputError, "explained: expected pred or gt, received none"),
        ({"resize": "crop"}, InputError, "resize: expected one of auto, model, squash"),
        ({"dtype": "int8"}, InputError, "dtype: expected one of float32"),
        ({"explain_dtype": "half"}, InputError, "explain_dtype: expected one of float32"),
        ({"batch": 0}, InputError, "batch: expected 1 or more images, received 0"),
        ({"forward_batch": -1}, InputError, "forward_batch: expected 1 or more images, received -1"),
        ({"bootstrap": 0}, InputError, "bootstrap: expected 1 or more resamples, received 0"),
        ({"batch": "auto"}, InputError, "batch: expected 1 or more images, received 'auto'"),
        ({"model": torch.nn.Linear(1, 1)}, InputError, "model: expected a LoadedModel, .* received Linear"),
        ({"source": 3}, InputError, "source: expected a Source or a path, received int"),
        ({"source": "no/such"}, InputError, "data: there is no file or folder"),
        ({"seed": -1}, InputError, "seed: expected 0 or more, received -1"),
        (
            {"methods": {"random": "gmar"}},
            InputError,
            "expected one that no control or variant of the ablation has, received 'random'",
        ),
        ({"methods": {"+ length": "gmar"}}, InputError, "received '\\+ length'"),
        ({"methods": {"a": "gmar", "negated a": "rollout"}}, InputError, "received 'negated a'"),
        ({"methods": {1: "gmar"}}, InputError, "expected labels that are text, received 1"),
        ({"methods": ["gmar", " gmar"]}, InputError, "expected each method once"),
        ({"methods": ["gmar:norm=l1,norm=l2"]}, InputError, "option 'norm' of gmar: expected once, received twice"),
        ({"backend": "cuda"}, InputError, "backend: expected one of"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(
    demo, source, tmp_path, change: dict, error: type[Exception], message: str
) -> None:
    arguments = {"model": demo, "source": source, "methods": ["rollout"], "protocols": ["saco"], **change}
    with pytest.raises(error, match=message):
        Evaluation(output=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_transformers_model_is_evaluated_by_its_logits(folder, tmp_path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is an extra, and is not installed")
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, intermediate_size=64, num_labels=3)
    model = transformers.ViTForImageClassification(config).eval()
    preprocessing = {
        "input_size": (3, 32, 32),
        "crop_pct": 1.0,
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "interpolation": "bilinear",
    }
    loaded = LoadedModel("own", model, preprocessing, CLASSES)
    source = open_source(folder, classes=loaded)
    assert source.labels == (0, 0, 1, 1, 2, 2)
    results = Evaluation(loaded, source, tmp_path, ["tokentm"], ["perturbation"], explained=("pred", "gt")).run()
    assert {figure.count for figure in results.figures} == {6}


def test_a_model_of_text_is_refused(folder, tmp_path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is an extra, and is not installed")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).eval()
    preprocessing = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(UnsupportedModelError, match="expected a model of images, received BertForSequenceClassification"):
        Evaluation(LoadedModel("bert", model, preprocessing, None), open_source(folder / "cat"), tmp_path, "rollout", "saco")


def test_labels_out_of_range_are_found_before_any_work(demo, folder, tmp_path) -> None:
    photo = next(folder.rglob("*.png"))
    (tmp_path / "table.csv").write_text(f"path,label\n{photo},10\n")
    with pytest.raises(InputError, match=r"label: expected a class from 0 to 9, received 10 for image"):
        Evaluation(demo, open_source(tmp_path / "table.csv"), tmp_path / "out", "rollout", "saco")


def test_labels_are_needed_to_explain_them(demo, folder, tmp_path) -> None:
    flat = open_source(folder / "cat")
    with pytest.raises(InputError, match=r"'gt' needs labels, and 'cat' \(folder\) has none"):
        Evaluation(demo, flat, tmp_path / "out", ["rollout"], ["perturbation"], explained=("gt",))


def test_everything_is_written(demo, source, tmp_path) -> None:
    results = evaluate(demo, source, tmp_path, ["tokentm", "rollout"], ["perturbation"], gallery=3, bootstrap=20)
    assert Results.read(tmp_path / "results.json") == Results.from_json(results.to_json())
    assert "tokentm" in (tmp_path / "results.md").read_text()
    assert {path.suffix for path in (tmp_path / "curves").iterdir()} == {".png", ".svg"}
    assert (tmp_path / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")


def test_the_gallery_shows_the_largest_disagreements_first(whole) -> None:
    photos = choose_gallery(whole, 5)
    values = [photo.disagreement for photo in photos]
    assert values == sorted(values, reverse=True)
    assert len({photo.name for photo in photos}) == 5
    assert photos[0].photo.shape == (32, 32, 3)
    assert set(photos[0].maps) == {"tokentm", "attcat"}
    assert photos[0].signed == {"attcat"}
    assert disagreement(photos[0].maps) == pytest.approx(values[0])


def test_disagreement_is_one_less_spearmans_correlation() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, (2, 6, 7)).astype(float)
    assert disagreement({"a": a, "b": b}) == pytest.approx(1 - spearmanr(a.ravel(), b.ravel()).statistic)
    assert disagreement({"a": a, "b": a**3}) == pytest.approx(0)
    assert disagreement({"a": a, "b": -a}) == pytest.approx(2)
    assert disagreement({"a": a, "b": np.zeros_like(a)}) == 1
    assert disagreement({"a": a}) == 0


def test_random_loses_on_real_photos(shared: Callable[[str], Path], tmp_path: Path) -> None:
    """64 real test images: explanations beat a random map, and that the negated one."""
    demo = load_model("demo")
    source = open_source(shared("data/cifar10_exact_test1017.npz"), classes=demo, images=":64")
    results = Evaluation(
        demo, source, tmp_path, ["transformer_mm", "iba"], ["perturbation"], dtype="bfloat16", batch=32, forward_batch=256
    ).run()
    column = next(column for column in results.columns if column.metric == "AOPC")
    figures = {label: results.figure(label, column) for label in results.methods}
    assert set(column.contenders) <= {"transformer_mm", "iba"}, "by paired differences"
    for method in ("transformer_mm", "iba"):
        assert figures[method].mean > figures["random"].mean > figures["negated transformer_mm"].mean


def test_a_file_whose_name_is_no_text_is_evaluated(demo, folder, tmp_path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(next(folder.rglob("*.png")).read_bytes())
    evaluate(demo, tmp_path / "in", tmp_path / "out", ["rollout"], ["average_drop"], bootstrap=5)
    assert Results.read(tmp_path / "out" / "results.json").figures
