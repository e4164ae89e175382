"""``vitexplain explain`` and ``vitexplain demo``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import (
    Backend,
    Device,
    Dtype,
    Failure,
    Methods,
    Model,
    Weights,
    app,
    complain,
    guarded,
    make_folder,
    method_names,
    progress,
)

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ..explanation import Explanation
    from ..loading import LoadedModel

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".svg", ".pdf")
ARRAYS = ".npz"

_TOP = re.compile(r"top[0-9]+")
_NO_NAME = re.compile(r"\W+")  # what is not in a file's name


# -- commands --------------------------------------------------------------------------------------------------------


@app.command()
def explain(
    images: Annotated[list[Path], typer.Argument(help="One photo or many.", metavar="IMAGE...", show_default=False)],
    model: Model = "demo",
    weights: Weights = None,
    method: Methods = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            "-t",
            help="Class to explain, number or name; repeat; or topK alone, such as top3, for the likeliest. "
            "Default: the predicted one.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Picture or .npz for one photo, folder for many. Default: NAME_explained.png in the current folder."),
    ] = None,
    contrast: Annotated[
        bool,
        typer.Option(
            "--contrast",
            help="Draw what speaks for one class rather than another: of two --target, or of the one, else the predicted one, "
            "and its likeliest rival. NAME_contrast.png; several methods get a file each, NAME_contrast_METHOD.png.",
        ),
    ] = False,
    by_block: Annotated[
        bool,
        typer.Option(
            "--by-block",
            help="Draw how the map grows, from the last block down. NAME_by_block.png; several methods, or classes, get a file "
            "each. 'all' stands for the methods that read more than the last block.",
        ),
    ] = False,
    alpha: Annotated[float, typer.Option(help="The map's share of a picture, the rest is the photo.", min=0, max=1)] = 0.55,
    colormap: Annotated[
        str | None,
        typer.Option(
            help="matplotlib's colour map for the maps, such as viridis. Default: inferno, or RdBu_r where they are signed."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on standard output.")
    ] = False,
    device: Device = "auto",
    backend: Backend = "auto",
    dtype: Dtype = "float32",
    batch: Annotated[int, typer.Option(help="Photos explained at once.", min=1)] = 8,
    top: Annotated[int, typer.Option(help="How many top classes to print.", min=1)] = 5,
) -> None:
    """Explain photos: the top classes on screen, the heat maps in a file.

    With --contrast or --by-block the file is that figure instead; as .npz, the arrays behind it.

    A photo that cannot be read is reported and does not stop the others. Exit code 0: all explained; 1: an error, in one line.
    """
    settings = {"method": method, "target": target, "backend": backend}
    figure = _Figure("contrast" if contrast else "by_block" if by_block else "explained", alpha, colormap)

    def run() -> None:
        if contrast and by_block:
            raise Failure("--contrast: expected one figure at a time, received --by-block as well")
        _explain(images, model, weights, output, as_json, batch, top, device, dtype, figure, **settings)

    guarded(run)


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


@dataclass(frozen=True)
class _Figure:
    """What is drawn of each photo.

    Attributes:
        kind: ``"explained"``, ``"contrast"`` or ``"by_block"``; files are named after it.
        alpha: the map's share.
        colormap: of the maps; by their sign where None.
    """

    kind: str = "explained"
    alpha: float = 0.55
    colormap: str | None = None

    @property
    def style(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "colormap": self.colormap}

    def check(self, targets: list[str]) -> None:
        """Before a model is loaded."""
        from ..heatmap import check_colormap

        check_colormap(self.colormap)
        if self.kind != "contrast":
            return
        if len(targets) > 2:
            raise Failure(f"--contrast: expected at most two classes (--target), received {len(targets)}")
        if len(targets) == 1 and _TOP.fullmatch(targets[0]) and targets != ["top2"]:
            raise Failure(f"--contrast: expected at most two classes (--target), received {targets[0]!r}")


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
    figure: _Figure,
    **settings: Any,
) -> None:
    from ..loading import dtype_named, load_model

    element_type = dtype_named(dtype)

    many = len(paths) > 1
    _check_output(output, many)
    figure.check(settings["target"] or [])
    session = _Session(load_model(model_name, weights, device, dtype=element_type), figure=figure, **settings)
    destinations = _destinations(paths, output, figure.kind)
    records: list[dict[str, Any]] = []
    failed = 0
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
    from ..photos import load_photo

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
        target: list[str] | None = None,
        backend: str = "auto",
        figure: _Figure | None = None,
    ) -> None:
        from ..explainer import Explainer
        from ..methods import methods_from_texts

        self.loaded, self.figure = loaded, figure or _Figure()
        by_block = self.figure.kind == "by_block"
        names = method_names(method)
        methods = methods_from_texts(_growing(names, method or []) if by_block else names)
        self.likeliest = _likeliest(target or [], loaded.num_classes)
        self.targets = [loaded.class_index(text) for text in target or [] if self.likeliest is None]
        if self.figure.kind == "contrast" and len(self.targets) != len(set(self.targets)):
            raise Failure(f"--contrast: expected two classes, received {self._short_name(self.targets[0])!r} twice")
        self.explainer = Explainer(loaded.model, methods, backend, rows="by_block" if by_block else None)

    def attribute(self, photos: list[Image.Image]) -> dict[str, Explanation]:
        """Explain photos of any size and shape."""
        import torch

        parameter = next(self.loaded.model.parameters())
        images = torch.stack([self.loaded.transform(photo) for photo in photos]).to(parameter)
        explanations = self.explainer.attribute(images, self._asked(images))
        assert isinstance(explanations, dict)  # several methods were named, if only one
        return explanations

    def _asked(self, images: Tensor) -> Any:
        """The classes to explain of each image."""
        if self.likeliest is not None:
            return self.likeliest
        if self.figure.kind != "contrast" or len(self.targets) == 2:
            return [self.targets] * len(images) if self.targets else None
        if not self.targets:
            return "top2"
        import torch

        with torch.no_grad():
            logits = self.loaded.model(images)
        logits[:, self.targets[0]] = -torch.inf
        return [[self.targets[0], rival] for rival in logits.argmax(-1).tolist()]

    def record(
        self, explanations: dict[str, Explanation], index: int, name: str, photo: Image.Image, destination: Path, top: int
    ) -> dict[str, Any]:
        """Write one photo's maps and return what there is to say about it."""
        first = next(iter(explanations.values()))
        assert first.target is not None, "classes are explained, and no score"
        probabilities = first.logits[index].float().softmax(-1)
        values, classes = probabilities.topk(min(top, len(probabilities)))
        assert first.target is not None  # classes are what is explained here
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
            files = _files(destination, list(explanations))
            return [e.save(path) for path, e in zip(files, explanations.values(), strict=True)]
        shown = self.loaded.display(photo)
        names = [self._short_name(c) for c in target]
        if self.figure.kind == "contrast":
            return self._write_contrasts(explanations, index, shown, destination, names)
        if self.figure.kind == "by_block":
            return self._write_evolutions(explanations, index, shown, destination, names)
        from ..visualize import save_panel

        maps = {}
        for name, explanation in explanations.items():
            grids = explanation.maps[index].reshape(len(target), *explanation.maps.shape[-2:])
            for class_name, grid in zip(names, grids, strict=True):
                maps[name if len(target) == 1 else f"{name}: {class_name}"] = grid.cpu()
        title = "Where the model looked for " + ", ".join(map(repr, names))
        return [save_panel(destination, shown, maps, title=title, **self.figure.style)]

    def _write_contrasts(
        self, explanations: dict[str, Explanation], index: int, shown: Image.Image, destination: Path, names: list[str]
    ) -> list[Path]:
        from ..visualize import contrast, save_figure

        files = _files(destination, list(explanations))
        return [
            save_figure(path, contrast(shown, explanation, index=index, names=names, **self.figure.style))
            for path, explanation in zip(files, explanations.values(), strict=True)
        ]

    def _write_evolutions(
        self, explanations: dict[str, Explanation], index: int, shown: Image.Image, destination: Path, names: list[str]
    ) -> list[Path]:
        from ..visualize import evolution, save_figure

        paths = []
        for path, explanation in zip(_files(destination, list(explanations)), explanations.values(), strict=True):
            for k, file in enumerate(_files(path, names)):
                figure = evolution(shown, explanation, index=index, target_index=k, name=names[k], **self.figure.style)
                paths.append(save_figure(file, figure))
        return paths

    def _short_name(self, index: int) -> str:
        from ..loading import short_class_name

        return short_class_name(self.loaded.class_names, index)


def _likeliest(targets: list[str], num_classes: int) -> str | None:
    """``topK`` where that is asked for; it stands alone."""
    from ..targets import num_top

    found = next((text for text in targets if _TOP.fullmatch(text)), None)
    if found is not None:
        if len(targets) > 1:
            raise Failure(f"--target: expected {found!r} alone, received {len(targets)} targets")
        num_top(found, num_classes)
    return found


def _files(destination: Path, parts: list[str]) -> list[Path]:
    """A file for each part, named after it, by what every file system takes, where there are several."""
    if len(parts) == 1:
        return [destination]
    return [destination.with_stem(f"{destination.stem}_{_NO_NAME.sub('-', part)}") for part in parts]


def _growing(names: list[str], asked: list[str]) -> list[str]:
    """Without those that 'all' stands for and that have no map for each block; what is named is left to be refused."""
    from ..methods import methods_from_texts

    methods = methods_from_texts(names)
    return [name for name in names if name in asked or "all" not in asked or methods[name].grows(num_blocks=2)]


def _check_output(output: Path | None, many: bool) -> None:
    """Refuse, before any work, an output that cannot be written; its folder is made."""
    if many:
        if output is not None and output.suffix.lower() in (*PICTURES, ARRAYS):
            raise Failure(f"output: expected a folder for several photos, received {str(output)!r}")
        make_folder(output or Path())
        return
    if output is None or output.is_dir():
        return
    if output.suffix.lower() not in (*PICTURES, ARRAYS):
        raise Failure(f"output: expected a file ending in {', '.join((*PICTURES, ARRAYS))} or a folder, received {str(output)!r}")
    make_folder(output.parent)


def _destinations(paths: list[Path], output: Path | None, kind: str = "explained") -> list[Path]:
    """Where each photo's maps go; photos of one name get a number."""
    if len(paths) == 1 and output is not None and not output.is_dir():
        return [output]
    folder = output or Path()
    taken: set[str] = set()
    destinations: list[Path] = []
    for path in paths:
        name, number = f"{path.stem}_{kind}.png", 2
        while name in taken:
            name, number = f"{path.stem}_{number}_{kind}.png", number + 1
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
