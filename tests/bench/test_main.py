"""The benchmark's command line."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from bench import __main__ as command
from bench import registry
from bench.cases import CASES
from bench.record import Row, read_rows, results_path, spread, unavailable, update
from bench.registry import EXPLANATION, Case, Entry, Setting, Size, figure

SIZES = (Size("small", 8, 197), Size("small", 8, 577), Size("large", 4, 197, dtype="bfloat16"))
ENTRY = Entry("tokentm", "ours")


class Toy(Case):
    """Two figures a size; what it is asked for is noted."""

    name, kind, title = "toy", EXPLANATION, "made up"

    def __init__(self) -> None:
        self.asked: list[tuple[Size, Setting]] = []

    def sizes(self, device_type: str) -> Sequence[Size]:  # noqa: ARG002
        return SIZES

    def entries(self, size: Size, device_type: str) -> Sequence[Entry]:  # noqa: ARG002
        return (ENTRY,)

    def measure(self, size: Size, setting: Setting) -> Iterator[Row]:
        self.asked.append((size, setting))
        for metric in ("time", "pace"):
            yield self.row(ENTRY, size, metric, "ms", figure(float(size.tokens)), setting.device)


@pytest.fixture
def toy(results, monkeypatch) -> Toy:  # noqa: ARG001
    """In the place of all cases."""
    made = Toy()
    monkeypatch.setattr(command, "CASES", {"toy": made})
    return made


def test_an_unknown_case_names_the_known_ones() -> None:
    with pytest.raises(SystemExit, match=rf"expected one of {', '.join(CASES)}, received 'speed'"):
        command.main(["run", "speed", "--device", "cpu"])


def test_figures_go_into_the_devices_file_and_are_replaced_there(toy: Toy, capsys) -> None:
    for _ in range(2):
        command.main(["run", "--device", "cpu", "--least", "7", "--work", "tokentm", "--no-memory", "--limit-gb", "3"])
    rows = read_rows(results_path("cpu"))
    assert [(row.tokens, row.metric) for row in rows] == [(n, m) for n in (197, 577, 197) for m in ("time", "pace")]
    setting = toy.asked[0][1]
    assert (setting.device.type, setting.least, setting.works, setting.providers) == ("cpu", 7, ("tokentm",), ())
    assert (setting.memory, setting.limit_gb, setting.deadline) == (False, 3, float("inf"))
    assert str(results_path("cpu")) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("patterns", "sizes"),
    [
        (["small/*"], SIZES[:2]),
        (["*/197/*"], (SIZES[0], SIZES[2])),
        (["large/*", "small/8/577/float32"], SIZES[1:]),
        (["medium/*"], ()),
    ],
)
def test_sizes_are_chosen_by_pattern(toy: Toy, patterns: list[str], sizes: tuple[Size, ...]) -> None:
    command.main(["run", "toy", "--device", "cpu", *(part for pattern in patterns for part in ("--size", pattern))])
    assert tuple(size for size, _ in toy.asked) == sizes


def test_what_a_budget_leaves_out_is_named(toy: Toy, capsys) -> None:
    command.main(["run", "--device", "cpu", "--budget", "0"])
    assert toy.asked == []
    printed = capsys.readouterr().out
    assert "left out, the budget is spent: toy small/8/577/float32" in printed
    assert not results_path("cpu").exists()


def _failing(monkeypatch, error: BaseException) -> None:
    """The second size fails after its first figure."""
    right = Toy.measure

    def fail(self: Toy, size: Size, setting: Setting) -> Iterator[Row]:
        rows = right(self, size, setting)
        yield next(rows)
        if size == SIZES[1]:
            raise error
        yield from rows

    monkeypatch.setattr(Toy, "measure", fail)


def test_a_size_that_fails_is_named_in_the_end_and_the_others_go_on(toy: Toy, monkeypatch, capsys) -> None:
    _failing(monkeypatch, RuntimeError("broken\nin detail"))
    with pytest.raises(SystemExit, match=r"^failed:\ntoy small/8/577/float32: RuntimeError: broken$"):
        command.main(["run", "--device", "cpu"])
    assert [size for size, _ in toy.asked] == list(SIZES)
    assert [row.tokens for row in read_rows(results_path("cpu"))] == [197, 197, 577, 197, 197]
    assert "in detail" in capsys.readouterr().err


def test_nothing_is_begun_on_a_lost_device(toy: Toy, monkeypatch, tmp_path) -> None:
    _failing(monkeypatch, RuntimeError("CUDA error: an illegal memory access was encountered"))
    monkeypatch.setattr(registry, "environment", lambda *_: {"device": "A GPU", "threads": 1, "versions": ""})
    cuda, path = Setting(command.torch.device("cuda")), tmp_path / "benchmark.csv"
    failed = command._measure_all([(toy, size) for size in SIZES], cuda, path)
    assert [size for size, _ in toy.asked] == list(SIZES[:2])
    assert len(read_rows(path)) == 3, "what there is was written"
    assert failed[-1] == "the device is lost: what comes after it was not begun"


def test_being_told_to_end_is_an_exit_that_writes(toy: Toy, monkeypatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    right = Toy.measure

    def told(self: Toy, size: Size, setting: Setting) -> Iterator[Row]:
        yield from right(self, size, setting)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Toy, "measure", told)
    with pytest.raises(SystemExit, match="143"):
        command.main(["run", "--device", "cpu"])
    assert len(toy.asked) == 1
    assert {row.tokens for row in read_rows(results_path("cpu"))} == {197}
    assert signal.getsignal(signal.SIGTERM) == before


def test_results_go_into_another_folder_and_are_merged_from_there(toy: Toy, results, tmp_path, capsys) -> None:  # noqa: ARG001
    command.main(["run", "--device", "cpu", "--size", "large/*"])
    kept = read_rows(results_path("cpu"))
    command.main(["run", "--device", "cpu", "--size", "*/577/*", "--results", str(tmp_path / "out")])
    path = tmp_path / "out" / "cpu" / "benchmark.csv"
    assert str(path) in capsys.readouterr().out
    added = read_rows(path)
    assert {row.tokens for row in added} == {577}, "what this run has measured, and nothing that another one may replace by then"
    assert read_rows(results_path("cpu")) == kept, "the repository's file is as it was"
    gpu = tmp_path / "out" / "nvidia-h200" / "benchmark.csv"
    update(gpu, [replace(row, **unavailable("not there")) for row in kept[:1]])
    results("nvidia-h200", kept)
    command.main(["merge", str(path), str(gpu)])
    assert read_rows(results_path("cpu")) == kept + added
    assert read_rows(results_path("nvidia-h200")) == kept, "what is unavailable replaces no figure"


def test_a_file_without_rows_is_not_merged(results, tmp_path) -> None:  # noqa: ARG001
    with pytest.raises(SystemExit, match=r"absent\.csv: expected rows of the benchmark, found none"):
        command.main(["merge", str(tmp_path / "absent.csv")])


def test_blank_lines_are_written_and_never_overwrite_what_was_measured(toy: Toy, results) -> None:
    command.main(["run", "--not-measured", "nvidia-h200"])
    blank = read_rows(results_path("nvidia-h200"))
    assert {(row.p50, row.device, row.metric) for row in blank} == {("not measured", "nvidia-h200", "time")}
    assert len(blank) == len(SIZES)
    results("nvidia-h200", [replace(blank[1], **spread([3.0]), versions="torch 3")])
    command.main(["run", "--not-measured", "nvidia-h200"])
    assert [row.p50 for row in read_rows(results_path("nvidia-h200"))] == ["not measured", "3", "not measured"]
    assert toy.asked == []


@pytest.mark.parametrize("name", CASES)
def test_every_case_has_blank_lines_for_a_gpu(name: str) -> None:
    case = CASES[name]
    assert (case.name, case.kind in registry.KINDS, bool(case.title)) == (name, True, True)
    rows = [row for size in case.sizes("cuda") for row in case.blank_rows(size, "nvidia-h200")]
    assert {row.p50 for row in rows} <= {"not measured"}
    assert len({row.line for row in rows}) == len(rows)


def test_the_list_shows_cases_works_and_providers(toy: Toy, capsys) -> None:
    command.main(["list"])
    printed = capsys.readouterr().out
    assert f"toy (explanation): {toy.title}" in printed
    assert "small/8/197/float32" in printed
    assert "tokentm: ours" in printed


def test_a_gpu_that_is_not_there_is_not_made_up(toy: Toy, monkeypatch) -> None:
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="expected a CUDA device, found none"):
        command.main(["run", "--device", "cuda"])
    assert toy.asked == []
