"""Faithfulness evaluations: the pace of a whole one, and of one perturbation curve beside the loops of public scripts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from vitexplain import Explainer
from vitexplain.evaluate import Evaluation
from vitexplain.evaluate.batch import Batch, Classifier, RankedMaps
from vitexplain.evaluate.protocols.base import counts_at, of_class, spans_first
from vitexplain.evaluate.protocols.perturbation import VTRANM
from vitexplain.evaluate.runner import DEFAULT_BATCHES
from vitexplain.loading import LoadedModel
from vitexplain.methods import own_methods
from vitexplain.models import read_anatomy
from vitexplain.sources import Source

from ..data_set_runs import RUNS, expect_data, made_photos, random_model
from ..faithfulness import STUDIES, data_folder
from ..record import Row, unavailable
from ..registry import EVALUATION, Check, Entry, Prepared, Setting, Size, TimedCase, Unavailable, figure, ours

WHOLE = "perturbation of the predicted class, all methods and controls"
METHOD, SUBSTRATE = "tokentm", "black"
# As public scripts do it
ONE_BY_ONE, STEP_BY_STEP = "one forward a step and photo", "one forward a step"
LIMIT = 1e-4  # between the curves of two ways, float32
WHOLE_TIMES = 2  # batches of a whole evaluation
CURVES = 8  # photos of the one curve: image by image, step by step takes long everywhere
LEADS = ("images per second", "changed images per second")


def curve_work(size: Size) -> str:
    """Name of the work at a size."""
    return f"perturbation curve of one map, {size.batch} photos"


@contextmanager
def photos_of(size: Size, device: torch.device) -> Iterator[tuple[LoadedModel, Source]]:
    """On a CPU the model with its weights and real photos; on a GPU random weights and photos made on the spot.

    Raises ``Unavailable`` where the data are absent.
    """
    count = WHOLE_TIMES * size.batch
    if device.type == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            yield random_model(size.model, device), made_photos(Path(folder), count, count)
        return
    expect_data(RUNS["photos"])
    study = STUDIES["perturbation"]
    model = study.load(data_folder(), "cpu")
    yield model, study.source(data_folder(), model).select(slice(0, count))


@dataclass
class _Curves(Prepared):
    """Photos and one ranked map of each; what is timed are probabilities (B, levels) of the predicted class."""

    batch: Batch
    maps: RankedMaps
    spans: Tensor

    def call(self, entry: Entry) -> Callable[[], Tensor]:
        return {ONE_BY_ONE: self.one_by_one, STEP_BY_STEP: self.step_by_step}.get(entry.provider, self.together)

    def check(self, entry: Entry) -> Check | None:
        """Each way against image by image, step by step, and that against ours."""
        other = self.curves_together if entry.provider == ONE_BY_ONE else self.curves_one_by_one
        return Check(float((self.call(entry)().double() - other).norm() / other.norm()), LIMIT)

    @cached_property
    def curves_together(self) -> Tensor:
        """In float64."""
        return self.together().double()

    @cached_property
    def curves_one_by_one(self) -> Tensor:
        """In float64; they take long."""
        return self.one_by_one().double()

    def together(self) -> Tensor:
        """Steps of all photos share forwards."""
        return of_class(self.batch.probe(self.maps.ranks, self.spans, SUBSTRATE), self.batch.predicted).exp()

    @torch.inference_mode()
    def one_by_one(self) -> Tensor:
        """Photo by photo, step by step."""
        curves = torch.empty(len(self.batch.images), len(self.spans), device=self.batch.images.device)
        substrate, shape = self.batch.substrate(SUBSTRATE), self.batch.images.shape[-2:]
        for row, (image, ranks, target) in enumerate(
            zip(self.batch.images, self.maps.ranks, self.batch.predicted.tolist(), strict=True)
        ):
            for step, removed in enumerate(self.spans[:, 1].tolist()):
                changed = torch.where((ranks < removed).view(1, 1, *shape), substrate, image)
                curves[row, step] = self.batch.classifier.anatomy.model(changed).softmax(-1)[0, target]
        return curves

    @torch.inference_mode()
    def step_by_step(self) -> Tensor:
        """All photos of the batch at one step."""
        substrate, model = self.batch.substrate(SUBSTRATE), self.batch.classifier.anatomy.model
        ranks = self.maps.ranks.view(-1, 1, *self.batch.images.shape[-2:])
        targets, curves = self.batch.predicted.view(-1, 1), []
        for removed in self.spans[:, 1].tolist():
            changed = torch.where(ranks < removed, substrate, self.batch.images)
            curves.append(model(changed).softmax(-1).gather(1, targets))
        return torch.cat(curves, 1)


class Evaluations(TimedCase):
    """Whole evaluations, and one curve; on a CPU with photos of ``../shared/data`` (or ``VITEXPLAIN_BENCH_DATA``)."""

    name: ClassVar[str] = "evaluations"
    kind: ClassVar[str] = EVALUATION
    title: ClassVar[str] = "perturbation evaluations: pace of a whole one, and of a curve beside one forward a step"

    def sizes(self, device_type: str) -> Sequence[Size]:
        model, batch = ("vit_base_patch16_224", 32) if device_type == "cuda" else ("deit_tiny_patch16_224", 8)
        return [Size(model, CURVES, 197), Size(model, batch, 197, dtype="bfloat16")]

    def entries(self, size: Size, device_type: str) -> Sequence[Entry]:
        """Curves in float32, where all ways agree; whole evaluations with changed images in bfloat16, as they are run."""
        if size.dtype == "float32":
            return [Entry(curve_work(size), provider) for provider in (ours(device_type), STEP_BY_STEP, ONE_BY_ONE)]
        return [Entry(WHOLE, ours(device_type))]

    def lead(self, entry: Entry) -> tuple[str, str]:
        return (LEADS[0], "1/s") if entry.work == WHOLE else ("time", "ms")

    def prepare(self, size: Size, setting: Setting) -> Prepared:
        with photos_of(size, setting.device) as (loaded, source):
            photos = [loaded.transform(source.sample(i).photo) for i in range(size.batch)]
        images = torch.stack(photos).to(setting.device)
        model = loaded.model.requires_grad_(False)
        _, forward_batch = DEFAULT_BATCHES["cpu" if setting.device.type == "cpu" else "gpu"]
        classifier = Classifier(read_anatomy(model), loaded.mean, loaded.std, forward_batch)
        clean = classifier.log_probabilities(images).clone()
        batch = Batch(images, tuple(source.ids[: size.batch]), None, None, clean, classifier, 0)
        maps = Explainer(model, METHOD).attribute(images, batch.predicted.clone()).maps
        return _Curves(batch, RankedMaps.of(maps, batch, METHOD), spans_first(counts_at(VTRANM, batch.num_pixels)))

    def measure(self, size: Size, setting: Setting) -> Iterator[Row]:
        yield from super().measure(size, setting) if size.dtype == "float32" else self._whole(size, setting)

    def _whole(self, size: Size, setting: Setting) -> Iterator[Row]:
        for entry in self.entries(size, setting.device.type):
            if not setting.wants(entry):
                continue
            try:
                timing = whole_evaluation(size, setting.device)
            except Unavailable as reason:
                yield self.row(entry, size, *self.lead(entry), unavailable(reason), setting.device)
                continue
            for metric in LEADS:
                yield self.row(entry, size, metric, "1/s", figure(timing[metric.replace(" ", "_")]), setting.device)


def whole_evaluation(size: Size, device: torch.device) -> dict[str, float]:
    """What an evaluation says of its own pace; on a GPU after one of a single batch, which compiles and chooses kernels."""
    with photos_of(size, device) as (model, source):
        if device.type == "cuda":
            _evaluated(model, source.select(slice(0, size.batch)), size)
        return _evaluated(model, source, size)


def _evaluated(model: LoadedModel, source: Source, size: Size) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        evaluation = Evaluation(model, source, folder, own_methods(), ["perturbation"], batch=size.batch, dtype=size.dtype)
        return evaluation.run().timing
