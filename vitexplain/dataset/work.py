"""What a run does, counted: images, time that devices worked and waited, how far it is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .engine import Tally


@dataclass(frozen=True)
class Progress:
    """How far a run is: images done of all, those of this run, its speed, and the share of time the device waited for data.

    With several processes of ``torchrun``, what the first one has seen of its own share, taken to be that of all.
    """

    done: int
    total: int
    images: int
    images_per_second: float
    waiting_share: float


@dataclass(frozen=True)
class Work:
    """What one process, or several, did: images, device seconds busy and idle, and how."""

    tally: Tally = field(default_factory=Tally)
    busy: float = 0.0
    idle: float = 0.0
    devices: tuple[str, ...] = ()
    replaced_workers: int = 0
    graphed: bool = False

    @classmethod
    def of(cls, parts: list[Work]) -> Work:
        """Of several together."""
        return cls(
            tally=sum((part.tally for part in parts), Tally()),
            busy=sum(part.busy for part in parts),
            idle=sum(part.idle for part in parts),
            devices=tuple(device for part in parts for device in part.devices),
            replaced_workers=sum(part.replaced_workers for part in parts),
            graphed=any(part.graphed for part in parts),
        )

    @property
    def waiting_share(self) -> float:
        """Of the devices' time, the part in which they waited."""
        return self.idle / (self.busy + self.idle) if self.busy + self.idle else 0.0


class Counter:
    """Counts images while they are explained, and tells ``progress``.

    Args:
        total: images of the source.
        missing: those that are still to be explained, and ``own`` that are this process's.
        progress: told from time to time.

    Attributes:
        images: explained by this process.
        memory: of it, in MiB, at "10%" and "90%" of its images; None where it is not known.
    """

    def __init__(self, total: int, missing: int, progress: Callable[[Progress], None] | None, own: int | None = None) -> None:
        self._total, self._missing = total, missing
        self._own = missing if own is None else own
        self.images = 0
        self.memory: dict[str, float | None] = {"10%": None, "90%": None}
        self._progress, self._started = progress, time.perf_counter()

    def add(self, count: int, waiting_share: float = 0.0) -> None:
        """So many images more; of the time so far the device waited for data for this share."""
        self.images += count
        for name, share in (("10%", 0.1), ("90%", 0.9)):
            if self.memory[name] is None and self.images >= share * self._own:
                self.memory[name] = resident_mib()
        self.tell(waiting_share)

    def tell(self, waiting_share: float = 0.0) -> None:
        """Tell ``progress`` how far it is."""
        if self._progress is None:
            return
        images = self.images if self._own == self._missing else round(self.images * self._missing / max(1, self._own))
        seconds = max(time.perf_counter() - self._started, 1e-9)
        done = self._total - self._missing + images
        self._progress(Progress(done, self._total, images, images / seconds, waiting_share))


def device_name(device: torch.device) -> str:
    """``"cpu"``, or a GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def resident_mib() -> float | None:
    """Memory of this process, where the system tells it."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
