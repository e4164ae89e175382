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
    """One model, explained with one thing changed at a time."""

    @cached_property
    def classes(self) -> Tensor:
        """The likeliest classes (B, K)."""
        return models.forward(self.model, self.images).topk(CLASSES).indices

    def call(self, entry: Entry) -> Callable[[], object]:
        if entry.work in BASELINES:
            return models.baseline(entry.work, self.model, self.images)
        return self._calls(entry)(self.images)

    def _calls(self, entry: Entry) -> Callable[[Tensor], Callable[[], object]]:
        """From images to what is timed."""
        on_cpu, work = self.images.device.type == "cpu", entry.work
        methods = METHODS if work in (SEVERAL_METHODS, METHOD_BY_METHOD) else ("tokentm",)
        if work == METHOD_BY_METHOD:
            each = [Explainer(self.model, method) for method in methods]
            return lambda images: lambda: [one.attribute(images, check_values=on_cpu) for one in each]
        explainer = Explainer(self.model, methods if len(methods) > 1 else methods[0], **OPTIONS.get(work, {}))
        columns = {SEVERAL_CLASSES: [self.classes], CLASS_BY_CLASS: self.classes.unbind(1)}.get(work, [None])
        looked = work == VALUES or on_cpu

        def prepared(images: Tensor) -> Callable[[], object]:
            def call() -> object:
                with CHANGES[work]() if work in CHANGES else nullcontext():
                    return [explainer.attribute(images, column, check_values=looked) for column in columns][-1]

            return call

        return prepared

    def check(self, entry: Entry) -> Check | None:
        """Of what explains the predicted class by one method; the others are the same calls, or several of them."""
        if entry.work in BASELINES or entry.work in OTHERS[3:]:
            return None
        found = self._calls(entry)(self.images)
        return self.gate.check("tokentm", lambda *_: ours.all_values(found())[: len(self.gate.images)], self._predicted)

    @property
    def _predicted(self) -> Tensor:
        return models.forward(self.model, self.images).argmax(-1)[: len(self.gate.images)]


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
