"""The project's own faithfulness tables: every method on real photos, by the papers' protocols.

    python -m bench.faithfulness              # all cases; goes on where it was interrupted
    python -m bench.faithfulness --case cifar10 --case localisation
    python -m bench.faithfulness --speed      # time per image of every method alone

Data and weights are read from ``../shared/data`` (``--data`` for another folder). What was measured of each image stays in
``build/faithfulness``, with curves and a report; figures and tables go to ``bench/results/faithfulness/CASE``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitexplain.evaluate import Evaluation, Results, write_results
from vitexplain.explainer import Explainer
from vitexplain.loading import LoadedModel, load_model
from vitexplain.methods import own_methods
from vitexplain.sources import Source, open_source

from .cost import forward_backward, plain_forward
from .operations import folder_of
from .record import RESULTS, Row, environment, spread, write_rows
from .timing import interleaved_ms

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
WORK = ROOT / "build" / "faithfulness"
FAITHFULNESS = RESULTS / "faithfulness"
SPEED_BATCH, SPEED_SECONDS, SPEED_PHOTOS = 8, 60.0, 16
IBA = tuple(f"iba:relevance={relevance}" for relevance in ("gradient", "gain", "probability", "uniform"))


@dataclass(frozen=True)
class Case:
    """One evaluation: a model, data, methods and protocols."""

    model: str
    weights: str | None
    data: str
    protocols: tuple[str, ...]
    methods: tuple[str, ...] = ()
    images: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def load(self, folder: Path, device: str) -> LoadedModel:
        """The model, with its weights from the data folder where they are not its own."""
        return load_model(self.model, None if self.weights is None else folder / self.weights, device)

    def source(self, folder: Path, model: LoadedModel) -> Source:
        """The images."""
        return open_source(folder / self.data, images=self.images, classes=model)


DEIT = {"model": "deit_tiny_patch16_224", "weights": "deit_tiny_patch16_224_fp16.safetensors"}
PHOTOS = {**DEIT, "data": "imagenet_sample_500.npz"}
BOTH = {"explained": ("pred", "gt")}
CASES: dict[str, Case] = {
    "perturbation": Case(**PHOTOS, protocols=("perturbation:convention=both",), settings=BOTH),
    "localisation": Case(**DEIT, data="ecssd_500.npz", protocols=("localisation",)),
    "cifar10": Case("demo", None, "cifar10_exact_test1017.npz", ("perturbation:convention=both",), settings=BOTH),
    "ablation": Case(**PHOTOS, protocols=("ablation",), methods=("tokentm",), images="::2"),
    "iba_chosen_on_even": Case(**PHOTOS, protocols=("perturbation",), methods=IBA, images="::2", settings={"controls": False}),
    "iba_reported_on_odd": Case(**PHOTOS, protocols=("perturbation",), methods=IBA, images="1::2", settings={"controls": False}),
    "probability": Case(**PHOTOS, protocols=("insertion_deletion:step=10", "average_drop"), images="::2"),
    "saco": Case(**PHOTOS, protocols=("saco",), images="::2"),
    "precision_float32": Case(**PHOTOS, protocols=("perturbation",), images=":32", methods=("tokentm", "iba", "rollout")),
    "precision_bfloat16": Case(**PHOTOS, protocols=("perturbation",), images=":32", methods=("tokentm", "iba", "rollout")),
}


def evaluation_of(name: str, folder: Path, device: str) -> Evaluation:
    """A case, ready to run; float32 forwards on changed images only where its name says so."""
    case = CASES[name]
    model = case.load(folder, device)
    return Evaluation(
        model,
        case.source(folder, model),
        case.methods or own_methods(),
        case.protocols,
        WORK / name,
        dtype="float32" if name.endswith("float32") else "bfloat16",
        **case.settings,
    )


def run(name: str, folder: Path, device: str) -> None:
    """Measure a case and write what it found into the results."""
    evaluation = evaluation_of(name, folder, device)
    started = time.perf_counter()
    results = evaluation.run(lambda done, total: _say(f"{name}: {done} of {total} images", started))
    written = write_results(evaluation, results)
    target = FAITHFULNESS / name
    target.mkdir(parents=True, exist_ok=True)
    for path in written:
        if path.suffix in (".json", ".md"):
            shutil.copyfile(path, target / path.name)


def _say(text: str, started: float) -> None:
    print(f"{text}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


# -- speed ---------------------------------------------------------------------------------------------------------------


def measure_speed(folder: Path, device: str) -> Path:
    """Time of explaining eight photos by every method alone, by all in one call, and of what the model itself costs; and the
    pace of a whole evaluation."""
    case = CASES["perturbation"]
    loaded = case.load(folder, device)
    model, place = loaded.model.requires_grad_(False), next(loaded.model.parameters()).device
    source = case.source(folder, loaded)
    images = torch.stack([loaded.transform(source.sample(i).photo) for i in range(SPEED_BATCH)]).to(place)
    explainers = {name: Explainer(model, name) for name in own_methods()}
    explainers["all of these in one call"] = Explainer(model, own_methods())
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: plain_forward(model, images),
        "forward + input gradient": lambda: forward_backward(model, images),
    } | {name: lambda explainer=explainer: explainer.attribute(images) for name, explainer in explainers.items()}
    samples = interleaved_ms(list(calls.values()), place, seconds=SPEED_SECONDS)
    common = {"case": "explanation", "model": case.model, "batch": SPEED_BATCH, "tokens": 197, "dtype": "float32"}
    rows = [
        Row(
            provider=name,
            metric="time per image",
            unit="ms",
            **common,
            **spread([t / SPEED_BATCH for t in taken]),
            **environment(place),
        )
        for name, taken in zip(calls, samples, strict=True)
    ]
    timing = _quick_evaluation(loaded, source).timing
    for metric in ("images_per_second", "changed_images_per_second"):
        taken = {**common, "case": "evaluation", "dtype": "bfloat16"}
        provider = "perturbation of the predicted class, all methods and controls"
        figure = {"metric": metric.replace("_", " "), "unit": "1/s", **spread([timing[metric]])}
        rows.append(Row(provider=provider, **figure, **taken, **environment(place)))
    return write_rows(speed_path(folder_of(place)), rows)


def _quick_evaluation(model: LoadedModel, source: Source) -> Results:
    with tempfile.TemporaryDirectory() as folder:
        photos = source.select(slice(0, SPEED_PHOTOS))
        return Evaluation(model, photos, own_methods(), ["perturbation"], folder, batch=SPEED_BATCH, dtype="bfloat16").run()


def speed_path(device_name: str) -> Path:
    """Where a device's times are kept."""
    return RESULTS / device_name / "faithfulness_speed.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="one case; repeat; default: all")
    parser.add_argument("--speed", action="store_true", help="time per image of every method alone, and nothing else")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    if options.speed:
        print(measure_speed(options.data, options.device))
        return
    for name in options.case or CASES:
        run(name, options.data, options.device)


if __name__ == "__main__":
    main()
