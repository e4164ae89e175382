"""Write the README's generated parts from the registry and the committed results, so that no figure is typed by hand.

python -m bench.readme           # rewrite the parts between the markers
python -m bench.readme --check   # exit 1 where the README is not what would be written
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

import vitexplain
from vitexplain.evaluate.results import Results
from vitexplain.evaluate.tables import interval, number, protocol_title, table

from .coverage import AGREES, COVERAGE, REFUSED, RUNS, TIMM_MODELS, Pair, TimmModel
from .coverage import read as read_coverage
from .faithfulness import FAITHFULNESS
from .operations import COMPUTE, FORWARD, NOT_MEASURED, results_path
from .record import RESULTS, Row, read_rows
from .scale import run_table

README = Path(__file__).resolve().parent.parent / "README.md"
COST = RESULTS / "cpu" / "cost_vit_small_patch16_224_float32.csv"
FURTHER = ("cifar10", "probability", "saco", "iba_chosen_on_even", "iba_reported_on_odd")
MEMORY = RESULTS / "cpu" / "memory_tokentm.csv"
# folder and element type of the operation benchmark's results, and the number of tokens that is shown
OPERATIONS = {("cpu", torch.float32): 577, ("nvidia-h200", torch.bfloat16): 1025}


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
        _timm_sentence(),
    ]
    return "\n".join(lines)


def _without_names(pair: Pair) -> str:
    return re.sub(r"block \d+", "a block", pair.reason.replace(repr(pair.method), "…"))


def _timm_sentence() -> str:
    models = read_coverage(TIMM_MODELS, TimmModel)
    counts = Counter(model.outcome for model in models)
    partly = sum(model.outcome == "explained" and bool(model.reason) for model in models)
    return (
        f"Of timm's {len(models)} model names whose class is a supported one, {counts['explained']} are explained ({partly} of "
        f"them not by `tokentm`, because values are normalised before the output projection or branches cannot be read apart), "
        f"{counts[REFUSED]} are refused with the reason, {counts['failed']} fail. `python -m bench.coverage --timm`"
    )


def cost_table() -> str:
    """Time of every method beside the model itself."""
    rows = [row for row in read_rows(COST) if row.case == "cost"]
    by_provider: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_provider.setdefault(row.provider, {})[row.metric] = row
    first = rows[0]
    lines = [
        f"{first.model}, batch {first.batch}, {first.dtype}, {first.device}, {first.threads} threads; {first.versions}; "
        f"median of {first.repeats} interleaved rounds [20th, 80th percentile]. `python -m bench.cost`",
        "",
        "| | time, ms | ÷ forward | ÷ forward + input gradient |",
        "|---|---|---|---|",
    ]
    for provider, metrics in by_provider.items():
        cells = (metrics["time"], metrics["ratio to forward"], metrics["ratio to forward + input gradient"])
        lines.append(f"| {provider} | " + " | ".join(f"{row.p50} [{row.p20}, {row.p80}]" for row in cells) + " |")
    return "\n".join(lines)


def operations_table() -> str:
    """Every operation on each device there are results of, at one size a device."""
    parts = []
    for (folder, dtype), tokens in OPERATIONS.items():
        rows = [row for row in read_rows(results_path(folder, dtype)) if row.tokens in (0, tokens)]
        parts.append(_operations_of(rows))
    return "\n\n".join(parts)


def _operations_of(rows: list[Row]) -> str:
    peaks = [row for row in rows if row.case == "peak"]
    operations = [row for row in rows if row.case == "operation"]
    first = operations[0]
    measured = "; ".join(f"{row.provider} {_figure(row)}" for row in peaks)
    threads = f", {first.threads} threads" if first.threads else ""
    device = "cpu" if first.threads and first.dtype == "float32" else "cuda"
    lines = [
        f"{first.device}{threads}; batch {first.batch}, {first.model}, {first.tokens} tokens, {first.dtype}; {first.versions}. "
        f"Measured peaks: {measured}. `python -m bench.operations --device {device}`",
        "",
        "| operation | time, ms | fraction of its peak | ÷ fused attention's rate |",
        "|---|---|---|---|",
    ]
    for provider in dict.fromkeys(row.provider for row in operations):
        metrics = {row.metric: row for row in operations if row.provider == provider}
        fraction = next(row for name, row in metrics.items() if name.startswith("fraction"))
        ratio = next((row for name, row in metrics.items() if name.startswith("rate over")), None)
        which = " (FLOP/s)" if fraction.metric.endswith(COMPUTE) else " (bytes/s)"
        beside = "–" if ratio is None else _figure(ratio, " (forward)" if ratio.metric.endswith(FORWARD) else " (backward)")
        time = metrics["time"]
        lines.append(f"| {provider} | {_figure(time, f' [{time.p20}, {time.p80}]')} | {_figure(fraction, which)} | {beside} |")
    return "\n".join(lines)


def _figure(row: Row, after: str = "") -> str:
    if row.p50 == NOT_MEASURED:
        return NOT_MEASURED
    return row.p50 + ("" if row.unit in ("1", "ms") else f" {row.unit}") + after


def memory_table() -> str:
    """Peak memory over the number of tokens."""
    rows = read_rows(MEMORY)
    first = rows[0]
    providers = list(dict.fromkeys(row.provider for row in rows))
    lines = [
        f"`tokentm`, {first.model}, one image, {first.device}, {first.threads} threads; {first.versions}; MiB above the process "
        "before the call (seconds). `python -m bench.memory`",
        "",
        "| tokens | " + " | ".join(f"{provider} ({_dtype(rows, provider)})" for provider in providers) + " |",
        "|---|" + "---|" * len(providers),
    ]
    for tokens in sorted({row.tokens for row in rows}):
        cells = []
        for provider in providers:
            found = {row.metric: row.p50 for row in rows if row.tokens == tokens and row.provider == provider}
            peak, seconds = found["peak memory"], found["time"]
            cells.append(peak if peak.startswith("out") else f"{float(peak):.0f} ({float(seconds):.2g} s)")
        lines.append(f"| {tokens} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _dtype(rows: list[Row], provider: str) -> str:
    return next(row.dtype for row in rows if row.provider == provider)


def faithfulness_tables() -> str:
    """The perturbation, localisation and ablation tables, which reconstruction of IBA was chosen, and times."""
    return "\n\n".join(
        [
            _case("perturbation", "positive", "negative", "AOPC", "LOdds"),
            _case("localisation", "pixel accuracy", "mIoU", "mAP", "AUROC"),
            _case("ablation", "positive", "negative", "AOPC", "LOdds"),
            _chosen_reconstruction(),
            _precision(),
            _speed(),
            f"In the same form: {', '.join(f'[{name}](bench/results/faithfulness/{name}/results.md)' for name in FURTHER)}. "
            "All of it: `python -m bench.faithfulness`",
        ]
    )


def _results(case: str) -> Results:
    return Results.read(FAITHFULNESS / case / "results.json")


def _case(case: str, *metrics: str) -> str:
    """A case's table, with the columns of these metrics alone."""
    results = _results(case)
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
        results = _results(case)
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
    exact, narrow = _results("precision_float32"), _results("precision_bfloat16")
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


def _speed() -> str:
    """Time per image of explanations, on each device there are figures of."""
    parts = []
    for path in sorted(RESULTS.glob("*/faithfulness_speed.csv")):
        rows = read_rows(path)
        first = rows[0]
        times = ", ".join(f"{row.provider} {row.p50}" for row in rows if row.case == "explanation")
        pace = {row.metric: row for row in rows if row.case == "evaluation"}
        parts.append(
            f"**Milliseconds per image** of an explanation alone, {first.model}, batch {first.batch}, {first.dtype}, "
            f"{first.device}, {first.threads} threads: {times}. A whole evaluation ({next(iter(pace.values())).provider}, "
            f"changed images in {next(iter(pace.values())).dtype}): {pace['images per second'].p50} images/s, "
            f"{pace['changed images per second'].p50} changed images/s. `python -m bench.faithfulness --speed`"
        )
    if not any(path.parent.name != "cpu" for path in RESULTS.glob("*/faithfulness_speed.csv")):
        parts.append(f"On a GPU: {NOT_MEASURED}.")
    return "\n\n".join(parts)


def dataset_table() -> str:
    """Whole data sets: pace, waiting, memory."""
    lines = []
    for path in sorted(RESULTS.glob("*/dataset_stream.csv")):
        rows = read_rows(path)
        for model in dict.fromkeys(row.model for row in rows):
            found = {row.metric: row for row in rows if row.model == model}
            first = found["images per second"]
            lines.append(
                f"{model}, {first.dtype}, batch {first.batch}, {first.device}: {first.p50} images/s decoded and explained, "
                f"{float(found['ratio to bare'].p50):.0%} of a bare `attribute` loop. `python -m bench.dataset --device cuda`"
            )
    return "\n".join([*run_table(), "", "`python -m bench.dataset`", "", *(lines or [f"On a GPU: {NOT_MEASURED}."])])


PARTS: dict[str, Callable[[], str]] = {
    "methods": method_table,
    "coverage": coverage_table,
    "cost": cost_table,
    "memory": memory_table,
    "operations": operations_table,
    "faithfulness": faithfulness_tables,
    "dataset": dataset_table,
}


def rendered(text: str) -> str:
    """The README with every marked part replaced."""
    for name, part in PARTS.items():
        pattern = rf"(<!-- {name}: generated by python -m bench.readme -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda match, part=part: f"{match[1]}{part()}\n{match[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{README.name}: expected one marked part {name!r}, found {count}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    current = README.read_text()
    wanted = rendered(current)
    if options.check:
        sys.exit(f"{README.name} is out of date: run python -m bench.readme" if wanted != current else 0)
    README.write_text(wanted)


if __name__ == "__main__":
    main()
