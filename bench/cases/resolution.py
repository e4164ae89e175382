"""One explanation over the number of tokens: what stored maps cost in time and memory, and where they no longer fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from vitexplain.errors import is_out_of_memory

from .. import measuring
from ..measuring import let_go
from ..providers import hooks, models, ours
from ..record import Row, unmeasured
from ..registry import DENSE, EXPLANATION, FORWARD_BACKWARD, Check, Entry, Prepared, Setting, Size, TimedCase, figure
from ..registry import ours as our_provider
from .explanations import PreparedExplanations, baseline, explaining

LARGEST_BATCH = "largest batch"
METHOD = "tokentm"
GATED_TOKENS = 577  # beyond, float64 maps with their graph take more memory than what they are to judge
BATCHED_TOKENS = 1000  # from here on it is memory that bounds a batch
MOST_IMAGES = 1024


class PreparedResolution(PreparedExplanations):
    """The gate holds where its reference fits: what is computed does not depend on the number of tokens."""

    def check(self, entry: Entry) -> Check | None:
        return super().check(entry) if self.size.tokens <= GATED_TOKENS else None


class Resolution(TimedCase):
    """Time and peak memory from 197 to 16,385 tokens; on a CPU in processes of their own, under a limit."""

    name: ClassVar[str] = "resolution"
    kind: ClassVar[str] = EXPLANATION
    title: ClassVar[str] = "time and memory of one explanation over the number of tokens, beside stored maps"

    def sizes(self, device_type: str) -> Sequence[Size]:
        if device_type != "cuda":
            wide, half = (1024, 224, 2048, 512, 384, 768), (1024, 224, 2048)
            return (
                *(_size("vit_small_patch16_224", 16, pixels, "float32") for pixels in wide),
                *(_size("vit_small_patch16_224", 16, pixels, "bfloat16") for pixels in half),
            )
        large, dino = ("vit_large_patch16_224", 16), ("vit_large_patch14_dinov2", 14)
        sizes = ((large, 1024), (large, 2048), (dino, 1036), (dino, 518), (large, 224))
        return tuple(_size(*model, pixels, "bfloat16") for model, pixels in sizes)

    def entries(self, size: Size, device_type: str) -> Sequence[Entry]:
        timed = _timed_entries(device_type)
        if device_type != "cuda" or size.tokens < BATCHED_TOKENS:
            return timed
        return (*timed, *(Entry(LARGEST_BATCH, provider) for provider in _our_ways(device_type)))

    def prepare(self, size: Size, setting: Setting) -> Prepared:
        return PreparedResolution(size, setting.device)

    def measure(self, size: Size, setting: Setting) -> Iterator[Row]:
        yield from measuring.measure(self, size, setting, _timed_entries(setting.device.type))
        for entry in filter(setting.wants, self.entries(size, setting.device.type)):
            if entry.provider == DENSE:
                model = models.sketched(size.model, size.image_size)
                stored = hooks.stored_bytes(model, size.batch, size.tokens, size.torch_dtype)
                yield self.row(entry, size, "stored maps, counted", "GB", figure(stored / 1e9), setting.device)
            if entry.work == LARGEST_BATCH:
                yield self._largest_batch(entry, size, setting)

    def blank_rows(self, size: Size, name: str) -> Iterator[Row]:
        for row in super().blank_rows(size, name):
            yield replace(row, metric="batch", unit="1") if row.work == LARGEST_BATCH else row

    def _largest_batch(self, entry: Entry, size: Size, setting: Setting) -> Row:
        model, images = models.build(size, setting.device), models.draw(size, setting.device)
        explainer = ours.build(entry.provider, model, METHOD, {})
        found = largest(lambda batch: ours.timed(explainer, images.repeat(batch, 1, 1, 1))(), setting.device)
        figures = figure(found) if found else unmeasured(measuring.OUT_OF_MEMORY)
        return self.row(entry, size, "batch", "1", figures, setting.device)


def largest(call: Callable[[int], object], device: torch.device) -> int:
    """The largest power of two that a call of so many images does not run out of memory with; 0 where one does not fit."""
    fitting, batch = 0, 1
    while batch <= MOST_IMAGES:
        fits = _fits(call, batch)
        let_go(device)
        if not fits:
            break
        fitting, batch = batch, 2 * batch
    return fitting


def _fits(call: Callable[[int], object], batch: int) -> bool:
    try:
        call(batch)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _size(model: str, patch: int, pixels: int, dtype: str) -> Size:
    """One image, with its class token."""
    return Size(model, 1, (pixels // patch) ** 2 + 1, pixels, dtype)


def _our_ways(device_type: str) -> tuple[str, str]:
    """Without and with activation checkpointing."""
    provider = our_provider(device_type)
    return provider, ours.switched(provider, ours.CHECKPOINTED)


def _timed_entries(device_type: str) -> Sequence[Entry]:
    plain, checkpointed = _our_ways(device_type)
    entries = (
        baseline(FORWARD_BACKWARD), explaining(METHOD, plain), explaining(METHOD, checkpointed), explaining("rollout", plain),
        explaining(METHOD, DENSE),
    )  # fmt: skip
    return tuple(replace(entry, apart=device_type != "cuda", memory=True) for entry in entries)
