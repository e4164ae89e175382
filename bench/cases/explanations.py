"""Whole explanations at the resolution that the models were trained for: every method beside the model itself and its rivals."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitexplain.methods import REGISTRY, own_methods

from ..measuring import let_go
from ..providers import hooks, models, ours, peers
from ..providers.gate import CHECKED_IMAGES, Gate
from ..registry import (
    BASELINES,
    CAPTUM,
    DENSE,
    EXPLANATION,
    FORWARD,
    GRAD_CAM,
    MODEL_ITSELF,
    TORCH,
    TRITON,
    Check,
    Counted,
    Entry,
    Prepared,
    Setting,
    Size,
    TimedCase,
    Unavailable,
)
from ..registry import ours as our_provider

THREE = "3 methods in one call (tokentm, gmar, iba)"
FIVE_CLASSES = "tokentm, 5 classes an image"
FEW_STEPS = "integrated_gradients, 4 steps"
CAM_OF_TOKENS = "grad_cam of tokens (another map)"  # not our attention Grad-CAM: no ratio between the two
MEMORY = ("tokentm", "gmar", "rollout", "transformer_attribution", *BASELINES)
FROZEN = f"{DENSE}, frozen parameters"
RIVALS = (DENSE, FROZEN, CAPTUM, GRAD_CAM)
MUCH_STORED = 4e9  # bytes
COUNTED = ("tokentm", "gmar", "transformer_mm")


@dataclass(frozen=True)
class Asked:
    """What a work asks for.

    Attributes:
        methods: explained in one call.
        options: of the methods.
        target: as ``attribute`` takes it.
    """

    methods: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    target: str | None = None


_WORKS = {
    THREE: Asked(("tokentm", "gmar", "iba")),
    FIVE_CLASSES: Asked(("tokentm",), target="top5"),
    FEW_STEPS: Asked(("integrated_gradients",), {"steps": 4}),
}


def asked(work: str) -> Asked:
    """What a work asks for: most are a method with its default options, of the predicted class."""
    return _WORKS.get(work, Asked((work,)))


def explaining(work: str, provider: str) -> Entry:
    """The entry of a work: where relevance is sent back, so much memory is taken that others would pay for it."""
    alone = any(method in REGISTRY and REGISTRY[method].rules is not None for method in asked(work).methods)
    return Entry(work, provider, alone=alone, memory=work in MEMORY and provider in (TORCH, TRITON, DENSE))


def storing(method: str, provider: str, size: Size, device_type: str) -> Entry:
    """The entry of a method on stored maps; on a GPU alone, where they would leave others too little memory."""
    entry = explaining(method, provider)
    if device_type != "cuda" or entry.alone or method == hooks.cdam.__name__:
        return entry
    stored = hooks.stored_bytes(models.sketched(size.model, size.image_size), size.batch, size.tokens, size.torch_dtype)
    return replace(entry, alone=stored > MUCH_STORED)


def baseline(work: str) -> Entry:
    """The model alone."""
    return Entry(work, MODEL_ITSELF, baseline=True, memory=True)


class PreparedExplanations(Prepared):
    """One model with images: the calls of all providers, and the gate that they share.

    This library is gated by the very call that is timed, with the explainer that is timed: on the whole batch, for the classes
    that it chose, of which the first two images' values are compared. Rivals explain these two alone, for classes that they are
    told.

    Args:
        size: of the model and its images.
        device: where they are.
        depth: number of blocks, where it is not the model's own.
    """

    def __init__(self, size: Size, device: torch.device, depth: int | None = None) -> None:
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # or another size's code would be made general, in the place of code for this one's shapes
        self.size = size
        self.model, self.images = models.build(size, device, depth), models.draw(size, device)
        self.explainer = cache(self._explainer)  # what is gated is what is timed

    @cached_property
    def gate(self) -> Gate:
        """With one float64 run for all methods."""
        return Gate(self.model, self.images)

    @cached_property
    def rivals_model(self) -> torch.nn.Module:
        """For providers that change the model's flags while they work."""
        return models.own_copy(self.model)

    def call(self, entry: Entry) -> Callable[[], object]:
        if entry.baseline:
            return models.baseline(entry.work, self.model, self.images)
        if entry.provider not in RIVALS:
            return ours.timed(self.explainer(entry), self.images, asked(entry.work).target)
        return partial(self._rival(entry), self.images)

    def check(self, entry: Entry) -> Check | None:
        if entry.baseline:
            return None
        if entry.provider == GRAD_CAM:
            if not torch.isfinite(peers.grad_cam(self.rivals_model, self.images[:CHECKED_IMAGES])).all():
                raise Unavailable("wrong: not finite")
            return None  # another map than any of ours
        wanted = asked(entry.work)
        if entry.provider in RIVALS:
            classes = models.forward(self.model, self.gate.images).argmax(-1)
            values = self._rival(entry)(self.gate.images, classes)
            return self.gate.check(wanted.methods[0], values, classes, **wanted.options)
        return ours.check(self.gate, ours.called(self.call(entry), self.images.device), wanted.options)

    def gates_done(self) -> None:
        """Free what the gates were held against; on a GPU also the graphs that were captured for them.

        Explainers are then made again, in the same way, for as long as they are timed.
        """
        self.gate.let_go()
        if self.images.device.type == "cuda":
            self.explainer = self._explainer
        let_go(self.images.device)

    def counted(self, entry: Entry) -> Counted | None:
        if entry.baseline:
            return models.least_work(self.size, 1 if entry.work == FORWARD else models.GRADIENT_PASSES)
        return models.least_work(self.size) if entry.work in COUNTED and entry.provider.startswith((TORCH, TRITON)) else None

    def _explainer(self, entry: Entry) -> ours.Explainer:
        wanted = asked(entry.work)
        methods = wanted.methods if len(wanted.methods) > 1 else wanted.methods[0]
        return ours.build(entry.provider, self.model, methods, wanted.options)

    def _rival(self, entry: Entry) -> Callable[..., Tensor]:
        """A function of images and, where they are given, classes."""
        if entry.provider == GRAD_CAM:
            return partial(peers.grad_cam, self.rivals_model)
        wanted = asked(entry.work)
        if entry.provider == CAPTUM:
            function, model, options = peers.captum, self.model, wanted.options
        else:
            function, model, options = hooks.explain, self.rivals_model, {"frozen": entry.provider == FROZEN}

        def explain(images: Tensor, target: Tensor | None = None) -> Tensor:
            return function(model, images, wanted.methods[0], target, **options)

        return explain


class Explanations(TimedCase):
    """Every method by every provider."""

    name: ClassVar[str] = "explanations"
    kind: ClassVar[str] = EXPLANATION
    title: ClassVar[str] = "one call of every method, beside the model itself, stored maps and other libraries"

    def sizes(self, device_type: str) -> Sequence[Size]:
        small, base, large = (f"vit_{name}_patch16_224" for name in ("small", "base", "large"))
        if device_type == "cuda":
            batches = ((large, 64, "bfloat16"), (base, 128, "bfloat16"), (small, 256, "bfloat16"), (base, 64, "float32"))
        else:
            batches = tuple((name, 8, dtype) for dtype in ("float32", "bfloat16") for name in (small, base))
        return tuple(Size(name, batch, 197, dtype=dtype) for name, batch, dtype in batches)

    def entries(self, size: Size, device_type: str) -> Sequence[Entry]:
        return (*map(baseline, BASELINES), *_our_entries(device_type), *_rival_entries(size, device_type))

    def prepare(self, size: Size, setting: Setting) -> Prepared:
        return PreparedExplanations(size, setting.device)


def _our_entries(device_type: str) -> Iterator[Entry]:
    provider = our_provider(device_type)
    for work in (*own_methods(), THREE, FIVE_CLASSES, "input_x_gradient", FEW_STEPS):
        yield explaining(work, provider)
    if device_type != "cuda":
        yield explaining("tokentm", ours.switched(provider, ours.COMPILED))
        for work in ("transformer_attribution", "lrp"):  # float64 on a CPU; stored maps are in the model's type
            yield explaining(work, ours.switched(provider, ours.FLOAT32_RELEVANCE))
        return
    for work in ("tokentm", "gmar"):
        yield explaining(work, ours.switched(provider, ours.CUDA_GRAPH))
        yield explaining(work, ours.switched(provider, ours.COMPILED, ours.CUDA_GRAPH))


def _rival_entries(size: Size, device_type: str) -> Iterator[Entry]:
    for method in own_methods():
        too_slow = device_type != "cuda" and "vit_base" in size.model and method in hooks.STANDS_IN  # ViT-S tells the same
        if not too_slow:
            yield storing(method, DENSE, size, device_type)
    yield storing("tokentm", FROZEN, size, device_type)
    for work in ("input_x_gradient", FEW_STEPS):
        yield explaining(work, CAPTUM)
    yield explaining(CAM_OF_TOKENS, GRAD_CAM)
