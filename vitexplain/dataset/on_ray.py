"""Shards explained by actors on a Ray cluster: Ray Data hands them out and replaces actors that are killed."""

from __future__ import annotations

import copy
import gc
import logging
import os
import pickle
import platform
import shutil
import socket
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ExplanationError, InputError
from ..files import writing
from ..messages import brief, differences, quiet, some
from .engine import Engine, Tally
from .layout import part_path
from .settings import Plan
from .standing import read_settings
from .store import StoreWriter, remove_leftovers
from .work import Counter, Work, device_name

SHARDS_A_TASK = {"cpu": 1, "cuda": 8}  # a GPU is through with a shard in a second, and between two tasks it waits for photos
ATTEMPTS = 5  # at one task, before it is taken to be what ends the actors: Ray Data would go on for ever

_MARKS = "_attempts"  # folder in the index: a file for each task that was begun, a byte for each attempt
_TASKS_AN_ACTOR = 4  # at least, so that none has much to do when the others are through
_LONG = 6 * 3600.0  # seconds without any task's end, after which a run ends: Ray Data's own half hour is short for a CPU
_REACH = 10.0  # seconds to reach a cluster
_STORE_BYTES = 256 << 20  # of the object store of a cluster that is started here, besides what is put there
_QUIET = {"RAY_BACKEND_LOG_LEVEL": "fatal"}  # errors of Ray Data's own making would stand on the terminal
_LOGGERS = ("ray", "ray.data")


def check() -> None:
    """See before any work that Ray can be used.

    Raises:
        InputError: it is not installed, or ``torchrun`` has started this process.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise InputError(
            f"engine: 'ray' starts its processes itself, received {processes} that torchrun has started; use 'local' with them"
        )
    _import_ray()


def explain_shards(
    plan: Plan, batch: int, writer: StoreWriter, missing: Sequence[int], actors: int | None, counter: Counter
) -> Work:
    """Explain and write shards on the cluster that this process is connected to, or ``RAY_ADDRESS`` names, or one of its own.

    Args:
        plan: with a model on a GPU where actors are to have one each.
        batch: images a batch.
        writer: of the store, in a folder that all nodes share.
        missing: numbers of the shards.
        actors: how many; None for one a GPU, or one where the model is on a CPU.
        counter: told of every task's images when they stand on disk.

    Raises:
        InputError: the cluster cannot be reached or is too small, or an actor failed in a way that it can tell of; the other
            actors are stopped then.
    """
    counter.tell()
    if not missing:
        return Work()
    ray = _import_ray()
    parcel = _Parcel.of(plan, batch, writer)
    with _connected(ray, len(parcel)), quiet(*_LOGGERS, level=logging.CRITICAL), _marks(writer):
        pool = _pool([node["Resources"] for node in ray.nodes() if node["Alive"]], plan.device.type, actors)
        tasks = _tasks(missing, pool.actors, SHARDS_A_TASK[plan.device.type])
        stalled = getattr(ray.data.exceptions, "ExecutionTimeoutError", ray.exceptions.RayError)  # older versions wait on
        try:
            work = _collect(_outcomes(ray, parcel, tasks, pool), writer, missing, counter)
        except ray.exceptions.RayTaskError:
            raise  # a defect, with its traceback
        except (ray.exceptions.RayError, stalled) as error:
            raise InputError(_in_words(error)) from error
    remove_leftovers(writer.output, writer.layout)  # of actors that were killed
    return work


# -- in the actors -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parcel:
    """All that actors need, with the model on the CPU and the device it is to be moved to."""

    plan: Plan
    device: str
    batch: int
    writer: StoreWriter
    attempts: int

    @classmethod
    def of(cls, plan: Plan, batch: int, writer: StoreWriter) -> bytes:
        """Pickled by Ray, which can do that with classes of the caller's script, too."""
        import ray.cloudpickle

        device = plan.device.type
        if device != "cpu":
            there = replace(plan.model, model=copy.deepcopy(plan.model.model).cpu())
            plan = replace(plan, model=there)
            gc.collect()
            torch.cuda.empty_cache()  # what measuring has left: an actor of this machine needs it
        return ray.cloudpickle.dumps(cls(plan, device, batch, writer, ATTEMPTS))


@dataclass(frozen=True)
class _Done:
    """What an actor did in one task."""

    shards: tuple[int, ...]
    work: Work
    actor: str | None


class _Actor:
    """Explains one task after the other; its engine, with the processes that decode, lives as long as it does.

    Nothing is done before the first task, as only the outcome of a task can carry an error in its own words.
    """

    def __init__(self, parcel: Any, threads: int | None) -> None:
        self._parcel, self._threads = parcel, threads
        self._begun: tuple[Engine, StoreWriter] | None = None
        self._attempts = 0
        self._before = Work()

    def __call__(self, items: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
        try:
            outcome: _Done | ExplanationError = self._explain(pickle.loads(items["item"][0]))
        except ExplanationError as error:
            outcome = error
            self._end()
        return {"outcome": [pickle.dumps(outcome)]}

    def _explain(self, shards: tuple[int, ...]) -> _Done:
        import ray

        engine, writer = self._begun or self._begin()
        mark = _begin_attempt(writer, shards, self._attempts)
        explainer = engine.explainer
        tally = sum((found for _, found in engine.write_shards(writer, shards)), Tally())
        mark.unlink(missing_ok=True)
        explainer.settle()
        before, replaced = self._before, engine.decoder.replaced
        self._before = Work(busy=explainer.busy, idle=explainer.idle, replaced_workers=replaced)
        work = Work(
            tally=tally,
            busy=explainer.busy - before.busy,
            idle=explainer.idle - before.idle,
            devices=(device_name(explainer.device),),
            replaced_workers=replaced - before.replaced_workers,
            graphed=explainer.graphed,
        )
        return _Done(shards, work, ray.get_runtime_context().get_actor_id())

    def _begin(self) -> tuple[Engine, StoreWriter]:
        import ray

        if self._threads is not None:
            torch.set_num_threads(self._threads)
        parcel: _Parcel = pickle.loads(ray.get(self._parcel))
        StoreWriter(parcel.writer.output, parcel.writer.layout)  # refuses a folder that is not shared
        _check_versions(parcel)
        model = replace(parcel.plan.model, model=parcel.plan.model.model.to(parcel.device))
        self._before, self._attempts = Work(), parcel.attempts
        engine = Engine(replace(parcel.plan, model=model), parcel.batch).__enter__()
        self._begun = engine, parcel.writer  # which knows what store it is for
        return self._begun

    def _end(self) -> None:
        """Batches that were on their way when something failed are not to be mistaken for the next task's."""
        if self._begun is not None:
            self._begun[0].__exit__()
            self._begun = None


def _check_versions(parcel: _Parcel) -> None:
    """Refuse a node whose packages would make other maps."""
    standing = read_settings(parcel.writer.output) or {}
    different = differences(standing.get("versions"), parcel.plan.versions())
    if different:
        raise InputError(
            f"ray: expected the same packages on every node, received others on {platform.node()}: {some(different)}"
        )


def _begin_attempt(writer: StoreWriter, shards: tuple[int, ...], most: int) -> Path:
    """Count the attempts at a task in a file, as nothing else outlives the process; the file is to be removed after it.

    Raises:
        InputError: there were ``most`` of them already.
    """
    mark = writer.index / _MARKS / str(shards[0])
    with writing(mark), mark.open("ab") as stream:
        stream.write(b".")
        attempts = stream.tell()
    if attempts > most:
        first, last = writer.layout.rows(shards[0]).start, writer.layout.rows(shards[-1]).stop - 1
        raise InputError(
            f"ray: {most} processes were killed, each at the images {first} to {last}, perhaps for want of memory; a smaller "
            "batch or fewer workers need less; run the same command again"
        )
    return mark


# -- in the driver -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pool:
    """Actors, and what each is given."""

    actors: int
    num_cpus: int
    num_gpus: int


def _pool(nodes: Sequence[dict[str, float]], device: str, actors: int | None) -> _Pool:
    """Actors that the cluster can hold all at once: Ray would wait without end for resources that it does not have.

    Args:
        nodes: the resources of each.
        device: what the model is on.
        actors: as asked for.
    """
    on_gpus = device == "cuda"
    name = "GPU" if on_gpus else "CPU"
    counts = [int(node.get(name, 0)) for node in nodes]
    total = sum(counts)
    if actors is None:
        actors = total if on_gpus else 1
    if not total:
        advice = "; load the model on the CPU, or add nodes with GPUs" if on_gpus else ""
        raise InputError(f"ray: expected at least one {name} in the cluster, received none{advice}")
    if actors > total:
        raise InputError(f"actors: expected at most {total}, one for each {name} of the cluster, received {actors}")
    if on_gpus:
        return _Pool(actors, 0, 1)
    cpus = next(cpus for cpus in range(max(counts), 0, -1) if sum(count // cpus for count in counts) >= actors)
    return _Pool(actors, cpus, 0)


def _tasks(missing: Sequence[int], actors: int, most: int) -> list[tuple[int, ...]]:
    """Shards by task: as many as ``most`` each, but enough tasks for all actors to end at about the same time."""
    size = max(1, min(most, len(missing) // (actors * _TASKS_AN_ACTOR)))
    return [tuple(missing[start : start + size]) for start in range(0, len(missing), size)]


def _outcomes(ray: Any, parcel: bytes, tasks: Sequence[tuple[int, ...]], pool: _Pool) -> Generator[_Done]:
    """What the actors did, task by task as they are through with them; closing it stops them."""
    dataset = ray.data.from_items([pickle.dumps(task) for task in tasks], override_num_blocks=len(tasks))
    context = dataset.context
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_errored_blocks = 0  # nothing is left out; tasks of killed actors are done again, as often as it takes
    context.execution_no_progress_timeout_s = _LONG
    explained = dataset.map_batches(
        _Actor,
        fn_constructor_args=(ray.put(parcel), pool.num_cpus or None),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=min(pool.actors, len(tasks)), max_tasks_in_flight_per_actor=2),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
    )
    with closing(iter(explained.iter_rows())) as rows:
        for row in rows:
            outcome = pickle.loads(row["outcome"])
            if isinstance(outcome, ExplanationError):
                raise outcome
            yield outcome


def _collect(outcomes: Generator[_Done], writer: StoreWriter, missing: Sequence[int], counter: Counter) -> Work:
    """Add up what the actors did, and see that it stands where this process sees it, too."""
    total, unseen = Work(), set(missing)
    devices: dict[str | None, tuple[str, ...]] = {}
    with closing(outcomes):
        for done in outcomes:
            for number in done.shards:
                _check_stands(writer, number)
            unseen -= set(done.shards)
            devices[done.actor] = done.work.devices
            total = Work.of([total, replace(done.work, devices=())])
            counter.add(done.work.tally.images, total.waiting_share)
    if unseen:
        raise InputError(f"ray: {len(unseen)} shards were lost on the way; run the same command again")
    return replace(total, devices=tuple(device for found in devices.values() for device in found))


@contextmanager
def _marks(writer: StoreWriter) -> Iterator[None]:
    """Room for the actors' marks, empty at first and gone afterwards."""
    folder = writer.index / _MARKS
    shutil.rmtree(folder, ignore_errors=True)
    with writing(folder):
        folder.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_stands(writer: StoreWriter, number: int) -> None:
    part = part_path(writer.index, number)
    if not part.exists():
        raise InputError(f"output: expected {str(part)!r}, which an actor has written; all nodes need one folder that they share")


# -- the cluster ---------------------------------------------------------------------------------------------------------


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError("engine: 'ray' needs ray, which is not installed: pip install 'vitexplain[ray]'") from error
    return ray


@contextmanager
def _connected(ray: Any, size: int) -> Iterator[None]:
    """Use the cluster that this process is connected to; else connect to that of ``RAY_ADDRESS``, or start one on this machine.

    Args:
        size: bytes that will be put into the object store.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": address} if address else {"address": "local", "include_dashboard": False}
    if not address:
        options["object_store_memory"] = _STORE_BYTES + 2 * size
    with ExitStack() as stack:
        try:
            _reach(address or "")
            stack.enter_context(_silent(ray))
            stack.callback(ray.shutdown)
            with _no_stderr():
                ray.init(**options, logging_level=logging.CRITICAL, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            what = f"cannot connect to RAY_ADDRESS={address!r}" if address else "cannot start a cluster on this machine"
            raise InputError(f"ray: {what}: {brief(error)}") from error
        yield


def _reach(address: str) -> None:
    """See that something listens at ``HOST:PORT``: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "://" not in address:
        socket.create_connection((host, int(port)), _REACH).close()


@contextmanager
def _silent(ray: Any) -> Iterator[None]:
    """Keep what Ray says of its own accord off the terminal: of a lost actor it prints pages, and the run goes on without.

    Its log files have all of it.
    """
    worker, before = ray._private.worker, {name: os.environ.get(name) for name in _QUIET}
    shown = getattr(worker, "_worker_logs_enabled", None)
    worker._worker_logs_enabled = False
    os.environ.update({name: value for name, value in _QUIET.items() if before[name] is None})
    try:
        yield
    finally:
        if shown is not None:
            worker._worker_logs_enabled = shown
        for name in (name for name, value in before.items() if value is None):
            del os.environ[name]


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Ray's C++ part says where its log level is from, before it has one."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _in_words(error: Exception) -> str:
    """One line about actors that were lost."""
    text = str(error).strip()
    if "creation task" in text:
        return f"ray: an actor cannot begin: {text.splitlines()[-1]}; every node needs vitexplain and its packages in one version"
    return f"ray: {brief(error)}; run the same command again"
