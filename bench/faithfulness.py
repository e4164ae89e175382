"""The project's own faithfulness tables: every method on real photos, by the papers' protocols.

    python -m bench.faithfulness              # all cases; goes on where it was interrupted
    python -m bench.faithfulness --case cifar10 --case localisation
    python -m bench.faithfulness --speed      # time per image of every method alone

Data and weights are read from ``../shared/data`` (``--data`` for another folder). What was measured of each image stays in
``build/faithfulness``; figures, tables and curves go to ``bench/results/faithfulness/CASE``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitexplain.errors import InputError
from vitexplain.evaluate.runner import Evaluation
from vitexplain.explainer import Explainer
from vitexplain.loading import LoadedModel, load_model
from vitexplain.methods import own_methods
from vitexplain.sources import Source, open_source

from .record import RESULTS, Row, environment, spread, write_rows

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
WORK = ROOT / "build" / "faithfulness"
FAITHFULNESS = RESULTS / "faithfulness"
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

    def load(self, device: str) -> LoadedModel:
        """The model, with its weights from the data folder where they are not its own."""
        return load_model(self.model, None if self.weights is None else DATA / self.weights, device)

    def source(self, model: LoadedModel) -> Source:
        """The images."""
        return open_source(DATA / self.data, images=self.images, classes=model)


DEIT = {"model": "deit_tiny_patch16_224", "weights": "deit_tiny_patch16_224_fp16.safetensors"}
PHOTOS = {**DEIT, "data": "imagenet_sample_500.npz"}
BOTH = {"explained": ("pred", "gt")}
CASES: dict[str, Case] = {
    "perturbation": Case(**PHOTOS, protocols=("perturbation:convention=both",), settings=BOTH),
    "localisation": Case(**DEIT, data="ecssd_500.npz", protocols=("localisation",)),
    "cifar10": Case("demo", None, "cifar10_exact_test1017.npz", ("perturbation:convention=both",), settings=BOTH),
    "ablation": Case(**PHOTOS, protocols=("ablation",), methods=("tokentm",)),
    "iba_chosen_on_even": Case(**PHOTOS, protocols=("perturbation",), methods=IBA, images="::2", settings={"controls": False}),
    "iba_reported_on_odd": Case(**PHOTOS, protocols=("perturbation",), methods=IBA, images="1::2", settings={"controls": False}),
    "probability": Case(**PHOTOS, protocols=("insertion_deletion:step=10", "average_drop", "saco"), images="::2"),
    "precision_float32": Case(**PHOTOS, protocols=("perturbation",), images=":64", methods=("tokentm", "iba", "rollout")),
    "precision_bfloat16": Case(**PHOTOS, protocols=("perturbation",), images=":64", methods=("tokentm", "iba", "rollout")),
}


def evaluation_of(name: str, device: str) -> Evaluation:
    """A case, ready to run; float32 forwards on changed images only where it says so."""
    case = CASES[name]
    model = case.load(device)
    return Evaluation(
        model,
        case.source(model),
        case.methods or own_methods(),
        case.protocols,
        WORK / name,
        dtype="float32" if name.endswith("float32") else "bfloat16",
        **case.settings,
    )


def run(name: str, device: str) -> None:
    """Measure a case and write what it found into the results."""
    from vitexplain.evaluate import write_results

    evaluation = evaluation_of(name, device)
    started = time.perf_counter()
    results = evaluation.run(lambda done, total: _say(name, done, total, started))
    written = write_results(evaluation, results)
    target = FAITHFULNESS / name
    target.mkdir(parents=True, exist_ok=True)
    for path in written:
        if path.suffix in (".json", ".md"):
            shutil.copyfile(path, target / path.name)


def _say(name: str, done: int, total: int, started: float) -> None:
    print(f"{name}: {done} of {total} images, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="one case; repeat; default: all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--measure-only", action="store_true", help="leave the tables and pictures for later")
    options = parser.parse_args()
    for name in options.case or CASES:
        if options.measure_only:
            started = time.perf_counter()
            evaluation_of(name, options.device).run(lambda done, total, name=name, t=started: _say(name, done, total, t))
        else:
            run(name, options.device)


if __name__ == "__main__":
    main()
