"""The generated parts of README and docs, from the registry and the committed results, so that no figure is typed by hand."""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import vitexplain
from vitexplain.evaluate.results import Results
from vitexplain.evaluate.tables import interval, number, protocol_title, table

from .cases.data_sets import STREAM
from .cases.resolution import LARGEST_BATCH
from .coverage import AGREES, COVERAGE, REFUSED, RUNS, TIMM_MODELS, Pair, TimmModel
from .coverage import read as read_coverage
from .faithfulness import FAITHFULNESS
from .layer_operations import LIBRARY
from .lines import Line, fitted_exponent, line_of, lines_of, ours_on, points_of, ratio_to_forward_backward
from .record import NOT_MEASURED, Row, devices, read_rows, results_path
from .registry import BASELINES, DENSE, FORWARD, FORWARD_BACKWARD, MODEL_ITSELF
from .scale import run_table

ROOT = Path(__file__).resolve().parent.parent
PICTURES = "docs/benchmark"  # a folder a device
FURTHER = ("cifar10", "probability", "saco", "iba_chosen_on_even", "iba_reported_on_odd")
MEDIAN = "median [20th, 80th percentile]"
LONGEST = 36  # of a text in a figure's place
CPU, H200 = "cpu", "nvidia-h200"
TOKENS_SHOWN, TOKENS_SHOWN_ELSEWHERE = {CPU: 577}, 1025  # of the operations' sizes


def method_table() -> str:
    """What methods there are."""
    lines = ["| method | name | class-specific | cost | options (default) |", "|---|---|---|---|---|"]
    for info in vitexplain.methods():
        options = ", ".join(f"`{option.name}` ({option.default})" for option in info.options) or "–"
        specific = "yes" if info.class_specific else "no"
        lines.append(f"| {info.title} | `{info.name}` | {specific} | {info.cost} | {options} |")
    return "\n".join(lines)


def coverage_table() -> str:
    """Which method explains which family."""
    pairs = read_coverage(COVERAGE, Pair)
    methods = list(dict.fromkeys(pair.method for pair in pairs))
    lines = [
        f"| model | from | {' | '.join(f'`{method}`' for method in methods)} |",
        "|---|---|" + "---|" * len(methods),
    ]
    signs = {AGREES: "✓", RUNS: "(✓)", REFUSED: "–"}
    for package, family in dict.fromkeys((pair.package, pair.family) for pair in pairs):
        found = {pair.method: signs[pair.outcome] for pair in pairs if (pair.package, pair.family) == (package, family)}
        lines.append(f"| {family} | {package} | {' | '.join(found[method] for method in methods)} |")
    counts = Counter(pair.outcome for pair in pairs)
    reasons = sorted({_without_names(pair) for pair in pairs if pair.outcome == REFUSED})
    lines += [
        "",
        f"✓ agrees with a dense float64 reference on a small random-weight model ({counts[AGREES]} pairs); (✓) explained, "
        f"without a reference ({counts[RUNS]}); – refused ({counts[REFUSED]}): {'; '.join(reasons)}. `python -m bench.coverage`",
        "",
        timm_sentence(),
    ]
    return "\n".join(lines)


def _without_names(pair: Pair) -> str:
    return re.sub(r"block \d+", "a block", pair.reason.replace(repr(pair.method), "…"))


def timm_sentence() -> str:
    """How many of timm's names are explained."""
    models = read_coverage(TIMM_MODELS, TimmModel)
    counts = Counter(model.outcome for model in models)
    partly = sum(model.outcome == "explained" and bool(model.reason) for model in models)
    return (
        f"Of timm's {len(models)} model names whose class is a supported one, {counts['explained']} are explained ({partly} of "
        f"them not by `tokentm`, because values are normalised before the output projection or branches cannot be read apart), "
        f"{counts[REFUSED]} are refused with the reason, {counts['failed']} fail. `python -m bench.coverage --timm`"
    )


# -- speed and memory ----------------------------------------------------------------------------------------------------


def explanations_tables() -> str:
    """Every method beside the dense reference, other libraries and the model itself."""
    return _by_device("explanations", _explanations_of, "methods.png")


def _by_device(case: str, part: Callable[[str, list[Row]], str], *pictures: str) -> str:
    """A part with its own pictures for each device that has figures of a case, the CPU's first; a sentence for another."""
    found = {name: read_rows(results_path(name), case=case) for name in sorted({CPU, *devices()}, key=lambda name: name != CPU)}
    command = f"`python -m bench run {case}`"
    if not any(row.measured for rows in found.values() for row in rows):
        return f"{NOT_MEASURED.capitalize()}. {command}"
    parts = []
    for name, rows in found.items():
        if any(row.measured for row in rows):
            parts += [part(name, rows), *_pictures(name, pictures)]
        elif rows:
            parts.append(f"On {name}: {NOT_MEASURED}.")
    if not any(rows for name, rows in found.items() if name != CPU):
        parts.append(f"On a GPU: {NOT_MEASURED}.")
    return "\n\n".join([*parts, command])


def _pictures(device: str, files: Sequence[str]) -> list[str]:
    """A device's pictures as one paragraph; none where none is drawn."""
    drawn = [f"{PICTURES}/{device}/{file}" for file in files if (ROOT / PICTURES / device / file).exists()]
    names = (f"{Path(path).stem.replace('_', ' ')}, {device}" for path in drawn)
    return ["\n".join(f"![{name}]({path})" for name, path in zip(names, drawn, strict=True))] if drawn else []


def _explanations_of(device: str, rows: list[Row]) -> str:
    """A table for each model and element type, all but the first folded away."""
    groups: dict[tuple[object, ...], list[Line]] = {}
    for line in lines_of(rows):
        groups.setdefault(line.size, []).append(line)
    measured = [lines for lines in groups.values() if any(line.measured for line in lines)]
    first, *others = [_methods_of(device, lines, rows) for lines in measured]
    names = [f"{lines[0].model}, {lines[0].dtype}" for lines in measured[1:]]
    return "\n\n".join([first, *map(_folded, names, others)])


def _folded(name: str, text: str) -> str:
    return f"<details><summary>{name}</summary>\n\n{text}\n\n</details>"


def _methods_of(device: str, lines: list[Line], rows: list[Row]) -> str:
    first, ours = lines[0], ours_on(device)
    text = [
        f"**{first.model}, batch {first.batch}, {first.tokens} tokens, {first.dtype}**; {machine(rows)}; {MEDIAN}.",
        "",
        f"| method | ms | ÷ {FORWARD_BACKWARD} | dense reference, ms | × faster | MiB | dense, MiB | images/s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for line in _by_work(lines, ours):
        text.append(_row(_called(line, ours), *_method_cells(line, lines, ours)))
    return "\n".join(text)


def _by_work(lines: Sequence[Line], ours: str) -> list[Line]:
    """Baselines, then work by work ours, our ways to run it, and whoever else; last what only others do.

    The dense reference has a line of its own only there: elsewhere it stands beside ours.
    """
    known = [info.name for info in vitexplain.methods()]  # lines that failed come first in a file, and would here
    works = sorted(
        dict.fromkeys(line.work for line in lines), key=lambda work: known.index(work) if work in known else len(known)
    )
    done = {line.work for line in lines if line.provider == ours}

    def place(line: Line) -> tuple[object, ...]:
        theirs = line.provider not in (MODEL_ITSELF, LIBRARY)
        return theirs, line.work not in done, works.index(line.work), line.provider != ours, not line.provider.startswith(ours)

    return sorted((line for line in lines if line.provider != DENSE or line.work not in done), key=place)


def _called(line: Line, ours: str) -> str:
    """A method, by whom else or in which way where it is not ours as it comes."""
    if line.work in BASELINES:
        return f"*{line.work}*"
    return _quoted(line.work) if line.provider == ours else f"{_quoted(line.work)}, {_short_provider(line.provider, ours)}"


def _short_provider(provider: str, ours: str) -> str:
    """Our ways to run by what is different, the dense reference without its explanation."""
    return provider.removeprefix(f"{ours}, ").replace(DENSE, DENSE.partition(" (")[0])


def _method_cells(line: Line, lines: list[Line], ours: str) -> list[str]:
    own = line.provider.startswith(ours)
    dense = line_of(lines, line.work, DENSE) if own else None
    return [
        _time(line),
        number_of(ratio_to_forward_backward(line, lines)),
        "–" if dense is None else _figure(dense, "time"),
        _faster(
            line, [other for other in lines if other.work == line.work and not other.provider.startswith(ours)] if own else []
        ),
        _figure(line, "peak memory"),
        "–" if dense is None else _figure(dense, "peak memory"),
        _figure(line, "pace"),
    ]


def _faster(line: Line, rivals: list[Line]) -> str:
    """How much longer the dense reference takes; other rivals are named."""
    times = {rival.provider: number_of(rival.value("time") / line.value("time")) for rival in rivals}
    cell = times.pop(DENSE, "–")
    named = [f"{name.removeprefix(f'{DENSE}, ')} {ratio}" for name, ratio in times.items() if ratio != "–"]
    return f"{cell} ({', '.join(named)})" if named else cell


def resolution_tables() -> str:
    """Time and memory over the number of tokens."""
    return _by_device("resolution", _resolution_of, "time_over_tokens.png", "memory_over_tokens.png")


def _resolution_of(device: str, rows: list[Row]) -> str:
    """`tokentm` in full, of every method how it grows; all but the first model and element type folded away."""
    lines, tables = lines_of(rows), {}
    for model, dtype in dict.fromkeys((line.model, line.dtype) for line in lines if line.measured):
        mine = [line for line in lines if (line.model, line.dtype) == (model, dtype)]
        tables[f"{model}, {dtype}"] = tokens_table(mine, ours_on(device), rows)
    (_, first), *others = tables.items()
    return "\n\n".join([first, *(_folded(*other) for other in others)])


def tokens_table(lines: list[Line], ours: str, rows: list[Row]) -> str:
    """`tokentm` at each number of tokens: ours, checkpointed, the model itself, and whoever stores maps."""
    first = lines[0]
    columns = (("tokentm", ours), ("tokentm", f"{ours}, checkpointed"), (FORWARD_BACKWARD, None), ("tokentm", DENSE))
    text = [
        f"**`tokentm`, {first.model}, batch {first.batch}, {first.dtype}**; {machine(rows)}.",
        "",
        f"| tokens | vitexplain | checkpointed | {FORWARD_BACKWARD} | dense reference | its maps alone, counted |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for tokens in sorted({line.tokens for line in lines if "time" in line.figures}):
        at = [line for line in lines if line.tokens == tokens]
        found = [line_of(at, *column) for column in columns]
        maps = math.nan if found[-1] is None else found[-1].value("stored maps, counted")
        text.append(_row(f"{tokens:,}", *(_time_and_memory(line) for line in found), number_of(maps, " GB")))
    batches = [line for line in lines if line.work == LARGEST_BATCH and not math.isnan(line.value("batch"))]
    largest = "; ".join(f"{line.tokens:,} tokens, {line.provider}: {line.value('batch'):.0f}" for line in batches)
    return "\n".join([*text, "", _growth(lines), *([f"Largest batch, of powers of two: {largest}."] if largest else [])])


def _time_and_memory(line: Line | None) -> str:
    if line is None:
        return "–"
    if not line.measured:
        return _shortened(line.reason or NOT_MEASURED)
    memory = line.figures.get("peak memory")
    if memory is None:
        return _duration(line.value("time"))
    return f"{_duration(line.value('time'))}, {number_of(memory.value, ' MiB') if memory.measured else _reason(memory)}"


def _growth(lines: list[Line]) -> str:
    """How time and memory grow with the number of tokens, as a sentence."""
    grows = []
    for work, provider in dict.fromkeys((line.work, line.provider) for line in lines):
        mine = [line for line in lines if (line.work, line.provider) == (work, provider)]
        exponents = [fitted_exponent(points_of(mine, metric)) for metric in ("time", "peak memory")]
        if not all(map(math.isnan, exponents)):
            name = work if work in BASELINES else f"{_quoted(work)}, {provider}"
            grows.append(f"{name} {_exponent(exponents[0])} and {_exponent(exponents[1])}")
    if not grows:
        return f"Exponents over the number of tokens: {NOT_MEASURED}."
    return f"Fitted exponents of time and of memory over n ≥ 500: {'; '.join(grows)}."


def _exponent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def operations_tables() -> str:
    """Every operation on each device there are results of, at one size a device."""
    return _by_device("operations", _operations_of, "roofline.png")


def _operations_of(device: str, rows: list[Row]) -> str:
    lines = lines_of(rows)
    operations = [line for line in lines if line.work != "peak"]
    size = _size_shown(device, operations)
    shown, ours = [line for line in operations if line.size == size], ours_on(device)
    first = shown[0]
    text = [
        f"**Batch {first.batch}, {first.model}, {first.tokens:,} tokens, {first.dtype}**; {machine(rows)}; {MEDIAN}. "
        f"Peaks: {_peaks(lines, first.dtype)}.",
        "",
        "| operation | ms | fraction of its peak | ÷ fused attention's rate | dense formula, ms |",
        "|---|--:|--:|--:|--:|",
    ]
    for line in _by_work(shown, ours):
        own = line.provider in (ours, LIBRARY)
        dense = line_of(shown, line.work, DENSE) if own else None
        name = line.work if own else f"{line.work}, {_short_provider(line.provider, ours)}"
        text.append(_row(name, *_operation_cells(line), "–" if dense is None else _time(dense)))
    return "\n".join(text)


def _peaks(lines: list[Line], dtype: str) -> str:
    """What a large product and a large copy reach."""
    rows = [(line.provider, line.figures["rate"]) for line in lines if (line.work, line.dtype) == ("peak", dtype)]
    return "; ".join(f"{provider} {_with_unit(row)}" for provider, row in rows) or NOT_MEASURED


def _size_shown(device: str, lines: Sequence[Line]) -> tuple[object, ...]:
    """The first size that was measured with that many tokens, or the one next to it."""
    wanted = TOKENS_SHOWN.get(device, TOKENS_SHOWN_ELSEWHERE)
    return min((line for line in lines if line.measured), key=lambda line: abs(line.tokens - wanted)).size


def _operation_cells(line: Line) -> list[str]:
    cells = [_time(line)]
    for prefix in ("fraction of peak ", "rate over torch fused attention "):
        metric = next((name for name in line.figures if name.startswith(prefix)), None)
        figure = math.nan if metric is None else line.value(metric)
        cells.append("–" if math.isnan(figure) else f"{figure:.2f} ({metric.removeprefix(prefix)})")
    return cells


def cold_start_tables() -> str:
    """The first explanation of a process."""
    return _by_device("cold_start", _cold_start_of)


def _cold_start_of(device: str, rows: list[Row]) -> str:  # noqa: ARG001
    lines = lines_of(rows)
    first = lines[0]
    text = [
        f"**{first.model}, batch {first.batch}, {first.dtype}**; {machine(rows)}; {MEDIAN} of processes of their own.",
        "",
        "| step | ms |",
        "|---|--:|",
    ]
    for line in lines:
        by = f", {line.provider}" if len({other.provider for other in lines if other.work == line.work}) > 1 else ""
        of = "" if line.size == first.size else f" ({line.model}, {line.dtype})"
        text.append(_row(f"{line.work}{by}{of}", _time(line)))
    return "\n".join(text)


def ablation_tables() -> str:
    """What each of the means to be fast contributes."""
    return _by_device("ablation", _ablation_of)


def _ablation_of(device: str, rows: list[Row]) -> str:  # noqa: ARG001
    groups: dict[tuple[object, ...], list[Line]] = {}
    for line in lines_of(rows):
        groups.setdefault(line.size, []).append(line)
    return "\n\n".join(_settings(lines, rows) for lines in groups.values() if any(line.measured for line in lines))


def _settings(lines: list[Line], rows: list[Row]) -> str:
    first = lines[0]
    metrics = dict.fromkeys(metric for line in lines for metric in line.figures)
    ratios = [metric for metric in metrics if metric.startswith("ratio to ") and metric != f"ratio to {FORWARD}"]
    shown = {metric: f"÷ {metric.removeprefix('ratio to ')}" for metric in ratios}
    shown |= {"peak memory": "MiB"} if "peak memory" in metrics else {}
    text = [
        f"**{first.model}, batch {first.batch}, {first.tokens} tokens, {first.dtype}**; {machine(rows)}; {MEDIAN}.",
        "",
        _row("setting", "ms", *shown.values()),
        "|---|--:|" + "--:|" * len(shown),
    ]
    for line in sorted(lines, key=lambda line: line.work not in BASELINES):
        name = f"*{line.work}*" if line.work in BASELINES else line.work
        text.append(_row(name, _time(line), *(number_of(line.value(metric)) for metric in shown)))
    return "\n".join(text)


# -- goals ---------------------------------------------------------------------------------------------------------------


Lines = Mapping[str, list[Line]]
LARGE, BASE, SMALL, MANY = "vit_large_patch16_224", "vit_base_patch16_224", "vit_small_patch16_224", 16_385
ON_CPU = ((BASE, "float32", 8), (SMALL, "float32", 8))  # what a CPU shows, the first that was measured


@dataclass(frozen=True)
class Goal:
    """A figure that is wanted of the H200, and how to find it among a device's lines by case.

    Attributes:
        text: what it is of.
        wanted: the limit.
        line: the line that is asked, from a device's name and its lines; None where there is none.
        figure: of that line; NaN where it was not measured.
        shown: how the figure is written.
        on_cpu: whether the same thing exists on a CPU.
    """

    text: str
    wanted: str
    line: Callable[[str, Lines], Line | None]
    figure: Callable[[Line, Lines], float]
    shown: str
    on_cpu: bool = False


def _ways(model: str, device: str, lines: Lines) -> list[Line]:
    """Our measured lines of `tokentm`, however it was run: of that model in bfloat16 on a GPU."""
    ours = [line for line in lines["explanations"] if line.work == "tokentm" and line.provider.startswith(ours_on(device))]
    if device != CPU:
        return [line for line in ours if line.measured and (line.model, line.dtype) == (model, "bfloat16")]
    return [line for size in ON_CPU for line in ours if line.measured and (line.model, line.dtype, line.batch) == size]


def _plain(model: str) -> Callable[[str, Lines], Line | None]:
    """As it comes: like by like with a model and a reference that nobody compiled or captured, either."""
    return lambda device, lines: line_of(_ways(model, device, lines), "tokentm", ours_on(device))


def _fastest(model: str) -> Callable[[str, Lines], Line | None]:
    """With the highest pace."""
    return lambda device, lines: max(_ways(model, device, lines), key=lambda line: line.value("pace"), default=None)


def _at_resolution(tokens: int | None = None) -> Callable[[str, Lines], Line | None]:
    """Our line of `tokentm` with so many tokens, or the first one."""

    def found(device: str, lines: Lines) -> Line | None:
        return line_of((line for line in lines["resolution"] if tokens in (None, line.tokens)), "tokentm", ours_on(device))

    return found


def _of(metric: str, scale: float = 1.0) -> Callable[[Line, Lines], float]:
    return lambda line, _: scale * line.value(metric)


def _an_image(metric: str, scale: float) -> Callable[[Line, Lines], float]:
    return lambda line, _: scale * line.value(metric) / line.batch


def _ratio(line: Line, lines: Lines) -> float:
    return ratio_to_forward_backward(line, lines["explanations"])


def _times_faster(line: Line, lines: Lines) -> float:
    dense = line_of((other for other in lines["explanations"] if other.size == line.size), "tokentm", DENSE)
    return math.nan if dense is None else dense.value("time") / line.value("time")


def _memory_exponent(line: Line, lines: Lines) -> float:
    same = (line.work, line.provider, line.model, line.dtype)
    mine = [other for other in lines["resolution"] if (other.work, other.provider, other.model, other.dtype) == same]
    return fitted_exponent(points_of(mine, "peak memory"))


GOALS = (
    Goal("ViT-L/16, images/s", "≥ 1,500", _fastest(LARGE), _of("pace"), ",.0f"),
    Goal(f"ViT-L/16, time ÷ {FORWARD_BACKWARD}", "≤ 1.15", _plain(LARGE), _ratio, ".2f", on_cpu=True),
    Goal("ViT-L/16, × faster than the dense reference", "≥ 5", _plain(LARGE), _times_faster, ".1f", on_cpu=True),
    Goal(
        "ViT-L/16, share of the limit: the FLOPs of two forwards at the measured peak", "≥ 50 %", _plain(LARGE),
        _of("fraction of peak compute", 100), ".0f", on_cpu=True,
    ),
    Goal("ViT-B/16, images/s", "≥ 4,500", _fastest(BASE), _of("pace"), ",.0f"),
    Goal(f"{MANY:,} tokens, seconds an image", "< 1.5", _at_resolution(MANY), _an_image("time", 1e-3), ".2f"),
    Goal(f"{MANY:,} tokens, GB an image", "< 20", _at_resolution(MANY), _an_image("peak memory", 2**20 / 1e9), ".1f"),
    Goal("exponent of memory over the number of tokens", "≤ 1.1", _at_resolution(), _memory_exponent, ".2f", on_cpu=True),
)  # fmt: skip


def goals_table() -> str:
    """What is wanted of a GPU against what was measured, and what a CPU shows of it."""
    found = {
        device: {case: lines_of(read_rows(results_path(device), case=case)) for case in ("explanations", "resolution")}
        for device in (H200, CPU)
    }
    of_cpu = found[CPU]
    asked = {"": _plain(LARGE)(CPU, of_cpu), "exponent: ": _at_resolution()(CPU, of_cpu)}
    shown = {what: line for what, line in asked.items() if line is not None and line.measured}
    heading = "CPU*" if shown else "CPU"
    text = [f"| `tokentm` | wanted of one H200, bfloat16 | H200 | {heading} |", "|---|--:|--:|--:|"]
    for goal in GOALS:
        on_cpu = _answer(goal, CPU, found[CPU]) if goal.on_cpu else "–"
        text.append(_row(goal.text, goal.wanted, _answer(goal, H200, found[H200]), on_cpu))
    if shown:
        others = "; ".join(f"{what}{line.model}, batch {line.batch}, {line.dtype}" for what, line in shown.items())
        where = machine([row for line in shown.values() for row in line.figures.values()])
        text += ["", f"\\* For comparison, another model: {others}; {where}."]
    return "\n".join(text)


def _answer(goal: Goal, device: str, lines: Lines) -> str:
    """The figure, and how the library was run where that was not plain."""
    line = goal.line(device, lines)
    value = math.nan if line is None else goal.figure(line, lines)
    if math.isnan(value):
        return NOT_MEASURED
    variant = line.provider.removeprefix(ours_on(device)).removeprefix(", ")
    unit = " %" if goal.wanted.endswith("%") else ""
    return f"{value:{goal.shown}}{unit}{f' ({variant})' if variant else ''}"


# -- cells ---------------------------------------------------------------------------------------------------------------


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def machine(rows: list[Row]) -> str:
    """Where and with what it was measured."""
    row = next(row for row in rows if row.measured)
    return f"{row.device}{f', {row.threads} threads' if row.threads else ''}; {row.versions}"


def _quoted(work: str) -> str:
    """A method's name as code, anything longer as it is."""
    return work if " " in work else f"`{work}`"


def number_of(value: float, unit: str = "") -> str:
    """Three digits; a dash where there is no figure."""
    if math.isnan(value):
        return "–"
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}") + unit


def _time(line: Line) -> str:
    """Milliseconds, or why there are none."""
    return _spread(line.figures["time"]) if line.measured else _shortened(line.reason or NOT_MEASURED)


def _figure(line: Line, metric: str) -> str:
    """One figure of a line, or why there is none."""
    row = line.figures.get(metric)
    if row is None:
        return "–" if metric != "time" else _time(line)
    return number_of(row.value) if row.measured else _reason(row)


def _reason(row: Row) -> str:
    """The text in the place of a figure."""
    return _shortened(row.p50)


def _shortened(text: str) -> str:
    """As much as fits a cell: without what stands in brackets, on one line."""
    return textwrap.shorten(text.partition(" (")[0].replace("|", "/"), LONGEST, placeholder=" …")


def _spread(row: Row) -> str:
    """The median and where the middle of the samples lies."""
    if not row.measured:
        return _reason(row)
    around = f" [{number_of(float(row.p20))}, {number_of(float(row.p80))}]" if row.repeats > 1 else ""
    return f"{number_of(row.value)}{around}"


def _with_unit(row: Row) -> str:
    return number_of(row.value, f" {row.unit}") if row.measured else _reason(row)


def _duration(milliseconds: float) -> str:
    return number_of(milliseconds / 1e3, " s") if milliseconds >= 1e3 else number_of(milliseconds, " ms")


# -- faithfulness --------------------------------------------------------------------------------------------------------


def faithfulness_tables() -> str:
    """The perturbation, localisation and ablation tables, and which reconstruction of IBA was chosen."""
    return "\n\n".join(
        [
            _case("perturbation", "positive", "negative", "AOPC", "LOdds"),
            _case("localisation", "pixel accuracy", "mIoU", "mAP", "AUROC"),
            _case("ablation", "positive", "negative", "AOPC", "LOdds"),
            _chosen_reconstruction(),
            _precision(),
            f"In the same form in `bench/results/faithfulness`: {', '.join(f'`{name}/results.md`' for name in FURTHER)}. "
            "All of it: `python -m bench.faithfulness`",
        ]
    )


def results_of(case: str) -> Results:
    """The committed results of a study of ``bench.faithfulness``."""
    return Results.read(FAITHFULNESS / case / "results.json")


def _case(case: str, *metrics: str) -> str:
    """A case's table, with the columns of these metrics alone."""
    results = results_of(case)
    shown = replace(results, columns=tuple(column for column in results.columns if column.metric in metrics))
    (protocol,) = dict.fromkeys(column.protocol for column in shown.columns)
    settings = results.settings
    return (
        f"**{protocol_title(protocol.partition(':')[0])}**: {settings['model']['name']}, {settings['data']['name']}, "
        f"{results.timing['images']} images, forwards on changed images in {settings['dtype']}, {_place(results.environment)}."
        f"\n\n{table(shown, protocol)}".rstrip()
    )


def _place(where: Mapping[str, object]) -> str:
    return f"{where['device']}, {where['threads']} threads; {where['versions']}"


def _chosen_reconstruction() -> str:
    """Which of IBA's reconstructions is ahead on the half it is chosen on, and the same figures on the other half."""
    parts = []
    for case, half in (("iba_chosen_on_even", "the even-numbered 250 photos"), ("iba_reported_on_odd", "the odd-numbered 250")):
        results = results_of(case)
        column = next(column for column in results.columns if column.metric == "AOPC")
        figures = ", ".join(
            f"{label.partition('=')[2]} {number(figure.mean, '.3f')} {interval(figure, '.3f')}"
            for label in results.methods
            if (figure := results.figure(label, column))
        )
        parts.append(f"on {half}: {figures}")
    return f"**Which reconstruction of `iba`** was chosen, by AOPC ↑ {parts[0]}; reported {parts[1]}. Other figures: see below."


def _precision() -> str:
    """How far bfloat16 forwards move the figures."""
    exact, narrow = results_of("precision_float32"), results_of("precision_bfloat16")
    largest = {
        column.metric: max(abs(exact.figure(label, column).mean - narrow.figure(label, column).mean) for label in exact.methods)
        for column in exact.columns
    }
    moved = ", ".join(f"{metric} {value:.2g}" for metric, value in largest.items())
    return (
        f"**bfloat16 against float32** forwards, {exact.timing['images']} photos, {len(exact.methods)} maps: the largest "
        f"difference of a figure is {moved}; {narrow.timing['changed_images_per_second']:.0f} against "
        f"{exact.timing['changed_images_per_second']:.0f} changed images a second."
    )


# -- data sets -----------------------------------------------------------------------------------------------------------


def dataset_table() -> str:
    """Whole data sets: pace, waiting, memory; on a GPU, decoded and explained without writing."""
    streams = [row for name in devices() for row in read_rows(results_path(name), case="data_sets", work=STREAM)]
    text = []
    for line in lines_of(row for row in streams if row.measured):
        pace = line.figures["images per second"]
        text.append(
            f"{line.model}, {line.dtype}, batch {line.batch}, {pace.device}: {number_of(pace.value)} images/s decoded and "
            f"explained, {line.value('ratio to bare'):.0%} of a bare `attribute` loop."
        )
    return "\n".join([*run_table(), "", *(text or [f"On a GPU: {NOT_MEASURED}."]), "", "`python -m bench run data_sets`"])
