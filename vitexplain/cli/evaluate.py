"""``vitexplain evaluate``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import (
    ELEMENT_TYPES,
    IMAGES,
    Backend,
    Device,
    Failure,
    Images,
    Methods,
    Model,
    Split,
    Weights,
    app,
    guarded,
    method_names,
    progress,
)

if TYPE_CHECKING:
    from rich.table import Table

    from ..evaluate import Results
    from ..evaluate.tables import Layout

_DEFAULT_PROTOCOL = "perturbation"


@app.command()
def evaluate(
    data: Annotated[
        Path,
        typer.Argument(help=IMAGES, metavar="SOURCE", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for results; an interrupted evaluation there goes on where it was.", show_default=False)
    ],
    model: Model = "demo",
    weights: Weights = None,
    method: Methods = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            "--protocol",
            "-p",
            help="perturbation, insertion_deletion, average_drop, localisation, saco, ablation, quantus; as NAME or "
            "NAME:OPTION=VALUE,…; repeat; see 'vitexplain protocols'. Default: perturbation.",
        ),
    ] = None,
    explain: Annotated[
        list[str] | None,
        typer.Option(help="Class explained: pred (predicted) or gt (the label); repeat for both. Default: pred."),
    ] = None,
    split: Split = None,
    images: Images = None,
    resize: Annotated[
        str, typer.Option(help="model (its own preprocessing), squash (the whole photo), or auto: squash where masks are read.")
    ] = "auto",
    controls: Annotated[
        bool, typer.Option(help="Measure a random map, a centre prior and the first method's negated map beside the methods.")
    ] = True,
    batch: Annotated[int | None, typer.Option(help="Images explained at once. Default: 8 on a CPU, 32 on a GPU.", min=1)] = None,
    forward_batch: Annotated[
        int | None, typer.Option(help="Changed images in one forward. Default: 64 on a CPU, 512 on a GPU.", min=1)
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"Of the forwards on changed images: {ELEMENT_TYPES}.")] = "float32",
    explain_dtype: Annotated[str, typer.Option(help=f"Of the explanations: {ELEMENT_TYPES}.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of ties, random maps and the bootstrap.", min=0)] = 0,
    bootstrap: Annotated[int, typer.Option(help="Resamples of the images for the intervals.", min=1)] = 2000,
    gallery: Annotated[int, typer.Option(help="Photos in the report, those the methods disagree on most first.", min=0)] = 12,
    device: Device = "auto",
    backend: Backend = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew, whatever stands in the folder.")] = False,
) -> None:
    """Measure how faithful methods are to a model: tables with intervals, curves and a report as one page.

    Writes results.json, results.md, report.html, curves/ and per_image/ into the output folder.
    """
    settings = {
        "explained": explain or ["pred"],
        "resize": resize,
        "controls": controls,
        "batch": batch,
        "forward_batch": forward_batch,
        "dtype": dtype,
        "explain_dtype": explain_dtype,
        "seed": seed,
        "bootstrap": bootstrap,
        "gallery": gallery,
        "backend": backend,
        "overwrite": overwrite,
    }
    where = {"path": data, "split": split, "images": images}
    guarded(lambda: _evaluate(model, weights, device, where, method, protocol, output, settings))


def _evaluate(
    model: str,
    weights: Path | None,
    device: str,
    where: dict[str, Any],
    methods: list[str] | None,
    protocols: list[str] | None,
    output: Path,
    settings: dict[str, Any],
) -> None:
    if os.path.isfile(output):
        raise Failure(f"output: expected a folder, received the file {str(output)!r}")
    from ..evaluate import evaluate as run
    from ..loading import load_model
    from ..sources import open_source

    names = method_names(methods)
    loaded = load_model(model, weights, device)
    source = open_source(where["path"], split=where["split"], images=where["images"], classes=loaded)
    with progress("evaluating", len(source)) as advance:
        done = 0

        def report(now: int, total: int) -> None:  # noqa: ARG001
            nonlocal done
            advance(now - done)
            done = now

        try:
            results = run(loaded, source, output, names, protocols or [_DEFAULT_PROTOCOL], progress=report, **settings)
        except KeyboardInterrupt:
            raise Failure(f"interrupted after {done} of {len(source)} images; the same command goes on from there") from None
    _print(results, output)


def _print(results: Results, output: Path) -> None:
    """A table for each protocol on screen, and where the rest is."""
    from rich.console import Console

    from ..evaluate.tables import lay_out, protocols

    console = Console()
    for protocol in protocols(results):
        layout = lay_out(results, protocol)
        console.print(_screen_table(layout))
        for note in layout.notes:
            console.print(f"{note.about}: {note.text}", style="dim", markup=False, highlight=False)
    for left in results.left_out:
        typer.echo(f"left out: {left['id']}: {left['reason']}", err=True)
    for name in ("results.json", "results.md", "report.html"):
        typer.echo(str(output / name))


def _screen_table(layout: Layout) -> Table:
    """Each figure above its interval, the winner in bold."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from ..evaluate.tables import NO_VALUE, groups, interval, number, number_styles

    table = Table(title=layout.title, title_justify="left", pad_edge=False, box=SIMPLE_HEAD)
    table.add_column("method")
    for head in layout.heads:
        table.add_column(Text(head.text), justify="right")
    styles = number_styles(layout)
    for group, rows in groups(layout):
        if group:
            table.add_section()
        for row in rows:
            cells = []
            for column, figure, style in zip(layout.columns, row.figures, styles, strict=True):
                if figure is None:
                    cells.append(Text(NO_VALUE))
                    continue
                value = Text(number(figure.mean, style), style="bold" if column.winner == row.label else "")
                cells.append(value.append("\n" + interval(figure, style), style="not bold dim"))
            table.add_row(Text(row.name, style="italic" if row.kind == "control" else ""), *cells)
    return table
