"""``vitexplain dataset``."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import (
    IMAGES,
    Backend,
    Device,
    Dtype,
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
    from ..dataset import Measured, Progress, Report
    from ..sources import Source


@app.command()
def dataset(
    source: Annotated[
        str,
        typer.Argument(
            help=IMAGES,
            metavar="SOURCE",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(help="The store to write, NAME.zarr; an interrupted run there goes on where it was.", show_default=False),
    ],
    model: Model = "demo",
    weights: Weights = None,
    method: Methods = None,
    target: Annotated[
        str, typer.Option("--target", "-t", help="Class explained: pred (predicted), label, or topK, such as top3.")
    ] = "pred",
    batch: Annotated[str, typer.Option(help="Images explained at once; auto finds it by measurement.")] = "auto",
    dtype: Dtype = "float32",
    split: Split = None,
    images: Images = None,
    resize: Annotated[str, typer.Option(help="model (its own preprocessing) or squash (the whole photo).")] = "model",
    engine: Annotated[
        str, typer.Option(help="local (this machine; with torchrun, one process a GPU) or ray (a cluster).")
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that decode photos, for each device; 0: none. Default: what suits the machine.", min=0),
    ] = None,
    actors: Annotated[
        int | None, typer.Option(help="With --engine ray: how many. Default: one a GPU, or one without any.", min=1)
    ] = None,
    shard: Annotated[
        int | None, typer.Option(help="Images a file of the store. Default: 256 on a CPU, 1024 on a GPU.", min=1)
    ] = None,
    device: Device = "auto",
    backend: Backend = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Run the model's blocks as torch.compile makes them.")] = False,
    cuda_graph: Annotated[
        bool, typer.Option(help="On a GPU, replay explanations from a CUDA graph where that can be done.")
    ] = True,
    deterministic: Annotated[bool, typer.Option(help="On a GPU, have torch give the same bits each time.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew, whatever maps stand there.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, and nothing else, on standard output.")
    ] = False,
) -> None:
    """Explain a whole data set: maps in a Zarr store, a Parquet index beside it.

    Killed at any moment, the same command goes on where it was. An image that cannot be read is recorded in the index with its
    reason. Look at the result with 'vitexplain summary' and 'vitexplain show', or vitexplain.dataset.open in Python.
    """
    settings = {
        "target": target,
        "batch": batch,
        "dtype": dtype,
        "resize": resize,
        "engine": engine,
        "workers": workers,
        "actors": actors,
        "shard": shard,
        "backend": backend,
        "compile": compile,
        "cuda_graph": cuda_graph,
        "deterministic": deterministic,
        "overwrite": overwrite,
    }
    where = {"path": source, "split": split, "images": images}
    guarded(lambda: _dataset(model, weights, device, where, method, output, as_json, settings))


def _dataset(
    model: str,
    weights: Path | None,
    device: str,
    where: dict[str, Any],
    methods: list[str] | None,
    output: Path,
    as_json: bool,
    settings: dict[str, Any],
) -> None:
    if settings["engine"] == "local" and settings["workers"] != 0:
        from ..processes import start_early

        start_early()
    from ..dataset import run
    from ..dataset.ranks import local_device
    from ..loading import load_model
    from ..sources import open_source

    names = method_names(methods)
    loaded = load_model(model, weights, local_device(device))
    source = open_source(where["path"], split=where["split"], images=where["images"], classes=loaded)
    first = os.environ.get("RANK", "0") == "0"
    with progress("explaining", len(source), enabled=first) as advance:
        seen: list[Progress] = []

        def report(now: Progress) -> None:
            before = seen[-1].done if seen else 0
            seen[:] = [now]
            note = f"{now.images_per_second:.1f} images/s, waited {now.waiting_share:.1%}" if now.images else ""
            advance(now.done - before, note)

        def measuring(measured: Measured) -> None:
            advance(0, f"batch {measured.batch}: {measured.images_per_second:.1f} images/s")

        try:
            done = run(loaded, source, output, names, progress=report, measuring=measuring, **settings)
        except KeyboardInterrupt:
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it would tell of what zarr had begun
            raise Failure("interrupted; the same command goes on from the last shard that is whole") from None
    if not first:
        return
    if as_json:
        typer.echo(json.dumps({**done.as_log(), "output": str(done.output)}, indent=2))
    else:
        _print(done, source)
    if done.total == done.unreadable:
        raise Failure(f"none of the {done.total} images could be read; see the reasons with 'vitexplain summary'")


def _print(done: Report, source: Source) -> None:
    """What was done, in a few lines."""
    if done.found:
        typer.echo(f"{done.found} of {len(source)} images stood in the store already")
    if done.images:
        typer.echo(
            f"{done.images} images in {done.seconds:.1f} s: {done.images_per_second:.1f} images/s, batch {done.batch}, "
            f"on {', '.join(done.devices)}"
        )
    if done.waiting_share is not None:
        bare = "" if done.ratio_to_bare is None else f"; {done.ratio_to_bare:.0%} of a bare attribute loop's speed"
        typer.echo(f"the device waited for data {done.waiting_share:.1%} of the time{bare}")
    for count, what in ((done.unreadable, "could not be read"), (done.not_finite, "gave values that are not finite")):
        if count:
            typer.echo(f"{count} images {what}: reasons in the index", err=True)
    typer.echo(f"maps: {done.output}")
    typer.echo(f"index: {done.output.with_suffix('.parquet')}")
