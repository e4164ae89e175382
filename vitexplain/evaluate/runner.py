"""An evaluation from beginning to end: explain, measure, keep, summarise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..environment import environment, with_used
from ..errors import InputError, UnsupportedModelError
from ..explainer import Explainer
from ..loading import RESIZE, LoadedModel, Preprocess, dtype_name, dtype_named, in_dtype
from ..methods import CaptumMethod, Method, MethodChoice, methods_from_texts
from ..models import read_anatomy
from ..options import checked_count
from ..sources import Sample, Source
from ..sources.opening import as_source
from .batch import Batch, Classifier, RankedMaps
from .controls import CONTROLS, control_maps
from .journal import Journal
from .protocols import Ablation, Protocol, Quantus, build_protocols
from .protocols.ablation import VARIANTS, WHOLE
from .results import MethodEntry, Results
from .summary import Raw, summarise

EXPLAINED = ("pred", "gt")
VERSIONS = ("vitexplain", "torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn")
DEFAULT_BATCHES = {"cpu": (8, 64), "gpu": (32, 512)}
BETWEEN = "|"  # parts of an array's name in a chunk

ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class _Row:
    """One row of the tables and the protocols it takes part in."""

    entry: MethodEntry
    protocols: tuple[str, ...]


@dataclass(frozen=True)
class _Loaded:
    """What was read from the source for one chunk."""

    images: Tensor | None
    ids: tuple[str, ...]
    labels: Tensor | None
    masks: Tensor | None
    left_out: tuple[dict[str, str], ...]


@dataclass(frozen=True)
class _Others:
    """The images of a batch whose label is not predicted: their rows (m,), themselves, and their labels (m,)."""

    rows: Tensor
    batch: Batch
    labels: Tensor


class Evaluation:
    """Methods × protocols on a model and a source of images.

    Args:
        model: with its preprocessing; see ``load_model``.
        source: of images, or the path of one; see ``open_source``.
        output: the folder that keeps what was measured. What stands there is gone on with.
        methods: names, ``NAME:OPTION=VALUE,…`` texts or ``Method`` instances, or a mapping of labels to any of these. The
            ablation has rows of its own and leaves them aside.
        protocols: names, ``NAME:OPTION=VALUE,…`` texts or ``Protocol`` instances.
        explained: the classes that are explained: ``"pred"``, the predicted one, ``"gt"``, the label, or both.
        controls: also measure random maps, a centre prior, and the first method's negated maps (in an ablation by itself:
            those of the whole ``tokentm``).
        resize: ``"model"``, the model's own preprocessing; ``"squash"``, the whole photo; ``"auto"``, squash where a protocol
            reads masks.
        batch: images explained at once; None for 8 on a CPU and 32 on a GPU.
        forward_batch: changed images in one forward; None for 64 on a CPU and 512 on a GPU.
        dtype: element type of the forwards on changed images.
        explain_dtype: of the explanations.
        backend: of the explanations.
        seed: of ties, random maps and the bootstrap.
        bootstrap: resamples of the images for the intervals.
        overwrite: throw away what stands in the folder.

    Raises:
        InputError, UnknownNameError, UnsupportedModelError: before any work, where something does not fit.
    """

    def __init__(
        self,
        model: LoadedModel,
        source: Source | str | Path,
        output: str | Path,
        methods: MethodChoice = "tokentm",
        protocols: str | Protocol | Iterable[str | Protocol] = "perturbation",
        *,
        explained: str | Iterable[str] = ("pred",),
        controls: bool = True,
        resize: str = "auto",
        batch: int | None = None,
        forward_batch: int | None = None,
        dtype: str = "float32",
        explain_dtype: str = "float32",
        backend: str = "auto",
        seed: int = 0,
        bootstrap: int = 2000,
        overwrite: bool = False,
    ) -> None:
        self.model, self.source, self.output = model, as_source(source, model), Path(output)
        self.dtype, self.explain_dtype = dtype_named(dtype), dtype_named(explain_dtype, "explain_dtype")
        self.methods = methods_from_texts(methods)
        self.protocols = build_protocols([protocols] if isinstance(protocols, str | Protocol) else protocols)
        self.explained = tuple(dict.fromkeys([explained] if isinstance(explained, str) else explained))
        device = next(model.model.parameters()).device
        default_batch, default_forward_batch = DEFAULT_BATCHES["cpu" if device.type == "cpu" else "gpu"]
        self.batch = default_batch if batch is None else batch
        self.forward_batch = default_forward_batch if forward_batch is None else forward_batch
        self.seed, self.bootstrap = seed, bootstrap
        self._check(resize)
        self.needs_masks = any(protocol.needs_masks for protocol in self.protocols.values())
        self.resize = resize if resize != "auto" else "squash" if self.needs_masks else "model"
        self.preprocess: Preprocess = model.preprocess(self.resize)
        self.rows = self._rows(controls)
        evaluated = in_dtype(model.model, self.dtype)
        explained_model = evaluated if self.dtype == self.explain_dtype else in_dtype(model.model, self.explain_dtype)
        anatomy = read_anatomy(evaluated)
        if anatomy.grid is None:
            raise UnsupportedModelError(f"evaluate: expected a model of images, received {type(anatomy.model).__name__}")
        self.grid = anatomy.grid(*model.input_size)
        self.classifier = Classifier(anatomy, model.mean, model.std, self.forward_batch)
        self.explainer = Explainer(explained_model, self._explained_methods(), backend)
        self.environment = environment(device, self._packages())
        self.settings = self._settings(controls, backend)
        self.journal = Journal(self.output, {**self.settings, "environment": self.environment}, overwrite=overwrite)

    # -- checks and settings -------------------------------------------------------------------------------------------

    def _check(self, resize: str) -> None:
        if resize not in ("auto", *RESIZE):
            raise InputError(f"resize: expected one of {', '.join(('auto', *RESIZE))}, received {resize!r}")
        for value in self.explained:
            if value not in EXPLAINED:
                raise InputError(f"explained: expected {' or '.join(EXPLAINED)}, received {value!r}")
        if not self.explained:
            raise InputError(f"explained: expected {' or '.join(EXPLAINED)}, received none")
        checked_count("batch", self.batch, 1, "image")
        checked_count("forward_batch", self.forward_batch, 1, "image")
        checked_count("bootstrap", self.bootstrap, 1, "resample")
        checked_count("seed", self.seed, 0)
        if "gt" in self.explained and not self.source.has_labels:
            raise InputError(f"explained: 'gt' needs labels, and {self.source.name!r} ({self.source.kind}) has none")
        for label, protocol in self.protocols.items():
            if protocol.needs_masks and not self.source.has_masks:
                raise InputError(f"protocol {label!r} needs masks, and {self.source.name!r} ({self.source.kind}) has none")
            if protocol.needs_scikit_learn and find_spec("sklearn") is None:
                raise InputError(f"protocol {label!r} needs scikit-learn: pip install 'vitexplain[evaluate]'")
        taken = {*CONTROLS, *VARIANTS, *(f"negated {label}" for label in self.methods)}
        for label in (*self.methods, *self.protocols):
            if BETWEEN in label:
                raise InputError(f"label: expected one without {BETWEEN!r}, received {label!r}")
            if label in taken:
                raise InputError(f"label: expected one that no control or variant of the ablation has, received {label!r}")
        self.source.check_labels(self.model.num_classes)

    def _rows(self, controls: bool) -> dict[str, _Row]:
        """By label: methods, the ablation's variants, and controls."""
        ordinary = tuple(label for label, protocol in self.protocols.items() if not isinstance(protocol, Ablation))
        ablations = tuple(label for label, protocol in self.protocols.items() if isinstance(protocol, Ablation))
        rows = {label: _Row(_entry(method, "method"), ordinary) for label, method in self.methods.items() if ordinary}
        rows |= {label: _Row(_entry(method, "ablation"), ablations) for label, method in VARIANTS.items() if ablations}
        self.negated = next(iter(self.methods)) if ordinary else WHOLE
        if controls:
            rows |= {name: _Row(MethodEntry(name, "control"), tuple(self.protocols)) for name in CONTROLS}
            negatable = tuple(label for label, protocol in self.protocols.items() if protocol.takes_negated_maps)
            if negatable:
                rows[f"negated {self.negated}"] = _Row(MethodEntry(f"negated {self.negated}", "control"), negatable)
        return rows

    def _packages(self) -> tuple[str, ...]:
        """Whose versions the figures depend on."""
        captum = any(isinstance(method, CaptumMethod) for method in self._explained_methods().values())
        quantus = any(isinstance(protocol, Quantus) for protocol in self.protocols.values())
        return with_used(VERSIONS, self.model.model, captum=captum, quantus=quantus)

    def _explained_methods(self) -> dict[str, Method]:
        return {label: {**VARIANTS, **self.methods}[label] for label, row in self.rows.items() if row.entry.kind != "control"}

    def _settings(self, controls: bool, backend: str) -> dict[str, Any]:
        return {
            "model": self.model.settings(self.resize),
            "data": {
                "name": self.source.name,
                "kind": self.source.kind,
                "images": len(self.source),
                "sha256": self.source.fingerprint(),
            },
            "methods": {
                label: {"name": method.name, "options": asdict(method)} for label, method in self._explained_methods().items()
            },
            "rows": list(self.rows),
            "protocols": {label: {"name": p.name, "options": asdict(p)} for label, p in self.protocols.items()},
            "explained": list(self.explained),
            "controls": controls,
            "dtype": dtype_name(self.dtype),
            "explain_dtype": dtype_name(self.explain_dtype),
            "backend": backend,
            "batch": self.batch,
            "forward_batch": self.forward_batch,
            "seed": self.seed,
        }

    # -- the run ---------------------------------------------------------------------------------------------------------

    def run(self, progress: ProgressCallback | None = None) -> Results:
        """Measure what is not measured yet, and summarise.

        Args:
            progress: called with the number of images done and of all images.

        Raises:
            InputError: no image can be read, a map is not finite, or the folder cannot be written.
        """
        missing = [number for number in range(self.num_chunks) if not self.journal.has(number)]
        total = len(self.source)
        done = total - sum(len(self._indices(number)) for number in missing)
        with ThreadPoolExecutor(1) as reader:
            ahead: Future[_Loaded] | None = reader.submit(self._load, missing[0]) if missing else None
            for place, number in enumerate(missing):
                if progress:
                    progress(done, total)
                assert ahead is not None
                loaded = ahead.result()
                following = missing[place + 1] if place + 1 < len(missing) else None
                ahead = None if following is None else reader.submit(self._load, following)
                self.journal.write(number, *self._measure_chunk(loaded))
                done += len(self._indices(number))
        if progress:
            progress(done, total)
        return self.summary()

    @property
    def num_chunks(self) -> int:
        return -(-len(self.source) // self.batch)

    def _indices(self, number: int) -> range:
        return range(number * self.batch, min((number + 1) * self.batch, len(self.source)))

    def _load(self, number: int) -> _Loaded:
        """Read a chunk; what cannot be read is left out and named."""
        samples, left_out = [], []
        for index in self._indices(number):
            try:
                samples.append(self.source.sample(index, masks=self.needs_masks))
            except InputError as error:
                left_out.append({"id": self.source.ids[index], "reason": str(error)})
        if not samples:
            return _Loaded(None, (), None, None, tuple(left_out))
        return _Loaded(
            images=torch.stack([self.preprocess.image(sample.photo) for sample in samples]),
            ids=tuple(sample.id for sample in samples),
            labels=torch.tensor([sample.label for sample in samples]) if self.source.has_labels else None,
            masks=torch.stack([self.preprocess.mask(_mask(sample)) for sample in samples]) if self.needs_masks else None,
            left_out=tuple(left_out),
        )

    def _measure_chunk(self, loaded: _Loaded) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays by name, images first, and notes."""
        if loaded.images is None:
            return {}, {"left_out": loaded.left_out, "seconds": {}, "forwarded": 0}
        started = time.perf_counter()
        batch = self._batch(loaded.images, loaded)
        before = self.classifier.num_forwarded
        others = self._others(batch)
        maps = self._maps(batch, batch.predicted)
        other_maps = {} if others is None else self._maps(others.batch, others.labels)
        if batch.images.is_cuda:
            torch.cuda.synchronize(batch.images.device)
        seconds = {"explaining": time.perf_counter() - started}
        arrays = self._about(batch, maps)
        ranked_maps = self._ranked(maps, batch)
        other_ranked_maps = repeat(None) if others is None else self._ranked(other_maps, others.batch)
        for (label, row), ranked, other_ranked in zip(self.rows.items(), ranked_maps, other_ranked_maps):  # noqa: B905
            for protocol in row.protocols:
                begun = time.perf_counter()
                found = self._measure(protocol, batch, ranked, others, other_ranked)
                seconds[protocol] = seconds.get(protocol, 0.0) + time.perf_counter() - begun
                for (kind, name), values in found.items():
                    arrays[BETWEEN.join((label, protocol, kind, name))] = values
        self.classifier.check_finite()
        seconds["all"] = time.perf_counter() - started
        return arrays, {
            "left_out": loaded.left_out,
            "seconds": seconds,
            "forwarded": self.classifier.num_forwarded - before,
        }

    def _about(self, batch: Batch, maps: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """What is kept of each image besides what protocols measure."""
        arrays = {
            "ids": np.array(batch.ids),
            "predicted": batch.predicted.cpu().numpy(),
            "clean_log_p": batch.clean.amax(-1).cpu().numpy(),
        }
        if batch.labels is not None:
            arrays["labels"] = batch.labels.cpu().numpy()
        return arrays | {f"map{BETWEEN}{label}": _thumbnail(values, self.grid) for label, values in maps.items()}

    def _batch(self, images: Tensor, loaded: _Loaded) -> Batch:
        place = self.classifier.device
        images = images.to(place, torch.float32)
        labels, masks = (None if tensor is None else tensor.to(place) for tensor in (loaded.labels, loaded.masks))
        clean = self.classifier.log_probabilities(images).clone()
        self.classifier.check_finite()
        return Batch(images, loaded.ids, labels, masks, clean, self.classifier, self.seed)

    def _others(self, batch: Batch) -> _Others | None:
        """The images whose label is explained and not predicted, if any."""
        if "gt" not in self.explained:
            return None
        assert batch.labels is not None, "labels are explained where there are some"
        rows = (batch.labels != batch.predicted).nonzero().squeeze(1)
        return _Others(rows, batch.take(rows), batch.labels[rows]) if len(rows) else None

    def _maps(self, batch: Batch, target: Tensor) -> dict[str, Tensor]:
        """(B, gh, gw) of every method and control, by label; all methods share forward and backward."""
        dtype = next(self.explainer.anatomy.model.parameters()).dtype
        explanations = self.explainer.attribute(batch.images.to(dtype), target.clone())
        maps = {label: explanation.maps for label, explanation in explanations.items()}
        return maps | {name: control_maps(name, batch, self.grid) for name in CONTROLS if name in self.rows}

    def _ranked(self, maps: Mapping[str, Tensor], batch: Batch) -> Iterator[RankedMaps]:
        """The maps of every row in turn, each sorted once; the negated control reverses those of the first method."""
        original: RankedMaps | None = None
        for label in self.rows:
            if label in maps:
                ranked = RankedMaps.of(maps[label], batch, label)
                original = ranked if label == self.negated else original
                yield ranked
            else:
                assert original is not None  # controls stand last
                yield original.negated()

    def _measure(
        self,
        protocol: str,
        batch: Batch,
        ranked: RankedMaps,
        others: _Others | None,
        other_ranked: RankedMaps | None,
    ) -> dict[tuple[str, str], np.ndarray]:
        """By (explained class, name): an image whose label is predicted is measured once for both."""
        raw = _to_numpy(self.protocols[protocol].measure(batch, ranked, batch.predicted))
        found = {("pred", name): values for name, values in raw.items()} if "pred" in self.explained else {}
        if "gt" in self.explained:
            true = {name: values.copy() for name, values in raw.items()}
            if others is not None and other_ranked is not None:
                rows = others.rows.cpu().numpy()
                measured = self.protocols[protocol].measure(others.batch, other_ranked, others.labels)
                for name, values in _to_numpy(measured).items():
                    true[name][rows] = values
            found |= {("gt", name): values for name, values in true.items()}
        return found

    # -- the summary -----------------------------------------------------------------------------------------------------

    def summary(self) -> Results:
        """Figures of everything that was measured."""
        raw: dict[tuple[str, str, str], dict[str, list[np.ndarray]]] = {}
        left_out: list[dict[str, str]] = []
        seconds: dict[str, float] = {}
        forwarded = 0
        for number in range(self.num_chunks):
            arrays, notes = self.journal.read(number)
            left_out += notes["left_out"]
            forwarded += notes["forwarded"]
            for name, value in notes["seconds"].items():
                seconds[name] = seconds.get(name, 0.0) + value
            for key, values in arrays.items():
                parts = key.split(BETWEEN)
                if len(parts) == 4:
                    label, protocol, kind, name = parts
                    raw.setdefault((label, protocol, kind), {}).setdefault(name, []).append(values)
        if not raw:
            raise InputError(f"source: none of the {len(self.source)} images of {self.source.name!r} could be read")
        joined: dict[tuple[str, str, str], Raw] = {
            key: {name: np.concatenate(parts) for name, parts in arrays.items()} for key, arrays in raw.items()
        }
        found = summarise(
            joined, self.protocols, self.explained, labels=self.source.has_labels, resamples=self.bootstrap, seed=self.seed
        )
        count = len(self.source) - len(left_out)
        return Results(
            methods={label: row.entry for label, row in self.rows.items()},
            columns=found.columns,
            figures=found.figures,
            curves=found.curves,
            settings={**self.settings, "bootstrap": self.bootstrap},
            environment=self.environment,
            left_out=tuple(left_out),
            timing={
                "seconds": seconds,
                "images": count,
                "images_per_second": count / seconds["all"],
                "changed_images": forwarded,
                "changed_images_per_second": forwarded / (seconds["all"] - seconds["explaining"]),
            },
        )


def _entry(method: Method, kind: str) -> MethodEntry:
    return MethodEntry(method.title, kind, asdict(method))


def _mask(sample: Sample) -> np.ndarray:
    assert sample.mask is not None, "read with masks"
    return sample.mask


def _to_numpy(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def _thumbnail(maps: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Maps on the patch grid in half precision, each scaled to a largest magnitude of 1: for pictures and disagreement alone."""
    maps = maps.float()
    if maps.shape[-2:] != grid:
        maps = torch.nn.functional.adaptive_avg_pool2d(maps.unsqueeze(1), grid).squeeze(1)
    largest = maps.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (maps / largest).half().cpu().numpy()


__all__ = ["Evaluation"]
