"""``vitexplain methods``, ``vitexplain models`` and ``vitexplain protocols``: what there is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import Json, app, guarded

if TYPE_CHECKING:
    from ..options import Option

_NAMES = {
    "demo": "the small CIFAR-10 model that comes with this package",
    "NAME": "a timm model, such as vit_base_patch16_224, with its pretrained weights or those of --weights FILE",
    "transformers:NAME": "one of Hugging Face transformers' image classifiers, by its name on the hub or its folder",
}


@app.command()
def methods(as_json: Json = False) -> None:
    """List the methods: paper, cost, options."""
    from ..methods import list_methods

    if as_json:
        _print_json([asdict(info) for info in list_methods()])
        return
    rows = []
    for info in list_methods():
        kind = "class-specific" if info.class_specific else "the same for every class"
        more = "; all rows" if info.all_rows else ""
        rows.append((f"{info.name}\n{info.title}", info.paper, f"{info.cost}\n({kind}{more})", _options(info.options)))
    _print_table("Methods", ("name", "paper", "cost", "options"), rows)


@app.command()
def protocols(as_json: Json = False) -> None:
    """List the protocols of evaluate: source, options."""
    from ..evaluate import PROTOCOLS

    if as_json:
        listed = [(kind.name, kind.title, kind.source, kind.options()) for kind in PROTOCOLS.values()]
        _print_json(
            [
                {"name": name, "title": title, "source": source, "options": [asdict(option) for option in options]}
                for name, title, source, options in listed
            ]
        )
        return
    rows = [(kind.name, f"{kind.title}\n{kind.source}", _options(kind.options())) for kind in PROTOCOLS.values()]
    _print_table("Protocols", ("name", "source", "options"), rows)


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="A model, as --model takes it.", metavar="NAME", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the families of models that are explained; or say whether, and by which methods, one model is.

    Of a model named here no weights are downloaded.
    """
    guarded(lambda: _list_models(as_json) if name is None else _describe(name, as_json))


def _list_models(as_json: bool) -> None:
    from ..models import FAMILIES

    families = [family.FAMILY for family in FAMILIES]
    if as_json:
        _print_json({"names": _NAMES, "families": families})
        return
    _print_table("Names of models", ("--model", "what it is"), list(_NAMES.items()))
    _print_table("Families", ("every variant with one chain of token-by-token maps",), [(family,) for family in families])
    typer.echo("vitexplain models NAME says whether a model is explained, and by which methods.")


def _describe(name: str, as_json: bool) -> None:
    from ..errors import UnsupportedModelError
    from ..loading import untrained_model
    from ..models import read_anatomy

    model = untrained_model(name)
    about: dict[str, Any] = {"name": name, "class": type(model).__name__, "family": None, "blocks": None}
    try:
        anatomy = read_anatomy(model)
    except UnsupportedModelError as error:
        about |= {"explained": False, "reason": str(error), "methods": {}}
    else:
        found = _refusals(model)
        reasons = set(found.values())
        reason = next(iter(reasons)) if len(reasons) == 1 else None
        about |= {"family": anatomy.family, "blocks": len(anatomy.blocks)}
        about |= {"explained": None in reasons, "reason": reason, "methods": found}
    if as_json:
        _print_json(about)
        return
    _print_about(about)


def _refusals(model: Any) -> dict[str, str | None]:
    """Of each method why it does not explain the model; None where it does."""
    from ..errors import ExplanationError
    from ..explainer import Explainer
    from ..methods import REGISTRY

    found: dict[str, str | None] = {}
    for name in REGISTRY:
        try:
            Explainer(model, name)
        except ExplanationError as error:
            found[name] = str(error)
        else:
            found[name] = None
    return found


def _print_about(about: Mapping[str, Any]) -> None:
    """In a few lines."""
    kind = about["class"] if about["family"] is None else f"{about['class']} ({about['family']}), {about['blocks']} blocks"
    typer.echo(f"{about['name']}: {kind}")
    if not about["explained"]:
        typer.echo(f"not explained: {about['reason']}" if about["reason"] else "not explained:")
    by = [name for name, reason in about["methods"].items() if reason is None]
    if by:
        typer.echo(f"explained by: {', '.join(by)}")
    if about["reason"] is None:
        for name, reason in about["methods"].items():
            if reason is not None:
                typer.echo(f"not by {name}: {reason}")


def _options(options: Iterable[Option]) -> str:
    """A method's or protocol's options, a line each."""
    return "\n".join(f"{o.name}={o.default} ({o.values}): {o.help}" for o in options) or "–"


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2))


def _print_table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Each row's first line in bold."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True, title=title)
    for place, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=place == 0)
    for first, *others in rows:
        name, _, more = first.partition("\n")
        table.add_row(Text.assemble((name, "bold"), f"\n{more}" if more else ""), *map(Text, others))
    Console().print(table)
