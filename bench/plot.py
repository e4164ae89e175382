"""Draw what was measured: time and memory over tokens, rooflines, methods beside one forward and backward.

What was not measured is not drawn: no line is continued, and a figure without a measured row is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter, NullLocator

from .layer_operations import LIBRARY
from .lines import OUT_OF_MEMORY, Line, fitted_exponent, lines_of, points_of, ratio_to_forward_backward
from .record import Row, devices, read_rows, results_path
from .registry import BASELINES, CAPTUM, COLREDUCE, DENSE, FORWARD_BACKWARD, GRAD_CAM, MODEL_ITSELF, TORCH, TRITON

DOCS = Path(__file__).resolve().parent.parent / "docs" / "benchmark"
DPI = 150

# Okabe and Ito's colours, which the colour-blind can tell apart; a provider has the same one in every figure
COLORS = {
    TORCH: "#0072B2", TRITON: "#332288", DENSE: "#D55E00", CAPTUM: "#E69F00", GRAD_CAM: "#CC79A7", COLREDUCE: "#B79F00",
    f"{COLREDUCE} (naive)": "#B79F00", MODEL_ITSELF: "#4D4D4D", LIBRARY: "#4D4D4D",
}  # fmt: skip
OTHER, GUIDE = "#8C8C8C", "#B0B0B0"
PLAIN, STYLES = "-", ("--", "-.", ":")  # of a provider as it comes, and of its variants one after the other
HATCHES = ("//////", "......", "xxxxxx")
MARKERS = "os^Dv<>P"

Drawing = Callable[[Sequence[Row]], Figure | None]


def draw(device: str | None) -> list[Path]:
    """Every figure of a device, or of all that have results; says which are left out, and why."""
    written = []
    for name in devices() if device is None else [device]:
        for case, file, drawing in FIGURES:
            figure = drawing(read_rows(results_path(name), case=case))
            if figure is None:
                print(f"{name}: {file} is not drawn: nothing of case {case} that it shows was measured")
                continue
            path = DOCS / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=DPI, bbox_inches="tight", metadata={"Software": None})
            written.append(path)
    return written


def base_of(provider: str) -> str:
    """Whose variant a provider is, itself where it is none: ``"vitexplain (torch), compiled"`` is one of the first part."""
    return next((name for name in COLORS if provider.startswith(f"{name}, ")), provider)


def color_of(provider: str) -> str:
    """A provider's colour, which its variants share."""
    return COLORS.get(base_of(provider), OTHER)


def _variant_number(provider: str, among: Sequence[str]) -> int | None:
    """Which of its provider's variants it is; None for the provider as it comes."""
    base = base_of(provider)
    variants = [name for name in dict.fromkeys(among) if name != base and base_of(name) == base]
    return None if provider == base else variants.index(provider)


def style(provider: str, among: Sequence[str]) -> str:
    """Solid, or dashed for a variant."""
    number = _variant_number(provider, among)
    return PLAIN if number is None else STYLES[number % len(STYLES)]


def hatch(provider: str, among: Sequence[str]) -> str | None:
    """What tells a variant's bar from its provider's."""
    number = _variant_number(provider, among)
    return None if number is None else HATCHES[number % len(HATCHES)]


def _variant_of(provider: str) -> str:
    """What a variant does differently, behind a comma; empty for a provider as it comes."""
    return provider.removeprefix(base_of(provider))


def _panels(count: int, width: float, height: float, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """A figure with axes for that many panels, without frames to the top and right."""
    across = min(count, columns)
    figure = Figure(figsize=(width * across, height * math.ceil(count / across)), layout="constrained")
    axes = [figure.add_subplot(math.ceil(count / across), across, 1 + number) for number in range(count)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(True, color="#E6E6E6", linewidth=0.6)
        one.set_axisbelow(True)
    return figure, axes


# -- over the number of tokens -------------------------------------------------------------------------------------------


def time_over_tokens(rows: Sequence[Row]) -> Figure | None:
    """Milliseconds an image."""
    return _over_tokens(rows, "time", "time per image, ms")


def memory_over_tokens(rows: Sequence[Row]) -> Figure | None:
    """MiB an image."""
    return _over_tokens(rows, "peak memory", "peak memory per image, MiB")


def _over_tokens(rows: Sequence[Row], metric: str, label: str) -> Figure | None:
    lines = [line for line in lines_of(rows) if "time" in line.figures]
    groups = {(line.model, line.dtype) for line in lines if not math.isnan(line.value(metric))}
    if not groups:
        return None
    figure, axes = _panels(len(groups), 6.2, 5.2)
    for one, (model, dtype) in zip(axes, sorted(groups), strict=True):
        _growth([line for line in lines if (line.model, line.dtype) == (model, dtype)], metric, one)
        one.set(title=f"{model}, {dtype}", xlabel="tokens n", ylabel=label)
    return figure


def _growth(lines: list[Line], metric: str, axes: Axes) -> None:
    """One line a provider and piece of work: the work is told by the marker, a variant by its dashes."""
    axes.set(xscale="log", yscale="log")
    works = [work for work in dict.fromkeys(line.work for line in lines) if work not in BASELINES]
    providers = [line.provider for line in lines]
    full: dict[tuple[int, str], None] = {}
    for work, provider in dict.fromkeys((line.work, line.provider) for line in lines):
        mine = sorted((line for line in lines if (line.work, line.provider) == (work, provider)), key=lambda line: line.tokens)
        points = points_of(mine, metric)
        marker = MARKERS[works.index(work) % len(MARKERS)] if work in works else "."
        if points:
            axes.plot(
                *zip(*points, strict=True), style(provider, providers), color=color_of(provider), marker=marker, markersize=4,
                label=_with_exponent(work, provider, points),
            )  # fmt: skip
            _band(mine, metric, axes, color_of(provider))
        full |= dict.fromkeys([(line.tokens, provider) for line in mine if line.out_of_memory][:1])
    ticks = sorted({line.tokens for line in lines if line.out_of_memory or not math.isnan(line.value(metric))})
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks], rotation=40, ha="right")
    axes.xaxis.set_minor_locator(NullLocator())
    if full:
        axes.set_ylim(top=3 * axes.get_ylim()[1])  # room for the marks at the edge
    _guides(axes)
    for tokens, provider in full:
        _mark_out_of_memory(axes, tokens, provider)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), frameon=False, fontsize=8)


def _with_exponent(work: str, provider: str, points: list[tuple[int, float]]) -> str:
    exponent = fitted_exponent(points)
    grows = "" if math.isnan(exponent) else rf"  $\propto n^{{{exponent:.2f}}}$"
    return f"{work}{'' if work in BASELINES else f', {provider}'}{grows}"


def _band(lines: list[Line], metric: str, axes: Axes, shade: str) -> None:
    """20th to 80th percentile, where a figure is of several samples."""
    rows = [(line, line.figures[metric]) for line in lines if not math.isnan(line.value(metric))]
    spreads = [(line.tokens, float(row.p20) / line.batch, float(row.p80) / line.batch) for line, row in rows if row.repeats > 1]
    if spreads:
        axes.fill_between(*zip(*spreads, strict=True), color=shade, alpha=0.18, linewidth=0)


def _guides(axes: Axes) -> None:
    """What grows like n and like n², from the lower left corner."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for slope, label in ((1, "∝ n"), (2, "∝ n²")):
        end = min(right, left * (top / bottom) ** (1 / slope))
        axes.plot([left, end], [bottom, bottom * (end / left) ** slope], color=GUIDE, linewidth=0.9, linestyle=":", zorder=1)
        middle = math.sqrt(left * end)
        axes.annotate(
            label, (middle, bottom * (middle / left) ** slope), (6, -6), textcoords="offset points", ha="left", va="top",
            color="#808080", fontsize=8,
        )  # fmt: skip
    axes.set(xlim=(left, right), ylim=(bottom, top))


def _mark_out_of_memory(axes: Axes, tokens: int, provider: str) -> None:
    """A cross at the top edge."""
    top = axes.get_xaxis_transform()
    axes.plot(
        [tokens], [1.0], "x", transform=top, color=color_of(provider), markersize=9, markeredgewidth=2, clip_on=False, zorder=5
    )
    axes.annotate(
        OUT_OF_MEMORY, (tokens, 1.0), (0, -7), xycoords=top, textcoords="offset points", ha="center", va="top", fontsize=8,
        color=color_of(provider),
    )  # fmt: skip


# -- roofline ------------------------------------------------------------------------------------------------------------


def roofline(rows: Sequence[Row]) -> Figure | None:
    """Every operation and size, ours and the library's, under the roof that a large product and a large copy make."""
    lines = sorted(lines_of(rows), key=lambda line: line.provider != LIBRARY)
    on_gpu = any(line.provider == TRITON and line.measured for line in lines)
    others = {DENSE, TORCH} if on_gpu else {DENSE}
    panels = {}
    for dtype in dict.fromkeys(line.dtype for line in lines):
        mine = [line for line in lines if line.dtype == dtype]
        shown = [
            line for line in mine if base_of(line.provider) not in others and line.value("work") > 0 and line.value("moved") > 0
        ]
        compute, bandwidth = _peak(mine, "large product"), _peak(mine, "large copy")
        if shown and compute > 0 and bandwidth > 0:
            panels[dtype] = shown, compute, bandwidth
    if not panels:
        return None
    figure, axes = _panels(len(panels), 8.5, 6.4, columns=1)
    for one, (dtype, (shown, compute, bandwidth)) in zip(axes, panels.items(), strict=True):
        _under_roof(shown, compute, bandwidth, one)
        one.set(title=dtype, xlabel="FLOP per byte", ylabel="TFLOP/s")
    return figure


def _peak(lines: list[Line], provider: str) -> float:
    return next((line.value("rate") for line in lines if (line.work, line.provider) == ("peak", provider)), math.nan)


def _under_roof(lines: list[Line], compute: float, bandwidth: float, axes: Axes) -> None:
    """Points of one operation are joined and carry its number; the marker's form is the size, its colour the provider."""
    places = {id(line): (1e3 * line.value("work") / line.value("moved"), line.value("rate")) for line in lines}
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    sizes = list(dict.fromkeys((line.tokens, line.batch, line.model) for line in lines))
    numbered = list(dict.fromkeys((line.work, line.provider) for line in lines))
    ends = []
    for number, key in enumerate(numbered, 1):
        mine = [line for line in lines if (line.work, line.provider) == key]
        shade = color_of(key[1])
        dashes = style(key[1], [provider for _, provider in numbered])
        axes.plot(*zip(*(places[id(line)] for line in mine), strict=True), dashes, color=shade, linewidth=0.5, alpha=0.5)
        for line in mine:
            form = MARKERS[sizes.index((line.tokens, line.batch, line.model)) % len(MARKERS)]
            axes.plot(*places[id(line)], form, color=shade, markersize=4.5, alpha=0.8)
        ends.append((places[id(mine[-1])], str(number), shade))
    across = [x for x, _ in places.values()]
    roof = sorted([min(across) / 2, compute / bandwidth, max(*across, compute / bandwidth) * 2])
    axes.plot(roof, [min(compute, bandwidth * x) for x in roof], color="black", linewidth=1.2)
    axes.annotate(f"{compute:.3g} TFLOP/s", (roof[-1], compute), (0, 4), textcoords="offset points", ha="right", fontsize=8)
    slope = math.sqrt(roof[0] * roof[1])  # the middle of the slanted part
    axes.annotate(f"{bandwidth:.3g} TB/s", (slope, bandwidth * slope), (8, -4), textcoords="offset points", fontsize=8)
    _keys(axes, numbered, sizes)
    axes.figure.draw_without_rendering()  # places are known once everything has its own
    _number_without_overlap(axes, ends, list(places.values()))


def _number_without_overlap(
    axes: Axes, ends: list[tuple[tuple[float, float], str, str]], points: list[tuple[float, float]]
) -> None:
    """A number beside the last point of each operation, at the first place around it that is free."""
    scale = 72 / axes.figure.dpi  # pixels to points
    taken = [tuple(scale * value for value in axes.transData.transform(point)) for point in points]
    ways = ((1, 0), (0.7, 0.7), (0.7, -0.7), (0, 1), (0, -1), (-0.7, 0.7), (-0.7, -0.7), (-1, 0))
    around = [(radius * dx, radius * dy) for radius in (11, 17, 23, 30, 38, 46) for dx, dy in ways]
    for place, text, shade in ends:
        x, y = (scale * value for value in axes.transData.transform(place))
        free = ((dx, dy) for dx, dy in around if all(abs(x + dx - a) > 10 or abs(y + dy - b) > 8 for a, b in taken))
        offset = next(free, around[0])
        taken.append((x + offset[0], y + offset[1]))
        axes.annotate(
            text, place, offset, textcoords="offset points", ha="center", va="center", fontsize=8, color=shade, weight="bold",
            arrowprops={"arrowstyle": "-", "color": shade, "linewidth": 0.5, "shrinkA": 4, "shrinkB": 2},
        )  # fmt: skip


def _keys(axes: Axes, numbered: list[tuple[str, str]], sizes: list[tuple[int, int, str]]) -> None:
    """What numbers, forms and colours stand for, beside the panel."""
    providers = list(dict.fromkeys(base_of(provider) for _, provider in numbered))
    names = "\n".join(f"{number}  {work}{_variant_of(provider)}" for number, (work, provider) in enumerate(numbered, 1))
    axes.text(1.02, 1.0, names, transform=axes.transAxes, va="top", fontsize=7.5, linespacing=1.4)
    handles: list[object] = [
        axes.plot([], [], MARKERS[i % len(MARKERS)], color="black", label=f"n = {tokens:,}, batch {batch}, {model}")[0]
        for i, (tokens, batch, model) in enumerate(sizes)
    ]
    if len(providers) > 1:
        handles += [Patch(color=color_of(name), label=name) for name in providers]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(1.0, 0.0), frameon=False, fontsize=7.5)


# -- methods -------------------------------------------------------------------------------------------------------------


def methods(rows: Sequence[Row]) -> Figure | None:
    """Time of every method over that of one forward and backward, whoever explains."""
    lines = lines_of(rows)
    ratios = {id(line): ratio_to_forward_backward(line, lines) for line in lines if line.work not in BASELINES}
    panels: dict[tuple[object, ...], list[Line]] = {}
    for line in lines:
        if not math.isnan(ratios.get(id(line), math.nan)):
            panels.setdefault(line.size, []).append(line)
    if not panels:
        return None
    most = max(len(shown) for shown in panels.values())
    figure, axes = _panels(len(panels), 7.0, 1.2 + 0.2 * most)
    for one, ((model, batch, _, dtype), shown) in zip(axes, panels.items(), strict=True):
        _bars(shown, [ratios[id(line)] for line in shown], one)
        one.set(title=f"{model}, batch {batch}, {dtype}", xlabel=f"time ÷ {FORWARD_BACKWARD}")
    return figure


def _bars(lines: list[Line], ratios: list[float], axes: Axes) -> None:
    """A group of bars a method, the first on top, the value at each bar's end."""
    works, named = list(dict.fromkeys(line.work for line in lines)), list(dict.fromkeys(line.provider for line in lines))
    place, ticks = 0.0, []
    for work in works:
        mine = [(line, ratio) for line, ratio in zip(lines, ratios, strict=True) if line.work == work]
        ticks.append(place + 0.5 * (len(mine) - 1))
        for line, ratio in mine:
            low, high = _whisker(line, ratio)
            axes.barh(place, ratio, 0.9, **_fill(line.provider, named))
            axes.errorbar(ratio, place, xerr=[[low], [high]], color="black", linewidth=0.8, capsize=1.5)
            axes.annotate(
                f"{ratio:.3g}",
                (ratio + high, place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                bbox={"color": "white", "pad": 0.5},
            )
            place += 1
        place += 0.6
    axes.set_yticks(ticks, works, fontsize=8)
    axes.set_ylim(place - 0.9, -0.8)
    axes.margins(x=0.1)
    axes.grid(False, axis="y")
    axes.axvline(1, color="black", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.legend(
        handles=[Patch(**_fill(name, named), label=name) for name in named], loc="upper center", frameon=False, fontsize=8,
        bbox_to_anchor=(0.5, -0.6 / (0.2 * len(lines) + 0.8)), ncol=2,
    )  # fmt: skip


def _fill(provider: str, among: Sequence[str]) -> dict[str, object]:
    """A bar's colour, and white lines across it for a variant."""
    return {"facecolor": color_of(provider), "edgecolor": "white", "linewidth": 0, "hatch": hatch(provider, among)}


def _whisker(line: Line, ratio: float) -> tuple[float, float]:
    """How far the 20th and the 80th percentile are from the median; nothing where it is a quotient of medians."""
    row = line.figures.get(f"ratio to {FORWARD_BACKWARD}")
    return (0.0, 0.0) if row is None or not row.measured else (ratio - float(row.p20), float(row.p80) - ratio)


FIGURES: tuple[tuple[str, str, Drawing], ...] = (
    ("resolution", "time_over_tokens.png", time_over_tokens),
    ("resolution", "memory_over_tokens.png", memory_over_tokens),
    ("operations", "roofline.png", roofline),
    ("explanations", "methods.png", methods),
)
