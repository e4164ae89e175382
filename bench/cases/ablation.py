"""What each way of saving work buys: the explanation as it is, and without one of them, or with one that is an option."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, ClassVar
from unittest import mock

from torch import Tensor

from vitexplain import Explainer
from vitexplain.tap import Tap

from ..providers import models, ours
from ..registry import BASELINES, EXPLANATION, Check, Entry, Prepared, Setting, Size, TimedCase
from ..registry import ours as our_provider
from .explanations import PreparedExplanations, baseline

AS_IT_IS = "tokentm"
CLASSES, METHODS = 5, ("tokentm", "gmar", "transformer_mm")

# As options of ``Explainer``
OPTIONS: dict[str, dict[str, bool]] = {
    AS_IT_IS: {},
    "+ compiled blocks": {"compile": True},
    "+ CUDA graph": {"cuda_graph": True},
    "+ compiled blocks, CUDA graph": {"compile": True, "cuda_graph": True},
    "+ activation checkpointing": {"checkpoint": True},
}
VALUES = "values looked at"
WHOLE_LAST_BLOCK = "− last block's backward and MLP on the class row alone"
TO_PIXELS = "− no gradient below block 0's attention"
SEVERAL_CLASSES, CLASS_BY_CLASS = f"{CLASSES} classes an image, one call", f"{CLASSES} classes an image, {CLASSES} calls"
SEVERAL_METHODS, METHOD_BY_METHOD = f"{len(METHODS)} methods, one call", f"{len(METHODS)} methods, {len(METHODS)} calls"
OTHERS = (VALUES, WHOLE_LAST_BLOCK, TO_PIXELS, SEVERAL_CLASSES, CLASS_BY_CLASS, SEVERAL_METHODS, METHOD_BY_METHOD)


@contextmanager
def whole_last_block() -> Iterator[None]:
    """The last block computed, forward and backward, for tokens that the head does not read."""
    with mock.patch.object(Tap, "rows_read_of", return_value=None):
        yield


@contextmanager
def gradient_to_pixels() -> Iterator[None]:
    """A backward that goes on to the images, as the model alone would do it."""
    forward = Tap.forward

    def further(tap: Tap, inputs: Tensor) -> Tensor:
        inputs = inputs.clone().requires_grad_()
        output = forward(tap, inputs)
        tap.leaves.append(inputs)
        return output

    with mock.patch.object(Tap, "forward", further):
        yield


CHANGES: dict[str, Callable[[], Any]] = {WHOLE_LAST_BLOCK: whole_last_block, TO_PIXELS: gradient_to_pixels}


class PreparedAblation(PreparedExplanations):
    """One model, explained with one thing changed at a time; each line is gated by the call that is timed."""

    @cached_property
    def classes(self) -> Tensor:
        """The likeliest classes (B, K)."""
        return models.forward(self.model, self.images).topk(CLASSES).indices

    def call(self, entry: Entry) -> Callable[[], object]:
        if entry.work in BASELINES:
            return models.baseline(entry.work, self.model, self.images)
        work, each, columns = entry.work, self.explainer(entry), self._columns(entry.work)
        looked = work == VALUES or self.images.device.type == "cpu"

        def call() -> object:
            with CHANGES[work]() if work in CHANGES else nullcontext():
                return [one.attribute(self.images, column, check_values=looked) for one in each for column in columns]

        return call

    def check(self, entry: Entry) -> Check | None:
        """Every method's map, for every class."""
        if entry.work in BASELINES:
            return None
        return ours.check(self.gate, ours.called(self.call(entry), self.images.device))

    def _explainer(self, entry: Entry) -> list[Explainer]:
        """Those that are called one after the other."""
        work = entry.work
        if work == METHOD_BY_METHOD:
            return [Explainer(self.model, method) for method in METHODS]
        return [Explainer(self.model, METHODS if work == SEVERAL_METHODS else AS_IT_IS, **OPTIONS.get(work, {}))]

    def _columns(self, work: str) -> Sequence[Tensor | None]:
        """The classes of each call."""
        if work == SEVERAL_CLASSES:
            return (self.classes,)
        return self.classes.unbind(1) if work == CLASS_BY_CLASS else (None,)


class Ablation(TimedCase):
    """Each way of saving work, by itself."""

    name: ClassVar[str] = "ablation"
    kind: ClassVar[str] = EXPLANATION
    title: ClassVar[str] = "what CUDA graphs, compiled blocks, the reduced last block and sharing a forward each buy"

    def sizes(self, device_type: str) -> Sequence[Size]:
        if device_type == "cuda":
            return (
                Size("vit_large_patch16_224", 64, 197, dtype="bfloat16"),
                Size("vit_large_patch16_224", 1, 197, dtype="bfloat16"),
            )
        return (Size("vit_small_patch16_224", 8, 197),)

    def entries(self, size: Size, device_type: str) -> Sequence[Entry]:  # noqa: ARG002
        provider = our_provider(device_type)
        works = [work for work in OPTIONS if device_type == "cuda" or "CUDA" not in work] + list(OTHERS)
        if device_type != "cuda":
            works.remove(VALUES)  # on a CPU a look costs nothing
        lines = [Entry(work, provider, baseline=work == AS_IT_IS, memory="check" in work or work == AS_IT_IS) for work in works]
        return (*map(baseline, BASELINES), *lines)

    def prepare(self, size: Size, setting: Setting) -> Prepared:
        return PreparedAblation(size, setting.device)
