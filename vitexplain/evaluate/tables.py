"""An evaluation's figures as tables of Markdown, laid out as the papers do."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import unknown_name
from .controls import CENTRE_PRIOR
from .results import Column, Figure, MethodEntry, Results

EXPLAINED = {"pred": "predicted", "gt": "ground truth"}
NO_VALUE = "–"
LEGEND = (
    "Each figure is followed by its 95 % interval, a bootstrap over images. **Bold**: better than every other row, each by a "
    "paired 95 % interval that excludes zero."
)

_PROTOCOLS = {
    "perturbation": (
        "Perturbation",
        "Pixels are removed from the photo in the order of the map, and the model looks again (VTranM, Tables 1 to 3).",
    ),
    "insertion_deletion": (
        "Insertion and deletion",
        "The probability of the explained class while its most important pixels come, or go (RISE).",
    ),
    "average_drop": (
        "Average drop and increase",
        "The probability of the explained class when the photo is multiplied by its map, scaled to 0 to 1 (Grad-CAM++).",
    ),
    "localisation": ("Localisation", "The map against a mask of the object (VTranM, Table 2)."),
    "saco": ("SaCo", "Whether pixels with more weight in the map also have more effect on the model (CVPR 2024)."),
    "ablation": (
        "Ablation of TokenTM",
        "The perturbation protocol on variants of TokenTM, its parts switched on one after the other (VTranM, Table 4).",
    ),
    "quantus": ("Quantus", "A metric of the library Quantus, as that library computes it."),
}
_REMOVED = {
    "positive": "accuracy while the most important pixels are removed first, area under the curve × 100",
    "negative": "accuracy while the least important pixels are removed first, area under the curve × 100",
    "AOPC": "mean loss of the predicted class's probability while the most important pixels are removed",
    "LOdds": "mean of ln(probability after / before) of the predicted class while the most important pixels are removed",
}
_METRICS = {
    "perturbation": _REMOVED,
    "ablation": _REMOVED,
    "insertion_deletion": {
        "insertion": "probability of the class while its most important pixels come first, area under the curve × 100",
        "deletion": "probability of the class while its most important pixels go first, area under the curve × 100",
    },
    "average_drop": {
        "average drop": "share of the class's probability that is lost when only what the map shows is left, mean over photos",
        "average increase": "share of the photos whose probability rises when only what the map shows is left",
    },
    "localisation": {
        "pixel accuracy": "share of all pixels on the right side, where the map's foreground is above the threshold",
        "mIoU": "intersection over union with the mask, mean of object and background, over all photos' pixels together",
        "mAP": "average precision of the map as a score of object and background, mean over photos",
        "AUROC": "chance that a pixel of the object has more weight than one of the background, mean over photos; 50 % is chance",
    },
    "saco": {"SaCo": "agreement of groups of pixels' weight and effect, from −1 (reversed) through 0 (none) to 1"},
}
_CHECKSUM = re.compile(r"[0-9a-f]{32,}")
_GROUPS = {"method": "", "ablation": "variants", "control": "controls"}  # in this order; methods need no heading


@dataclass(frozen=True)
class Row:
    """A method's row: its name for people, its kind, and its figures in the order of the columns, None where not measured."""

    label: str
    name: str
    kind: str
    figures: tuple[Figure | None, ...]


@dataclass(frozen=True)
class Head:
    """A column's heading: the metric with its arrow, the explained class where the table has several, one line on the metric."""

    title: str
    explained: str
    meaning: str

    @property
    def text(self) -> str:
        """On one line, such as ``"predicted: positive ↓"``."""
        return f"{self.explained}: {self.title}" if self.explained else self.title


@dataclass(frozen=True)
class Note:
    """A remark below a table: what it is about, and what is to be said of that."""

    about: str
    text: str


@dataclass(frozen=True)
class Layout:
    """One protocol's table, for whatever writes it down: rows by methods, variants, controls; a head for each column."""

    protocol: str
    title: str
    summary: str
    columns: tuple[Column, ...]
    heads: tuple[Head, ...]
    rows: tuple[Row, ...]
    notes: tuple[Note, ...]


# -- Markdown ----------------------------------------------------------------------------------------------------------


def markdown(results: Results) -> str:
    """What ``results.md`` holds: what was evaluated, a table for each protocol, which images were left out, and the settings."""
    parts = ["# Evaluation", _bullets(overview(results)), LEGEND]
    for protocol in protocols(results):
        layout = lay_out(results, protocol)
        parts += [f"## {escaped(layout.title)}", escaped(layout.summary), _table(layout)]
    if results.left_out:
        parts += ["## Left out", _left_out(results)]
    if settings_lines(results):
        parts += ["## Settings", _bullets(settings_lines(results))]
    return "\n\n".join(parts) + "\n"


def table(results: Results, protocol: str, methods: Sequence[str] | None = None) -> str:
    """One protocol's table with the remarks that belong to it, as Markdown.

    Args:
        results: an evaluation's.
        protocol: its label.
        methods: labels of the rows to show, in the results' order; None shows all.

    Returns:
        Text that ends with a line break.

    Raises:
        UnknownNameError: the results have no such protocol or method.
    """
    return _table(lay_out(results, protocol, methods)) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is; what is no text, in names of files, as its escape."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    text = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\`*|\[\]~$]|\b_|_\b", r"\\\g<0>", text)


def _table(layout: Layout) -> str:
    lines = [["method", *(escaped(head.text) for head in layout.heads)]]
    styles = number_styles(layout)
    for group, rows in groups(layout):
        if group:
            lines.append([f"*{group}*", *[""] * len(layout.columns)])
        lines += [[escaped(row.name), *_cells(layout, row, styles)] for row in rows]
    notes = [f"- {escaped(note.about)}: {escaped(note.text)}" for note in layout.notes]
    return "\n".join([*_aligned(lines), *([""] if notes else []), *notes])


def _cells(layout: Layout, row: Row, styles: Sequence[str]) -> list[str]:
    cells = []
    for column, figure, style in zip(layout.columns, row.figures, styles, strict=True):
        if figure is None:
            cells.append(NO_VALUE)
            continue
        value = number(figure.mean, style)
        value = f"**{value}**" if column.winner == row.label else value
        cells.append(f"{value} {interval(figure, style)}")
    return cells


def _aligned(lines: list[list[str]]) -> list[str]:
    """Rows of a Markdown table, padded so that they can be read as they are."""
    widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
    rows = [
        " | ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    rule = "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths))
    return [f"| {rows[0]} |", f"|{rule}|", *(f"| {row} |" for row in rows[1:])]


def _bullets(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- **{escaped(name)}**: {escaped(value)}" for name, value in facts.items())


def _left_out(results: Results, shown: int = 5) -> str:
    entries = results.left_out
    lines = [f"- {escaped(name)}: {escaped(reason)}" for name, reason in map(left_out_entry, entries[:shown])]
    more = [f"- and {len(entries) - shown} more, see results.json"] if len(entries) > shown else []
    return "\n".join([f"{_counted(len(entries), 'image')} could not be read:", "", *lines, *more])


# -- what a table holds ------------------------------------------------------------------------------------------------


def protocols(results: Results) -> list[str]:
    """Labels of the protocols that have columns, in their order."""
    return list(dict.fromkeys(column.protocol for column in results.columns))


def lay_out(results: Results, protocol: str, methods: Sequence[str] | None = None) -> Layout:
    """One protocol's columns, rows and remarks; arguments and errors as for ``table``."""
    if protocol not in protocols(results):
        raise unknown_name("protocol", protocol, protocols(results))
    for label in methods or ():
        if label not in results.methods:
            raise unknown_name("method", label, results.methods)
    columns = _columns(results, protocol)
    rows = _rows(results, columns, methods)
    heads = _heads(columns)
    return Layout(
        protocol,
        protocol_title(protocol),
        _summary(results, protocol, columns),
        columns,
        heads,
        rows,
        (*_verdicts(results, columns, heads, rows), *_against_centre_prior(results, protocol, columns, heads, rows)),
    )


def groups(layout: Layout) -> list[tuple[str, list[Row]]]:
    """The rows in groups, each with its heading; what a table begins with has one only if it is of controls."""
    found: list[tuple[str, list[Row]]] = []
    for heading, rows in itertools.groupby(layout.rows, key=lambda row: _GROUPS.get(row.kind, "")):
        found.append((heading if found or heading == _GROUPS["control"] else "", list(rows)))
    return found


def protocol_title(protocol: str) -> str:
    """For people; a label's own options follow in brackets."""
    name, _, options = protocol.partition(":")
    title = _PROTOCOLS.get(name, (name, ""))[0]
    return f"{title} ({_spaced(options)})" if options else title


def names(results: Results) -> dict[str, str]:
    """Titles by label, each once; a method's options follow it in brackets, and a variant of an ablation has its label alone."""
    plain = {label: _name(label, entry) for label, entry in results.methods.items()}
    shared = [name for name, count in Counter(plain.values()).items() if count > 1]
    return {label: f"{name} [{label}]" if name in shared else name for label, name in plain.items()}


def _name(label: str, entry: MethodEntry) -> str:
    if entry.kind == "ablation":
        return label
    options = label.partition(":")[2]
    return f"{entry.title} ({_spaced(options)})" if options else entry.title


def _spaced(options: str) -> str:
    return options.replace("=", " = ").replace(",", ", ")


def _columns(results: Results, protocol: str) -> tuple[Column, ...]:
    """In order, but each metric's explained classes side by side."""
    found = [column for column in results.columns if column.protocol == protocol]
    metrics = list(dict.fromkeys(column.metric for column in found))
    return tuple(sorted(found, key=lambda column: metrics.index(column.metric)))


def _rows(results: Results, columns: Sequence[Column], methods: Sequence[str] | None) -> tuple[Row, ...]:
    """Those that have a figure: methods, then variants, then controls."""
    figures = {(f.method, f.protocol, f.metric, f.explained): f for f in results.figures}
    titles = names(results)
    rows = []
    for label, entry in results.methods.items():
        cells = tuple(figures.get((label, c.protocol, c.metric, c.explained)) for c in columns)
        if any(cells) and (methods is None or label in methods):
            rows.append(Row(label, titles[label], entry.kind, cells))
    order = list(_GROUPS)
    return tuple(sorted(rows, key=lambda row: order.index(row.kind) if row.kind in order else 0))


def _heads(columns: Sequence[Column]) -> tuple[Head, ...]:
    several = len({column.explained for column in columns}) > 1
    return tuple(
        Head(c.title, EXPLAINED.get(c.explained, c.explained) if several else "", _meaning(c.protocol, c.metric)) for c in columns
    )


def _meaning(protocol: str, metric: str) -> str:
    """One line; a metric's variant, named in brackets, has the meaning of the metric."""
    known = _METRICS.get(protocol.partition(":")[0], {})
    return known.get(metric) or known.get(metric.partition(" (")[0], "")


def _summary(results: Results, protocol: str, columns: Sequence[Column]) -> str:
    """What the protocol does, with which options, and which class was explained."""
    about = _PROTOCOLS.get(protocol.partition(":")[0], ("", ""))[1]
    chosen = results.settings.get("protocols")
    options = {name: item for name, item in _options(_options(chosen).get(protocol)).items() if name != "name"}
    parts = [
        about,
        f"Options: {brief(options)}." if options else "",
        f"Explained class: {_classes(columns)}.",
        _units(columns),
    ]
    return " ".join(part for part in parts if part)


def _classes(columns: Sequence[Column]) -> str:
    return " and ".join(EXPLAINED.get(name, name) for name in dict.fromkeys(column.explained for column in columns))


def _units(columns: Sequence[Column]) -> str:
    percent = list(dict.fromkeys(column.metric for column in columns if column.unit == "%"))
    if not percent:
        return ""
    return "All figures in %." if all(column.unit == "%" for column in columns) else f"In %: {', '.join(percent)}."


# -- remarks -----------------------------------------------------------------------------------------------------------


def _verdicts(results: Results, columns: Sequence[Column], heads: Sequence[Head], rows: Sequence[Row]) -> list[Note]:
    """One for each column that has nothing in bold."""
    shown = {row.label for row in rows}
    titles = names(results)
    notes = []
    for column, head in zip(columns, heads, strict=True):
        if column.winner is None:
            notes.append(Note(head.text, _no_winner(results, column, titles, len(rows))))
        elif column.winner not in shown:
            notes.append(Note(head.text, f"the best is {titles.get(column.winner, column.winner)}, which is not shown here."))
    return notes


def _no_winner(results: Results, column: Column, titles: Mapping[str, str], num_rows: int) -> str:
    sign = 1 if column.better == "lower" else -1
    means = {label: figure.mean for label in column.contenders if (figure := results.figure(label, column))}
    if num_rows < 2 or not means:
        return "no winner, as there is nothing to compare with."
    best, *others = sorted(means, key=lambda label: sign * means[label])
    if not others:
        return f"no winner; {titles[best]} is best."
    return f"no winner; {titles[best]} is best, and cannot be told from it: {', '.join(titles[label] for label in others)}."


def _against_centre_prior(
    results: Results, protocol: str, columns: Sequence[Column], heads: Sequence[Head], rows: Sequence[Row]
) -> list[Note]:
    """Photographers centre their objects: only what beats a blob in the middle has found one."""
    if protocol.partition(":")[0] != "localisation":
        return []
    priors = [results.figure(CENTRE_PRIOR, column) for column in columns]
    if not any(priors):
        return [Note(CENTRE_PRIOR, "not among the rows, so no claim about localisation can be made.")]
    return [
        Note(
            head.text, _compared(prior, column.better, [(row.name, row.figures[index]) for row in rows if row.kind != "control"])
        )
        for index, (prior, column, head) in enumerate(zip(priors, columns, heads, strict=True))
        if prior is not None
    ]


def _compared(prior: Figure, better: str, figures: Sequence[tuple[str, Figure | None]]) -> str:
    """By whole intervals: the results hold no paired differences to a control."""
    measured = [(name, figure) for name, figure in figures if figure is not None]
    beats = [name for name, f in measured if (f.low > prior.high if better == "higher" else f.high < prior.low)]
    others = [name for name, _ in measured if name not in beats]
    where = f"{'above' if better == 'higher' else 'below'} that of the {CENTRE_PRIOR}"
    if not beats:
        return f"no method's interval lies {where}."
    if not others:
        return f"every method's interval lies {where}."
    rest = f"not so {', '.join(others)}" if len(others) <= 4 else f"not so the other {len(others)} methods"
    return f"the interval lies {where} for {', '.join(beats)}; {rest}."


# -- figures and settings as text ---------------------------------------------------------------------------------------


def number_styles(layout: Layout) -> list[str]:
    """For each column the format of its numbers: a percentage to one decimal, others to what their size makes sensible."""
    return [
        _number_style(column.unit, [abs(figure.mean) for row in layout.rows if (figure := row.figures[index]) is not None])
        for index, column in enumerate(layout.columns)
    ]


def _number_style(unit: str, sizes: Sequence[float]) -> str:
    largest = max(sizes, default=0.0)
    if unit == "%":
        return ".1f"
    if 0 < largest < 0.01 or largest >= 1e5:
        return ".2e"
    return ".3f" if largest < 1.5 else ".2f" if largest < 100 else ".1f"


def number(value: float, style: str) -> str:
    """With a true minus sign, and no minus before zero."""
    text = format(value, style)
    return text.removeprefix("-") if float(text) == 0 else text.replace("-", "−")


def interval(figure: Figure, style: str) -> str:
    """Such as ``[13.1, 15.6]``."""
    return f"[{number(figure.low, style)}, {number(figure.high, style)}]"


def overview(results: Results) -> dict[str, str]:
    """What was evaluated, for people, by heading: model, data, images, explained classes, device, versions; one line each."""
    settings, environment = dict(results.settings), dict(results.environment)
    facts = {name.capitalize(): brief(settings.get(name)) for name in ("model", "data") if settings.get(name)}
    facts["Images"] = _images(results)
    facts["Explained class"] = _classes(results.columns)
    device = [brief(part) for part in (environment.pop("device", None), settings.get("dtype")) if part]
    facts["Device"] = ", ".join(device)
    versions = [brief(environment.pop("versions"))] if "versions" in environment else []
    facts["Versions"] = ", ".join([*versions, *(f"{name} {brief(value)}" for name, value in environment.items())])
    return {name: value for name, value in facts.items() if value}


def settings_lines(results: Results) -> dict[str, str]:
    """Every setting on one line, by name, without those of the overview."""
    shown = ("model", "data", "dtype", "explained")
    return {name: brief(value) for name, value in results.settings.items() if name not in shown}


def left_out_entry(entry: Mapping[str, str]) -> tuple[str, str]:
    """Name and reason of an image that was left out."""
    return ", ".join(value for name, value in entry.items() if name != "reason"), entry.get("reason", "")


def brief(value: Any) -> str:
    """A value of the settings on one line, checksums cut short."""
    if isinstance(value, Mapping):
        listed = ", ".join(_item(str(name), item) for name, item in _options(value).items() if name != "name")
        if "name" not in value:
            return listed
        return f"{value['name']} ({listed})" if listed else str(value["name"])
    if isinstance(value, list | tuple):
        return ", ".join(map(brief, value))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return f"{value[:12]}…" if isinstance(value, str) and _CHECKSUM.fullmatch(value) else str(value)


def _item(name: str, value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"{name} = ({brief(value)})"
    if not isinstance(value, Mapping):
        return f"{name} = {brief(value)}"
    if value.get("name", name) == name or name.startswith(f"{value['name']}:"):
        value = {key: item for key, item in value.items() if key != "name"}
    text = brief(value)
    return f"{name} ({text})" if text else name


def _options(value: Any) -> dict[str, Any]:
    """Of a method or protocol in the settings; those that stand under ``options`` as if they did not."""
    if not isinstance(value, Mapping):
        return {}
    inner = value.get("options")
    return (
        {**{name: item for name, item in value.items() if name != "options"}, **inner}
        if isinstance(inner, Mapping)
        else dict(value)
    )


def _images(results: Results) -> str:
    counts = sorted({figure.count for figure in results.figures})
    text = "none" if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{text}; {len(results.left_out)} left out" if results.left_out else text


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
