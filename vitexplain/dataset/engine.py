"""From rows of a source to explained batches and written shards, on one device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..loading import dtype_name
from .compute import BatchExplainer, BatchResult, Pending, deterministic
from .layout import Row, ShardContent
from .loader import Decoded, Decoder, Outcome
from .settings import Plan
from .store import StoreWriter

OK, UNREADABLE, NOT_FINITE = "ok", "unreadable", "not_finite"
_UNWRITTEN_SHARDS = 2  # that may wait for the disk


@dataclass(frozen=True)
class Tally:
    """How many images were explained, could not be read, and gave values that are not finite."""

    ok: int = 0
    unreadable: int = 0
    not_finite: int = 0

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Tally:
        """Of rows of the index."""
        statuses = [row.status for row in rows]
        return cls(*(statuses.count(status) for status in (OK, UNREADABLE, NOT_FINITE)))

    @property
    def images(self) -> int:
        """All of them."""
        return self.ok + self.unreadable + self.not_finite

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.ok + other.ok, self.unreadable + other.unreadable, self.not_finite + other.not_finite)


@dataclass(frozen=True)
class Explained:
    """One batch as the device gave it back."""

    rows: range
    outcomes: tuple[Outcome, ...]
    result: BatchResult


class Engine:
    """Reads, explains and, where it is told to, writes; a context manager that owns the processes that decode.

    Args:
        plan: what is explained and how, with a model on the device that is to be used.
        batch: images a batch.
        packed: see ``BatchExplainer``.

    Attributes:
        explainer, decoder: which know how long they worked and waited.
    """

    def __init__(self, plan: Plan, batch: int, *, packed: bool = True) -> None:
        self.plan, self.batch = plan, batch
        self.explainer = BatchExplainer(
            plan.model, plan.methods, batch=batch, cuda_graph=plan.cuda_graph, packed=packed, **plan.how
        )
        device = self.explainer.device
        self.decoder = Decoder(
            plan.source,
            plan.preprocess,
            plan.model.input_size,
            batch,
            plan.workers,
            pinned_for=device if device.type == "cuda" else None,
        )

    def __enter__(self) -> Engine:
        self.decoder.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.decoder.__exit__(*exception)

    # -- batches ---------------------------------------------------------------------------------------------------------

    def explained(self, batches: Iterable[range]) -> Iterator[Explained]:
        """The batches in order; while one is handed out, the next is on the device already."""
        before: tuple[Decoded, Pending] | None = None
        for decoded in self.decoder.batches(batches):
            with deterministic(self.explainer.device, enabled=self.plan.deterministic):
                pending = self.explainer.submit(decoded.photos, self._classes(decoded.rows), len(decoded.rows))
            if before is not None:
                yield self._finish(*before)
            before = decoded, pending
        if before is not None:
            yield self._finish(*before)

    def _finish(self, decoded: Decoded, pending: Pending) -> Explained:
        pending.wait_for_input()
        decoded.release()
        result = pending.result()
        self.explainer.settle()
        return Explained(decoded.rows, decoded.outcomes, result)

    def _classes(self, rows: range) -> Tensor | None:
        if self.plan.target != "label":
            return None
        assert self.plan.source.labels is not None, "a source without labels has been refused"
        classes = torch.zeros(self.batch, dtype=torch.int64, device="cpu")
        classes[: len(rows)] = torch.tensor(self.plan.source.labels[rows.start : rows.stop], device="cpu")
        return classes

    # -- shards ----------------------------------------------------------------------------------------------------------

    def write_shards(
        self, writer: StoreWriter, shards: Iterable[int], on_batch: Callable[[int], None] = lambda _count: None
    ) -> Iterator[tuple[int, Tally]]:
        """Explain and write shards, each as a whole.

        Args:
            writer: of the store.
            shards: their numbers.
            on_batch: called with the number of images that were explained since the last time.

        Yields:
            A shard's number and tally when it stands on disk.
        """
        shards = list(shards)
        explained = self.explained(self._batches(writer, shards))
        waiting: deque[tuple[Future[None], int, Tally]] = deque()

        def watched(count: int) -> None:
            on_batch(count)
            if waiting and waiting[0][0].done():
                waiting[0][0].result()  # an error of writing is to be known now, not when the next shard is whole

        with ThreadPoolExecutor(1, "vitexplain-writer") as thread:
            for number in shards:
                content = self._shard(writer, number, explained, watched)
                waiting.append((thread.submit(writer.write, number, content), number, Tally.of(content.rows)))
                while len(waiting) > _UNWRITTEN_SHARDS or (waiting and waiting[0][0].done()):
                    yield _written(waiting.popleft())
            while waiting:
                yield _written(waiting.popleft())

    def _batches(self, writer: StoreWriter, shards: Iterable[int]) -> Iterator[range]:
        for number in shards:
            rows = writer.layout.rows(number)
            for start in range(rows.start, rows.stop, self.batch):
                yield range(start, min(start + self.batch, rows.stop))

    def _shard(
        self, writer: StoreWriter, number: int, explained: Iterator[Explained], on_batch: Callable[[int], None]
    ) -> ShardContent:
        rows, layout = writer.layout.rows(number), writer.layout
        factors = (len(rows),) if layout.num_targets is None else (len(rows), layout.num_targets)
        maps = {label: np.full((len(rows), *shape), np.nan, np.float16) for label, shape in layout.maps.items()}
        scales = {label: np.full(factors, np.nan, np.float32) for label in layout.maps}
        index: list[Row] = []
        while len(index) < len(rows):
            batch = next(explained)
            found = self.rows(batch)
            place = slice(batch.rows.start - rows.start, batch.rows.stop - rows.start)
            kept = {
                label: np.array([_has_map(row, label, batch.result, position) for position, row in enumerate(found)])
                for label in maps
            }
            for label, values in maps.items():
                values[place][kept[label]] = batch.result.maps[label].numpy()[kept[label]]
                scales[label][place][kept[label]] = batch.result.scales[label].numpy()[kept[label]]
            index += found
            on_batch(len(found))
        return ShardContent(maps, scales, index)

    def rows(self, batch: Explained) -> list[Row]:
        """What the index says of a batch."""
        result = batch.result
        columns = zip(
            *(values.tolist() for values in (result.prediction, result.score, result.target, result.target_score)), strict=True
        )
        finite_maps = {label: flags.tolist() for label, flags in result.finite.items()}
        return [
            self._row(index, outcome, found, finite, [label for label, flags in finite_maps.items() if not flags[position]])
            for position, (index, outcome, found, finite) in enumerate(
                zip(batch.rows, batch.outcomes, columns, result.finite_logits.tolist(), strict=True)
            )
        ]

    def _row(self, index: int, outcome: Outcome, found: tuple[Any, ...], finite: bool, odd: list[str]) -> Row:
        source = self.plan.source
        label = None if source.labels is None else source.labels[index]
        row = Row(source.ids[index], source.path(index), label, None, None, None, None, index, OK, outcome.note)
        if outcome.failure is not None:
            return replace(row, status=UNREADABLE, reason=outcome.failure)
        if not finite:
            reason = f"model output: NaN or infinity (model in {dtype_name(self.plan.dtype)})"
            return replace(row, status=NOT_FINITE, reason=reason)
        prediction, score, target, target_score = found
        if isinstance(target, list):
            target, target_score = tuple(target), tuple(target_score)
        row = replace(row, prediction=prediction, score=score, target=target, target_score=target_score)
        if odd:
            return replace(row, status=NOT_FINITE, reason=f"NaN or infinity in the map of {', '.join(odd)}")
        return row


def _has_map(row: Row, label: str, result: BatchResult, position: int) -> bool:
    return row.prediction is not None and bool(result.finite[label][position])


def _written(shard: tuple[Future[None], int, Tally]) -> tuple[int, Tally]:
    future, number, tally = shard
    future.result()
    return number, tally
