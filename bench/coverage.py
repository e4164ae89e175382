"""What explains what: every method on a small model of every family, and every timm model of a supported class.

python -m bench.coverage          # each pair against the dense float64 reference -> results/coverage.csv
python -m bench.coverage --timm   # every name of timm.list_models(), two blocks deep -> results/timm_models.csv
python -m bench.coverage --timm vit_tiny_patch16_224   # this one again

The tests make the same comparisons and hold them to the committed table; the README's table is made of it.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import vitexplain
from vitexplain import Explanation, ExplanationError
from vitexplain.models import FAMILIES
from vitexplain.testing import DenseReference, relative_error
from vitexplain.testing.families import FAMILY_CASES, FamilyCase

from .record import RESULTS

COVERAGE = RESULTS / "coverage.csv"
TIMM_MODELS = RESULTS / "timm_models.csv"

AGREES = "agrees"
RUNS = "explained, without a reference"
REFUSED = "refused"
# float64, maps rounded to float32; quotients near 0 / 0 in LRP's own rules multiply rounding errors
TOLERANCE = {"lrp": 1e-5, "partial_lrp": 1e-5}
OPTIONS = {"integrated_gradients": {"steps": 3}}  # more of the same passes would show no more
DEFAULT_TOLERANCE = 1e-6

TIMM_METHODS = ("tokentm", "gmar", "iba", "rollout")
TIMM_DEPTH = 2


@dataclass(frozen=True)
class Pair:
    """One method on one family: how it went, and why not."""

    package: str
    family: str
    method: str
    outcome: str
    reason: str = ""


@dataclass(frozen=True)
class TimmModel:
    """One name of timm's: its class, how it went, and why not."""

    name: str
    kind: str
    outcome: str
    reason: str = ""


def outcomes(case: FamilyCase) -> Iterator[Pair]:
    """Every method on one family, against the dense reference; raises ``AssertionError`` where they disagree."""
    model, inputs, score = case.model(), case.inputs(), case.score()
    reference = DenseReference(model, inputs)
    for info in vitexplain.methods():
        options = OPTIONS.get(info.name, {})
        try:
            ours = vitexplain.explain(model, inputs, method=info.name, score=score, **options)
        except ExplanationError as error:
            yield Pair(case.package, case.family, info.name, REFUSED, str(error))
            continue
        assert torch.isfinite(ours.maps).all(), f"{info.name} on {case.family}: values that are not finite"
        if not hasattr(DenseReference, f"_{info.name}"):
            yield Pair(case.package, case.family, info.name, RUNS)
            continue
        exact = reference.explain(info.name, score or ours.target, **options)
        error = relative_error(_values(ours), exact.flatten(1))
        limit = TOLERANCE.get(info.name, DEFAULT_TOLERANCE)
        assert error <= limit, f"{info.name} on {case.package} {case.family}: relative error {error:.1e}, expected {limit:.0e}"
        yield Pair(case.package, case.family, info.name, AGREES)


def _values(explanation: Explanation) -> Tensor:
    return torch.cat([explanation.prefix_values, explanation.maps.flatten(1)], -1)


def supported_timm_names() -> Iterator[str]:
    """Names of timm's whose class one of the families reads; classes are found without making weights."""
    for name in timm.list_models():
        with torch.device("meta"):
            try:
                model = timm.create_model(name)
            except (NotImplementedError, RuntimeError):  # some convolutional models compute with their weights as they are built
                continue
        if any(family.reads(model) for family in FAMILIES):
            yield name


def explain_timm_model(name: str) -> TimmModel:
    """A timm model, two blocks deep and with ten classes where it has none, explained on noise."""
    torch.manual_seed(0)
    model = _built(name)
    kind = type(model).__name__
    size = getattr(model.patch_embed, "img_size", None) or model.pretrained_cfg["input_size"][1:]
    channels = model.pretrained_cfg.get("input_size", (3,))[0]
    images = torch.randn(1, channels, *size)
    try:
        vitexplain.Explainer(model, "rollout")
    except ExplanationError as error:
        return TimmModel(name, kind, REFUSED, str(error))
    refused, explained = [], []
    for method in TIMM_METHODS:
        try:
            vitexplain.Explainer(model, method)
            explained.append(method)
        except ExplanationError as error:
            refused.append(str(error))
    for method, explanation in vitexplain.explain(model, images, method=explained).items():
        assert torch.isfinite(explanation.maps).all(), f"{name}, {method}: values that are not finite"
        assert explanation.maps.abs().max() > 0, f"{name}, {method}: all zero"
    return TimmModel(name, kind, "explained", "; ".join(refused))


def _built(name: str) -> nn.Module:
    with torch.device("meta"):
        whole = timm.create_model(name)
    options: dict[str, object] = {"depth": TIMM_DEPTH}
    if not whole.num_classes:
        options["num_classes"] = 10
    groups = [getattr(getattr(block, "attn", None), "num_kv_heads", 0) for block in whole.blocks]
    if any(groups):  # may be given block by block, for more blocks than are built
        options["num_kv_heads"] = min(groups)
    return timm.create_model(name, **options).eval()


def write(path: Path, rows: Iterable[Pair] | Iterable[TimmModel]) -> None:
    """Rows with a header."""
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(rows[0])])
        writer.writerows(astuple(row) for row in rows)


def read(path: Path, kind: type) -> list:
    """The rows of a file, as ``Pair`` or ``TimmModel``."""
    with path.open(newline="") as file:
        return [kind(**row) for row in csv.DictReader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timm", action="store_true", help="sweep over timm.list_models()")
    parser.add_argument("names", nargs="*", help="with --timm: only these, whose rows replace the old ones")
    arguments = parser.parse_args()
    if not arguments.timm:
        pairs = [pair for case in FAMILY_CASES for pair in outcomes(case)]
        write(COVERAGE, pairs)
        print(Counter(pair.outcome for pair in pairs))
        return
    models = {model.name: model for model in read(TIMM_MODELS, TimmModel)} if arguments.names else {}
    for name in arguments.names or supported_timm_names():
        try:
            models[name] = explain_timm_model(name)
        except Exception as error:  # a failure is a row of the table, and the sweep goes on
            models[name] = TimmModel(name, "", "failed", f"{type(error).__name__}: {error}")
        print(*astuple(models[name]), sep=" | ", flush=True)
    write(TIMM_MODELS, [models[name] for name in sorted(models)])
    print(Counter(model.outcome for model in models.values()))


if __name__ == "__main__":
    main()
