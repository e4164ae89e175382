"""Models by name, with what belongs to them: preprocessing, class names."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import timm.data
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .errors import InputError, unknown_name
from .heatmap import as_photo
from .hugging_face import PREFIX, transformers_model, untrained_transformers_model, within_reach
from .messages import brief, quiet
from .models import unwrap
from .weights import fill, float32_state, num_classes_of, read_state_dict

DEMO = "demo"
DISPLAY_SIDE = 448
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RESIZE = ("model", "squash")

_ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:", "timm/")  # names of models on a hub or in a folder
_SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_PREPROCESSING = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")

_DEMO_FILES = "demo_vit_cifar10"


class Preprocess:
    """One geometry for photos and their masks, by a timm data configuration."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._image = timm.data.create_transform(**config, is_training=False)
        self._seen = timm.data.create_transform(**config, is_training=False, normalize=False)
        nearest = {**config, "interpolation": "nearest", "mean": (0.0, 0.0, 0.0)}  # what is added around a photo is background
        self._mask = timm.data.create_transform(**nearest, is_training=False, normalize=False)

    def image(self, photo: Image.Image) -> Tensor:
        """(3, h, w) float32, normalised, of a photo of any mode."""
        return self._image(as_photo(photo))

    def seen(self, photo: Image.Image) -> Tensor:
        """(3, h, w) uint8: what the model sees of the photo."""
        return self._seen(as_photo(photo))

    def mask(self, mask: np.ndarray) -> Tensor:
        """(h, w) bool of a mask (H, W) bool of the photo's size."""
        return self._mask(Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB"))[0] > 127


class Display:
    """What a model sees of photos, for people, by a timm data configuration; see ``LoadedModel.display``."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        channels, height, width = config["input_size"]
        factor = max(1, -(-DISPLAY_SIDE // min(height, width)))
        larger = {**config, "input_size": (channels, height * factor, width * factor)}
        self._transform = timm.data.create_transform(**larger, is_training=False, normalize=False)
        self._squashes = config.get("crop_mode") == "squash"

    def __call__(self, photo: Image.Image) -> Image.Image:
        seen = as_photo(self._transform(as_photo(photo)))
        if not self._squashes:
            return seen
        scale = min(seen.size) / min(photo.size)
        return seen.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be explained, with what belongs to it.

    Attributes:
        name: the name it was asked for by.
        model: in evaluation mode, on its device.
        config: timm's data configuration: ``input_size``, ``interpolation``, ``crop_pct``, ``crop_mode``, ``mean``, ``std``.
        class_names: one name a class, or None where they are not known.
    """

    name: str
    model: nn.Module
    config: Mapping[str, Any]
    class_names: tuple[str, ...] | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        config: Mapping[str, Any] | None = None,
        class_names: Iterable[str] | None = None,
        name: str | None = None,
    ) -> LoadedModel:
        """A model that one has already; it is put into evaluation mode and stays on its device.

        Args:
            model: of any family that is read, for RGB images.
            config: timm's data configuration: ``input_size`` (3, h, w), ``interpolation``, ``crop_pct``, ``crop_mode``, ``mean``,
                ``std``; None where the model is timm's and has its own.
            class_names: one a class; None where they are not known.
            name: how results call it; None for the name of its class.

        Raises:
            InputError: no module; no ``config`` for a model that has none, or one that lacks something; or names that are not one
                a class.
        """
        if not isinstance(model, nn.Module):
            raise InputError(f"model: expected a torch.nn.Module, received {type(model).__name__}")
        inside = unwrap(model)
        kind, expected = type(inside).__name__, ", ".join(_PREPROCESSING)
        if config is None:
            if not getattr(inside, "pretrained_cfg", None):
                raise InputError(f"config: expected {expected} for {kind}, which has no pretrained_cfg of timm's, received none")
            config = timm.data.resolve_model_data_config(inside)
        missing = [key for key in _PREPROCESSING if key not in config]
        if missing:
            raise InputError(f"config: expected {expected}, received one without {', '.join(missing)}")
        names = None if class_names is None else tuple(class_names)
        loaded = cls(name or kind, model.eval(), config, names)
        if names is not None and loaded.num_classes != len(names):
            raise InputError(f"class_names: expected one for each of {loaded.num_classes} classes, received {len(names)}")
        return loaded

    @property
    def num_classes(self) -> int:
        """Width of the model's output."""
        inside = unwrap(self.model)
        found = getattr(inside, "num_classes", None) or getattr(getattr(inside, "config", None), "num_labels", None)
        return found or len(self.class_names or ())

    @property
    def mean(self) -> tuple[float, ...]:
        """Of the normalisation, three values."""
        return tuple(self.config["mean"])

    @property
    def std(self) -> tuple[float, ...]:
        """Of the normalisation, three values."""
        return tuple(self.config["std"])

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the model's input."""
        return tuple(self.config["input_size"][1:])

    @cached_property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """From a photo to the model's input (3, h, w), normalised, float32."""
        return self.preprocess().image

    @cached_property
    def _display(self) -> Display:
        return Display(self.config)

    def preprocess(self, resize: str = "model") -> Preprocess:
        """How photos and masks become inputs.

        Args:
            resize: ``"model"``, as the model was trained, mostly with a crop; or ``"squash"``, the whole photo squeezed to the
                input's shape, which is how localisation is measured.

        Raises:
            InputError: another word.
        """
        return Preprocess(resized(self.config, resize))

    def display(self, photo: Image.Image) -> Image.Image:
        """The part of the photo that the model saw, at a resolution for people: the shorter side has at least 448 pixels.

        Where the model squeezes the whole photo to its input's shape, it is shown in its own proportions.
        """
        return self._display(photo)

    def class_name(self, index: int) -> str:
        """The name of a class, or ``"class 7"`` where names are not known."""
        return class_name(self.class_names, index)

    def settings(self, resize: str) -> dict[str, Any]:
        """What results depend on, as JSON: name, hash of the weights, and preprocessing, of which ``resize`` is a part."""
        return {
            "name": self.name,
            "weights_sha256": weights_hash(self.model),
            "resize": resize,
            "preprocessing": {name: self.config.get(name) for name in _PREPROCESSING},
        }

    def class_index(self, text: str) -> int:
        """The class meant by an index or a name; upper and lower case, and which synonym of a name, do not matter.

        Raises:
            InputError: an index that is out of range, a name where names are not known, or a name of several classes.
            UnknownNameError: no class has that name; the message lists near ones.
        """
        count = self.num_classes
        try:
            index = int(text)
        except ValueError:
            return self._class_index_by_name(text)
        if not 0 <= index < count:
            raise InputError(f"target: expected a class from 0 to {count - 1}, received {index}")
        return index

    def _class_index_by_name(self, text: str) -> int:
        if self.class_names is None:
            raise InputError(f"target: expected the index of a class, as the names are not known; received {text!r}")
        found = self.classes_named([text])[text]
        if len(found) > 1:
            meant = ", ".join(f"{index} ({self.class_names[index]})" for index in found)
            raise InputError(f"target: expected the name of one class, received {text!r}, which is the name of {meant}")
        if not found:
            known = {synonym for name in self.class_names for synonym in _synonyms(name)}
            raise unknown_name("class", text.strip().casefold(), known)
        return found[0]

    def classes_named(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """The classes that each name may mean, none where it is not known; a whole name counts before a synonym."""
        whole: dict[str, list[int]] = {}
        part: dict[str, list[int]] = {}
        for index, known in enumerate(self.class_names or ()):
            whole.setdefault(known.casefold(), []).append(index)
            for synonym in _synonyms(known):
                part.setdefault(synonym, []).append(index)
        wanted = {name: name.strip().casefold() for name in names}
        return {name: tuple(whole.get(text) or part.get(text) or ()) for name, text in wanted.items()}


def load_model(
    name: str,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """A model by name, with its preprocessing and class names.

    Args:
        name: ``"demo"``, the small CIFAR-10 model that comes with this package; the name of a timm model; or
            ``"transformers:"`` and the name of one of Hugging Face transformers' image classifiers or its folder.
        weights: file of a state dict (.safetensors, .pth, .pt, .bin); None for the demo's own or timm's pretrained weights,
            which are downloaded. The number of classes is read from the file.
        device: where the model is put; ``"auto"`` is CUDA where there is a device, else the CPU.
        dtype: the model's dtype; the transform's output stays float32.

    Raises:
        UnknownNameError: no model has that name.
        InputError: the weights cannot be downloaded, read, or do not fit; or there is no such device.
    """
    place = resolve_device(device)
    if weights is not None and name.startswith(PREFIX):
        raise InputError(
            f"weights: expected none beside {name!r}, whose folder or place on the hub has them, received {str(weights)!r}"
        )
    state = None if weights is None else read_state_dict(weights)
    try:
        if name == DEMO:
            model, config, class_names = _demo(state, weights)
        elif name.startswith(PREFIX):
            model, config, class_names = transformers_model(name)
        else:
            model, config, class_names = _timm(name, state, weights)
        model = model.eval().to(place, dtype)
    except torch.OutOfMemoryError as error:
        raise InputError(f"device: {place} has not enough free memory for model {name!r}") from error
    channels = config["input_size"][0]
    if channels != 3:
        raise InputError(f"model: expected one that takes RGB photos, received {name!r}, which takes {channels} channels")
    return LoadedModel(name, model, config, class_names)


def untrained_model(name: str) -> nn.Module:
    """The network of a name without pretrained weights, mostly on the meta device: for a look at what it is made of.

    Args:
        name: as of ``load_model``. Of a model on a hub the configuration is downloaded, and nothing else.

    Raises:
        UnknownNameError: no model has that name.
        InputError: it cannot be built.
    """
    if name == DEMO:
        return _demo(None, None)[0]
    if name.startswith(PREFIX):
        return untrained_transformers_model(name)
    _check_name(name)
    try:
        with torch.device("meta"):
            return _create(name, pretrained=False)
    except InputError:  # it looks at its weights while they are made
        return _create(name, pretrained=False)


def class_name(names: Sequence[str] | None, index: int) -> str:
    """The name of a class, or ``"class 7"`` where it is not known."""
    return names[index] if names and index < len(names) else f"class {index}"


def short_class_name(names: Sequence[str] | None, index: int) -> str:
    """The same, up to the first comma: ImageNet's names are lists of synonyms."""
    return class_name(names, index).partition(",")[0]


def resized(config: Mapping[str, Any], resize: str) -> dict[str, Any]:
    """A timm data configuration with ``"model"``, its own way to the input's shape, or ``"squash"``, the whole photo squeezed.

    Raises:
        InputError: another word.
    """
    if resize not in RESIZE:
        raise InputError(f"resize: expected one of {', '.join(RESIZE)}, received {resize!r}")
    return dict(config) if resize == "model" else {**config, "crop_mode": "squash", "crop_pct": 1.0}


def resolve_device(device: str | torch.device) -> torch.device:
    """``"auto"`` or a device's name as a device that exists.

    Raises:
        InputError: no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: expected one that is available here, received {str(device)!r}: {brief(error)}") from error
    return place


def dtype_named(text: str, what: str = "dtype") -> torch.dtype:
    """The element type of a name, ``"float32"``, ``"bfloat16"`` or ``"float16"``, or of its short form, such as ``"bf16"``.

    Raises:
        InputError: another name; the message begins with ``what``.
    """
    name = _SHORT_DTYPES.get(text, text)
    if name not in DTYPES:
        known = ", ".join(f"{whole} ({short})" for short, whole in _SHORT_DTYPES.items())
        raise InputError(f"{what}: expected one of {known}, received {text!r}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The whole name of an element type."""
    return str(dtype).removeprefix("torch.")


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model itself where its parameters have that element type, else a copy that has."""
    return model if next(model.parameters()).dtype == dtype else copy.deepcopy(model).to(dtype)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# -- models ------------------------------------------------------------------------------------------------------------


def _demo(state: dict[str, Tensor] | None, source: str | Path | None) -> tuple[nn.Module, dict[str, Any], tuple[str, ...] | None]:
    """The shipped model, its data configuration, and its class names."""
    assets = resources.files("vitexplain") / "assets"
    card = json.loads((assets / f"{_DEMO_FILES}.json").read_text(encoding="utf-8"))
    if state is None:
        state = float32_state(safetensors.torch.load((assets / f"{_DEMO_FILES}.safetensors").read_bytes()))
    model = VisionTransformer(**card["arguments"])
    fill(model, state, source or DEMO, DEMO)
    side = card["arguments"]["img_size"]
    config = dict(
        input_size=(3, side, side),
        interpolation="bicubic",
        crop_pct=1.0,
        crop_mode=card["crop_mode"],
        mean=card["mean"],
        std=card["std"],
    )
    return model, config, tuple(card["class_names"])


def _timm(
    name: str, state: dict[str, Tensor] | None, source: str | Path | None
) -> tuple[nn.Module, dict[str, Any], tuple[str, ...] | None]:
    """A timm model, its data configuration, and its class names where it was trained on ImageNet."""
    _check_name(name)
    model = _create(name, pretrained=state is None)
    if state is not None:
        num_classes = num_classes_of(model, state)
        if num_classes not in (None, model.num_classes):
            model = _create(name, pretrained=False, num_classes=num_classes)
        fill(model, state, source, name)
    return model, timm.data.resolve_model_data_config(model), _imagenet_names(model)


def _check_name(name: str) -> None:
    """Refuse a name that timm does not know; names of models on a hub or in a folder cannot be known beforehand."""
    if name.startswith(_ELSEWHERE):
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise unknown_name("model", name, [*timm.list_models(), DEMO])
    tagged = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tagged:
        raise unknown_name("model", name, [architecture, *tagged])


def _create(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
    """``timm.create_model``, whose many ways to fail on the way to a hub become one line."""
    with quiet("huggingface_hub", "timm"), within_reach() if pretrained or name.startswith(_ELSEWHERE) else nullcontext():
        try:
            return timm.create_model(name, pretrained=pretrained, **options)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the errors of the hub's client and of its transport have no common base
            if not pretrained:
                raise InputError(f"model: cannot build {name!r}: {brief(error)}") from error
            raise InputError(
                f"model: the pretrained weights of {name!r} cannot be had here; pass a file with --weights FILE ({brief(error)})"
            ) from error


def _imagenet_names(model: nn.Module) -> tuple[str, ...] | None:
    subset = timm.data.infer_imagenet_subset(model)
    if subset is None:
        return None
    info = timm.data.ImageNetInfo(subset)
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))


def _synonyms(name: str) -> set[str]:
    return {synonym.strip().casefold() for synonym in name.split(",")}
