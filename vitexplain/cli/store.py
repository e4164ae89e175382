"""``vitexplain show`` and ``vitexplain summary``: the maps of a data set, to look at."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from ..files import folder_size
from ..messages import in_bytes
from .app import Failure, app, complain, guarded, make_folder
from .explain import PICTURES

if TYPE_CHECKING:
    import pyarrow
    from PIL import Image
    from rich.table import Table

    from ..dataset.maps import MapStore
    from ..dataset.pictures import Photos

MEANS, SHEET = "class_means.png", "contact_sheet.png"

_NAME_BYTES = 200  # of a file's name; most file systems take 255
_FEW = 3  # notes about photos before they are counted only
_REASONS = 5
_RUNS = 10
_ROWS_AT_ONCE = 10_000

Store = Annotated[Path, typer.Argument(help="The store that 'vitexplain dataset' wrote.", metavar="OUT.zarr", show_default=False)]
Source = Annotated[Path | None, typer.Option(help="Where the photos are now. Default: where they were.")]


# -- commands --------------------------------------------------------------------------------------------------------


@app.command()
def show(
    store: Store,
    identity: Annotated[list[str] | None, typer.Option("--id", help="An image by its id; repeat for several.")] = None,
    row: Annotated[
        list[int] | None, typer.Option("--row", help="An image by its row in the data, from 0; repeat for several.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help="Method's label; repeat. Default: all.")] = None,
    target_index: Annotated[
        int | None, typer.Option(help="Which of several explained classes, from 0. Default: all.", min=0)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Picture for one image, folder for several. Default: NAME_explained.png in the current folder."),
    ] = None,
    source: Source = None,
    alpha: Annotated[float, typer.Option(help="The maps' share where they lie over the photo.", min=0, max=1)] = 0.55,
) -> None:
    """Draw images of a store: the photo, and each method's map laid over it.

    Where the photo cannot be found, the maps are drawn alone. An image without maps is reported and does not stop the others.
    """
    guarded(lambda: _show(store, [*(identity or []), *(row or [])], method, target_index, output, source, alpha))


@app.command()
def summary(
    store: Store,
    output: Annotated[Path | None, typer.Option(help=f"Folder for {MEANS} and {SHEET}. Default: no pictures.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON, and nothing else, on standard output.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare it with its checksum.")] = False,
    count: Annotated[int, typer.Option(help="Images on the contact sheet.", min=1, max=400)] = 24,
    method: Annotated[str | None, typer.Option("--method", "-m", help="Label of the method drawn. Default: the first.")] = None,
    source: Source = None,
) -> None:
    """Say what a store holds and how its runs went; draw the mean map of each class and a sheet of images.

    Exit code 0: all is well; 1: an error, in one line, or what --verify found.
    """
    guarded(lambda: _summary(store, output, as_json, verify, count, method, source))


# -- show ------------------------------------------------------------------------------------------------------------


def _show(
    path: Path,
    asked: list[str | int],
    methods: list[str] | None,
    target_index: int | None,
    output: Path | None,
    source: Path | None,
    alpha: float,
) -> None:
    from ..dataset.maps import open_maps
    from ..dataset.pictures import overlay
    from ..errors import ExplanationError
    from ..visualize import save_figure

    store = open_maps(path)
    if not asked:
        raise Failure("image: expected --id or --row, which can be repeated")
    _check_methods(store, methods or [])
    _check_target_index(store, target_index)
    many = len(asked) > 1
    folder, file = _place(store, output, many)
    rows, failed = _rows(store, asked)
    total = failed + len(rows)
    finder = _Finder(store, source)
    destinations = [file] if file else [folder / name for name in _file_names([row["id"] for row in rows])]
    for row, destination in zip(rows, destinations, strict=False):
        try:
            figure = overlay(store, row, finder.find(row), methods=methods, target_index=target_index, alpha=alpha)
            typer.echo(f"heat maps: {save_figure(destination, figure)}")
        except ExplanationError as error:  # a file of the store is damaged, or the picture cannot be written
            complain(str(error))
            failed += 1
    finder.conclude()
    if failed:
        raise Failure(f"{failed} of {total} images could not be drawn") if many else typer.Exit(1)


def _rows(store: MapStore, asked: list[str | int]) -> tuple[list[dict[str, Any]], int]:
    """Rows of the index that can be drawn, each once, and how many cannot, which are reported."""
    from ..errors import ExplanationError

    found: dict[int, dict[str, Any]] = {}
    failed = 0
    for which in asked:
        try:
            row = store.row(which)
        except ExplanationError as error:
            complain(str(error))
            failed += 1
            continue
        if row["status"] == "ok":
            found[row["row"]] = row
        else:
            complain(f"{row['id']!r} has no maps: {row['status']}" + (f" ({row['reason']})" if row["reason"] else ""))
            failed += 1
    return list(found.values()), failed


class _Finder:
    """The photos of a store; what cannot be found is said on standard error, and then the maps are drawn alone."""

    def __init__(self, store: MapStore, source: Path | None) -> None:
        from ..dataset.pictures import Photos

        self._photos: Photos | None = Photos(store, source)
        self._hint = "" if source else "; where they are now can be given with --source"
        self._missing = 0
        self._has_doubt = False

    def find(self, row: Mapping[str, Any]) -> Image.Image | None:
        """The photo of a row of the index, or None."""
        from ..dataset.pictures import NoPhotos
        from ..errors import ExplanationError

        if self._photos is None:
            return None
        try:
            if row["path"] is None:
                self._tell(self._photos.doubt)
            return self._photos.find(row)
        except NoPhotos as error:
            self._photos = None
            typer.echo(f"note: the maps are drawn without photos: {error}{self._hint}", err=True)
        except ExplanationError as error:
            self._missing += 1
            if self._missing <= _FEW:
                typer.echo(f"note: {row['id']!r} is drawn without its photo: {error}", err=True)
        return None

    def conclude(self) -> None:
        """Count what was not said."""
        if self._missing > _FEW:
            typer.echo(f"note: {self._missing - _FEW} more are drawn without their photos", err=True)

    def _tell(self, doubt: str | None) -> None:
        if doubt is not None and not self._has_doubt:
            self._has_doubt = True
            typer.echo(f"note: {doubt}", err=True)


def _check_methods(store: MapStore, labels: list[str]) -> None:
    from ..errors import unknown_name

    for label in labels:
        if label not in store.methods:
            raise unknown_name("method", label, store.methods)


def _check_target_index(store: MapStore, index: int | None) -> None:
    count = store.num_targets
    if index is None or (count is None and index == 0):
        return
    if count is None or index >= count:
        expected = "none, as one class was explained an image" if count is None else f"0 to {count - 1}"
        raise Failure(f"target-index: expected {expected}, received {index}")


def _place(store: MapStore, output: Path | None, many: bool) -> tuple[Path, Path | None]:
    """The folder for pictures, which is made where it is not there, or the file for the only one."""
    folder = output or Path()
    if output is not None and output.suffix.lower() in PICTURES and not output.is_dir():
        if many:
            raise Failure(f"output: expected a folder for several images, received {str(output)!r}")
        _refuse_inside(store, output)
        make_folder(output.parent)
        return output.parent, output
    if output is not None and output.suffix and not many and not output.is_dir():
        raise Failure(f"output: expected a file ending in {', '.join(PICTURES)} or a folder, received {str(output)!r}")
    _make_folder(store, folder)
    return folder, None


def _make_folder(store: MapStore, folder: Path) -> None:
    _refuse_inside(store, folder)
    make_folder(folder)


def _refuse_inside(store: MapStore, output: Path) -> None:
    """Pictures among a store's own files would not be known to those who read it."""
    place = output.resolve()
    for own in (store.path.resolve(), store.path.with_suffix(".parquet").resolve()):
        if place.is_relative_to(own):
            raise Failure(f"output: expected a place outside the store, received {str(output)!r}")


def _file_names(ids: list[str]) -> Iterator[str]:
    """A picture's name for each id, made of what every file system takes; those that would be the same get a number."""
    taken: set[str] = set()
    for identity in ids:
        name = re.sub(r"\.(jpe?g|png|webp|bmp|tiff?|gif|ppm)$", "", identity, flags=re.IGNORECASE)
        stem = re.sub(r"[^\w.-]+", "_", name).strip("._-").encode()[-_NAME_BYTES:].decode(errors="ignore") or "image"
        chosen, number = stem, 2
        while chosen.casefold() in taken:
            chosen, number = f"{stem}_{number}", number + 1
        taken.add(chosen.casefold())
        yield f"{chosen}_explained.png"


# -- summary ---------------------------------------------------------------------------------------------------------


def _summary(
    path: Path, output: Path | None, as_json: bool, verify: bool, count: int, method: str | None, source: Path | None
) -> None:
    from ..dataset.maps import open_maps

    store = open_maps(path)
    _check_methods(store, [method] if method else [])
    if output is not None:
        _make_folder(store, output)
    content = {"store": str(path), **_describe(store)}
    problems = store.verify() if verify else []
    if not as_json:
        _print(content)
        if verify and not problems:
            typer.echo(_verified(content["progress"]))
    for problem in problems:
        complain(problem)
    pictures, is_drawn = ([], True) if output is None else _draw(store, output, count, method, source)
    if as_json:
        content |= {"verified": not problems if verify else None, "problems": problems, "pictures": pictures}
        typer.echo(json.dumps(content, indent=2))
    else:
        for picture in pictures:
            typer.echo(picture)
    if problems or not is_drawn:
        raise typer.Exit(1)


def _draw(store: MapStore, folder: Path, count: int, method: str | None, source: Path | None) -> tuple[list[str], bool]:
    """The pictures written, none where no image has maps; and whether nothing went wrong, which is reported."""
    from ..dataset.pictures import class_means, contact_sheet
    from ..errors import ExplanationError
    from ..visualize import save_figure

    if "ok" not in _counts(store.index["status"]):
        typer.echo("note: no pictures, as no image has maps yet", err=True)
        return [], True
    paths: list[str] = []
    try:
        paths.append(str(save_figure(folder / MEANS, class_means(store, method))))
        finder = _Finder(store, source)
        paths.append(str(save_figure(folder / SHEET, contact_sheet(store, finder.find, method, count=count))))
        finder.conclude()
    except ExplanationError as error:  # a file of the store is damaged, or a picture cannot be written
        complain(str(error))
        return paths, False
    return paths, True


def _verified(progress: Mapping[str, Any]) -> str:
    if progress["complete"]:
        return "verified: every file is as it was written"
    left = progress["shards_of"] - progress["shards"]
    return f"verified: every file of the shards that are done is as it was written; {left:,} are not done yet"


def _describe(store: MapStore) -> dict[str, Any]:
    """What there is to say about a store, as JSON."""
    settings = store.settings
    model = {key: value for key, value in settings["model"].items() if key != "class_names"}
    maps, index = folder_size(store.path), folder_size(store.path.with_suffix(".parquet"))
    return {
        **settings,
        "model": model,
        "progress": _progress(store),
        "status": _counts(store.index["status"]),
        "reasons": _reasons(store),
        "accuracy": _accuracy(store),
        "bytes": {"maps": maps, "index": index, "all": maps + index},
        "runs": store.runs(),
    }


def _progress(store: MapStore) -> dict[str, Any]:
    shard = store.settings["shard"]
    return {
        "images": len(store.index),
        "images_of": len(store),
        "shards": len(np.unique(store.index["row"].to_numpy() // shard)),
        "shards_of": -(-len(store) // shard),
        "complete": store.is_complete,
    }


def _counts(column: pyarrow.ChunkedArray) -> dict[str, int]:
    """How often each value occurs, the most frequent first."""
    counts = {entry["values"]: entry["counts"] for entry in column.value_counts().to_pylist()}
    return dict(sorted(counts.items(), key=lambda entry: -entry[1]))


def _reasons(store: MapStore) -> list[dict[str, Any]]:
    """Why images have no maps, or were converted, the most frequent first; the images' own names are left out of the reasons."""
    counts: Counter[tuple[str, str]] = Counter()
    told = store.index.select(["status", "reason", "path", "id"]).filter(store.index["reason"].is_valid())
    for row in (row for batch in told.to_batches(max_chunksize=_ROWS_AT_ONCE) for row in batch.to_pylist()):
        reason = row["reason"]
        for name in (row["path"], row["id"]):
            reason = reason.replace(repr(name), "'…'") if name else reason
        counts[row["status"], reason] += 1
    return [{"status": status, "reason": reason, "images": count} for (status, reason), count in counts.most_common()]


def _accuracy(store: MapStore) -> dict[str, Any] | None:
    """How many labels were predicted, None where there are no labels."""
    import pyarrow.compute as pc

    right = pc.equal(store.index["label"], store.index["prediction"]).drop_null()  # null where one of them is
    if not len(right):
        return None
    correct = pc.sum(right).as_py()
    return {"value": correct / len(right), "correct": correct, "images": len(right)}


def _print(content: Mapping[str, Any]) -> None:
    """The summary on screen."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(title=Text(content["store"]), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _lines(content):
        table.add_row(name, Text(text))
    console.print(table)
    if not content["progress"]["images"]:
        console.print("\nNo shard is done yet: there are no maps to look at.")
    runs = [run for run in content["runs"] if run.get("images") != 0]  # those that found everything done
    if runs:
        console.print()
        console.print(_runs_table(runs))


def _lines(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and text of each line on screen."""
    model, data, done, size = (content[name] for name in ("model", "data", "progress", "bytes"))
    parts = (data["kind"], data["split"] and f"split {data['split']}", data["images"] and f"images {data['images']}")
    methods = (
        label if label.startswith(entry["name"]) else f"{label} ({entry['name']})" for label, entry in content["methods"].items()
    )
    where = f"{content['dtype']} on {content['device']}, backend {content['backend']}, batches of {content['batch']}"
    return [
        ("model", f"{model['name']}, weights {model['weights_sha256'][:12]}, resize {model['resize']}"),
        ("data", f"{data['name']} ({', '.join(filter(None, parts))}), {data['path']}"),
        ("methods", ", ".join(methods)),
        ("target", content["target"]),
        ("computed", where + ("" if content["deterministic"] else ", not deterministic")),
        ("versions", ", ".join(f"{name} {version}" for name, version in content["versions"].items())),
        ("done", f"{done['images']:,} of {done['images_of']:,} images, {done['shards']:,} of {done['shards_of']:,} shards"),
        ("status", ", ".join(f"{name} {count:,}" for name, count in content["status"].items()) or "–"),
        *_reason_lines(content["reasons"]),
        *_accuracy_line(content["accuracy"]),
        ("on disk", f"{in_bytes(size['all'])} (maps {in_bytes(size['maps'])}, index {in_bytes(size['index'])})"),
    ]


def _reason_lines(reasons: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for place, entry in enumerate(reasons[:_REASONS]):
        yield "" if place else "reasons", f"{entry['images']:,} × {entry['status']}: {entry['reason']}"
    if len(reasons) > _REASONS:
        yield "", f"… and {len(reasons) - _REASONS:,} more"


def _accuracy_line(accuracy: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    if accuracy:
        counts = f"{accuracy['correct']:,} of {accuracy['images']:,} labelled images"
        yield "accuracy", f"{100 * accuracy['value']:.2f} % ({counts})"


def _runs_table(runs: list[dict[str, Any]]) -> Table:
    """A line a run, the last ones."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    more = f", the last {_RUNS} of {len(runs)}" if len(runs) > _RUNS else ""
    table = Table(title=f"Runs{more}", title_justify="left", pad_edge=False, box=SIMPLE_HEAD)
    table.add_column("started")
    for name in ("images", "seconds", "images/s", "waiting", "of bare loop"):
        table.add_column(name, justify="right")
    table.add_column("on", overflow="fold")
    for run in runs[-_RUNS:]:
        workers = f"{run['workers']} workers" if run.get("workers") is not None else None
        ended = None if run.get("ended") in (None, "whole") else f"ended: {run['ended']}"
        place = ", ".join(str(part) for part in (run.get("engine"), run.get("device"), workers, ended) if part)
        table.add_row(
            str(run.get("started", "–"))[:16].replace("T", " "),  # to the minute
            _number(run.get("images"), "{:,}"),
            _number(run.get("seconds"), "{:,.1f}"),
            _number(run.get("images_per_second"), "{:,.1f}"),
            _number(run.get("waiting_share"), "{:.1%}"),
            _number(run.get("ratio_to_bare"), "{:.2f}"),
            Text(place or "–"),
        )
    return table


def _number(value: Any, style: str) -> str:
    return style.format(value) if isinstance(value, int | float) else "–"
