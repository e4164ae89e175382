"""Explaining a whole data set: into a store, or as an iterator of tensors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, is_out_of_memory
from ..loading import LoadedModel, dtype_named
from ..messages import brief, differences
from ..methods import MethodChoice, methods_from_texts
from ..options import checked_count
from ..processes import start_early
from ..sources import Source
from ..sources.opening import as_source
from .auto_batch import Measured, best_batch, try_one_batch
from .compute import BatchExplainer, deterministic
from .engine import Engine, Tally
from .layout import checked_output, import_parquet, import_zarr
from .lock import locked
from .ranks import Ranks
from .settings import Plan
from .standing import read_settings
from .store import StoreWriter
from .work import Counter, Progress, Work, device_name

ENGINES = ("local", "ray")
SHARD = {"cpu": 256, "cuda": 1024}  # images; a kill loses the shard in work, and those that are still being written
SHARD_BYTES = 64 << 20  # of maps in memory until a shard is whole
MEASURED_BATCHES = 16  # a run of fewer batches is not worth measuring what it could have been


@dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
        output: the store.
        total: images of the source; ``found`` of them stood in the store already.
        ok, unreadable, not_finite: images of this run by status.
        seconds: of this run's work, from the start of what decodes to the last shard; ``images_per_second`` in them.
        preparing_seconds: before that: hashing weights, looking at the store, measuring batches.
        waiting_share: of the time between the first and the last batch, the part in which the device waited for data.
        bare_images_per_second: of ``attribute`` in a loop on a batch that is on the device already, and ``ratio_to_bare`` the
            run's speed over it; None where the run was too short to measure it.
        batch, shard: images in each.
        engine, workers, devices: what did it; ``workers`` processes decoded for each device.
        replaced_workers: how often processes that decode had to be replaced.
        graphed: whether explanations were replayed from a CUDA graph.
        memory_mib: of this process at "10%" and "90%" of the run; None where it is not known.
    """

    output: Path
    total: int
    found: int
    ok: int
    unreadable: int
    not_finite: int
    seconds: float
    preparing_seconds: float
    images_per_second: float
    waiting_share: float | None
    bare_images_per_second: float | None
    ratio_to_bare: float | None
    batch: int
    shard: int
    engine: str
    workers: int
    devices: tuple[str, ...]
    replaced_workers: int
    graphed: bool
    memory_mib: Mapping[str, float | None]
    started: str
    finished: str

    @property
    def images(self) -> int:
        """Images of this run."""
        return self.ok + self.unreadable + self.not_finite

    def as_log(self) -> dict[str, Any]:
        """For the store's log of runs."""
        return {
            **asdict(self),
            "ended": "whole",
            "images": self.images,
            "output": self.output.name,
            "device": ", ".join(self.devices),
        }


@dataclass(frozen=True)
class ExplainedBatch:
    """A batch of explained images.

    Attributes:
        ids: n of them; ``rows`` their indices in the source.
        maps: by label, float32 (n, gh, gw), or (n, K, gh, gw) for K targets, on the model's device.
        prediction, score: (n,), the predicted class and its probability.
        target, target_score: (n,) or (n, K), the explained class and its probability.
        status: ``"ok"``, ``"unreadable"`` or ``"not_finite"`` an image; where it is not ``"ok"``, the other values mean nothing.
        reason: why it is not, or what was done to read the image; None where there is nothing to say.
    """

    ids: tuple[str, ...]
    rows: range
    maps: Mapping[str, Tensor]
    prediction: Tensor
    score: Tensor
    target: Tensor
    target_score: Tensor
    status: tuple[str, ...]
    reason: tuple[str | None, ...]


def run(
    model: LoadedModel,
    source: Source | str | Path,
    output: str | Path,
    methods: MethodChoice = "tokentm",
    *,
    target: str = "pred",
    batch: int | str = "auto",
    dtype: str = "float32",
    backend: str = "auto",
    resize: str = "model",
    engine: str = "local",
    workers: int | None = None,
    actors: int | None = None,
    shard: int | None = None,
    compile: bool = False,
    cuda_graph: bool = True,
    deterministic: bool = True,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    measuring: Callable[[Measured], None] | None = None,
) -> Report:
    """Explain every image of a source and keep the maps in a store; a run that was interrupted goes on where it was.

    Args:
        model: with its preprocessing; see ``load_model``.
        source: of images; see ``open_source``.
        output: the store, ``NAME.zarr``; its index ``NAME.parquet`` stands beside it.
        methods: names, ``NAME:OPTION=VALUE,…`` texts or ``Method`` instances, or a mapping of labels to any of these.
        target: ``"pred"``, the predicted class, ``"label"``, or ``"topK"``, the K likeliest ones.
        batch: images explained at once, or ``"auto"``, found by measurement; that of a store that stands is kept.
        dtype: element type that the model runs in.
        backend: of the explanations; see ``Explainer``.
        resize: ``"model"``, its own preprocessing, or ``"squash"``, the whole photo.
        engine: ``"local"``, this process, or each of those that ``torchrun`` started; ``"ray"``, actors on a cluster.
        workers: processes that decode photos for each device; 0 for none; None for a number that suits the machine.
        actors: on Ray; None for one a GPU, or one where there is none.
        shard: images a file; None for 256 on a CPU and 1,024 on a GPU; a multiple of the batch is made of it.
        compile: run the model's blocks as ``torch.compile`` makes them, at the price of the compiler's time at the beginning.
        cuda_graph: capture explanations in a CUDA graph where that can be done.
        deterministic: the same bits each time, also on a GPU.
        overwrite: throw away the store that stands there.
        progress: called from time to time.
        measuring: called with each batch that ``"auto"`` has measured.

    Raises:
        InputError, UnknownNameError, UnsupportedModelError: before any work, where something does not fit: also where another
            run is writing, or a store with other settings stands there. InputError: the disk is full, or the source is gone;
            what is written stays, and the same call goes on from there.
    """
    times, started = [time.perf_counter()], _now()
    _check_call(engine, actors, progress, measuring)
    output = checked_output(output)
    sizes = _checked_batch(batch), None if shard is None else checked_count("shard", shard, 1, "image")
    plan = _plan(
        model, source, methods, target=target, dtype=dtype, backend=backend, resize=resize, compile=compile,
        cuda_graph=cuda_graph, deterministic=deterministic, workers=workers,
    )  # fmt: skip
    plan.layout(1)  # refuses labels that can name no folder
    import_zarr()
    import_parquet()
    ranks = Ranks()
    if engine == "local" and plan.workers and not (sizes[0] is None and plan.device.type == "cpu"):
        start_early()  # a measurement on the CPU would suffer from it
    with ExitStack() as stack:
        ranks.first(lambda: stack.enter_context(locked(output)) and None)
        ranks.first(lambda: try_one_batch(plan))
        chosen = ranks.first(lambda: _sizes(plan, output, *sizes, overwrite, measuring))
        layout = plan.layout(chosen[1])
        settings = plan.settings(*chosen)
        _check_alike(ranks.gather(settings))
        ranks.first(lambda: StoreWriter.prepare(output, settings, layout, overwrite=overwrite) and None)
        writer = StoreWriter(output, layout)
        missing = ranks.first(writer.missing)
        times.append(time.perf_counter())
        shards = ranks.share(missing)
        images, own = (sum(len(layout.rows(number)) for number in numbers) for numbers in (missing, shards))
        counter = Counter(len(plan.source), images, progress, own)
        try:
            if engine == "ray":
                from . import on_ray

                work = on_ray.explain_shards(plan, chosen[0], writer, missing, actors, counter)
            else:
                work = ranks.together(lambda: _explain_shards(plan, chosen[0], writer, shards, counter))
        except BaseException as error:
            if ranks.is_first:
                _log_end(writer, started, counter, error)
            raise
        parts = ranks.gather(work)
        times.append(time.perf_counter())
        bare = ranks.gather(_bare_images_per_second(plan, chosen[0], work) if engine == "local" else None)
        report = _report(output, plan, chosen, counter, parts, engine, bare, times, started)
        if ranks.is_first:
            writer.log(report.as_log())
    return report


def stream(
    model: LoadedModel,
    source: Source | str | Path,
    methods: MethodChoice = "tokentm",
    *,
    target: str = "pred",
    batch: int | str = "auto",
    dtype: str = "float32",
    backend: str = "auto",
    resize: str = "model",
    workers: int | None = None,
    compile: bool = False,
    cuda_graph: bool = True,
    deterministic: bool = True,
) -> Iterator[ExplainedBatch]:
    """Explain every image of a source, batch by batch, and write nothing: maps are tensors on the model's device.

    Args:
        model, source, methods, target, batch, dtype, backend, resize, workers, compile, cuda_graph, deterministic: as of ``run``.

    Raises:
        InputError, UnknownNameError, UnsupportedModelError: as ``run``, before the first batch is asked for.
    """
    plan = _plan(
        model, source, methods, target=target, dtype=dtype, backend=backend, resize=resize, compile=compile,
        cuda_graph=cuda_graph, deterministic=deterministic, workers=workers,
    )  # fmt: skip
    size = _checked_batch(batch)
    try_one_batch(plan)
    return _stream(plan, best_batch(plan) if size is None else size)


def _stream(plan: Plan, batch: int) -> Iterator[ExplainedBatch]:
    with Engine(plan, batch, packed=False) as engine:

        def on_device(values: Tensor) -> Tensor:
            return values.to(engine.explainer.device, non_blocking=True)

        count = len(plan.source)
        for explained in engine.explained(range(start, min(start + batch, count)) for start in range(0, count, batch)):
            result, found = explained.result, engine.rows(explained)
            yield ExplainedBatch(
                ids=tuple(row.id for row in found),
                rows=explained.rows,
                maps=result.maps,
                prediction=on_device(result.prediction),
                score=on_device(result.score),
                target=on_device(result.target),
                target_score=on_device(result.target_score),
                status=tuple(row.status for row in found),
                reason=tuple(row.reason for row in found),
            )


# -- before the work -----------------------------------------------------------------------------------------------------


def _plan(
    model: LoadedModel, source: Source | str | Path, methods: MethodChoice, *, workers: int | None, dtype: str, **settings: Any
) -> Plan:
    source = as_source(source, model)
    device = next(model.model.parameters()).device
    return Plan(
        model=model,
        source=source,
        methods=methods_from_texts(methods),
        dtype=dtype_named(dtype),
        workers=default_workers(device) if workers is None else workers,
        **settings,
    )


def _check_call(engine: str, actors: int | None, *callbacks: object) -> None:
    if engine not in ENGINES:
        raise InputError(f"engine: expected one of {', '.join(ENGINES)}, received {engine!r}")
    if actors is not None:
        checked_count("actors", actors, 1, "actor")
        if engine != "ray":
            raise InputError(f"actors: expected them with engine 'ray' alone, received {actors} with {engine!r}")
    for callback in callbacks:
        if callback is not None and not callable(callback):
            raise InputError(f"progress, measuring: expected functions, received {type(callback).__name__}")
    if engine == "ray":
        from . import on_ray

        on_ray.check()


def _check_alike(settings: list[dict[str, Any]]) -> None:
    """Refuse processes that would write different maps into one store."""
    for rank, others in enumerate(settings):
        different = differences(settings[0], others)
        if different:
            raise InputError(
                f"torchrun: expected the same model, data and versions in every process, received others in process {rank} "
                f"({'; '.join(different[:3])}, there being those of the first process)"
            )


def default_workers(device: torch.device) -> int:
    """Processes that decode: on a CPU they take cores from the explanations, on a GPU there should be enough to keep it busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cpu":
        return max(1, cores // 4 // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(16, cores // max(1, torch.cuda.device_count()) - 1))


def _checked_batch(batch: int | str) -> int | None:
    """A number, or None for ``"auto"``; the command line gives numbers as text."""
    if batch == "auto":
        return None
    if isinstance(batch, str):
        if not batch.strip().lstrip("-").isdigit():
            raise InputError(f"batch: expected a number or 'auto', received {batch!r}")
        batch = int(batch)
    return checked_count("batch", batch, 1, "image")


def _sizes(
    plan: Plan,
    output: Path,
    number: int | None,
    shard: int | None,
    overwrite: bool,
    measuring: Callable[[Measured], None] | None,
) -> tuple[int, int]:
    """Images a batch and a shard: as asked for, as the store that stands has them, or as they suit."""
    standing = None if overwrite else read_settings(output)
    if number is None:
        number = standing["batch"] if standing else best_batch(plan, measuring)
    if shard is None:
        if standing:
            return number, standing["shard"]
        shard = min(SHARD[plan.device.type], max(1, SHARD_BYTES // plan.layout(1).image_bytes))
    return number, -(-shard // number) * number


# -- the work ------------------------------------------------------------------------------------------------------------


def _explain_shards(plan: Plan, batch: int, writer: StoreWriter, shards: list[int], counter: Counter) -> Work:
    """Explain and write shards on the device that the model is on."""
    counter.tell()
    if not shards:
        return Work()
    tally = Tally()
    with Engine(plan, batch) as engine:
        explainer = engine.explainer

        def report(count: int) -> None:
            counter.add(count, Work(busy=explainer.busy, idle=explainer.idle).waiting_share)

        for _, found in engine.write_shards(writer, shards, report):
            tally += found
    explainer.settle()
    return Work(
        tally, explainer.busy, explainer.idle, (device_name(explainer.device),), engine.decoder.replaced, explainer.graphed
    )


def _bare_images_per_second(plan: Plan, batch: int, work: Work) -> float | None:
    """Of this process's device, where what it did is worth the comparison and there is memory for it."""
    if not work.devices or work.tally.images < MEASURED_BATCHES * batch:
        return None
    try:
        with deterministic(plan.device, enabled=plan.deterministic):
            return BatchExplainer(plan.model, plan.methods, batch=batch, cuda_graph=False, **plan.how).bare_images_per_second()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


# -- after it ------------------------------------------------------------------------------------------------------------


def _report(
    output: Path,
    plan: Plan,
    chosen: tuple[int, int],
    counter: Counter,
    parts: list[Work],
    engine: str,
    bare_of_each: list[float | None],
    times: list[float],
    started: str,
) -> Report:
    work = Work.of(parts)
    known = [rate for rate in bare_of_each if rate is not None]
    bare = sum(known) if known and len(known) == len(work.devices) else None
    preparing, seconds = (after - before for before, after in pairwise(times))
    images_per_second = work.tally.images / seconds
    return Report(
        output=output,
        total=len(plan.source),
        found=len(plan.source) - work.tally.images,
        **asdict(work.tally),
        seconds=seconds,
        preparing_seconds=preparing,
        images_per_second=images_per_second,
        waiting_share=work.waiting_share if work.busy else None,
        bare_images_per_second=bare,
        ratio_to_bare=None if bare is None else images_per_second / bare,
        batch=chosen[0],
        shard=chosen[1],
        engine=engine,
        workers=plan.workers,
        devices=work.devices,
        replaced_workers=work.replaced_workers,
        graphed=work.graphed,
        memory_mib=counter.memory,
        started=started,
        finished=_now(),
    )


def _log_end(writer: StoreWriter, started: str, counter: Counter, error: BaseException) -> None:
    """Keep a line about a run that did not come to its end; the error itself matters more than a line that fails."""
    ended = brief(error) if isinstance(error, Exception) else "interrupted"
    with suppress(Exception):
        writer.log({"started": started, "finished": _now(), "ended": ended, "images": counter.images})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


__all__ = ["ExplainedBatch", "Progress", "Report", "run", "stream"]
