"""How a ``TimedCase`` is measured: gates, then groups of calls timed in turns, ratios round by round, peak memory.

Whatever goes wrong with one line is a reason in the place of its figures; only what takes the device with it ends a run.
"""

from __future__ import annotations

import contextlib
import gc
import json
import resource
import signal
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitexplain.errors import is_out_of_memory
from vitexplain.messages import brief

from .peaks import peaks
from .record import Row, spread, unavailable, unmeasured
from .registry import Case, Check, Entry, Prepared, Setting, Size, TimedCase, Unavailable, _Timed, figure
from .timing import cpu_sample, interleaved_ms

MEBI = 2**20
OUT_OF_MEMORY = "out of memory"
FAILED = "failed"
LONGEST = 120  # characters of a reason
FAST_MS = 5000.0  # what is apart and takes less is timed several times, once it is warm
AGAIN = 5
GROUP = 6  # calls timed in turns, beside the baselines: rows come early, and a failure hits few

# What CUDA says before it says nothing but that, whatever is asked of it
_LAST_WORDS = (
    "illegal memory access", "device-side assert", "misaligned address", "illegal instruction", "unspecified launch failure",
)  # fmt: skip


class DeviceLost(RuntimeError):
    """This process can do nothing more on the GPU."""


class ProcessFailed(RuntimeError):
    """What a process of its own died of, in one line."""


def measure(case: TimedCase, size: Size, setting: Setting, entries: Sequence[Entry] | None = None) -> Iterator[Row]:
    """All rows of a case at one size, as they come; of these entries alone, where the case measures some by itself.

    All rows of a line come together: an interrupted run leaves no line with a part of its figures.
    """
    asked = case.entries(size, setting.device.type) if entries is None else entries
    entries = [entry for entry in asked if setting.wants(entry)]
    try:
        prepared = case.prepare(size, setting)
    except Unavailable as reason:
        for entry in entries:
            yield case.row(entry, size, *case.lead(entry), unavailable(reason), setting.device)
        return
    yield from _Run(case, size, setting, prepared).rows(entries)


def groups(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Who is timed in turns with whom, beside the baselines: providers of one work always are, who is alone never is."""
    found: list[list[Entry]] = []
    works: dict[str, list[Entry]] = {}
    others = [entry for entry in entries if not entry.baseline]
    for entry in others:
        if not entry.alone:
            works.setdefault(entry.work, []).append(entry)
    for same in works.values():
        if found and len(found[-1]) + len(same) <= GROUP:
            found[-1].extend(same)
        else:
            found.append(same)
    return [*found, *([entry] for entry in others if entry.alone)]


def lost(text: str, device: torch.device) -> bool:
    """Whether an error says that a GPU is of no more use to this process."""
    return device.type == "cuda" and any(said in text for said in _LAST_WORDS)


def let_go(device: torch.device) -> None:
    """Hand back what failed calls have left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass
class _Run:
    """A case at one size on its way through the measuring."""

    case: Case
    size: Size
    setting: Setting
    prepared: Prepared
    gates: dict[Entry, list[Row]] = field(default_factory=dict)
    baselines: list[_Timed] = field(default_factory=list)
    listed: set[Entry] = field(default_factory=set)

    @property
    def device(self) -> torch.device:
        return self.setting.device

    def rows(self, entries: Sequence[Entry]) -> Iterator[Row]:
        """Gates first; then group by group, each prepared when its turn comes and dropped before the next."""
        passed: list[Entry] = []
        for entry in self._in_time(entries, self.setting.halved):
            yield from self._gated(entry, passed)
        self.prepared.gates_done()
        let_go(self.device)
        apart = [entry for entry in passed if entry.apart and self.device.type == "cpu"]
        for entry in self._in_time(apart):
            yield from self._apart(entry)
        here = [entry for entry in passed if entry not in apart]
        yield from self._prepare([entry for entry in here if entry.baseline], self.baselines)
        for group in groups(here):
            yield from self._group(group)
            let_go(self.device)
        if list(self._in_time(one.entry for one in self.baselines if one.entry not in self.listed)):
            yield from self._baselines_alone()

    def _in_time(self, entries: Iterable[Entry], setting: Setting | None = None) -> Iterator[Entry]:
        """Those that are begun before the deadline, of this setting or another; the others are named."""
        for entry in entries:
            if not (setting or self.setting).spent:
                yield entry
                continue
            where = f"{self.case.name} {self.size.label}"
            print(f"left out, the budget is spent: {where} {entry.work}, {entry.provider}", flush=True)

    def _gated(self, entry: Entry, passed: list[Entry]) -> Iterator[Row]:
        """Rows where an entry may not be timed; those of a gate that it passed are kept until it is."""
        check, reason = attempt(lambda: self.prepared.check(entry), self.device)
        rows = [] if check is None else [
            self._row(entry, "relative error", "1", figure(check.error)),
            self._row(entry, "error limit", "1", figure(check.limit)),
        ]  # fmt: skip
        if reason is not None:
            yield from self._without(entry, reason)
        elif check is None or check.passed:
            self.gates[entry] = rows
            passed.append(entry)
        else:
            yield from (*rows, self._row(entry, "time", "ms", unmeasured(_wrong(check))))

    def _prepare(self, entries: Sequence[Entry], timed: list[_Timed], again: list[Entry] | None = None) -> Iterator[Row]:
        """Put calls that fit beside each other into ``timed``.

        Those that ran out of memory come into ``again``, if given and if it may be the others' memory: no verdict yet.
        """
        for entry in self._in_time(entries):
            call, reason = attempt(partial(_tried, self.prepared, entry, self.device), self.device)
            if reason is None:
                timed.append(_Timed(entry, call))
            elif reason == OUT_OF_MEMORY and timed and again is not None:
                again.append(entry)
            else:
                yield from self._without(entry, reason)

    def _group(self, entries: Sequence[Entry]) -> Iterator[Row]:
        """Calls timed in turns with the baselines; each by itself where they cannot be timed together."""
        timed: list[_Timed] = []
        again: list[Entry] = []
        yield from self._prepare(entries, timed, again)
        samples, reason = self._sampled((*self.baselines, *timed)) if timed else ([], None)
        if reason is None:
            yield from self._lines((*self.baselines, *timed), samples)
        elif len(timed) == 1:
            yield from self._single(timed[0], reason)
        elif lost(reason, self.device):  # by one of them, and none can be asked
            raise DeviceLost(f"{reason}; one of {', '.join(f'{one.entry.work} ({one.entry.provider})' for one in timed)}")
        else:
            again = [*(one.entry for one in timed), *again]
        timed.clear()  # what comes again has the memory for itself
        for entry in again:
            let_go(self.device)
            yield from self._group([entry])

    def _single(self, one: _Timed, reason: str) -> Iterator[Row]:
        """A call that could not be timed beside the baselines: without those that fail now, or without any.

        A baseline that fails beside it gets its verdict elsewhere, when nobody else holds memory.
        """
        if lost(reason, self.device):
            yield from self._without(one.entry, reason)
        beside = [base for base in self.baselines if self._sampled([base])[1] is None]
        if len(beside) == len(self.baselines):
            beside = []
        samples, reason = self._sampled([*beside, one])
        if reason is None:
            yield from self._lines([*beside, one], samples)
        else:
            yield from self._without(one.entry, reason)

    def _baselines_alone(self) -> Iterator[Row]:
        """Baselines that no group has listed: together, or each by itself where one of them fails."""
        samples, reason = self._sampled(self.baselines)
        if reason is None:
            yield from self._lines(self.baselines, samples)
            return
        for one in self.baselines:
            samples, reason = self._sampled([one])
            if one.entry not in self.listed:
                yield from self._lines([one], samples) if reason is None else self._without(one.entry, reason)

    def _sampled(self, timed: Sequence[_Timed]) -> tuple[list[list[float]], str | None]:
        """Milliseconds of calls in turns, or why there are none."""
        calls = [one.call for one in timed]
        samples, reason = attempt(
            lambda: interleaved_ms(calls, self.device, self.setting.seconds, self.setting.least), self.device
        )
        return samples or [], reason

    # -- rows

    def _row(self, entry: Entry, metric: str, unit: str, figures: dict[str, object]) -> Row:
        return self.case.row(entry, self.size, metric, unit, figures, self.device)

    def _told(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Rows, and the end where one of them says that the device is lost."""
        yield from rows
        for row in rows:
            if lost(row.p50, self.device):
                raise DeviceLost(f"{row.work} ({row.provider}): {row.p50}")

    def _without(self, entry: Entry, reason: str) -> Iterator[Row]:
        """A line that has no figures."""
        self.listed.add(entry)
        yield from self._told([*self.gates.get(entry, ()), self._row(entry, *self.case.lead(entry), unmeasured(reason))])

    def _lines(self, timed: Sequence[_Timed], samples: Sequence[list[float]]) -> Iterator[Row]:
        """Each line with all its figures; baselines, which are timed in every group, once."""
        taken = {one.entry: times for one, times in zip(timed, samples, strict=True)} if samples else {}
        for one in timed:
            if one.entry in taken and one.entry not in self.listed:
                self.listed.add(one.entry)
                yield from self._told([*self.gates.get(one.entry, ()), *self._times(one.entry, taken), *self._memory(one)])

    def _times(self, entry: Entry, samples: dict[Entry, list[float]]) -> Iterator[Row]:
        """Time, pace, the ratio to each baseline, and what was counted."""
        taken = samples[entry]
        yield self._row(entry, "time", "ms", spread(taken))
        yield self._row(entry, "pace", "1/s", spread([1e3 * self.size.batch / time for time in taken]))
        for base, reference in samples.items():
            if base.baseline:
                ratios = [time / other for time, other in zip(taken, reference, strict=True)]
                yield self._row(entry, f"ratio to {base.work}", "1", spread(ratios))
        rows, reason = attempt(lambda: list(self._counted(entry, samples)), self.device)
        yield from rows if reason is None else [self._row(entry, "work", "GFLOP", unmeasured(reason))]

    def _counted(self, entry: Entry, samples: dict[Entry, list[float]]) -> Iterator[Row]:
        """Rates and the fraction of a peak, where work was counted."""
        counted = self.prepared.counted(entry)
        if counted is None:
            return
        taken = samples[entry]
        seconds = 1e-3 * statistics.median(taken)
        yield self._row(entry, "work", "GFLOP", figure(counted.flops / 1e9))
        yield self._row(entry, "rate", "TFLOP/s", figure(counted.flops / seconds / 1e12))
        if counted.moved_bytes:
            yield self._row(entry, "moved", "MB", figure(counted.moved_bytes / 1e6))
            yield self._row(entry, "traffic", "TB/s", figure(counted.moved_bytes / seconds / 1e12))
        peak = peaks(self.device, self.size.torch_dtype)[counted.bound]
        work = counted.flops if counted.bound == "compute" else counted.moved_bytes
        yield self._row(entry, f"fraction of peak {counted.bound}", "1", figure(work / seconds / peak.rate))
        for base, reference in samples.items():
            if base.baseline and base.work == counted.against:
                own, other = counted.flops, self.prepared.counted(base).flops
                rates = [own / time * before / other for time, before in zip(taken, reference, strict=True)]
                yield self._row(entry, f"rate over {base.work}", "1", spread(rates))

    def _memory(self, one: _Timed) -> list[Row]:
        """Peak memory, where it is asked for."""
        if not (self.setting.memory and one.entry.memory):
            return []
        if self.device.type == "cuda":
            figures, reason = attempt(lambda: _device_memory(one, self.device), self.device)
        else:
            found, reason = self._in_a_process(one.entry)
            figures = figure(found["mib"]) if found else {}
        return [self._row(one.entry, "peak memory", "MiB", figures if reason is None else unmeasured(reason))]

    def _apart(self, entry: Entry) -> Iterator[Row]:
        """Time and memory of one call in a process of its own."""
        found, reason = self._in_a_process(entry)
        times, memory = (spread(found["ms"]), figure(found["mib"])) if found else [unmeasured(reason)] * 2
        yield from self.gates.get(entry, ())
        yield self._row(entry, "time", "ms", times)
        yield self._row(entry, "peak memory", "MiB", memory)

    def _in_a_process(self, entry: Entry) -> tuple[dict[str, Any] | None, str | None]:
        """What one call took there, or why that is not known."""
        found, reason = attempt(lambda: host_call(self.case, entry, self.size, self.setting), self.device)
        exceeded = f"{OUT_OF_MEMORY} (limit {self.setting.limit_gb:g} GB)"
        return found, reason or (None if found else exceeded)


def _tried(prepared: Prepared, entry: Entry, device: torch.device) -> Callable[[], object]:
    """The call, once made: it fits. A GPU's errors come late, so it is waited for."""
    call = prepared.call(entry)
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return call


def _wrong(check: Check) -> str:
    return f"wrong: error {check.error:.1e}, limit {check.limit:.1e}"


def attempt(action: Callable[[], Any], device: torch.device) -> tuple[Any, str | None]:
    """What an action returns, or why it cannot be done here."""
    try:
        return action(), None
    except Unavailable as reason:
        return None, str(unavailable(reason)["p50"])
    except Exception as error:
        reason = _reason(error)
    if not lost(reason, device):
        let_go(device)  # only now: the error's frames held what did not fit
    return None, reason


def _reason(error: Exception) -> str:
    """What stands in the place of a figure; of what nobody expected, the whole story goes to stderr."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    traceback.print_exception(error)
    said = "" if isinstance(error, ProcessFailed) else f"{type(error).__name__}: "
    text = f"{FAILED}: {said}{brief(error)}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


# -- memory --------------------------------------------------------------------------------------------------------------


def _device_memory(one: _Timed, device: torch.device) -> dict[str, object]:
    """Of a GPU, above what model and inputs take."""
    let_go(device)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    one.call()
    torch.cuda.synchronize(device)
    return figure((torch.cuda.max_memory_allocated(device) - before) / MEBI)


# The last is what oneDNN says where it gets none
_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "MemoryError", "bad_alloc", "could not create a primitive")


def host_call(case: Case, entry: Entry, size: Size, setting: Setting) -> dict[str, Any] | None:
    """One call in a fresh process: ``"mib"`` above what it held before, and times ``"ms"`` of it; None beyond the limit.

    Slow calls are timed once, as they come; others some times more, when libraries and threads are up.

    Raises:
        ProcessFailed: it died of something else.
    """
    question = {"case": case.name, "entry": asdict(entry), "size": asdict(size), "limit_gb": setting.limit_gb}
    command = [sys.executable, "-m", "bench.measuring", json.dumps(question)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    # Killed without a word is how a system takes back memory that it has promised to too many
    if done.returncode == -signal.SIGKILL or any(sign in done.stderr for sign in _NO_MEMORY):
        return None
    print(done.stderr, file=sys.stderr)
    if done.returncode < 0:
        raise ProcessFailed(f"signal {-done.returncode}")
    raise ProcessFailed((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])


def _forget_peak() -> None:
    """Begin anew with the peak: what the model's building took is no part of the call."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _kib_of(name: str) -> int | None:
    """What the kernel says of this process; None where it is not asked that way."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
    return None


def _peak_mib() -> float:
    """Most resident memory so far. Not ``ru_maxrss`` where it can be helped: a process inherits its parent's."""
    kib = _kib_of("VmHWM")
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if kib is None else kib) / 1024


def _allow(limit_gb: float) -> None:
    """Let this process map so much more than it has: libraries, model and images are not the provider's."""
    limit = int(limit_gb * 2**30) + 1024 * (_kib_of("VmSize") or 0)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _in_this_process(question: dict[str, Any]) -> dict[str, Any]:
    """One call."""
    from .cases import CASES

    case, entry, size = CASES[question["case"]], Entry(**question["entry"]), Size(**question["size"])
    prepared = case.prepare(size, Setting(torch.device("cpu")))
    call = prepared.call(entry)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # threads and libraries are up before the level is read
    _forget_peak()
    before = _peak_mib()
    _allow(question["limit_gb"])
    samples = [cpu_sample(call, torch.device("cpu"))]
    mib = _peak_mib() - before
    if question["entry"]["apart"] and samples[0] < FAST_MS:
        samples = [cpu_sample(call, torch.device("cpu")) for _ in range(AGAIN)]
    return {"mib": mib, "ms": samples}


if __name__ == "__main__":
    print(json.dumps(_in_this_process(json.loads(sys.argv[1]))))
