"""Whole data sets: images a second, waiting, memory over the run, and the pace of each stage by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import ClassVar

from .. import data_set_runs as runs
from ..record import Row, spread, unavailable
from ..registry import DATA_SET, TRITON, Case, Entry, Setting, Size, Unavailable, ours

GPU_MODELS = ("vit_base_patch16_224", "vit_large_patch16_224")
STREAM, STAGES = "stream", "uint8"  # the stages' element type: photos before normalisation
DECODER, READER, WRITER = "decoder", "reader", "writer"
# Works of one measurement each: who does them, and the measurement
STAGE_GROUPS: tuple[tuple[dict[str, str], Callable[[], Iterator[runs.Found]]], ...] = (
    ({"decode photos": DECODER, "decode usual photos": DECODER}, runs.measure_decoding),
    ({"source": READER}, runs.measure_source),
    ({"write": WRITER}, runs.measure_writing),
)
LEADS = {"source": ("bytes an image", "bytes"), "write": ("images per second a thread", "1/s")}


class DataSets(Case):
    """Runs over data sets on a CPU with photos of ``../shared/data`` (``VITEXPLAIN_BENCH_DATA`` names another folder), their
    stages alone, and on a GPU photos made on the spot through models with random weights, nothing written."""

    name: ClassVar[str] = "data_sets"
    kind: ClassVar[str] = DATA_SET
    title: ClassVar[str] = "whole data sets, and their stages: images a second, waiting, memory"

    def sizes(self, device_type: str) -> Sequence[Size]:
        if device_type == "cuda":
            return [Size(model, runs.MADE_BATCH, 197, 224, "bfloat16") for model in GPU_MODELS]
        whole = [Size(run.model, run.batch, run.tokens, 224 if run.tokens == 197 else 32) for run in runs.RUNS.values()]
        return [*whole, Size(runs.RUNS["photos"].model, 1, 197, 224, STAGES)]

    def entries(self, size: Size, device_type: str) -> Sequence[Entry]:
        if device_type == "cuda":
            return [Entry(STREAM, TRITON)]
        if size.dtype == STAGES:
            return [Entry(work, provider) for works, _ in STAGE_GROUPS for work, provider in works.items()]
        return [Entry(name, ours(device_type)) for name, run in runs.RUNS.items() if run.model == size.model]

    def lead(self, entry: Entry) -> tuple[str, str]:
        if entry.provider == DECODER:
            return "images per second a core", "1/s"
        return LEADS.get(entry.work, ("images per second", "1/s"))

    def measure(self, size: Size, setting: Setting) -> Iterator[Row]:
        wanted = {entry.work: entry for entry in self.entries(size, setting.device.type) if setting.wants(entry)}
        for works, make in self._groups(size, setting):
            asked = [wanted[work] for work in works if work in wanted]
            if not asked:
                continue
            try:
                for found in make():  # as they come: threads are those of the measurement
                    if found.work in wanted:
                        figures = spread(found.samples)
                        yield self.row(wanted[found.work], size, found.metric, found.unit, figures, setting.device)
            except Unavailable as reason:
                for entry in asked:
                    yield self.row(entry, size, *self.lead(entry), unavailable(reason), setting.device)

    def _groups(self, size: Size, setting: Setting) -> Sequence[tuple[Sequence[str], Callable[[], Iterator[runs.Found]]]]:
        """Works and the measurement that finds figures of them."""
        if setting.device.type == "cuda":
            return [((STREAM,), partial(runs.measure_stream, size.model, setting.device))]
        if size.dtype == STAGES:
            return [(tuple(works), make) for works, make in STAGE_GROUPS]
        return [((entry.work,), partial(runs.measure_apart, entry.work)) for entry in self.entries(size, "cpu")]
