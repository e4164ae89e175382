"""The bridge to Quantus: maps of ours under any of its metrics, none of which is written again here."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import inspect
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ExplanationError, InputError, unknown_name
from ..explainer import BACKENDS, Explainer
from ..methods import Method, build_methods
from ..models import unwrap

ExplainFunction = Callable[..., np.ndarray]

# By class: metrics without a number for each image that says something of its map.
_REFUSED = {
    "SensitivityN": "its scores are one a step, correlated over the images of a batch, and none an image",
    "Focus": "it scores maps of mosaics of four images, which no map of an image by itself is",
    "Monotonicity": "Quantus replaces its baseline by the same baseline, so that every map scores 1",
}
_REFUSED_WEIGHTED = {
    "PointingGame": "Quantus writes the weight into an array of booleans",
    "AttributionLocalisation": "Quantus divides the object's size by the number of values in all images but two",
}
# Their score of an image says how it lies among the other images.
_COMPARE_IMAGES = ("Sufficiency", "Consistency")
# They count one feature a map's value where the image has one a channel: their maps are handed over with all channels.
_COUNT_CHANNELS = ("Completeness", "ROAD")
# They mix the images of a batch: the one averages over them, the other draws its baseline and its area from all.
_ONE_BY_ONE = ("ROAD", "IROF")
# Normalises distances between maps by the same function, along axes that a map does not have.
_NORMALISES_ITS_OWN_WAY = ("Sufficiency",)


def quantus_explainer(method: str | Method = "tokentm", backend: str = "auto", **options: Any) -> ExplainFunction:
    """A method as Quantus's ``explain_func``.

    Args:
        method, backend, **options: as of ``Explainer``.

    Returns:
        ``explain_func(model, inputs, targets, **kw)``: for images (B, c, H, W), normalised, and classes (B,), None for the
        predicted ones, the maps (B, 1, H, W) float32, up-sampled to pixels. It runs on the model's device in the model's dtype;
        further keywords, such as the device that Quantus hands on, are ignored.

    Raises:
        InputError, UnknownNameError: a method, backend or option that does not fit.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend: expected one of {', '.join(BACKENDS)}, received {backend!r}")
    built = list(build_methods(method, options).values())
    if len(built) != 1:
        raise InputError(f"method: expected one, received {', '.join(one.name for one in built)}")

    def explain_func(model: nn.Module, inputs: Any, targets: Any, **_: Any) -> np.ndarray:
        parameter = next(model.parameters())
        images = torch.as_tensor(inputs).to(parameter.device, parameter.dtype)
        classes = None if targets is None else torch.as_tensor(targets, dtype=torch.int64, device=parameter.device)
        explanation = Explainer(model, built[0], backend).attribute(images, classes)
        height, width = images.shape[-2:]
        return explanation.to_image((height, width)).unsqueeze(1).float().cpu().numpy()

    return explain_func


# -- metrics by name -----------------------------------------------------------------------------------------------------


def metric_names() -> tuple[str, ...]:
    """The names of Quantus's metrics, as its own table lists them.

    Raises:
        InputError: Quantus is not installed.
    """
    return tuple(_listed())


def build_metric(name: str, **params: Any) -> Any:
    """A metric of Quantus's by its listed name or its class's, such as ``"Pixel-Flipping"`` or ``"PixelFlipping"``.

    Its defaults are Quantus's, with no progress bar and no printed advice, a score an image and no aggregate, and attributions
    normalised image by image instead of by the largest value of a batch, so that no image's score depends on its neighbours.
    What is given goes before.

    Raises:
        UnknownNameError: no metric has that name.
        InputError: a parameter that the metric does not take, or a value that it refuses; Quantus is not installed.
    """
    classes = _listed()
    by_key = {_key(kind.__name__): kind for kind in classes.values()} | {_key(listed): kind for listed, kind in classes.items()}
    if not isinstance(name, str) or _key(name) not in by_key:
        raise unknown_name("Quantus metric", str(name), classes)
    kind = by_key[_key(name)]
    taken = [p.name for p in inspect.signature(kind).parameters.values() if p.kind is not p.VAR_KEYWORD]
    wrong = [param for param in params if param not in taken]
    if wrong:
        raise InputError(f"{kind.__name__}: expected parameters among {', '.join(taken)}; received {', '.join(wrong)}")
    defaults: dict[str, Any] = {"disable_warnings": True, "display_progressbar": False, "return_aggregate": False}
    if kind.__name__ not in _NORMALISES_ITS_OWN_WAY and "normalise_func" not in params:
        defaults["normalise_func_kwargs"] = {"normalise_axes": (1, 2, 3)}
    try:
        return kind(**{**{key: value for key, value in defaults.items() if key in taken}, **params})
    except Exception as error:
        raise InputError(f"{kind.__name__}: expected parameters that it takes, received {params}: {_reason(error)}") from error


def _quantus() -> Any:
    try:
        return importlib.import_module("quantus")
    except ImportError as error:
        if importlib.util.find_spec("quantus") is not None:  # OpenCV, which it imports, needs system libraries such as libGL
            raise InputError(
                f"Quantus's metrics: the package quantus is there and cannot be imported: {_reason(error)}"
            ) from error
        raise InputError("Quantus's metrics: expected the package quantus: pip install 'vitexplain[quantus]'") from error


def _listed() -> dict[str, type]:
    """Classes by listed name, of all of Quantus's categories."""
    return {name.strip(): kind for kinds in _quantus().AVAILABLE_METRICS.values() for name, kind in kinds.items()}


def _key(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


# -- scores --------------------------------------------------------------------------------------------------------------


def quantus_scores(
    metric: Any,
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    maps: Tensor,
    explain_func: ExplainFunction | None = None,
    masks: Tensor | None = None,
    *,
    batch_size: int = 64,
    seed: int = 0,
) -> np.ndarray:
    """One number an image by a metric of Quantus's, of maps that exist already.

    Quantus works on copies of the model and of the metric: both, and the global random states, are afterwards as before. Images
    and outputs pass through it in float32, whatever the model's dtype. Slips of Quantus 0.6 are mended on the way: ROAD and IROF,
    which fail on images in colour, remove pixels in all channels; Smooth MPRT, which would explain by a gradient, does so by
    ``explain_func``; InputInvariance, which would leave one value as it is, shifts all; an empty mask gives NaN and not a hit of
    the Pointing Game.

    Args:
        metric: a name, or what ``build_metric`` or Quantus built; an aggregate over images is not asked of it.
        model: of images, with logits; any device, dtype and mode.
        images: (B, c, H, W), normalised, as the model takes them.
        targets: (B,) integers, the explained classes.
        maps: (B, H, W), or (B, 1, H, W), the attributions to score.
        explain_func: for metrics that explain again (robustness, randomisation, input invariance): how ``maps`` were made, as
            ``quantus_explainer`` gives it. The Continuity Test and Efficient MPRT score what it makes, and not ``maps``.
        masks: (B, H, W) bool, the objects, for metrics of localisation.
        batch_size: images that a metric treats at once. Sufficiency and Consistency compare all B images with each other.
        seed: of all that a metric draws at random.

    Returns:
        (B,) float64. A curve becomes its area as the metric defines it (Pixel-Flipping, Region Segmentation, Selectivity); scores
        by layer (MPRT, Smooth MPRT) their mean, the untouched model's among them, as ``return_average_correlation`` has it, or
        with ``skip_layers`` the last; what else comes as a list (ROAD's percentages) its mean. True is 1. NaN where the metric
        has no answer, as for an empty mask.

    Raises:
        UnknownNameError: no metric has that name.
        InputError: arguments that do not fit; a metric without a number an image (SensitivityN, Focus) or that does not see the
            map (Monotonicity-Arya); one that fails, with its reason; Quantus is not installed.
    """
    if not isinstance(metric, str) and not hasattr(metric, "evaluate_batch"):
        raise InputError(f"metric: expected a name or a metric of Quantus's, received {type(metric).__name__}")
    metric = build_metric(metric) if isinstance(metric, str) else copy.deepcopy(metric)
    name = type(metric).__name__
    maps, masks = _check_arrays(metric, images, targets, maps, masks)
    check_metric(metric, len(images))
    metric.return_aggregate = False
    if name in _COMPARE_IMAGES:
        batch_size = len(images)
    explain = _explaining(name, explain_func)
    with _seeded(seed), _mended(name, explain), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"quantus\.")
        try:
            handed = _hand_over(metric, model, images)
            arrays = {
                "x_batch": _array(images, np.float32),
                "y_batch": _array(targets, np.int64),
                "a_batch": _array(maps, np.float32),
                "s_batch": None if masks is None else _array(masks, bool),
            }
            call = functools.partial(
                metric, handed, channel_first=True, explain_func=explain, device=str(handed.device), batch_size=batch_size
            )
            scores = _one_by_one(metric, call, arrays) if name in _ONE_BY_ONE else _numbers(metric, call(**arrays))
        except (ExplanationError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # Quantus refuses by assertions, and falls over what it does not refuse
            raise InputError(f"{name}: expected arguments that Quantus's metric can work with: {_reason(error)}") from error
    if scores.shape != (len(images),):
        raise InputError(f"{name}: expected one number an image ({len(images)},), received an array {scores.shape} from Quantus")
    if masks is not None:
        scores[~masks.flatten(1).any(1).cpu().numpy()] = np.nan  # Pointing Game counts a hit there
    return scores


def explains_again(metric: Any) -> bool:
    """Whether a metric asks for further explanations and not only for the maps it is given."""
    category = getattr(metric.evaluation_category, "value", None)
    name = type(metric).__name__
    return name == "InputInvariance" or (category in ("Robustness", "Randomisation") and name not in _COMPARE_IMAGES)


def reads_masks(metric: Any) -> bool:
    """Whether a metric compares maps with masks."""
    return getattr(metric.evaluation_category, "value", None) == "Localisation"


def check_metric(metric: Any, num_images: int) -> None:
    """Raise ``InputError`` where a metric has no number for each of so many images."""
    name = type(metric).__name__
    if name in _REFUSED:
        raise InputError(f"{name}: expected a metric with a number for each image's map; {_REFUSED[name]}")
    if getattr(metric, "weighted", False) and name in _REFUSED_WEIGHTED:
        raise InputError(f"{name}: expected weighted=False; {_REFUSED_WEIGHTED[name]}")
    if name in _COMPARE_IMAGES and num_images < 2:
        raise InputError(f"{name}: expected at least two images, which it compares with each other, received {num_images}")


def _check_arrays(
    metric: Any, images: Tensor, targets: Tensor, maps: Tensor, masks: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Maps and masks as Quantus takes them, (B, 1 or c, H, W); masks only for a metric that reads them."""
    for label, given in {"images": images, "targets": targets, "maps": maps, "masks": masks}.items():
        if not isinstance(given, Tensor) and not (given is None and label == "masks"):
            raise InputError(f"{label}: expected a tensor, received {type(given).__name__}")
    if images.dim() != 4 or 0 in images.shape:
        raise InputError(f"images: expected shape (B, c, H, W) with B ≥ 1, received {tuple(images.shape)}")
    batch, channels, *size = images.shape
    if tuple(targets.shape) != (batch,) or targets.is_floating_point() or targets.dtype == torch.bool:
        raise InputError(f"targets: expected integers of shape ({batch},), received {targets.dtype} {tuple(targets.shape)}")
    maps = maps.unsqueeze(1) if maps.dim() == 3 else maps
    if tuple(maps.shape) != (batch, 1, *size):
        raise InputError(f"maps: expected shape {(batch, *size)}, one value a pixel, received {tuple(maps.shape)}")
    if not torch.isfinite(maps).all():
        raise InputError("maps: expected finite values, received NaN or infinity")
    name = type(metric).__name__
    if name in _COUNT_CHANNELS:
        maps = maps.expand(-1, channels, -1, -1) / channels
    if not reads_masks(metric):
        return maps, None
    if masks is None:
        raise InputError(f"{name}: expected masks of shape {(batch, *size)}, received None")
    masks = masks.unsqueeze(1) if masks.dim() == 3 else masks
    if masks.dtype != torch.bool or tuple(masks.shape) != (batch, 1, *size):
        raise InputError(f"masks: expected bool of shape {(batch, *size)}, received {masks.dtype} {tuple(masks.shape)}")
    return maps, masks


def _array(tensor: Tensor, dtype: Any) -> np.ndarray:
    """A copy of its own: some metrics write into what they are given."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy().astype(dtype)  # astype copies


def _numbers(metric: Any, result: Any) -> np.ndarray:
    """What a metric returned for B images as (B,) float64."""
    if isinstance(result, dict):  # by layer, or by percentage of one image
        by_key = np.array(list(result.values()), np.float64)
        return by_key[-1] if getattr(metric, "skip_layers", False) else by_key.mean(0, keepdims=by_key.ndim == 1)
    scores = np.asarray(result, np.float64)
    if scores.ndim == 2 and hasattr(type(metric), "get_auc_score"):
        return np.array([_area(metric, curve) for curve in scores])
    return scores.reshape(len(scores), -1).mean(1)


def _area(metric: Any, curve: np.ndarray) -> float:
    metric.evaluation_scores = [curve]  # the metric's own mean area, over one curve
    return float(metric.get_auc_score)


def _one_by_one(metric: Any, call: Callable[..., Any], arrays: dict[str, np.ndarray | None]) -> np.ndarray:
    images = arrays["x_batch"]
    assert images is not None, "every metric is called with images"
    scores = []
    for row in range(len(images)):
        one = {key: None if array is None else array[row : row + 1] for key, array in arrays.items()}
        scores.append(_numbers(metric, call(**one)))
    return np.concatenate(scores)


# -- what Quantus gets ---------------------------------------------------------------------------------------------------


class _HandedOver(nn.Module):
    """A model as Quantus takes it: float32 images in, float32 logits out, and no class of transformers', which it takes for text.

    It has the model's own children, parameters and buffers, under their own names, so that layers are found, randomised and
    copied as in the model itself; what is registered on the one is registered on the other, also in deep copies of the pair.
    """

    inside: tuple[nn.Module]

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for shared in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[shared] = model.__dict__[shared]
        self.__dict__["inside"] = (model,)  # in a tuple, where torch does not take it for a child

    @property
    def model(self) -> nn.Module:
        return self.inside[0]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images.to(next(self.model.parameters()).dtype))
        return getattr(output, "logits", output).float()


def _hand_over(metric: Any, model: nn.Module, images: Tensor) -> _HandedOver:
    """A copy of the model in evaluation mode, and the metric fitted to it and to images in colour."""
    handed = _HandedOver(copy.deepcopy(unwrap(model)).eval()).eval()
    name = type(metric).__name__
    if name == "RandomLogit":
        with torch.no_grad():
            num_classes = handed(images[:1].detach().to(handed.device)).shape[-1]
        metric.num_classes = min(metric.num_classes, num_classes)  # its default is ImageNet's
    if name == "InputInvariance":
        # It shifts the bias of the first module, which has to be the first layer: here the patch projection.
        first = next((module for module in handed.modules() if isinstance(module, nn.Conv2d)), None)
        if first is None or first.bias is None:
            kind = type(unwrap(model)).__name__
            raise InputError(f"{name}: expected a model that begins with a convolution with a bias, received {kind}")
        handed.__dict__["_modules"] = {"first_layer": first, **handed._modules}
    if name in _MENDED_PERTURBATIONS:
        perturb = metric.perturb_func
        metric.perturb_func = functools.partial(_MENDED_PERTURBATIONS[name], perturb.func, **perturb.keywords)
    return handed


def _impute_pixels(impute: Callable[..., np.ndarray], arr: np.ndarray, indices: np.ndarray, **keywords: Any) -> np.ndarray:
    """ROAD ranks every channel's values, its imputation takes pixels and replaces all their channels."""
    return impute(arr=arr, indices=np.unique(indices % arr[0].size), **keywords)


def _replace_in_all_channels(
    replace: Callable[..., np.ndarray], arr: np.ndarray, mask: np.ndarray, **keywords: Any
) -> np.ndarray:
    """IROF gives a mask of one channel to a replacement that expects the image's."""
    return replace(arr=arr, mask=np.broadcast_to(mask, arr.shape), **keywords)


def _shift_all(shift: Callable[..., np.ndarray], arr: np.ndarray, **keywords: Any) -> np.ndarray:
    """InputInvariance names the indices of all values but the first."""
    return shift(arr=arr, **{**keywords, "indices": np.arange(arr.size)})


_MENDED_PERTURBATIONS: dict[str, Callable[..., np.ndarray]] = {
    "ROAD": _impute_pixels,
    "IROF": _replace_in_all_channels,
    "InputInvariance": _shift_all,
}


def _explaining(name: str, explain_func: ExplainFunction | None) -> ExplainFunction:
    """The user's function, given the model that is inside; without one, the metrics that never call it still run."""

    def explain(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, **keywords: Any) -> np.ndarray:
        if explain_func is None:
            raise InputError(f"{name}: expected an explain_func, by which it explains again, received None")
        inside = model.model if isinstance(model, _HandedOver) else model
        return explain_func(model=inside, inputs=inputs, targets=targets, **keywords)

    return explain


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Global random states set from a seed, and afterwards as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def _mended(name: str, explain: ExplainFunction) -> Iterator[None]:
    """What Quantus looks up by the wrong name, replaced for one call."""
    quantus = _quantus()
    with ExitStack() as stack:
        if name == "SmoothMPRT":  # explains by this, whatever explain_func it is given
            stack.enter_context(_replaced(quantus, "explain", explain))
        if not hasattr(np, "trapz"):  # Quantus's areas call a function that NumPy 2.4 no longer has
            utils = importlib.import_module("quantus.helpers.utils")
            stack.enter_context(_replaced(utils, "calculate_auc", _calculate_auc))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _calculate_auc(values: Any, dx: int = 1, batched: bool = False) -> Any:
    return np.trapezoid(np.asarray(values), dx=dx, axis=1 if batched else -1)
