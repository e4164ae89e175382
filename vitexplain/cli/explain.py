"""``vitexplain explain``, ``vitexplain list``, ``vitexplain demo``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import (
    Backend,
    Device,
    Failure,
    Model,
    Weights,
    app,
    complain,
    guarded,
    method_names,
    options_text,
    prepare_hub,
    progress,
)

if TYPE_CHECKING:
    from PIL import Image

    from ..explanation import Explanation
    from ..loading import LoadedModel

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".svg", ".pdf")
ARRAYS = ".npz"


# -- commands --------------------------------------------------------------------------------------------------------


@app.command()
def explain(
    images: Annotated[list[Path], typer.Argument(help="One photo or many.", metavar="IMAGE...", show_default=False)],
    model: Model = "demo",
    weights: Weights = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="Method; repeat for several, 'all' for all but captum's. Default: tokentm."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="A method's option as NAME=VALUE; repeat. See 'vitexplain list'.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", "-t", help="Class to explain, number or name; repeat. Default: the predicted one."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Picture or .npz for one photo, folder for many. Default: NAME_explained.png in the current folder."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on standard output.")
    ] = False,
    device: Device = "auto",
    backend: Backend = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    batch: Annotated[int, typer.Option(help="Photos explained at once.", min=1)] = 8,
    top: Annotated[int, typer.Option(help="How many top classes to print.", min=1)] = 5,
) -> None:
    """Explain photos: the top classes on screen, the heat maps in a file.

    A photo that cannot be read is reported and does not stop the others. Exit code 0: all explained; 1: an error, in one line.
    """
    settings = {"method": method, "option": option, "target": target, "backend": backend}
    guarded(lambda: _explain(images, model, weights, output, as_json, batch, top, device, dtype, **settings))


@app.command("list")
def list_methods(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the methods: paper, cost, options."""
    from ..methods import list_methods as listed

    if as_json:
        typer.echo(json.dumps([asdict(info) for info in listed()], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_lines=True, title="Methods")
    for column in ("name", "paper", "cost", "options"):
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for info in listed():
        rows = "; all rows" if info.all_rows else ""
        kind = "class-specific" if info.class_specific else "the same for every class"
        table.add_row(
            f"[bold]{info.name}[/bold]\n{info.title}", info.paper, f"{info.cost}\n({kind}{rows})", options_text(info.options)
        )
    Console().print(table)


@app.command()
def demo(output: Annotated[Path, typer.Option(help="The picture to write.")] = Path("vitexplain_demo.png")) -> None:
    """Explain scikit-image's cat with the shipped model, by every method of this library's own."""

    def run() -> None:
        try:
            from skimage import data
        except ImportError as error:
            raise Failure("the demo's photo comes with scikit-image: pip install 'vitexplain[demo]'") from error
        from PIL import Image

        _explain_one("scikit-image's cat", Image.fromarray(data.chelsea()), output)

    guarded(run)


# -- explaining ------------------------------------------------------------------------------------------------------


def _explain(
    paths: list[Path],
    model_name: str,
    weights: Path | None,
    output: Path | None,
    as_json: bool,
    batch: int,
    top: int,
    device: str,
    dtype: str,
    **settings: Any,
) -> None:
    prepare_hub(model_name, weights)
    from ..loading import dtype_named, load_model

    element_type = dtype_named(dtype)

    many = len(paths) > 1
    _check_output(output, many)
    session = _Session(load_model(model_name, weights, device, dtype=element_type), **settings)
    destinations = _destinations(paths, output)
    records, failed = [], 0
    with progress("explaining", len(paths), enabled=many and not as_json) as advance:
        for start in range(0, len(paths), batch):
            group = list(zip(paths, destinations, strict=True))[start : start + batch]
            done = _explain_group(session, group, top)
            failed += len(group) - len(done)
            records += done
            advance(len(group))
    if as_json:
        typer.echo(json.dumps(records, indent=2))
    else:
        for record in records:
            _print_record(record)
    if failed:
        raise Failure(f"{failed} of {len(paths)} photos could not be explained") if many else typer.Exit(1)


def _explain_group(session: _Session, group: list[tuple[Path, Path]], top: int) -> list[dict[str, Any]]:
    """Explain what can be read of a batch; report the rest."""
    from ..errors import InputError
    from ..loading import load_photo

    readable = []
    for path, destination in group:
        try:
            readable.append((path, load_photo(path), destination))
        except InputError as error:
            complain(str(error))
    if not readable:
        return []
    explanations = session.attribute([photo for _, photo, _ in readable])
    records = []
    for i, (path, photo, destination) in enumerate(readable):
        try:
            records.append(session.record(explanations, i, str(path), photo, destination, top))
        except InputError as error:  # it cannot be written
            complain(str(error))
    return records


def _explain_one(name: str, photo: Image.Image, output: Path) -> None:
    from ..loading import DEMO, load_model

    _check_output(output, many=False)
    session = _Session(load_model(DEMO), method=["all"])
    _print_record(session.record(session.attribute([photo]), 0, name, photo, output, 5))


class _Session:
    """A model and an explainer, and how their results are written."""

    def __init__(
        self,
        loaded: LoadedModel,
        method: list[str] | None = None,
        option: list[str] | None = None,
        target: list[str] | None = None,
        backend: str = "auto",
    ) -> None:
        from ..explainer import Explainer

        names = method_names(method)
        self.loaded = loaded
        self.targets = [loaded.class_index(text) for text in target or []]
        self.explainer = Explainer(loaded.model, names, backend, **_parse_options(option or [], names))

    def attribute(self, photos: list[Image.Image]) -> dict[str, Explanation]:
        """Explain photos of any size and shape."""
        import torch

        parameter = next(self.loaded.model.parameters())
        images = torch.stack([self.loaded.transform(photo) for photo in photos]).to(parameter)
        return self.explainer.attribute(images, [self.targets] * len(photos) if self.targets else None)

    def record(
        self, explanations: dict[str, Explanation], index: int, name: str, photo: Image.Image, destination: Path, top: int
    ) -> dict[str, Any]:
        """Write one photo's maps and return what there is to say about it."""
        first = next(iter(explanations.values()))
        probabilities = first.logits[index].float().softmax(-1)
        values, classes = probabilities.topk(min(top, len(probabilities)))
        target = first.target[index].reshape(-1).tolist()
        return {
            "image": name,
            "model": self.loaded.name,
            "methods": list(explanations),
            "target": [{"class": c, "name": self.loaded.class_name(c)} for c in target],
            "top": [
                {"class": c, "name": self.loaded.class_name(c), "probability": round(p, 6)}
                for c, p in zip(classes.tolist(), values.tolist(), strict=True)
            ],
            "output": [str(path) for path in self._write(explanations, index, photo, destination, target)],
        }

    def _write(
        self, explanations: dict[str, Explanation], index: int, photo: Image.Image, destination: Path, target: list[int]
    ) -> list[Path]:
        if destination.suffix.lower() == ARRAYS:
            single = len(explanations) == 1
            return [
                e.save(destination if single else destination.with_stem(f"{destination.stem}_{name}"))
                for name, e in explanations.items()
            ]
        from ..visualize import save_panel

        maps = {}
        for name, explanation in explanations.items():
            grids = explanation.maps[index].reshape(len(target), *explanation.maps.shape[-2:])
            for c, grid in zip(target, grids, strict=True):
                maps[name if len(target) == 1 else f"{name}: {self._short_name(c)}"] = grid.cpu()
        title = "Where the model looked for " + ", ".join(repr(self._short_name(c)) for c in target)
        return [save_panel(destination, self.loaded.display(photo), maps, title=title)]

    def _short_name(self, index: int) -> str:
        return self.loaded.class_name(index).partition(",")[0]


def _parse_options(pairs: list[str], methods: list[str]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs, each value in the type that the named methods' options have."""
    from ..methods import build_methods
    from ..options import parse_value, split_pair

    kinds = [type(method) for method in build_methods(methods, {}).values()]
    return {name: parse_value(name, text, kinds) for name, text in map(split_pair, pairs)}


def _check_output(output: Path | None, many: bool) -> None:
    """Refuse, before any work, an output that cannot be written."""
    if many:
        folder = output or Path()
        if output is not None and output.suffix.lower() in (*PICTURES, ARRAYS):
            raise Failure(f"output: expected a folder for several photos, received {str(output)!r}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Failure(f"output: cannot make the folder {str(folder)!r}: {error.strerror}") from error
        return
    if output is None or output.is_dir():
        return
    if output.suffix.lower() not in (*PICTURES, ARRAYS):
        raise Failure(f"output: expected a file ending in {', '.join((*PICTURES, ARRAYS))} or a folder, received {str(output)!r}")
    if not output.parent.is_dir():
        raise Failure(f"output: expected a file in an existing folder, received {str(output)!r}")


def _destinations(paths: list[Path], output: Path | None) -> list[Path]:
    """Where each photo's maps go; photos of one name get a number."""
    if len(paths) == 1 and output is not None and not output.is_dir():
        return [output]
    folder, taken, destinations = output or Path(), set(), []
    for path in paths:
        name, number = f"{path.stem}_explained.png", 2
        while name in taken:
            name, number = f"{path.stem}_{number}_explained.png", number + 1
        taken.add(name)
        destinations.append(folder / name)
    return destinations


def _print_record(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{record['image']} · {record['model']}", title_justify="left")
    table.add_column("class")
    table.add_column("probability", justify="right")
    explained = {entry["class"] for entry in record["target"]}
    for entry in record["top"]:
        mark = " ← explained" if entry["class"] in explained else ""
        table.add_row(f"{entry['name']}{mark}", f"{100 * entry['probability']:.1f} %")
    console = Console()
    console.print(table)
    others = [entry["name"] for entry in record["target"] if entry["class"] not in {top["class"] for top in record["top"]}]
    if others:
        console.print(f"explained: {', '.join(others)}")
    for path in record["output"]:
        typer.echo(f"heat maps: {path}")
