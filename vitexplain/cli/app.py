"""The command line's application, and what its commands share: one-line errors, progress.

Heavy imports wait until a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="vitexplain",
    help="Explain Vision Transformers: see where a model looked, at the price of fused attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ELEMENT_TYPES = "float32, bfloat16 (bf16) or float16 (fp16)"
IMAGES = (
    "Images: a folder, or one of class folders, a CSV or Parquet table (path, label, mask), WebDataset shards (.tar, a folder of "
    "them, or a pattern such as 'train-{0000..0099}.tar'), a Hugging Face dataset folder, or an .npz."
)

# options that several commands have
Model = Annotated[
    str,
    typer.Option(
        help="'demo' (shipped), a timm model, pretrained, or 'transformers:NAME', one of Hugging Face's image classifiers or its "
        "folder; see 'vitexplain models'."
    ),
]
Weights = Annotated[Path | None, typer.Option(help="Weights from a file: .safetensors, .pth, .pt, .bin.")]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        "-m",
        help="NAME or NAME:OPTION=VALUE,…; repeat; 'all' for all but captum's; see 'vitexplain methods'. Default: tokentm.",
    ),
]
Split = Annotated[str | None, typer.Option(help="Split of the data, where there are several.")]
Images = Annotated[str | None, typer.Option(help="Which images, START:STOP:STEP, as :100 or ::2.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help=f"Element type of the model: {ELEMENT_TYPES}.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON.")]
Backend = Annotated[str, typer.Option(help="auto, triton, torch, or dense (float64 reference, stores every map).")]


class Failure(Exception):
    """A one-line message for the person at the terminal."""


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False) -> None:
    if version:
        from .. import __version__

        typer.echo(f"vitexplain {__version__}")
        raise typer.Exit


def guarded(work: Any) -> None:
    """Run; known errors become one line on standard error and exit code 1."""
    from ..errors import ExplanationError, is_out_of_memory

    try:
        work()
    except typer.Exit:  # a RuntimeError to Python
        raise
    except (Failure, ExplanationError) as error:
        complain(str(error))
        raise typer.Exit(1) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):  # a defect of ours: let it be seen whole
            raise
        message = next(iter(str(error).strip().splitlines()), "out of memory")
        complain(f"{message} (a smaller --batch needs less)")
        raise typer.Exit(1) from error
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        raise typer.Exit(1) from None


def complain(message: str) -> None:
    typer.echo(f"error: {message}", err=True)


def make_folder(folder: Path) -> None:
    """Make a folder for pictures, where it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"output: cannot make the folder {str(folder)!r}: {error.strerror}") from error


def method_names(asked: list[str] | None) -> list[str]:
    """The methods asked for, ``all`` in its place for each of this library's own that is not named besides."""
    from ..methods import own_methods

    asked = asked or ["tokentm"]
    if "all" not in asked:
        return asked
    place = asked.index("all")
    others = [name for name in asked if name != "all"]
    own = [name for name in own_methods() if name not in others]
    return [*others[:place], *own, *others[place:]]


class progress:
    """A progress bar on standard error, from the first step on; none where it is not enabled."""

    def __init__(self, what: str, total: int, *, enabled: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        note = TextColumn("{task.fields[note]}", style="dim")
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
        # The time left comes from steps of this period; a step of many images and methods can take minutes.
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not enabled, speed_estimate_period=3600)
        self.total = total

    def __enter__(self) -> Any:
        task = self.bar.add_task("images", total=self.total, note="")

        def advance(count: int, note: str = "") -> None:
            self.bar.start()
            self.bar.update(task, advance=count, note=note)

        return advance

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()
