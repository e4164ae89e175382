"""Everything that the maps of a data set depend on, checked, and as it is written beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..environment import versions, with_used
from ..errors import InputError, UnsupportedModelError
from ..explainer import Explainer
from ..loading import RESIZE, LoadedModel, Preprocess, dtype_name
from ..methods import CaptumMethod, Method
from ..models import read_anatomy
from ..options import checked_count
from ..sources import Source
from ..targets import num_top
from .layout import FORMAT, Layout

PACKAGES = ("vitexplain", "torch", "torchvision", "timm", "numpy", "pillow", "zarr", "numcodecs", "pyarrow")


@dataclass(frozen=True)
class Plan:
    """What is to be explained and how, checked; it can be pickled.

    Attributes:
        model: with its preprocessing.
        source: of the images.
        methods: by label.
        target: ``"pred"``, ``"label"`` or ``"topK"``.
        dtype: element type that the model runs in.
        backend: of the explanations.
        resize: ``"model"`` or ``"squash"``; see ``LoadedModel.preprocess``.
        compile: run the model's blocks as ``torch.compile`` makes them.
        cuda_graph: capture explanations in a CUDA graph where that can be done.
        deterministic: the same bits each time, also on a GPU.
        workers: processes that decode photos, for each device.

    Raises:
        InputError, UnsupportedModelError: something does not fit.
    """

    model: LoadedModel
    source: Source
    methods: Mapping[str, Method]
    target: str = "pred"
    dtype: torch.dtype = torch.float32
    backend: str = "auto"
    resize: str = "model"
    compile: bool = False
    cuda_graph: bool = True
    deterministic: bool = True
    workers: int = 0

    def __post_init__(self) -> None:
        if self.resize not in RESIZE:
            raise InputError(f"resize: expected one of {', '.join(RESIZE)}, received {self.resize!r}")
        checked_count("workers", self.workers, 0, "process")
        for name in ("compile", "cuda_graph", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}: expected True or False, received {getattr(self, name)!r}")
        if self.device.type not in ("cpu", "cuda"):
            raise InputError(f"model: expected one on a CPU or a CUDA device, received one on {self.device}")
        if torch.is_autocast_enabled(self.device.type):
            raise InputError("dtype: expected no autocast around a whole data set; the model runs in the dtype that is asked for")
        explainer = Explainer(self.model.model, self.methods, self.backend, compile=self.compile)
        explainer.check_backend(self.device)
        anatomy = explainer.anatomy
        if anatomy.grid is None:
            raise UnsupportedModelError(f"dataset: expected a model of images, received {type(anatomy.model).__name__}")
        anatomy.check_image_size(3, *self.model.input_size)
        self._check_target()

    def _check_target(self) -> None:
        count = self.model.num_classes
        if not isinstance(self.target, str):
            raise InputError(f"target: expected pred, label or topK, such as top3, received {self.target!r}")
        if self.target.startswith("top"):
            num_top(self.target, count)
        elif self.target not in ("pred", "label"):
            raise InputError(f"target: expected pred, label or topK, such as top3, received {self.target!r}")
        if self.target == "label" and self.source.labels is None:
            raise InputError(f"target: 'label' needs labels, and {self.source.name!r} ({self.source.kind}) has none")
        self.source.check_labels(count)

    @property
    def device(self) -> torch.device:
        """That the model is on."""
        return next(self.model.model.parameters()).device

    @property
    def how(self) -> dict[str, Any]:
        """Options of ``BatchExplainer`` that decide what is explained."""
        return {"target": self.target, "dtype": self.dtype, "backend": self.backend, "compile": self.compile}

    @property
    def num_targets(self) -> int | None:
        """K of ``"topK"``; None where maps have no axis of targets."""
        return num_top(self.target, self.model.num_classes) if self.target.startswith("top") else None

    @property
    def preprocess(self) -> Preprocess:
        """What makes photos the model's input."""
        return self.model.preprocess(self.resize)

    def layout(self, shard: int) -> Layout:
        """The store's arrays, with that many images a shard."""
        grid = read_anatomy(self.model.model).grid
        assert grid is not None
        size = self.model.input_size
        patches = tuple(grid(*size))
        leading = () if self.num_targets is None else (self.num_targets,)
        shapes = {
            label: (*leading, *(size if method.resolution == "pixels" else patches)) for label, method in self.methods.items()
        }
        return Layout(len(self.source), shard, shapes, self.num_targets)

    def settings(self, batch: int, shard: int) -> dict[str, Any]:
        """All that maps depend on, as JSON."""
        return {
            "format": FORMAT,
            "model": {
                **self.model.settings(self.resize),
                "class_names": None if self.model.class_names is None else list(self.model.class_names),
            },
            "data": {
                "name": self.source.name,
                "kind": self.source.kind,
                "path": self.source.location,
                "split": self.source.split,
                "images": self.source.images,
                "count": len(self.source),
                "sha256": self.source.fingerprint(),
            },
            "methods": {label: {"name": method.name, "options": asdict(method)} for label, method in self.methods.items()},
            "target": self.target,
            "dtype": dtype_name(self.dtype),
            "backend": self.backend,
            "compile": self.compile,
            "device": self.device.type,
            "deterministic": self.deterministic,
            "float32_products": str(torch.backends.cuda.matmul.fp32_precision) if self.device.type == "cuda" else "ieee",
            "batch": batch,
            "shard": shard,
            "versions": self.versions(),
        }

    def versions(self) -> dict[str, str]:
        """Of all packages that the maps depend on, as they are in this process."""
        captum = any(isinstance(method, CaptumMethod) for method in self.methods.values())
        return versions(with_used(PACKAGES, self.model.model, captum=captum))
