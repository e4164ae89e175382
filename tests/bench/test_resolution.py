"""One explanation over the number of tokens: apart, under a limit, gated where the reference fits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench import measuring
from bench.cases.resolution import LARGEST_BATCH, PreparedResolution, Resolution, _timed_entries, largest
from bench.providers import hooks
from bench.record import Row
from bench.registry import BASELINES, DENSE, FORWARD_BACKWARD, MODEL_ITSELF, TORCH, TRITON, Check, Entry, Setting, Size
from vitexplain.testing import DenseReference

CPU = torch.device("cpu")
TINY = Size("vit_tiny_patch16_224", 1, 17, 64)
CHECKPOINTED = f"{TORCH}, checkpointed"


def _found(rows) -> dict[tuple[str, str, str], Row]:
    return {(row.work, row.provider, row.metric): row for row in rows}


@pytest.fixture
def in_no_process(monkeypatch) -> list[tuple[str, str]]:
    """Who would be called in a process of its own."""
    asked: list[tuple[str, str]] = []

    def host_call(_case, entry, _size, _setting) -> dict[str, object]:
        asked.append((entry.work, entry.provider))
        return {"mib": 12.0, "ms": [3.0, 4.0, 5.0]}

    monkeypatch.setattr(measuring, "host_call", host_call)
    return asked


def test_tokens_are_those_of_the_image_sizes() -> None:
    case = Resolution()
    assert {size.tokens for size in case.sizes("cpu")} == {197, 577, 1025, 2305, 4097, 16385}
    assert {(size.image_size, size.tokens) for size in case.sizes("cuda")} == {
        (224, 197), (518, 1370), (1036, 5477), (1024, 4097), (2048, 16385),
    }  # fmt: skip


def test_everything_is_apart_on_a_cpu_and_gated_first(in_no_process) -> None:
    found = _found(Resolution().measure(TINY, Setting(CPU)))
    tokentm = [("tokentm", TORCH), ("tokentm", CHECKPOINTED)]
    lines = [(FORWARD_BACKWARD, MODEL_ITSELF), *tokentm, ("rollout", TORCH), ("tokentm", DENSE)]
    assert in_no_process == lines
    for work, provider in lines:
        assert (found[work, provider, "time"].value, found[work, provider, "time"].repeats) == (4, 3)
        assert found[work, provider, "peak memory"].value == 12
        assert work in BASELINES or found[work, provider, "relative error"].value < 1e-5
    counted = 2 * 12 * 3 * 17**2 * 4 / 1e9
    assert found["tokentm", DENSE, "stored maps, counted"].value == pytest.approx(counted, rel=1e-3)


def test_a_wrong_rival_gets_no_process(in_no_process, monkeypatch) -> None:
    monkeypatch.setitem(hooks.METHODS, "tokentm", hooks.rollout)
    found = _found(Resolution().measure(TINY, Setting(CPU, providers=("dense",))))
    assert found["tokentm", DENSE, "time"].p50.startswith("wrong: error ")
    assert in_no_process == [(FORWARD_BACKWARD, MODEL_ITSELF)]


LARGER = Size(TINY.model, 1, 578, 64)  # it says so: the images have 17 tokens


def _gated(prepared: PreparedResolution) -> dict[tuple[str, str], Check | None]:
    entries = [entry for entry in Resolution().entries(TINY, "cpu") if not entry.baseline]
    return {(entry.work, entry.provider): prepared.check(entry) for entry in entries}


@pytest.mark.parametrize(("size", "blocks"), [(TINY, 12), (LARGER, 2)])
def test_the_gate_holds_the_whole_model_or_its_first_blocks(size: Size, blocks: int, monkeypatch) -> None:
    made, real = [], DenseReference.__init__

    def count(reference: DenseReference, model: nn.Module, *args: object) -> None:
        made.append(len(model.blocks))
        real(reference, model, *args)

    monkeypatch.setattr(DenseReference, "__init__", count)
    checks = _gated(PreparedResolution(size, CPU))
    assert all(check.passed and check.error > 0 for check in checks.values())
    assert set(made) == {blocks}


def test_a_wrong_rival_is_refused_at_many_tokens(monkeypatch) -> None:
    monkeypatch.setitem(hooks.METHODS, "tokentm", hooks.rollout)
    checks = _gated(PreparedResolution(LARGER, CPU))
    assert [line for line, check in checks.items() if not check.passed] == [("tokentm", DENSE)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_no_map_can_be_stored_the_gate_stores_none(dtype: str, monkeypatch) -> None:
    monkeypatch.setattr(DenseReference, "__init__", None)
    size = Size(TINY.model, 1, 16385, 64, dtype)
    checks = _gated(PreparedResolution(size, CPU))
    assert checks.pop(("tokentm", DENSE)) is None
    assert all(check.passed for check in checks.values())
    assert len(checks) == 3


def test_gates_of_cut_models_leave_nothing_in_memory() -> None:
    prepared = PreparedResolution(LARGER, CPU)
    _gated(prepared)
    assert not {"exact_run", "plain_run"} & set(vars(prepared.cut.gate)), "a process of its own may be next"
    prepared.gates_done()
    assert "cut" not in vars(prepared)


def test_out_of_memory_is_a_result() -> None:
    case = Resolution()
    entry = next(entry for entry in case.entries(TINY, "cpu") if entry.provider == DENSE)
    found = _found(measuring.measure(case, TINY, Setting(CPU, limit_gb=0.001), [entry]))
    for metric in ("time", "peak memory"):
        assert found["tokentm", DENSE, metric].p50 == "out of memory (limit 0.001 GB)"


def test_the_largest_batch_is_asked_for_where_memory_bounds_it() -> None:
    case = Resolution()
    works = {size.tokens: {entry.work for entry in case.entries(size, "cuda")} for size in case.sizes("cuda")}
    assert {tokens for tokens, found in works.items() if LARGEST_BATCH in found} == {1370, 4097, 5477, 16385}
    assert not any(LARGEST_BATCH in {entry.work for entry in case.entries(size, "cpu")} for size in case.sizes("cpu"))
    rows = [row for size in case.sizes("cuda") for row in case.blank_rows(size, "a-gpu")]
    assert {(row.metric, row.unit) for row in rows if row.work == LARGEST_BATCH} == {("batch", "1")}
    assert {row.provider for row in rows if row.work == LARGEST_BATCH} == {TRITON, f"{TRITON}, checkpointed"}
    assert all(row.p50 == "not measured" for row in rows)


@pytest.mark.parametrize(("room", "expected"), [(0, 0), (1, 1), (6, 4), (10_000, 1024)])
def test_the_largest_batch_is_found_by_doubling(room: int, expected: int) -> None:
    def call(batch: int) -> None:
        if batch > room:
            raise torch.OutOfMemoryError

    assert largest(call, CPU) == expected


def _largest(monkeypatch, call) -> dict[str, Row]:
    """The rows of the largest batch, on a CPU, of images of which no more than two fit."""
    case = Resolution()
    monkeypatch.setattr("bench.providers.ours.timed", lambda _explainer, images, *_: lambda: call(len(images)))
    monkeypatch.setattr("bench.cases.resolution._timed_entries", lambda *_: ())
    monkeypatch.setattr(Resolution, "entries", lambda *_: (Entry(LARGEST_BATCH, TORCH),))
    return {row.metric: row for row in case.measure(TINY, Setting(CPU, 1e-9, 1))}


def test_the_largest_batch_is_timed(monkeypatch) -> None:
    called = []

    def call(batch: int) -> None:
        called.append(batch)
        if batch > 2:
            raise torch.OutOfMemoryError

    found = _largest(monkeypatch, call)
    assert found["batch"].value == 2
    assert found["time"].repeats == found["pace"].repeats == 3
    assert found["pace"].value == pytest.approx(2e3 / found["time"].value, rel=1e-2)
    assert called == [1, 2, 4, 2, 2, 2, 2]


def test_what_fails_at_the_largest_batch_is_a_reason(monkeypatch) -> None:
    def fail(batch: int) -> None:
        raise {1: RuntimeError("no such kernel"), 2: torch.OutOfMemoryError()}[batch]

    assert _largest(monkeypatch, fail)["batch"].p50 == "failed: RuntimeError: no such kernel"

    def forgetful(batch: int, seen: list[int] = []) -> None:  # noqa: B006
        seen.append(batch)
        if seen[2:]:
            raise torch.OutOfMemoryError if batch == 4 else RuntimeError("not again")

    found = _largest(monkeypatch, forgetful)
    assert found["batch"].value == 2
    assert found["time"].p50 == "failed: RuntimeError: not again"
    assert "pace" not in found


def test_beyond_the_deadline_nothing_is_begun_and_no_count_stands_for_older_figures(monkeypatch, capsys) -> None:
    monkeypatch.setattr(Resolution, "entries", lambda *_: (*_timed_entries(TINY, "cpu"), Entry(LARGEST_BATCH, TORCH)))
    assert list(Resolution().measure(TINY, Setting(CPU, deadline=0.0))) == []
    assert f"left out, the budget is spent: resolution {TINY.label} {LARGEST_BATCH}, {TORCH}" in capsys.readouterr().out


def test_much_stored_is_timed_alone_on_a_gpu() -> None:
    alone = {
        size.tokens: entry.alone
        for size in Resolution().sizes("cuda")
        for entry in Resolution().entries(size, "cuda")
        if entry.provider == DENSE
    }
    assert alone == {197: False, 1370: False, 4097: True, 5477: True, 16385: True}
