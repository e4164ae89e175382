"""One explanation over the number of tokens: apart, under a limit, gated where the reference fits."""

from __future__ import annotations

import pytest
import torch

from bench import measuring
from bench.cases.resolution import LARGEST_BATCH, PreparedResolution, Resolution, largest
from bench.providers import hooks
from bench.record import Row
from bench.registry import BASELINES, DENSE, FORWARD_BACKWARD, MODEL_ITSELF, TORCH, TRITON, Setting, Size

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


def test_the_gate_holds_where_its_reference_fits() -> None:
    entry = next(entry for entry in Resolution().entries(TINY, "cpu") if entry.provider == DENSE)
    assert PreparedResolution(TINY, CPU).check(entry).passed
    assert PreparedResolution(Size(TINY.model, 1, 578, 64), CPU).check(entry) is None


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
