"""Gate, turns, ratios, peaks and memory of a made-up case; one call of a real case in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, repeat

import pytest
import torch

from bench import measuring, timing
from bench.cases import CASES
from bench.measuring import GROUP, DeviceLost, ProcessFailed, groups, host_call, measure
from bench.peaks import BANDWIDTH, COMPUTE, Peak
from bench.record import Row
from bench.registry import CAPTUM, OPERATION, Check, Counted, Entry, Prepared, Setting, Size, TimedCase, Unavailable

SIZE = Size("a layer", 4, 33)
QUICK = Setting(torch.device("cpu"), seconds=1e-9, least=3, memory=False)
BASE, OURS, WRONG, ABSENT, ALONE = (
    Entry("base", "torch", baseline=True),
    Entry("add", "ours"),
    Entry("add", "rival that is wrong"),
    Entry("add", "rival that is not there"),
    Entry("add", "ours, alone", alone=True),
)
RIVAL = Entry("add", "rival")


@dataclass
class Toy(TimedCase, Prepared):
    """Every call notes who was called."""

    shown: Sequence[Entry] = (BASE, OURS)
    works: Counted | None = None
    called: list[str] = field(default_factory=list)
    broken: dict[Entry, Exception] = field(default_factory=dict)  # whose calls fail
    prepared: list[object] = field(default_factory=list)  # weak references to the calls

    name, kind, title = "toy", OPERATION, "made up"

    def sizes(self, device_type: str) -> Sequence[Size]:  # noqa: ARG002
        return (SIZE,)

    def entries(self, size: Size, device_type: str) -> Sequence[Entry]:  # noqa: ARG002
        return self.shown

    def prepare(self, size: Size, setting: Setting) -> Prepared:  # noqa: ARG002
        return self

    def call(self, entry: Entry) -> Callable[[], object]:
        if entry == ABSENT:
            raise Unavailable("not installed")

        def call() -> None:
            self.called.append(entry.provider)
            if entry in self.broken:
                raise self.broken[entry]

        call.entry = entry
        self.prepared.append(weakref.ref(call))
        return call

    def gates_done(self) -> None:
        self.called.append("gates done")

    def check(self, entry: Entry) -> Check | None:
        return None if entry.baseline else Check({WRONG: 0.5}.get(entry, 1e-7), 1e-5)

    def counted(self, entry: Entry) -> Counted | None:
        return None if entry.baseline else self.works


def _metrics(rows: list[Row], entry: Entry) -> dict[str, Row]:
    return {row.metric: row for row in rows if (row.work, row.provider) == (entry.work, entry.provider)}


def test_what_is_wrong_is_not_timed_and_says_so() -> None:
    toy = Toy((BASE, WRONG))
    found = _metrics(list(measure(toy, SIZE, QUICK)), WRONG)
    assert found["time"].p50 == "wrong: error 5.0e-01, limit 1.0e-05"
    assert set(found) == {"relative error", "error limit", "time"}
    assert set(toy.called) == {"gates done", "torch"}


def test_an_error_that_is_no_number_does_not_pass(monkeypatch) -> None:
    monkeypatch.setattr(Toy, "check", lambda *_: Check(float("nan"), 1e-5))
    toy = Toy((OURS,))
    assert _metrics(list(measure(toy, SIZE, QUICK)), OURS)["time"].p50.startswith("wrong: error nan")
    assert toy.called == ["gates done"]


def test_what_cannot_be_done_here_says_why_and_the_others_go_on() -> None:
    rows = list(measure(Toy((ABSENT, OURS)), SIZE, QUICK))
    assert {name: row.p50 for name, row in _metrics(rows, ABSENT).items()}["time"] == "unavailable: not installed"
    assert _metrics(rows, OURS)["time"].measured


def test_a_size_that_cannot_be_built_says_why_in_every_line(monkeypatch) -> None:
    def refuse(*_: object) -> Prepared:
        raise Unavailable("no such model")

    monkeypatch.setattr(Toy, "prepare", refuse)
    assert [row.p50 for row in measure(Toy(), SIZE, QUICK)] == ["unavailable: no such model"] * 2


def test_a_call_that_runs_out_of_memory_says_so_and_the_others_go_on(monkeypatch) -> None:
    def full(toy: Toy, entry: Entry) -> Callable[[], object]:
        if entry == OURS:
            raise MemoryError
        return lambda: toy.called.append(entry.provider)

    monkeypatch.setattr(Toy, "call", full)
    rows = list(measure(Toy(), SIZE, QUICK))
    assert _metrics(rows, OURS)["time"].p50 == "out of memory"
    assert _metrics(rows, BASE)["time"].measured


def test_ratios_are_taken_round_by_round(monkeypatch) -> None:
    monkeypatch.setattr(measuring, "interleaved_ms", lambda *_: [[10.0, 40.0, 20.0], [20.0, 20.0, 60.0]])
    rows = list(measure(Toy(), SIZE, QUICK))
    ours = _metrics(rows, OURS)
    assert (ours["time"].value, ours["time"].repeats) == (20, 3)
    assert ours["pace"].value == pytest.approx(1e3 * 4 / 20)
    assert ours["ratio to base"].value == 2.0, "of 2, 0.5 and 3; the medians' quotient is 1"
    assert (float(ours["ratio to base"].p20), float(ours["ratio to base"].p80)) == (pytest.approx(1.1), pytest.approx(2.6))
    assert _metrics(rows, BASE)["ratio to base"].value == 1.0
    where = (OPERATION, "toy", "add", "ours", "a layer", 4, 33, "float32")
    row = ours["time"]
    assert (row.kind, row.case, row.work, row.provider, row.model, row.batch, row.tokens, row.dtype) == where


def test_who_is_alone_is_timed_beside_the_baselines_and_nobody_else() -> None:
    toy = Toy((BASE, OURS, ALONE))
    rows = list(measure(toy, SIZE, QUICK))
    turns = ["torch", "ours", *["torch", "ours"] * 4, "ours, alone", *["torch", "ours, alone"] * 4]
    assert toy.called == ["gates done", *turns], (
        "each is tried once, when its group's turn comes; then a warm-up and three rounds"
    )
    assert _metrics(rows, ALONE)["ratio to base"].measured
    assert sum(row.metric == "time" and row.work == "base" for row in rows) == 1


def test_a_fraction_is_of_the_peak_that_bounds_the_work(monkeypatch) -> None:
    monkeypatch.setattr(measuring, "interleaved_ms", lambda *_: [[10.0], [2.0]])
    monkeypatch.setattr(measuring, "peaks", lambda *_: {COMPUTE: Peak(4e12, ()), BANDWIDTH: Peak(2e12, ())})
    found = _metrics(list(measure(Toy(works=Counted(4e9)), SIZE, QUICK)), OURS)
    assert (found["work"].value, found["rate"].value, found["fraction of peak compute"].value) == (4, 2, 0.5)
    assert "traffic" not in found
    found = _metrics(list(measure(Toy(works=Counted(4e9, 1e9, BANDWIDTH)), SIZE, QUICK)), OURS)
    assert (found["moved"].value, found["traffic"].value, found["fraction of peak bandwidth"].value) == (1000, 0.5, 0.25)


def test_only_what_is_asked_for_is_measured_beside_the_baselines() -> None:
    toy = Toy((BASE, OURS, ALONE, Entry("other", "ours")))
    rows = list(measure(toy, SIZE, replace(QUICK, works=("add",), providers=("alone",))))
    assert {(row.work, row.provider) for row in rows} == {("base", "torch"), ("add", "ours, alone")}


@pytest.mark.parametrize(("found", "shown"), [({"mib": 12.0, "ms": [3.0]}, "12"), (None, "out of memory (limit 20 GB)")])
def test_peak_memory_is_that_of_a_process_of_its_own(monkeypatch, found: dict[str, object] | None, shown: str) -> None:
    monkeypatch.setattr(measuring, "host_call", lambda *_: found)
    measured = list(measure(Toy((replace(OURS, memory=True),)), SIZE, replace(QUICK, memory=True)))
    assert _metrics(measured, OURS)["peak memory"].p50 == shown
    assert _metrics(measured, OURS)["time"].measured
    toy = Toy((replace(OURS, apart=True),))
    apart = _metrics(list(measure(toy, SIZE, QUICK)), OURS)
    assert apart["peak memory"].p50 == shown
    assert apart["time"].p50 == ("3" if found else shown)
    assert toy.called == ["gates done"], "it was not called in this process"


@pytest.fixture(scope="module")
def on_a_layer() -> Callable[[int, float], dict[str, object] | None]:
    """A map of n × n by an operation of the benchmark, in a process that may take so many GB."""
    case = CASES["operations"]

    def call(tokens: int, limit_gb: float) -> dict[str, object] | None:
        size = Size("2 heads of 16", 1, tokens)
        entry = next(one for one in case.entries(size, "cpu") if one.work.startswith("contribution_map"))
        return host_call(case, entry, size, replace(QUICK, limit_gb=limit_gb))

    return call


def test_a_process_tells_what_it_took(on_a_layer) -> None:
    found = on_a_layer(1500, 40.0)
    assert found["mib"] > 1500**2 * 4 / 2**20, "a map is made"
    assert min(found["ms"]) > 0


def test_a_process_that_takes_more_than_its_limit_is_out_of_memory(on_a_layer) -> None:
    assert on_a_layer(1500, 0.001) is None


def test_any_other_end_of_a_process_is_a_reason(monkeypatch) -> None:
    ends = iter(
        [(-signal.SIGSEGV, ""), (1, "Traceback:\nValueError: too narrow\n"), (-signal.SIGKILL, ""), (1, "std::bad_alloc")]
    )

    def end(command: list[str], **_: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, *(lambda code, said: (code, "", said))(*next(ends)))

    monkeypatch.setattr(measuring.subprocess, "run", end)
    times = [_metrics(list(measure(Toy((replace(OURS, apart=True),)), SIZE, QUICK)), OURS)["time"].p50 for _ in range(4)]
    full = "out of memory (limit 20 GB)"
    assert times == ["failed: signal 11", "failed: ValueError: too narrow", full, full]


def test_a_limit_is_on_top_of_what_is_mapped(monkeypatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(measuring.resource, "setrlimit", lambda _, limits: asked.append(limits))
    monkeypatch.setattr(measuring, "_kib_of", {"VmSize": 3}.get)
    measuring._allow(2.0)
    assert asked == [(2 * 2**30 + 3 * 1024,) * 2]


# -- what fails


def test_a_call_that_fails_is_named_and_the_others_go_on(capsys) -> None:
    toy = Toy((BASE, OURS, RIVAL), broken={RIVAL: ValueError("too many\nheads")})
    rows = list(measure(toy, SIZE, QUICK))
    assert _metrics(rows, RIVAL)["time"].p50 == "failed: ValueError: too many"
    assert _metrics(rows, OURS)["ratio to base"].measured
    assert "heads" in capsys.readouterr().err, "with its traceback"


def test_a_gate_that_fails_is_named(monkeypatch) -> None:
    def check(_toy: Toy, entry: Entry) -> Check | None:
        if entry == OURS:
            raise RuntimeError("x" * 200)
        return None

    monkeypatch.setattr(Toy, "check", check)
    rows = list(measure(Toy((BASE, OURS, RIVAL)), SIZE, QUICK))
    text = _metrics(rows, OURS)["time"].p50
    assert (text[:22], text[-1], len(text)) == ("failed: RuntimeError: ", "…", 120)
    assert _metrics(rows, RIVAL)["time"].measured


def test_counting_and_memory_that_fail_leave_the_time(monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise ProcessFailed("signal 11")

    monkeypatch.setattr(measuring, "host_call", fail)
    monkeypatch.setattr(measuring, "peaks", fail)
    one = replace(OURS, memory=True)
    found = _metrics(list(measure(Toy((one,), works=Counted(4e9)), SIZE, replace(QUICK, memory=True))), one)
    assert found["time"].measured
    assert (found["work"].p50, found["peak memory"].p50) == ("failed: signal 11",) * 2


def _full_together(monkeypatch, *fitting: set[str]) -> list[list[str]]:
    """Timing runs out of memory unless those in turns are one of these; who was tried in turns is noted."""
    tried: list[list[str]] = []

    def sample(calls: Sequence[Callable[[], object]], *_: object) -> list[list[float]]:
        names = [call.entry.provider for call in calls]
        tried.append(names)
        if set(names) not in fitting:
            raise torch.OutOfMemoryError
        return [[float(len(names))]] * len(names)

    monkeypatch.setattr(measuring, "interleaved_ms", sample)
    return tried


def test_a_group_that_is_out_of_memory_is_timed_one_by_one_before_the_verdict(monkeypatch) -> None:
    tried = _full_together(monkeypatch, {"torch", "ours"}, {"torch"})
    toy = Toy((BASE, OURS, RIVAL))
    rows = list(measure(toy, SIZE, QUICK))
    assert tried[:3] == [["torch", "ours", "rival"], ["torch", "ours"], ["torch", "rival"]]
    assert _metrics(rows, OURS)["ratio to base"].measured
    assert _metrics(rows, RIVAL)["time"].p50 == "out of memory"
    assert _metrics(rows, BASE)["time"].measured
    assert len(toy.prepared) == 5, "made anew, so that none holds memory when another is timed"


def test_a_baseline_that_is_out_of_memory_is_so_alone(monkeypatch) -> None:
    _full_together(monkeypatch, {"ours"})
    rows = list(measure(Toy(), SIZE, QUICK))
    assert _metrics(rows, BASE)["time"].p50 == "out of memory"
    ours = _metrics(rows, OURS)
    assert ours["time"].measured
    assert "ratio to base" not in ours


def test_who_does_not_fit_beside_the_baselines_is_timed_without(monkeypatch) -> None:
    _full_together(monkeypatch, {"ours"}, {"torch"})
    rows = list(measure(Toy(), SIZE, QUICK))
    assert _metrics(rows, BASE)["time"].measured
    assert _metrics(rows, OURS)["time"].measured


# -- groups, time


def test_groups_are_small_and_never_split_a_work() -> None:
    works = [Entry(f"work {i}", provider) for provider in ("ours", "rival") for i in range(4)]
    many = [Entry("much", f"provider {i}") for i in range(GROUP + 1)]
    found = groups([BASE, *works, ALONE, *many])
    assert [len(group) for group in found] == [6, 2, GROUP + 1, 1]
    assert [{entry.work for entry in group} for group in found[:2]] == [{"work 0", "work 1", "work 2"}, {"work 3"}]
    assert (found[2], found[3]) == (many, [ALONE])


def test_a_group_is_dropped_before_the_next_is_prepared(monkeypatch) -> None:
    others = [Entry(f"work {i}", "ours") for i in range(2 * GROUP)]
    alive: list[int] = []

    def sample(calls: Sequence[Callable[[], object]], *_: object) -> list[list[float]]:
        alive.append(sum(one() is not None for one in toy.prepared))
        return [[1.0]] * len(calls)

    monkeypatch.setattr(measuring, "interleaved_ms", sample)
    toy = Toy((BASE, *others))
    rows = list(measure(toy, SIZE, QUICK))
    assert alive == [1 + GROUP] * 2
    assert [row.work for row in rows if row.metric == "time"] == ["base", *(entry.work for entry in others)]
    assert toy.called[0] == "gates done"


def _clock(monkeypatch, *shown: float) -> None:
    """At each look; 9 in the end."""
    now = chain(shown, repeat(9.0))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))


def test_gates_take_no_more_than_half_of_the_time(monkeypatch, capsys) -> None:
    _clock(monkeypatch, 0, 3, 3, 5, 5, 5)
    monkeypatch.setattr(measuring, "interleaved_ms", lambda calls, *_: [[1.0]] * len(calls))
    rows = list(measure(Toy((BASE, OURS, RIVAL)), SIZE, replace(QUICK, deadline=8.0)))
    assert {row.provider for row in rows} == {"torch", "ours"}
    assert capsys.readouterr().out.splitlines() == ["left out, the budget is spent: toy a layer/4/33/float32 add, rival"]


def test_what_is_not_begun_in_time_has_no_row_and_is_named(monkeypatch, capsys) -> None:
    assert list(measure(Toy(), SIZE, replace(QUICK, deadline=time.perf_counter()))) == []
    assert "left out, the budget is spent: toy a layer/4/33/float32 add, ours" in capsys.readouterr().out
    _clock(monkeypatch, 0, 1, 1, 1, 2, 3)
    later = [Entry(f"work {i}", "ours") for i in range(2)]
    monkeypatch.setattr(measuring, "interleaved_ms", lambda calls, *_: [[1.0]] * len(calls))
    rows = list(measure(Toy((BASE, *later)), SIZE, replace(QUICK, deadline=8.0)))
    assert {row.work for row in rows} == {"base", "work 0"}, "not the passed gate of the other: it would replace its figures"
    assert capsys.readouterr().out.splitlines() == ["left out, the budget is spent: toy a layer/4/33/float32 work 1, ours"]


# -- as on a GPU


@pytest.fixture
def gpu(monkeypatch) -> Setting:
    """A setting that names a GPU, with the little that would touch one replaced."""

    def sample(call: Callable[[], object], _: torch.device) -> float:
        call()
        return 2.0

    monkeypatch.setattr(timing, "cuda_sample", sample)
    monkeypatch.setattr(measuring, "_device_memory", lambda one, _: {**measuring.figure(7.0), "p20": one.entry.provider})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A GPU")
    return replace(QUICK, device=torch.device("cuda"), memory=True)


def test_on_a_gpu_all_happens_in_this_process(gpu: Setting) -> None:
    base, ours = replace(BASE, memory=True), replace(OURS, memory=True, apart=True)
    rows = list(measure(Toy((base, ours, RIVAL)), SIZE, gpu))
    assert [_metrics(rows, one)["peak memory"].p20 for one in (base, ours)] == ["torch", "ours"]
    assert "peak memory" not in _metrics(rows, RIVAL)
    assert {row.device for row in rows} == {"A GPU"}
    assert all(f"CUDA {torch.version.cuda}" in row.versions for row in rows)
    lines = [row.line for row in rows]
    assert lines == sorted(lines, key=lines.index), "all rows of a line come together"


@pytest.mark.parametrize(
    "said", ["CUDA error: an illegal memory access was encountered", "CUDA error: device-side assert triggered"]
)
def test_a_lost_gpu_ends_the_run_after_what_there_is(gpu: Setting, said: str) -> None:
    last = replace(ALONE, provider="never asked")
    toy, rows = Toy((BASE, OURS, ALONE, last), broken={ALONE: RuntimeError(f"{said}\nhint")}), []
    with pytest.raises(DeviceLost, match=f"ours, alone.*{said}"):
        rows.extend(measure(toy, SIZE, gpu))  # what came before the error stays
    assert _metrics(rows, OURS)["time"].measured
    assert _metrics(rows, ALONE)["time"].p50 == f"failed: RuntimeError: {said}"
    assert last.provider not in toy.called


def test_who_lost_the_gpu_is_not_made_up(gpu: Setting, monkeypatch) -> None:
    def lose(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(measuring, "interleaved_ms", lose)
    with pytest.raises(DeviceLost, match=r"one of add \(ours\), add \(rival\)"):
        next(measure(Toy((BASE, OURS, RIVAL)), SIZE, gpu))


def test_a_call_that_is_out_of_a_gpus_memory_beside_others_is_tried_alone(gpu: Setting, monkeypatch) -> None:
    right = Toy.call

    def call(toy: Toy, entry: Entry) -> Callable[[], object]:
        if entry == RIVAL and any(one() is not None for one in toy.prepared[1:]):  # ours holds what it needs
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(toy, entry)

    monkeypatch.setattr(Toy, "call", call)
    rows = list(measure(Toy((BASE, OURS, RIVAL)), SIZE, gpu))
    assert all(_metrics(rows, one)["ratio to base"].measured for one in (OURS, RIVAL))


def test_rows_of_other_libraries_name_their_version() -> None:
    (row, *_), captum = measure(Toy((OURS,)), SIZE, QUICK), Entry("add", f"{CAPTUM}, somehow")
    assert all(f"{package} " in row.versions for package in ("python", "torch", "timm", "numpy"))
    assert ("captum" in row.versions, "CUDA" in row.versions) == (False, False)
    assert "captum" in next(measure(Toy((captum,)), SIZE, QUICK)).versions
