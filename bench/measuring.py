"""How a ``TimedCase`` is measured: gate, warm-up, times in turns, ratios round by round, peak memory."""

from __future__ import annotations

import contextlib
import gc
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vitexplain.errors import is_out_of_memory

from .peaks import peaks
from .record import Row, spread, unavailable, unmeasured
from .registry import Case, Check, Entry, Prepared, Setting, Size, TimedCase, Unavailable, _Timed, figure
from .timing import cpu_sample, interleaved_ms

MEBI = 2**20
OUT_OF_MEMORY = "out of memory"
FAST_MS = 5000.0  # what is apart and takes less is timed several times, once it is warm
AGAIN = 5


def measure(case: TimedCase, size: Size, setting: Setting, entries: Sequence[Entry] | None = None) -> Iterator[Row]:
    """All rows of a case at one size, as they come; of these entries alone, where the case measures some by itself."""
    device = setting.device
    asked = case.entries(size, device.type) if entries is None else entries
    entries = [entry for entry in asked if setting.wants(entry)]
    try:
        prepared = case.prepare(size, setting)
    except Unavailable as reason:
        for entry in entries:
            yield case.row(entry, size, *case.lead(entry), unavailable(reason), device)
        return
    timed: list[_Timed] = []
    for entry in entries:
        rows, passed = _gated(case, prepared, entry, size, device)
        yield from rows
        if not passed:
            continue
        if entry.apart and device.type == "cpu":
            yield from _apart(case, entry, size, setting)
            continue
        call, reason = _attempt(lambda entry=entry: _tried(prepared, entry), device)
        if reason is None:
            timed.append(_Timed(entry, call))
        else:
            yield case.row(entry, size, *case.lead(entry), unmeasured(reason), device)
    baselines = [one for one in timed if one.entry.baseline]
    together = [one for one in timed if not one.entry.alone]
    for number, group in enumerate([together, *([*baselines, one] for one in timed if one.entry.alone)]):
        if not group:
            continue
        calls = [one.call for one in group]
        samples, reason = _attempt(lambda calls=calls: interleaved_ms(calls, device, setting.seconds, setting.least), device)
        if reason is not None:
            yield from (case.row(one.entry, size, *case.lead(one.entry), unmeasured(reason), device) for one in group)
            continue
        by_entry = {one.entry: taken for one, taken in zip(group, samples, strict=True)}
        for one in group:
            if number and one.entry.baseline:
                continue  # taken again for the ratios of its group, listed once
            yield from _rows_of_times(case, prepared, one.entry, size, device, by_entry)
    if setting.memory:
        for one in timed:
            if one.entry.memory:
                yield _memory_row(case, one, size, setting)


def _gated(case: Case, prepared: Prepared, entry: Entry, size: Size, device: torch.device) -> tuple[list[Row], bool]:
    """The rows of the gate, and whether what it guards may be timed."""
    check, reason = _attempt(lambda: prepared.check(entry), device)
    if reason is not None:
        return [case.row(entry, size, *case.lead(entry), unmeasured(reason), device)], False
    if check is None:
        return [], True
    rows = [
        case.row(entry, size, "relative error", "1", figure(check.error), device),
        case.row(entry, size, "error limit", "1", figure(check.limit), device),
    ]
    if not check.passed:
        rows.append(case.row(entry, size, "time", "ms", unmeasured(_failed(check)), device))
    return rows, check.passed


def _attempt(action: Callable[[], Any], device: torch.device) -> tuple[Any, str | None]:
    """What an action returns, or why it cannot be done here."""
    try:
        return action(), None
    except Unavailable as reason:
        return None, str(unavailable(reason)["p50"])
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    let_go(device)  # only now: the error's frames held what did not fit
    return None, OUT_OF_MEMORY


def _tried(prepared: Prepared, entry: Entry) -> Callable[[], object]:
    """The call, once made: it fits."""
    call = prepared.call(entry)
    call()
    return call


def _failed(check: Check) -> str:
    return f"wrong: error {check.error:.1e}, limit {check.limit:.1e}"


def _rows_of_times(
    case: Case, prepared: Prepared, entry: Entry, size: Size, device: torch.device, samples: dict[Entry, list[float]]
) -> Iterator[Row]:
    """Time, pace, the ratio to each baseline, and the fraction of a peak where work was counted."""
    taken = samples[entry]
    yield case.row(entry, size, "time", "ms", spread(taken), device)
    yield case.row(entry, size, "pace", "1/s", spread([1e3 * size.batch / time for time in taken]), device)
    for base, reference in samples.items():
        if base.baseline:
            ratios = [time / other for time, other in zip(taken, reference, strict=True)]
            yield case.row(entry, size, f"ratio to {base.work}", "1", spread(ratios), device)
    counted = prepared.counted(entry)
    if counted is None:
        return
    seconds = 1e-3 * statistics.median(taken)
    yield case.row(entry, size, "work", "GFLOP", figure(counted.flops / 1e9), device)
    yield case.row(entry, size, "rate", "TFLOP/s", figure(counted.flops / seconds / 1e12), device)
    if counted.moved_bytes:
        yield case.row(entry, size, "moved", "MB", figure(counted.moved_bytes / 1e6), device)
        yield case.row(entry, size, "traffic", "TB/s", figure(counted.moved_bytes / seconds / 1e12), device)
    peak = peaks(device, size.torch_dtype)[counted.bound]
    work = counted.flops if counted.bound == "compute" else counted.moved_bytes
    yield case.row(entry, size, f"fraction of peak {counted.bound}", "1", figure(work / seconds / peak.rate), device)
    for base, reference in samples.items():
        if base.baseline and base.work == counted.against:
            own, other = counted.flops, prepared.counted(base).flops
            rates = [own / time * before / other for time, before in zip(taken, reference, strict=True)]
            yield case.row(entry, size, f"rate over {base.work}", "1", spread(rates), device)


# -- memory --------------------------------------------------------------------------------------------------------------


def _memory_row(case: Case, one: _Timed, size: Size, setting: Setting) -> Row:
    if setting.device.type == "cuda":
        return case.row(one.entry, size, "peak memory", "MiB", _device_memory(one, setting.device), setting.device)
    found = host_call(case, one.entry, size, setting)
    figures = figure(found["mib"]) if found else unmeasured(_exceeded(setting))
    return case.row(one.entry, size, "peak memory", "MiB", figures, setting.device)


def _apart(case: Case, entry: Entry, size: Size, setting: Setting) -> Iterator[Row]:
    """Time and memory of one call in a process of its own."""
    found = host_call(case, entry, size, setting)
    times, memory = (spread(found["ms"]), figure(found["mib"])) if found else [unmeasured(_exceeded(setting))] * 2
    yield case.row(entry, size, "time", "ms", times, setting.device)
    yield case.row(entry, size, "peak memory", "MiB", memory, setting.device)


def _exceeded(setting: Setting) -> str:
    return f"{OUT_OF_MEMORY} (limit {setting.limit_gb:g} GB)"


def let_go(device: torch.device) -> None:
    """Hand back what failed calls have left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


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
    """
    question = {"case": case.name, "entry": asdict(entry), "size": asdict(size), "limit_gb": setting.limit_gb}
    command = [sys.executable, "-m", "bench.measuring", json.dumps(question)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode < 0 or any(sign in done.stderr for sign in _NO_MEMORY):
        return None
    raise SystemExit(done.stderr)


def _forget_peak() -> None:
    """Begin anew with the peak: what the model's building took is no part of the call."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> float:
    """Most resident memory so far. Not ``ru_maxrss`` where it can be helped: a process inherits its parent's."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _in_this_process(question: dict[str, Any]) -> dict[str, Any]:
    """One call."""
    from .cases import CASES

    case, entry, size = CASES[question["case"]], Entry(**question["entry"]), Size(**question["size"])
    prepared = case.prepare(size, Setting(torch.device("cpu")))
    call = prepared.call(entry)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # threads and libraries are up before the level is read
    _forget_peak()
    before = _peak_mib()
    limit = int(question["limit_gb"] * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    samples = [cpu_sample(call, torch.device("cpu"))]
    mib = _peak_mib() - before
    if question["entry"]["apart"] and samples[0] < FAST_MS:
        samples = [cpu_sample(call, torch.device("cpu")) for _ in range(AGAIN)]
    return {"mib": mib, "ms": samples}


if __name__ == "__main__":
    print(json.dumps(_in_this_process(json.loads(sys.argv[1]))))
