"""Gate, turns, ratios, peaks and memory of a made-up case; one call of a real case in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from bench import measuring
from bench.cases import CASES
from bench.measuring import host_call, measure
from bench.peaks import BANDWIDTH, COMPUTE, Peak
from bench.record import Row
from bench.registry import OPERATION, Check, Counted, Entry, Prepared, Setting, Size, TimedCase, Unavailable

SIZE = Size("a layer", 4, 33)
QUICK = Setting(torch.device("cpu"), seconds=1e-9, least=3, memory=False)
BASE, OURS, WRONG, ABSENT, ALONE = (
    Entry("base", "torch", baseline=True),
    Entry("add", "ours"),
    Entry("add", "rival that is wrong"),
    Entry("add", "rival that is not there"),
    Entry("add", "ours, alone", alone=True),
)


@dataclass
class Toy(TimedCase, Prepared):
    """Every call notes who was called."""

    shown: Sequence[Entry] = (BASE, OURS)
    works: Counted | None = None
    called: list[str] = field(default_factory=list)

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
        return lambda: self.called.append(entry.provider)

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
    assert set(toy.called) == {"torch"}


def test_an_error_that_is_no_number_does_not_pass(monkeypatch) -> None:
    monkeypatch.setattr(Toy, "check", lambda *_: Check(float("nan"), 1e-5))
    toy = Toy((OURS,))
    assert _metrics(list(measure(toy, SIZE, QUICK)), OURS)["time"].p50.startswith("wrong: error nan")
    assert toy.called == []


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
    turns = toy.called[3:]  # each was tried once
    assert turns[: 2 * 4] == ["torch", "ours"] * 4, "a warm-up and three rounds"
    assert turns[2 * 4 :] == ["torch", "ours, alone"] * 4
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
    assert toy.called == [], "it was not called in this process"


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
