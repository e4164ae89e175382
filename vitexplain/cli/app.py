"""The command line's application, and what its commands share: one-line errors, progress.

Heavy imports wait until a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..options import Option

app = typer.Typer(
    name="vitexplain",
    help="Explain Vision Transformers: see where a model looked, at the price of fused attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# options that several commands have
Model = Annotated[str, typer.Option(help="'demo' (shipped) or a timm model, pretrained.")]
Weights = Annotated[Path | None, typer.Option(help="Weights from a file: .safetensors, .pth, .pt, .bin.")]
Methods = Annotated[
    list[str] | None,
    typer.Option("--method", "-m", help="NAME or NAME:OPTION=VALUE,…; repeat; 'all' for all but captum's. Default: tokentm."),
]
Split = Annotated[str | None, typer.Option(help="Split of the data, where there are several.")]
Images = Annotated[str | None, typer.Option(help="Which images, START:STOP:STEP, as :100 or ::2.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
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


def options_text(options: Iterable[Option]) -> str:
    """A method's or protocol's options for a listing, a line each."""
    return "\n".join(f"{o.name}={o.default} ({o.values}): {o.help}" for o in options) or "–"


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
