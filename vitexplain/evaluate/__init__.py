"""Is an explanation faithful to its model? The papers' protocols on any data set and model."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import write_whole
from ..loading import LoadedModel
from ..methods import MethodChoice
from ..options import checked_count
from ..sources import Source
from .controls import CONTROLS
from .curves import save_curves
from .gallery import choose_gallery
from .protocols import PROTOCOLS, Protocol
from .quantus_bridge import build_metric, metric_names, quantus_explainer, quantus_scores
from .report import write_report
from .results import Results
from .runner import Evaluation, ProgressCallback
from .tables import markdown

__all__ = [
    "CONTROLS",
    "PROTOCOLS",
    "Evaluation",
    "Protocol",
    "Results",
    "build_metric",
    "evaluate",
    "metric_names",
    "quantus_explainer",
    "quantus_scores",
    "write_results",
]


def evaluate(
    model: LoadedModel,
    source: Source | str | Path,
    output: str | Path,
    methods: MethodChoice = "tokentm",
    protocols: str | Protocol | Iterable[str | Protocol] = "perturbation",
    *,
    gallery: int = 12,
    progress: ProgressCallback | None = None,
    **settings: Any,
) -> Results:
    """Measure how faithful methods are to a model, and write tables, curves and a report.

    An evaluation that was interrupted goes on where it was, with the same result, when it is called again with the same
    arguments.

    Args:
        model, source, output, methods, protocols, settings: see ``Evaluation``.
        gallery: photos in the report.
        progress: called with the number of images done and of all.

    Returns:
        What ``output/results.json`` holds; beside it are ``results.md``, ``report.html``, ``curves/`` and ``per_image/``.

    Raises:
        InputError, UnknownNameError, UnsupportedModelError: something does not fit.
    """
    if find_spec("jinja2") is None:
        raise InputError("the report needs jinja2: pip install 'vitexplain[evaluate]'")
    checked_count("gallery", gallery, 0, "photo")
    evaluation = Evaluation(model, source, output, methods, protocols, **settings)
    results = evaluation.run(progress)
    write_results(evaluation, results, gallery=gallery)
    return results


def write_results(evaluation: Evaluation, results: Results, *, gallery: int = 12) -> list[Path]:
    """Write ``results.json``, ``results.md``, the curves and ``report.html`` into the evaluation's folder.

    Raises:
        InputError: one of them cannot be written.
    """
    output = evaluation.output
    write_whole(output / "results.json", results.to_json().encode())
    write_whole(output / "results.md", markdown(results).encode())
    curves = save_curves(results, output / "curves")
    report = write_report(results, choose_gallery(evaluation, gallery), output / "report.html")
    return [output / "results.json", output / "results.md", *curves, report]
