"""The README's short tables: each method in a line, which models, and what linear memory is worth."""

from __future__ import annotations

import math

import vitexplain
from vitexplain.evaluate.controls import CENTRE_PRIOR
from vitexplain.evaluate.results import Column, Results
from vitexplain.evaluate.tables import NO_VALUE, interval, number

from .coverage import COVERAGE, REFUSED, Pair
from .coverage import read as read_coverage
from .lines import Line, line_of, lines_of, ours_on, ratio_to_forward_backward
from .record import Row, read_rows, results_path
from .registry import DENSE, FORWARD_BACKWARD
from .table import CPU, machine, number_of, results_of, timm_sentence, tokens_table

RANDOM = "random"
CONTROLS = {RANDOM: "*random map*", CENTRE_PRIOR: "*centre prior*"}
COLUMNS = (("perturbation", "AOPC", ".3f"), ("localisation", "mIoU", ".1f"))


def overview_table() -> str:
    """Every method in a line: what it explains, how faithful it is, what it takes."""
    found = [_column(case, metric) for case, metric, _ in COLUMNS]
    rows = read_rows(results_path(CPU), case="explanations")
    lines = [line for line in lines_of(rows) if line.size == _first_size(rows)]
    text = [
        f"| method | name | of a class | AOPC ↑ | mIoU ↑ | time ÷ {FORWARD_BACKWARD} |",
        "|---|---|---|--:|--:|--:|",
    ]
    for info in vitexplain.methods():
        line = line_of(lines, info.name, ours_on(CPU))
        pace = NO_VALUE if line is None else number_of(ratio_to_forward_backward(line, lines))
        specific = "yes" if info.class_specific else "no"
        text.append(f"| {info.title} | `{info.name}` | {specific} | {_figures(info.name, found)} | {pace} |")
    text += [f"| {title} | | | {_figures(label, found)} | |" for label, title in CONTROLS.items()]
    (perturbation, _), (localisation, _) = found
    return "\n".join(
        [
            *text,
            "",
            f"AOPC: mean loss of the predicted class's probability while the pixels with the largest weight are removed; mIoU: "
            f"with masks of the objects; 95 % intervals over {perturbation.timing['images']} and "
            f"{localisation.timing['images']} photos, {perturbation.settings['model']['name']}. {_timed(lines, rows)} "
            f"{NO_VALUE}: not measured.",
        ]
    )


def _column(case: str, metric: str) -> tuple[Results, Column]:
    """A case's column, of the predicted class where there are several."""
    results = results_of(case)
    return results, next(column for column in results.columns if column.metric == metric)


def _figures(label: str, found: list[tuple[Results, Column]]) -> str:
    cells = []
    for (results, column), (_, _, style) in zip(found, COLUMNS, strict=True):
        figure = results.figure(label, column)
        cells.append(NO_VALUE if figure is None else f"{number(figure.mean, style)} {interval(figure, style)}")
    return " | ".join(cells)


def _first_size(rows: list[Row]) -> tuple[object, ...]:
    return next(line.size for line in lines_of(rows) if line.measured)


def _timed(lines: list[Line], rows: list[Row]) -> str:
    first = lines[0]
    return f"Time: {first.model}, batch {first.batch}, {first.dtype}, {machine(rows)}."


def families_table() -> str:
    """Which families are explained, those together that the same methods refuse."""
    pairs = read_coverage(COVERAGE, Pair)
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for package, family in dict.fromkeys((pair.package, pair.family) for pair in pairs):
        mine = [pair for pair in pairs if (pair.package, pair.family) == (package, family)]
        refused = tuple(pair.method for pair in mine if pair.outcome == REFUSED)
        groups.setdefault((package, refused), []).append(family)
    text = ["| from | models | explained by every method but |", "|---|---|---|"]
    for (package, refused), families in groups.items():
        text.append(f"| {package} | {'; '.join(families)} | {', '.join(f'`{name}`' for name in refused) or NO_VALUE} |")
    return "\n".join([*text, "", timm_sentence()])


def growth_table() -> str:
    """`tokentm` over the number of tokens, beside stored maps."""
    rows = read_rows(results_path(CPU), case="resolution")
    lines = [line for line in lines_of(rows) if line.model]
    first = next(line for line in lines if line.measured)
    mine = [line for line in lines if (line.model, line.dtype) == (first.model, first.dtype)]
    ours, dense = (line_of(_at_most_tokens(mine), "tokentm", provider) for provider in (ours_on(CPU), DENSE))
    table = tokens_table(mine, ours_on(CPU), rows)
    if ours is None or dense is None or not (ours.measured and dense.measured):
        return table
    times, memory = (dense.value(metric) / ours.value(metric) for metric in ("time", "peak memory"))
    if math.isnan(memory):
        return table
    return f"{table}\n\nAt {ours.tokens:,} tokens: {times:.1f} × faster and {memory:.1f} × less memory than stored maps."


def _at_most_tokens(lines: list[Line]) -> list[Line]:
    """The lines at the largest number of tokens at which the dense reference was measured."""
    most = max((line.tokens for line in lines if line.provider == DENSE and line.measured), default=0)
    return [line for line in lines if line.tokens == most]
