"""What can be measured: a case is a kind of work at several sizes, done by several providers.

A case is one file of ``bench/cases`` and one row of ``bench.cases.CASES``. Most are ``TimedCase``: they say which calls there
are, how each is held to what is right, and the measuring is the same for all. The others (whole runs, processes of their own)
measure by themselves and yield rows.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from .record import Row, blank, environment, spread, unmeasured

OPERATION, EXPLANATION, EVALUATION, DATA_SET = KINDS = ("operation", "explanation", "evaluation", "data set")

# Providers, as they stand in the tables
TORCH, TRITON, DENSE, CAPTUM, GRAD_CAM, COLREDUCE = (
    "vitexplain (torch)",
    "vitexplain (Triton)",
    "dense reference (hooks, stored maps)",
    "captum",
    "pytorch-grad-cam",
    "flash-colreduce",
)
PACKAGES = {CAPTUM: "captum", GRAD_CAM: "grad-cam", COLREDUCE: "flash-colreduce"}  # whose versions stand beside their rows
MODEL_ITSELF = "model itself"
FORWARD, FORWARD_BACKWARD = BASELINES = ("forward", "forward + backward")


def ours(device_type: str) -> str:
    """This library's provider on a device."""
    return TRITON if device_type == "cuda" else TORCH


@dataclass(frozen=True)
class Size:
    """An amount of work.

    Attributes:
        model: a timm model, or the form of a layer.
        batch, tokens: how many.
        image_size: height and width in pixels, where there are images.
        dtype: element type by name.
    """

    model: str
    batch: int
    tokens: int
    image_size: int = 224
    dtype: str = "float32"

    @property
    def label(self) -> str:
        """As patterns on the command line name it."""
        return f"{self.model}/{self.batch}/{self.tokens}/{self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The element type."""
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Attributes:
        device: where.
        seconds: of sampling for each group of calls that is timed in turns; at least ``least`` rounds.
        works, providers: only these, by a part of their name; all where empty. Baselines always run.
        memory: measure peak memory, too; on a CPU each in a process of its own.
        limit_gb: memory that a provider may take on a CPU before it counts as out of memory.
        deadline: of ``time.perf_counter()``; what is not begun by then is left out and named.
    """

    device: torch.device
    seconds: float = 1.0
    least: int = 5
    works: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    memory: bool = True
    limit_gb: float = 20.0
    deadline: float = math.inf

    @property
    def spent(self) -> bool:
        """Whether no time is left to begin anything."""
        return time.perf_counter() >= self.deadline

    @property
    def halved(self) -> Setting:
        """With half of the time that is left: the gates take no more of it, or nothing that they let pass would be timed."""
        now = time.perf_counter()
        return replace(self, deadline=now + (self.deadline - now) / 2)

    def wants(self, entry: Entry) -> bool:
        """Whether a line is asked for."""
        by_work = not self.works or any(text in entry.work for text in self.works)
        return entry.baseline or (by_work and (not self.providers or any(text in entry.provider for text in self.providers)))


@dataclass(frozen=True)
class Entry:
    """One line of a case at one size: who does what.

    Attributes:
        work, provider: names in the table.
        baseline: what the others' times are divided by.
        alone: not timed in turns with others: it takes so much memory that whoever comes after it would pay.
        apart: once, in a process of its own on a CPU: it may take more memory than there is. Time and peak memory.
        memory: its peak memory is worth a measurement.
    """

    work: str
    provider: str
    baseline: bool = False
    alone: bool = False
    apart: bool = False
    memory: bool = False


class Unavailable(Exception):
    """A provider cannot do this work here; the text says why and stands in the table instead of a figure."""


@dataclass(frozen=True)
class Check:
    """How far a result is from what is right, and how far it may be; both relative."""

    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """False, too, for an error that is not a number."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Counted:
    """Work that was counted, not measured.

    Attributes:
        flops: of matrix products.
        moved_bytes: every input read once, every output written once.
        bound: ``"compute"`` or ``"bandwidth"``, the peak that the work is held against.
        against: work of the baseline whose FLOP/s the rate is compared with; empty for none.
    """

    flops: float
    moved_bytes: float = 0.0
    bound: str = "compute"
    against: str = ""


class Prepared(ABC):
    """A case at one size, with model and inputs in place."""

    @abstractmethod
    def call(self, entry: Entry) -> Callable[[], object]:
        """What is timed. Raises ``Unavailable``."""

    def check(self, entry: Entry) -> Check | None:  # noqa: ARG002
        """The gate, before anything is timed; None where there is nothing to compare with. Raises ``Unavailable``."""
        return None

    def counted(self, entry: Entry) -> Counted | None:  # noqa: ARG002
        """FLOPs and bytes, where they are counted."""
        return None

    def gates_done(self) -> None:  # noqa: B027
        """Every gate is passed and nothing timed yet: references that only gates need may be freed."""


class Case(ABC):
    """One kind of work.

    Class attributes:
        name: on the command line.
        kind: one of ``KINDS``.
        title: one line of help.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def sizes(self, device_type: str) -> Sequence[Size]:
        """What is measured on a CPU (``"cpu"``) or a GPU (``"cuda"``), the most telling first: time may run out."""

    @abstractmethod
    def entries(self, size: Size, device_type: str) -> Sequence[Entry]:
        """The lines at one size."""

    @abstractmethod
    def measure(self, size: Size, setting: Setting) -> Iterator[Row]:
        """The figures of one size, as they come."""

    def lead(self, entry: Entry) -> tuple[str, str]:  # noqa: ARG002
        """Metric and unit under which a line says why it has no figure."""
        return "time", "ms"

    def row(self, entry: Entry, size: Size, metric: str, unit: str, figures: dict[str, object], device: torch.device) -> Row:
        """A row of this case."""
        where = environment(device, *(PACKAGES[one] for one in PACKAGES if entry.provider.startswith(one)))
        return Row(
            kind=self.kind, case=self.name, work=entry.work, provider=entry.provider, model=size.model, batch=size.batch,
            tokens=size.tokens, dtype=size.dtype, metric=metric, unit=unit, **figures, **where,
        )  # fmt: skip

    def blank_rows(self, size: Size, name: str) -> Iterator[Row]:
        """A line for each entry that says that it was not measured on the device of that name."""
        for entry in self.entries(size, "cuda"):
            yield blank(self.row(entry, size, *self.lead(entry), unmeasured(), torch.device("cpu")), name)


@dataclass
class _Timed:
    """One line on its way through the measuring."""

    entry: Entry
    call: Callable[[], object]


class TimedCase(Case):
    """A case of calls that are gated, then timed in turns, then held against baselines and peaks."""

    @abstractmethod
    def prepare(self, size: Size, setting: Setting) -> Prepared:
        """Model and inputs. Raises ``Unavailable`` where the size cannot be built here."""

    def measure(self, size: Size, setting: Setting) -> Iterator[Row]:
        from . import measuring

        yield from measuring.measure(self, size, setting)


def figure(value: float) -> dict[str, object]:
    """A single figure."""
    return spread([value])
