"""Models by name, weights from files, and photos from files, each with one-line errors for what cannot be read."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import safetensors.torch
import timm
import timm.data
import torch
from PIL import Image, ImageOps
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .errors import InputError, unknown_name
from .heatmap import as_photo
from .messages import brief, quiet, some
from .models import unwrap

DEMO = "demo"
DISPLAY_SIDE = 448
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
MAX_SIDE_RATIO = 100

_DEMO_FILES = "demo_vit_cifar10"
_ROWS = 64  # of an image that are scaled at a time: in float64 the whole of a large one would take eight times its bytes
_ONE_PICTURE = ("MPO", "PSD")  # further frames are previews, depth maps or layers of the one picture
_MODES = {  # how messages name Pillow's modes
    "1": "black and white ({})",
    "L": "grayscale ({})",
    "LA": "grayscale with transparency ({})",
    "P": "palette ({})",
    "PA": "palette with transparency ({})",
    "I": "integer grayscale ({})",
    "F": "floating-point grayscale ({})",
    **dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), "16-bit grayscale ({})"),
}
_Converted = TypeVar("_Converted")


class Preprocess:
    """One geometry for photos and their masks, by a timm data configuration."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._image = timm.data.create_transform(**config, is_training=False)
        self._seen = timm.data.create_transform(**config, is_training=False, normalize=False)
        nearest = {**config, "interpolation": "nearest", "mean": (0.0, 0.0, 0.0)}  # what is added around a photo is background
        self._mask = timm.data.create_transform(**nearest, is_training=False, normalize=False)

    def image(self, photo: Image.Image) -> Tensor:
        """(3, h, w) float32, normalised, of an RGB photo."""
        return self._image(photo)

    def seen(self, photo: Image.Image) -> Tensor:
        """(3, h, w) uint8: what the model sees of the photo."""
        return self._seen(photo)

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
        seen = as_photo(self._transform(photo.convert("RGB")))
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

    @property
    def squashes(self) -> bool:
        """Whether the whole photo is squeezed to the input's shape."""
        return self.config.get("crop_mode") == "squash"

    @cached_property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """From an RGB photo to the model's input (3, h, w), normalised, float32."""
        return timm.data.create_transform(**self.config, is_training=False)

    @cached_property
    def _display(self) -> Display:
        return Display(self.config)

    def preprocess(self, resize: str = "model") -> Preprocess:
        """How photos and masks become inputs.

        Args:
            resize: ``"model"``, as the model was trained, mostly with a crop; or ``"squash"``, the whole photo squeezed to the
                input's shape, which is how localisation is measured.
        """
        return Preprocess(resized(self.config, resize))

    def display(self, photo: Image.Image) -> Image.Image:
        """The part of the photo that the model saw, at a resolution for people: the shorter side has at least 448 pixels.

        Where the model squeezes the whole photo to its input's shape, it is shown in its own proportions.
        """
        return self._display(photo)

    def class_name(self, index: int) -> str:
        """The name of a class, or ``"class 7"`` where names are not known."""
        return self.class_names[index] if self.class_names else f"class {index}"

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
        return {name: tuple(whole.get(text) or part.get(text, ())) for name, text in wanted.items()}


def load_model(
    name: str,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """A model by name, with its preprocessing and class names.

    Args:
        name: ``"demo"``, the small CIFAR-10 model that comes with this package, or the name of a timm model.
        weights: file of a state dict (.safetensors, .pth, .pt, .bin); None for the demo's own or timm's pretrained weights,
            which are downloaded. The number of classes is read from the file.
        device: where the model is put; ``"auto"`` is CUDA where there is a device, else the CPU.
        dtype: the model's dtype; the transform's output stays float32.

    Raises:
        UnknownNameError: no model has that name.
        InputError: the weights cannot be downloaded, read, or do not fit; or there is no such device.
    """
    place = resolve_device(device)
    state = None if weights is None else read_state_dict(weights)
    try:
        if name == DEMO:
            model, config, class_names = _demo(state, weights)
        else:
            model, config, class_names = _timm(name, state, weights)
        model = model.eval().to(place, dtype)
    except torch.OutOfMemoryError as error:
        raise InputError(f"device: {place} has not enough free memory for model {name!r}") from error
    channels = config["input_size"][0]
    if channels != 3:
        raise InputError(f"model: expected one that takes RGB photos, received {name!r}, which takes {channels} channels")
    return LoadedModel(name, model, config, class_names)


def resized(config: Mapping[str, Any], resize: str) -> dict[str, Any]:
    """A timm data configuration with ``"model"``, its own way to the input's shape, or ``"squash"``, the whole photo squeezed."""
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
    name = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(text, text)
    if name not in DTYPES:
        raise InputError(f"{what}: expected one of {', '.join(DTYPES)}, received {text!r}")
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
        state = _float32(safetensors.torch.load((assets / f"{_DEMO_FILES}.safetensors").read_bytes()))
    model = VisionTransformer(**card["arguments"])
    _fill(model, state, source or DEMO, DEMO)
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
        num_classes = _num_classes(model, state)
        if num_classes not in (None, model.num_classes):
            model = _create(name, pretrained=False, num_classes=num_classes)
        _fill(model, state, source, name)
    return model, timm.data.resolve_model_data_config(model), _imagenet_names(model)


def _check_name(name: str) -> None:
    """Refuse a name that timm does not know; names of models on a hub or in a folder cannot be known beforehand."""
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:", "timm/")):
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise unknown_name("model", name, [*timm.list_models(), DEMO])
    tagged = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tagged:
        raise unknown_name("model", name, [architecture, *tagged])


def _create(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
    """``timm.create_model``, whose many ways to fail on the way to a hub become one line."""
    with quiet("huggingface_hub", "timm"):
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


# -- weights -----------------------------------------------------------------------------------------------------------


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, in float32; ``{"state_dict": …}`` and ``{"model": …}`` around it are taken off.

    Raises:
        InputError: no such file, not readable as weights, or a file that would run code when read.
    """
    path = Path(path)
    if path.suffix.lower() not in WEIGHT_SUFFIXES:
        raise InputError(f"weights: expected a file ending in {', '.join(WEIGHT_SUFFIXES)}, received {path.name!r}")
    check_file(path, "weights")
    try:
        if path.suffix.lower() == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything inside a parser
        raise InputError(_why_unreadable(path, error)) from error
    return _float32(_unwrap_state(content, path))


def _why_unreadable(path: Path, error: Exception) -> str:
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    code = named or re.search(r"Unsupported (?:global|class)|[Uu]nrecognized function", str(error))
    if isinstance(error, OSError):
        return f"weights: cannot read {str(path)!r}: {error.strerror or error}"
    if code is None:
        return f"weights: cannot read {str(path)!r}: not a file of weights, or damaged ({type(error).__name__})"
    what = named.group(1) if named else "objects other than tensors"
    return (
        f"weights: refused {str(path)!r}: it holds {what}, and unpickling that could run any code; "
        "expected tensors only (a state_dict, better as .safetensors)"
    )


def _unwrap_state(content: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"weights: expected a state dict of tensors in {str(path)!r}, received {_describe(content)}")
    if all(str(key).startswith("module.") for key in content):  # saved from inside a data-parallel wrapper
        return {str(key).removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        odd = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
        return f"a dict with other values under {some(odd)}" if odd else "an empty dict"
    return type(content).__name__


def _float32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def _num_classes(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """The number of classes that the head in a state dict has; None where there is no head of the model's name."""
    head = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    weight = state.get(f"{head if isinstance(head, str) else head[0]}.weight")
    return None if weight is None or weight.dim() != 2 else len(weight)


def _fill(model: nn.Module, state: Mapping[str, Tensor], source: object, name: str) -> None:
    """Strictly load a state dict.

    Raises:
        InputError: it does not fit; the message names a few of the keys.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    wrong = [
        f"{key} (expected {tuple(own[key].shape)}, received {tuple(state[key].shape)})"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    parts = [("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong)]
    problems = "; ".join(f"{what} {some(keys)}" for what, keys in parts if keys)
    if problems:
        raise InputError(f"weights: {str(source)!r} does not fit model {name!r}: {problems}")
    model.load_state_dict(state)


# -- photos ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Photo:
    """A photo as it was read.

    Attributes:
        image: RGB, upright.
        note: what was done to the file's own image apart from turning it upright, such as ``"converted from CMYK to RGB"``;
            None where nothing was.
    """

    image: Image.Image
    note: str | None


def load_photo(path: str | Path) -> Image.Image:
    """The photo in a file as RGB, upright; transparent parts become white, 16-bit values are scaled, and of an animation
    the first frame is taken.

    Raises:
        InputError: no such file, or it cannot be read as an image.
    """
    return read_photo(path).image


def read_photo(path: str | Path) -> Photo:
    """The photo in a file as ``load_photo`` gives it, with what was done to it.

    Raises:
        InputError: no such file, or it cannot be read as an image.
    """
    path = Path(path)
    check_file(path, "photo")
    return decode_photo(path, repr(str(path)))


def decode_photo(file: Path | BinaryIO, name: str) -> Photo:
    """The photo in a file or a stream of bytes as ``read_photo`` gives it; ``name`` stands for it in messages.

    Raises:
        InputError: it cannot be read as an image.
    """
    photo = decode_image(file, "photo", name, _as_photo)
    check_sides(photo.image.size, name)
    return photo


def check_sides(size: tuple[int, int], name: str) -> None:
    """Raise ``InputError`` where a photo of this width and height, called ``name``, is empty or but a thread."""
    width, height = size
    if min(size) == 0 or max(size) > MAX_SIDE_RATIO * min(size):
        raise InputError(f"photo: expected sides within a ratio of {MAX_SIDE_RATIO}, received {width} × {height} in {name}")


def decode_image(file: Path | BinaryIO, what: str, name: str, convert: Callable[[Image.Image], _Converted]) -> _Converted:
    """What ``convert`` makes of the image in a file or a stream of bytes.

    Args:
        file: the encoded image.
        what: what the image is for, ``"photo"`` or ``"mask"``; messages begin with it.
        name: stands for the image in messages.
        convert: from an image of any mode, as the file holds it: open, its first frame decoded, not yet upright.

    Raises:
        InputError: it cannot be read as an image, or not be converted.
        MemoryError: there is too little memory for it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large photos and odd metadata
            with Image.open(file) as image:
                image.load()
                return convert(image)
    except MemoryError:  # the machine's trouble, not the file's: another try can succeed
        raise
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{what}: {name} is not an image in a known format") from error
    except Exception as error:  # a damaged file can raise anything inside a decoder
        raise InputError(f"{what}: cannot read {name}: {brief(error)}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: integers of 16 bits are scaled to 8, and what is transparent becomes white."""
    rgb, _ = _to_rgb(image)
    return rgb.copy() if rgb is image else rgb


def _as_photo(image: Image.Image) -> Photo:
    rgb, conversion = _to_rgb(upright(image))
    if rgb is image:
        rgb = _detached(image)
    return Photo(rgb, "; ".join(filter(None, (_frames(image), conversion))) or None)


def upright(image: Image.Image) -> Image.Image:
    """The image itself, turned as its metadata say; no copy is made of one that stands upright already."""
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _frames(image: Image.Image) -> str | None:
    """That the file has more frames than the one that was decoded."""
    if image.format in _ONE_PICTURE:
        return None
    try:
        count = getattr(image, "n_frames", 1)
    except Exception:  # what comes behind the first frame is damaged
        return "first of several frames"
    return f"first of {count} frames" if count > 1 else None


def _to_rgb(image: Image.Image) -> tuple[Image.Image, str | None]:
    """An image of any mode as RGB, itself where it is, and what that changed."""
    mode = image.mode
    conversion = None if mode == "RGB" else f"converted from {_MODES.get(mode, '{}').format(mode)} to RGB"
    if mode.startswith("I") or mode == "F":
        return Image.fromarray(_to_uint8(np.asarray(image))).convert("RGB"), conversion
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image if mode == "RGBA" else image.convert("RGBA")
        if image.getextrema()[3][0] == 255:
            return image.convert("RGB"), conversion
        conversion = f"transparent parts on white ({mode})"
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB"), conversion
    return image if mode == "RGB" else image.convert("RGB"), conversion


def _detached(image: Image.Image) -> Image.Image:
    """An image of the same pixels that knows nothing of its file; they are copied only where they lie in the file, mapped."""
    return image.copy() if image.readonly else image._new(image.im)


def _to_uint8(values: np.ndarray) -> np.ndarray:
    """Values in [0, 65535], or for floats also in [0, 1] or [0, 255] if none is larger, to [0, 255]."""
    top = 65535.0
    if values.dtype.kind == "f":
        largest = float(np.max(values, where=np.isfinite(values), initial=-np.inf))
        if largest == -np.inf:
            raise ValueError("none of its values is finite")
        top = next(limit for limit in (1.0, 255.0, max(65535.0, largest)) if largest <= limit)
    scaled = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _ROWS):
        block = np.nan_to_num(values[start : start + _ROWS]) / top
        scaled[start : start + _ROWS] = np.rint(np.clip(block, 0, 1) * 255)
    return scaled


# -- files -------------------------------------------------------------------------------------------------------------


def check_file(path: Path, what: str) -> None:
    """Raise ``InputError`` where a path is not a file with something in it."""
    try:
        if path.is_dir():
            raise InputError(f"{what}: expected a file, received the directory {str(path)!r}")
        if not path.exists():
            raise InputError(f"{what}: there is no file {str(path)!r}")
        if path.is_file() and path.stat().st_size == 0:
            raise InputError(f"{what}: the file {str(path)!r} is empty (0 bytes)")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{what}: cannot read {str(path)!r}: {brief(error)}") from error
