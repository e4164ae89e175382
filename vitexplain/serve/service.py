"""What the page asks for, without the page: models kept at hand, the top classes of a photo, and its maps as pictures.

A session keeps a photo's logits and maps, so that another look (transparency, colours) is drawn without running the model, and
another class or method runs no more than its own explanation.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ..errors import ExplanationError, InputError, is_out_of_memory
from ..explainer import Explainer
from ..explanation import Explanation
from ..files import check_file
from ..heatmap import ALPHA, SCALES
from ..hugging_face import PREFIX, is_folder
from ..loading import DEMO, LoadedModel, class_name, load_model, short_class_name
from ..messages import brief
from ..methods import REGISTRY, CaptumMethod
from ..photos import decode_photo
from ..visualize import contrast

PREDICTED = "predicted"
BY_SIGN = "by sign"  # the colour map that fits a map's sign
COLORMAPS = (BY_SIGN, "inferno", "viridis", "magma", "turbo", "gray")
STARTING_METHODS = ("tokentm", "gmar", "legrad", "rollout")
SUGGESTED_MODELS = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_medium_patch16_reg4_gap_256.sbb_in12k_ft_in1k",
)
TOP = 5

_KEPT_MODELS = 2
_KEPT_RESULTS = 64  # of a session: as many maps, and as many classes
_LONGEST_SIDE = 1200  # of the photo as it is shown
_LOG = logging.getLogger(__name__)

Key = TypeVar("Key")
Kept = TypeVar("Kept")


# -- what is asked for and what is shown -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What the page shows at a moment.

    Attributes:
        photo: the file; None where there is none yet.
        photo_name: how messages call it.
        model: ``"demo"``, a name of timm's, or ``"transformers:NAME"``.
        methods: names of methods, in the order of their maps.
        target: ``"predicted"``, or a class by number or name.
        alpha: a map's share of its picture, 0 to 1.
        colormap: ``"by sign"``, or the name of one of matplotlib's.
        compare: show the maps of the class beside those of its runner-up.
        local: whoever asks sits at this machine; others cannot name its folders as models.
    """

    photo: Path | None
    photo_name: str = ""
    model: str = DEMO
    methods: tuple[str, ...] = STARTING_METHODS
    target: str = PREDICTED
    alpha: float = ALPHA
    colormap: str = BY_SIGN
    compare: bool = False
    local: bool = True


@dataclass(frozen=True)
class Picture:
    """One picture of a view.

    Attributes:
        title: above it.
        note: in small below it; where there is no image, why.
        image: None where a method cannot explain this model.
        wide: it is several pictures in a row.
    """

    title: str
    note: str
    image: Image.Image | None
    wide: bool = False


@dataclass(frozen=True)
class View:
    """What is to be shown for a request.

    Attributes:
        message: what went wrong, in one line; empty where nothing did.
        heading: what the pictures show.
        top: the likeliest classes: number, name and probability.
        target: the class in force, as in a request: ``"predicted"`` again after another photo or model.
        pictures: the photo and its maps.
        scales: for the legend: each colour map that pictures show, with what its two ends mean.
    """

    message: str = ""
    heading: str = ""
    top: tuple[tuple[int, str, float], ...] = ()
    target: str = PREDICTED
    pictures: tuple[Picture, ...] = ()
    scales: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class _Seen:
    """A photo as a model saw it, in the host's memory: what stays when the model itself has made room for another."""

    source: tuple[str, Path]
    inputs: Tensor
    shown: Image.Image
    logits: Tensor
    names: tuple[str, ...] | None

    def name(self, index: int) -> str:
        return class_name(self.names, index)

    def short_name(self, index: int) -> str:
        return short_class_name(self.names, index)

    def probabilities(self) -> Tensor:
        return self.logits.float().softmax(-1)

    def top(self) -> tuple[tuple[int, str, float], ...]:
        values, classes = self.probabilities().topk(min(TOP, len(self.logits)))
        return tuple((c, self.name(c), p) for c, p in zip(classes.tolist(), values.tolist(), strict=True))


@dataclass
class Session:
    """What one open page keeps between two requests."""

    seen: _Seen | None = None
    classes: OrderedDict[str, int] = field(default_factory=OrderedDict)  # by how they were asked for
    # explanations in the host's memory, or why there is none; of both what was used last stands last
    maps: OrderedDict[tuple[str, tuple[int, ...]], Explanation | str] = field(default_factory=OrderedDict)

    def start(self, seen: _Seen | None) -> None:
        """Another photo or model, or none: nothing that was kept fits any longer."""
        self.seen = seen
        self.classes.clear()
        self.maps.clear()


# -- the work --------------------------------------------------------------------------------------------------------------


class Service:
    """Models by name, and views of photos; one request at a time, whoever asks.

    Args:
        model: the first model, as ``load_model`` takes it, loaded at once.
        weights: file of that model's weights.
        device, dtype: where models are put, and their element type, as ``load_model`` takes them.
        backend: as ``Explainer`` takes it.

    Attributes:
        loads, classifications, explanations: how often models were loaded, run on a photo, and explained.

    Raises:
        ExplanationError: the model cannot be loaded or explained, or an argument does not fit.
    """

    def __init__(
        self,
        model: str = DEMO,
        weights: Path | None = None,
        device: str = "auto",
        *,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> None:
        self.model, self.weights, self.device, self.dtype, self.backend = model, weights, device, dtype, backend
        self.loads = self.classifications = self.explanations = 0
        self._models: OrderedDict[str, LoadedModel] = OrderedDict()  # the one used last stands last
        self._lock = threading.Lock()
        self._loaded(model)

    def view(self, request: Request, session: Session) -> View:
        """What to show for a request; what goes wrong becomes the view's message."""
        with self._lock:
            try:
                return self._view(request, session)
            except ExplanationError as error:
                return _failed(str(error), session)
            except Exception as error:  # the model's own code runs here
                if is_out_of_memory(error):
                    return _failed("There is too little memory for this model and photo.", session)
                _LOG.exception("model %r, photo %r", request.model, request.photo_name)
                return _failed(f"{request.model!r} cannot be run on this photo: {brief(error)}", session)

    # -- a view ------------------------------------------------------------------------------------------------------

    def _view(self, request: Request, session: Session) -> View:
        if request.photo is None:
            session.start(None)
            return View()
        source = request.model.strip(), request.photo
        target = request.target.strip() or PREDICTED
        if session.seen is None or session.seen.source != source:
            session.start(None)
            if not request.local:
                self._check_reach(source[0])
            session.start(self._look(source, request.photo_name or request.photo.name))
            target = PREDICTED
        seen = session.seen
        assert seen is not None
        index = self._class(target, session, seen)
        classes = (index, _runner_up(seen.logits, index)) if request.compare and len(seen.logits) > 1 else (index,)
        found = self._explained(request.methods, classes, session, seen)
        return View(
            heading=_heading(seen, classes),
            top=seen.top(),
            target=target,
            pictures=tuple(_pictures(request, seen, classes, found)),
            scales=_scales(request.colormap, classes, found),
        )

    def _look(self, source: tuple[str, Path], photo_name: str) -> _Seen:
        """Read a photo and classify it."""
        name, path = source
        check_file(path, "photo")
        photo = decode_photo(path, repr(photo_name)).image
        loaded = self._loaded(name)
        inputs = loaded.transform(photo).unsqueeze(0)
        self.classifications += 1
        with torch.inference_mode():
            logits = loaded.model(inputs.to(next(loaded.model.parameters())))[0].cpu()
        shown = loaded.display(photo)
        shown.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        return _Seen(source, inputs, shown, logits, loaded.class_names)

    def _class(self, target: str, session: Session, seen: _Seen) -> int:
        if target not in session.classes:
            known = int(seen.logits.argmax()) if target == PREDICTED else self._loaded(seen.source[0]).class_index(target)
            _keep(session.classes, target, known)
        return session.classes[target]

    def _explained(
        self, methods: Sequence[str], classes: tuple[int, ...], session: Session, seen: _Seen
    ) -> dict[str, Explanation | str]:
        """By method, its explanation for these classes, or why there is none; only what the session has not is computed."""
        missing = [name for name in methods if (name, classes) not in session.maps]
        new = self._explain(missing, classes, seen) if missing else {}
        found = {name: new[name] if name in new else session.maps[name, classes] for name in methods}
        for name, one in found.items():
            _keep(session.maps, (name, classes), one)
        return found

    def _explain(self, methods: list[str], classes: tuple[int, ...], seen: _Seen) -> dict[str, Explanation | str]:
        """All methods in one call; where one fails, each by itself, so that the others' maps are there."""
        model = self._loaded(seen.source[0]).model
        try:
            explainer = Explainer(model, methods, self.backend)
            self.explanations += 1
            found = explainer.attribute(seen.inputs.to(next(model.parameters())), [list(classes)])
        except Exception as error:  # the model's own code runs here, and captum's
            if is_out_of_memory(error):
                raise
            if len(methods) == 1:
                return {methods[0]: _reason(error, methods[0], seen)}
        else:
            return {name: _on_host(one) for name, one in found.items()}
        each = [self._explain([name], classes, seen) for name in methods]
        return {name: one for alone in each for name, one in alone.items()}

    # -- models ------------------------------------------------------------------------------------------------------

    def _loaded(self, name: str) -> LoadedModel:
        """The model of a name, loaded where it is none of the last ones."""
        if name not in self._models:
            if not name:
                raise InputError("model: expected 'demo', a name of timm's, or transformers:NAME, received nothing")
            self._make_room(_KEPT_MODELS - 1)
            loaded = self._load(name)
            # rollout asks least of a model; what another method does not allow is said in its place
            Explainer(loaded.model, "rollout", self.backend).check_backend(next(loaded.model.parameters()).device)
            self.loads += 1
            self._models[name] = loaded
        self._models.move_to_end(name)
        return self._models[name]

    def _load(self, name: str) -> LoadedModel:
        """``load_model``, and once more without the other models where memory was wanting."""
        weights = self.weights if name == self.model else None
        try:
            return load_model(name, weights, self.device, dtype=self.dtype)
        except Exception as error:  # load_model names the device, and has torch's own error as the cause
            if not self._models or not is_out_of_memory(error.__cause__ or error):
                raise
        self._make_room(0)
        return load_model(name, weights, self.device, dtype=self.dtype)

    def _make_room(self, kept: int) -> None:
        """Forget the models used longest ago, all but ``kept``."""
        if len(self._models) > kept:
            while len(self._models) > kept:
                self._models.popitem(last=False)
            gc.collect()
            torch.cuda.empty_cache()

    def _check_reach(self, name: str) -> None:
        """Refuse a folder of this machine to whoever is elsewhere, unless it is the one that the page was started with."""
        if name != self.model and (name.startswith("local-dir:") or (name.startswith(PREFIX) and is_folder(name))):
            raise InputError(f"model: expected a name, as folders are read for visitors at this machine alone, received {name!r}")


def grouped_methods() -> dict[str, list[tuple[str, str]]]:
    """The methods as titles and names, in groups, each in the registry's order."""
    groups: dict[str, list[tuple[str, str]]] = {
        "Attention and its gradient": [],
        "Relevance, layer by layer": [],
        "Gradient of pixels (captum)": [],
    }
    attention, relevance, pixels = groups.values()
    for name, kind in REGISTRY.items():
        group = pixels if issubclass(kind, CaptumMethod) else attention if kind.rules is None else relevance
        group.append((kind.title, name))
    return groups


def method_note(name: str) -> str:
    """A line on a method: what it costs, and whether the class matters."""
    kind = REGISTRY[name]
    cost = kind.cost[0].upper() + kind.cost[1:]
    return f"{cost}." if kind.uses_target else f"{cost}. The same for every class."


# -- a view's parts --------------------------------------------------------------------------------------------------------


def _keep(kept: OrderedDict[Key, Kept], key: Key, value: Kept) -> None:
    """As the one used last, of which so many are kept."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > _KEPT_RESULTS:
        kept.popitem(last=False)


def _on_host(explanation: Explanation) -> Explanation:
    tensors: dict[str, Any] = {name: tensor.cpu() for name, tensor in explanation.tensors().items()}
    return replace(explanation, **tensors)


def _reason(error: Exception, method: str, seen: _Seen) -> str:
    """Why a method has no map; a defect is told in full in the log."""
    if isinstance(error, ExplanationError):
        return str(error)
    _LOG.error("method %r, model %r", method, seen.source[0], exc_info=error)
    return brief(error)


def _failed(message: str, session: Session) -> View:
    """The message, and the classes of the photo where it was not the photo or the model that went wrong."""
    return View(message, top=session.seen.top() if session.seen else ())


def _runner_up(logits: Tensor, index: int) -> int:
    """The likeliest class but one."""
    first, second = logits.topk(2).indices.tolist()
    return second if first == index else first


def _heading(seen: _Seen, classes: tuple[int, ...]) -> str:
    probabilities = seen.probabilities()
    named = [f"“{seen.short_name(c)}” ({100 * float(probabilities[c]):.1f} %)" for c in classes]
    return f"Where {seen.source[0]} looked for " + " and for ".join(named)


def _pictures(request: Request, seen: _Seen, classes: tuple[int, ...], found: dict[str, Explanation | str]) -> list[Picture]:
    photo = [] if len(classes) > 1 and found else [Picture("Photo", "The part that the model saw.", seen.shown)]
    return photo + [_picture(name, request, seen, classes, one) for name, one in found.items()]


def _picture(name: str, request: Request, seen: _Seen, classes: tuple[int, ...], found: Explanation | str) -> Picture:
    kind, note = REGISTRY[name], method_note(name)
    colormap = None if request.colormap == BY_SIGN else request.colormap
    if isinstance(found, str):
        return Picture(kind.title, found, None)
    if len(classes) == 1 or not kind.uses_target:
        return Picture(kind.title, note, found.overlay(seen.shown, alpha=request.alpha, colormap=colormap))
    names = [seen.short_name(c) for c in classes]
    figure = contrast(seen.shown, found, names=names, title="", caption="", alpha=request.alpha, colormap=colormap)
    return Picture(kind.title, note, _drawn(figure), wide=True)


def _drawn(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _scales(colormap: str, classes: tuple[int, ...], found: dict[str, Explanation | str]) -> tuple[tuple[str, str, str], ...]:
    """Of the maps that stand alone; a comparison has its own legend."""
    alone = [one for name, one in found.items() if len(classes) == 1 or not REGISTRY[name].uses_target]
    signs = sorted({one.signed for one in alone if isinstance(one, Explanation)})
    return tuple((SCALES[sign][0] if colormap == BY_SIGN else colormap, *SCALES[sign][1:]) for sign in signs)
