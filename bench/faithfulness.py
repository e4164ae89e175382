"""The project's own faithfulness tables: every method on real photos, by the papers' protocols.

    python -m bench.faithfulness              # all studies; goes on where it was interrupted
    python -m bench.faithfulness --study cifar10 --study localisation

Data and weights are read from ``../shared/data`` (``--data`` or ``VITEXPLAIN_BENCH_DATA`` for another folder). What was measured
of each image stays in ``build/faithfulness``, with curves and a report; figures and tables go to
``bench/results/faithfulness/STUDY``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitexplain.evaluate import Evaluation, write_results
from vitexplain.loading import LoadedModel, load_model
from vitexplain.methods import own_methods
from vitexplain.sources import Source, open_source

from .record import RESULTS

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
WORK = ROOT / "build" / "faithfulness"
FAITHFULNESS = RESULTS / "faithfulness"
IBA = tuple(f"iba:relevance={relevance}" for relevance in ("gradient", "gain", "probability", "uniform"))


@dataclass(frozen=True)
class Study:
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
STUDIES: dict[str, Study] = {
    "perturbation": Study(**PHOTOS, protocols=("perturbation:convention=both",), settings=BOTH),
    "localisation": Study(**DEIT, data="ecssd_500.npz", protocols=("localisation",)),
    "cifar10": Study("demo", None, "cifar10_exact_test1017.npz", ("perturbation:convention=both",), settings=BOTH),
    "ablation": Study(**PHOTOS, protocols=("ablation",), methods=("tokentm",), images="::2"),
    "iba_chosen_on_even": Study(**PHOTOS, protocols=("perturbation",), methods=IBA, images="::2", settings={"controls": False}),
    "iba_reported_on_odd": Study(**PHOTOS, protocols=("perturbation",), methods=IBA, images="1::2", settings={"controls": False}),
    "probability": Study(**PHOTOS, protocols=("insertion_deletion:step=10", "average_drop"), images="::2"),
    "saco": Study(**PHOTOS, protocols=("saco",), images="::2"),
    "precision_float32": Study(**PHOTOS, protocols=("perturbation",), images=":32", methods=("tokentm", "iba", "rollout")),
    "precision_bfloat16": Study(**PHOTOS, protocols=("perturbation",), images=":32", methods=("tokentm", "iba", "rollout")),
}


def data_folder() -> Path:
    """Photos and weights: ``../shared/data``, or what ``VITEXPLAIN_BENCH_DATA`` names."""
    return Path(os.environ.get("VITEXPLAIN_BENCH_DATA", DATA))


def evaluation_of(name: str, folder: Path, device: str) -> Evaluation:
    """A study, ready to run; float32 forwards on changed images only where its name says so."""
    study = STUDIES[name]
    model = study.load(folder, device)
    return Evaluation(
        model,
        study.source(folder, model),
        WORK / name,
        study.methods or own_methods(),
        study.protocols,
        dtype="float32" if name.endswith("float32") else "bfloat16",
        **study.settings,
    )


def run(name: str, folder: Path, device: str) -> None:
    """Measure a study and write what it found into the results."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", action="append", choices=tuple(STUDIES), help="one study; repeat; default: all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", type=Path, default=data_folder())
    options = parser.parse_args()
    for name in options.study or STUDIES:
        run(name, options.data, options.device)


if __name__ == "__main__":
    main()
