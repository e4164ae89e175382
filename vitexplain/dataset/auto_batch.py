"""The batch that explains most images a second, found by measurement."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import InputError, is_out_of_memory
from .compute import BatchExplainer, deterministic
from .settings import Plan

LARGEST = {"cpu": 64, "cuda": 1024}
ENOUGH = 0.97  # of the best speed: the smallest batch that reaches it leaves the most memory
MEMORY = 0.8  # of a GPU's, which the largest batch may take
_PART = 1 / 24  # of the images that the largest batch may have: measuring must not take longer than explaining
_LONG = 20.0  # seconds of one measurement, after which larger batches are not tried
_LEAST = 0.2


@dataclass(frozen=True)
class Measured:
    """One batch size and its speed."""

    batch: int
    images_per_second: float


def best_batch(plan: Plan, report: Callable[[Measured], None] | None = None) -> int:
    """The smallest batch within 3 % of the best speed; sizes are doubled until they no longer gain, or memory runs out.

    Raises:
        InputError: not even one image fits into memory.
    """
    device = plan.device
    found: list[Measured] = []
    batch = 1
    while batch <= max(1, min(LARGEST[device.type], _PART * len(plan.source))):
        seconds = _seconds_or_none(plan, batch)
        if seconds is None:
            break
        found.append(Measured(batch, batch / seconds))
        if report is not None:
            report(found[-1])
        if seconds > _LONG or _is_full(device) or _no_longer_gains(found):
            break
        batch *= 2
    if not found:
        raise InputError(f"batch: not even one image of {plan.model.name!r} fits into the memory of {device}")
    best = max(measured.images_per_second for measured in found)
    return next(measured.batch for measured in found if measured.images_per_second >= ENOUGH * best)


def try_one_batch(plan: Plan) -> None:
    """Explain one image of noise, looking at its values, so that what cannot be explained is refused before any work.

    Raises:
        InputError, UnsupportedModelError: the model or a method on it cannot be explained.
    """
    explainer = BatchExplainer(plan.model, plan.methods, batch=1, cuda_graph=False, **plan.how)
    photos, classes = explainer.sample_batch()
    with deterministic(explainer.device, enabled=plan.deterministic):
        try:
            explainer.explain(photos, classes, check_values=True)
        except InputError:  # of noise the values may be what they like; anything else comes again
            explainer.explain(photos, classes)


def _seconds_or_none(plan: Plan, batch: int) -> float | None:
    """Seconds a batch takes; None where there is not enough memory for it."""
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()  # what the batch before has left would count as this one's
    try:
        return _seconds(plan, batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def _seconds(plan: Plan, batch: int) -> float:
    """Seconds a batch takes: the fastest of a few, as what else runs on the machine only adds to it."""
    explainer = BatchExplainer(plan.model, plan.methods, batch=batch, cuda_graph=plan.cuda_graph, **plan.how)
    device = explainer.device
    photos, classes = explainer.sample_batch()
    photos, classes = photos.cpu(), None if classes is None else classes.cpu()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with deterministic(device, enabled=plan.deterministic):
        explainer.submit(photos, classes, batch).result()
        seconds: list[float] = []
        while len(seconds) < 2 or sum(seconds) < _LEAST:
            started = time.perf_counter()
            explainer.submit(photos, classes, batch).result()
            seconds.append(time.perf_counter() - started)
            if seconds[-1] > _LONG:
                break
    return min(seconds)


def _is_full(device: torch.device) -> bool:
    """Whether twice the memory would not fit."""
    if device.type != "cuda":
        return False
    return 2 * torch.cuda.max_memory_reserved(device) > MEMORY * torch.cuda.get_device_properties(device).total_memory


def _no_longer_gains(found: list[Measured]) -> bool:
    """Whether two doublings in a row brought less than 3 %."""
    speeds = [measured.images_per_second for measured in found]
    return len(speeds) > 2 and max(speeds[-2:]) * ENOUGH < max(speeds[:-2])
