"""One explanation over the number of tokens: what stored maps cost in time and memory, and where they no longer fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitexplain import Explainer
from vitexplain.errors import is_out_of_memory

from .. import measuring
from ..measuring import let_go
from ..providers import hooks, models, ours
from ..providers.gate import Gate
from ..record import Row, spread, unmeasured
from ..registry import DENSE, EXPLANATION, FORWARD_BACKWARD, Check, Entry, Prepared, Setting, Size, TimedCase, figure
from ..registry import ours as our_provider
from ..timing import samples_ms
from .explanations import PreparedExplanations, baseline, explaining, storing

LARGEST_BATCH = "largest batch"
METHOD = "tokentm"
GATED_WHOLE = 577  # tokens
GATED_BLOCKS = 2  # the last one, of which the class row alone is computed, and one before it
MOST_STORED = {"cpu": 4097, "cuda": 5477}  # tokens; some 12 float64 maps are alive at a time, each of H n² numbers
TILED_IN = {"cpu": torch.float64, "cuda": torch.float32}
LEAST_SAMPLES = 3
BATCHED_TOKENS = 1000  # from here on it is memory that bounds a batch
MOST_IMAGES = 1024


class TiledReference:
    """This library's own tiles in plain torch, in a dtype of their own: a reference where stored maps no longer fit.

    Args:
        model: copied and converted.
        images: (B, 3, h, w).
        dtype: of the whole computation.
    """

    def __init__(self, model: nn.Module, images: Tensor, dtype: torch.dtype) -> None:
        self.model, self.images = copy.deepcopy(model).to(dtype), images.to(dtype)

    def explain(self, method: str, classes: Tensor) -> Tensor:
        """Values of all tokens (B, n)."""
        return ours.all_values(Explainer(self.model, method, backend="torch").attribute(self.images, classes))


class PreparedCut(PreparedExplanations):
    """The model cut to its first blocks, with the head: what is held against a reference where the whole is too large for one.

    Up to 4,097 tokens on a CPU and 5,477 on a GPU it is the dense reference in float64. Beyond, where a single map of it takes
    gigabytes, it is this library's tiles in plain torch: on a GPU in float32, an implementation apart from the kernels that are
    timed. On a CPU those tiles are what is timed, and float64 shows that rounding stays within its budget at so many tokens, and
    with checkpoints; not that the method is right, which fewer tokens show. No map of theirs is stored.
    """

    def __init__(self, size: Size, device: torch.device) -> None:
        super().__init__(size, device, GATED_BLOCKS)

    @property
    def stores_maps(self) -> bool:
        """Whether the dense reference fits."""
        return self.size.tokens <= MOST_STORED[self.images.device.type]

    @cached_property
    def gate(self) -> Gate:
        """One of two references."""
        if self.stores_maps:
            return super().gate
        return Gate(self.model, self.images, TiledReference, TILED_IN[self.images.device.type])

    def check(self, entry: Entry) -> Check | None:
        """None for stored maps on a CPU that are too large for their reference: they do not fit where they are timed, either."""
        if entry.provider == DENSE and not self.stores_maps and self.images.device.type == "cpu":
            return None
        return super().check(entry)


class PreparedResolution(PreparedExplanations):
    """One image, explained by the whole model; beyond 577 tokens the gate holds its first blocks instead.

    What a block computes does not depend on how many there are, and float64 maps of all with their graph take more memory than
    what they are to judge.
    """

    @cached_property
    def cut(self) -> PreparedCut:
        """What the gate holds."""
        return PreparedCut(self.size, self.images.device)

    def check(self, entry: Entry) -> Check | None:
        if self.size.tokens <= GATED_WHOLE:
            return super().check(entry)
        try:
            return self.cut.check(entry)
        finally:
            self.cut.gates_done()  # a process of its own may be next, with little memory beside it

    def gates_done(self) -> None:
        super().gates_done()
        self.__dict__.pop("cut", None)


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
        timed = _timed_entries(size, device_type)
        if device_type != "cuda" or size.tokens < BATCHED_TOKENS:
            return timed
        return (*timed, *(Entry(LARGEST_BATCH, provider) for provider in _our_ways(device_type)))

    def prepare(self, size: Size, setting: Setting) -> Prepared:
        return PreparedResolution(size, setting.device)

    def measure(self, size: Size, setting: Setting) -> Iterator[Row]:
        begun: set[tuple[str, str]] = set()
        for row in measuring.measure(self, size, setting, _timed_entries(size, setting.device.type)):
            begun.add((row.work, row.provider))
            yield row
        for entry in filter(setting.wants, self.entries(size, setting.device.type)):
            if entry.provider == DENSE and (entry.work, entry.provider) in begun:  # or it would stand for older figures
                model = models.sketched(size.model, size.image_size)
                stored = hooks.stored_bytes(model, size.batch, size.tokens, size.torch_dtype)
                yield self.row(entry, size, "stored maps, counted", "GB", figure(stored / 1e9), setting.device)
            if entry.work == LARGEST_BATCH and setting.spent:
                print(f"left out, the budget is spent: {self.name} {size.label} {entry.work}, {entry.provider}", flush=True)
            elif entry.work == LARGEST_BATCH:
                yield from _till_lost(self._largest_batch(entry, size, setting), setting.device)

    def blank_rows(self, size: Size, name: str) -> Iterator[Row]:
        for row in super().blank_rows(size, name):
            yield replace(row, metric="batch", unit="1") if row.work == LARGEST_BATCH else row

    def _largest_batch(self, entry: Entry, size: Size, setting: Setting) -> Iterator[Row]:
        """The batch, then its times; a reason in the place of what fails."""
        device, least = setting.device, max(LEAST_SAMPLES, setting.least)

        def search() -> tuple[int, Callable[[], object]]:
            model, images = models.build(size, device), models.draw(size, device)
            explainer = ours.build(entry.provider, model, METHOD, {})
            found = largest(lambda batch: ours.timed(explainer, images.repeat(batch, 1, 1, 1))(), device)
            return found, ours.timed(explainer, images.repeat(found, 1, 1, 1))

        found, reason = measuring.attempt(search, device)
        batch, call = found or (0, None)
        if not batch:
            yield self.row(entry, size, "batch", "1", unmeasured(reason or measuring.OUT_OF_MEMORY), device)
            return
        yield self.row(entry, size, "batch", "1", figure(batch), device)
        taken, reason = measuring.attempt(lambda: samples_ms(call, device, setting.seconds, least), device)
        if reason is not None:
            yield self.row(entry, size, "time", "ms", unmeasured(reason), device)
            return
        yield self.row(entry, size, "time", "ms", spread(taken), device)
        yield self.row(entry, size, "pace", "1/s", spread([1e3 * batch / time for time in taken]), device)


def _till_lost(rows: Iterator[Row], device: torch.device) -> Iterator[Row]:
    """Rows, and the end of the run where one says that the device is lost."""
    for row in rows:
        yield row
        if measuring.lost(row.p50, device):
            raise measuring.DeviceLost(f"{row.work} ({row.provider}): {row.p50}")


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


def _timed_entries(size: Size, device_type: str) -> Sequence[Entry]:
    plain, checkpointed = _our_ways(device_type)
    entries = (
        baseline(FORWARD_BACKWARD), explaining(METHOD, plain), explaining(METHOD, checkpointed), explaining("rollout", plain),
        storing(METHOD, DENSE, size, device_type),
    )  # fmt: skip
    return tuple(replace(entry, apart=device_type != "cuda", memory=True) for entry in entries)
