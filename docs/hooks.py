"""What the documentation's pages cannot do by themselves: lists from registries, and links out of the folder."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitexplain.methods import Method
    from vitexplain.options import Option

ROOT = Path(__file__).resolve().parent.parent

_PLACE = re.compile(r"<!-- every (\w+): written by docs/hooks.py -->")
# what lies beside docs/ is named, not linked
_OUTSIDE = re.compile(r"\[[^\]]+\]\((?:\.\./)*((?:bench|examples|tests|kernels|vitexplain)/[^)]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with each page's text."""
    markdown = _PLACE.sub(lambda found: WRITERS[found[1]](), markdown)
    # Tables stand in folded parts, which Markdown leaves alone unless it is told otherwise.
    markdown = markdown.replace("<details><summary>", '<details markdown="1"><summary>')
    return _OUTSIDE.sub(r"`\1`", markdown)


def commands() -> str:
    """The command line's reference, from the commands themselves."""
    import typer
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from vitexplain.cli import app

    command = get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="vitexplain", indent=1)
    text = re.sub(r"\A## `vitexplain`\n", "", text)
    return re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", text)  # they follow, each with its whole description


def methods() -> str:
    """Every method of the registry: its definition, which is its class's docstring, and its options."""
    from vitexplain.methods import REGISTRY

    return "\n\n".join(
        _entry(2, kind.title, f"vitexplain.methods.{kind.__name__}", _about(kind), kind.options()) for kind in REGISTRY.values()
    )


def protocols() -> str:
    """Every protocol of the registry."""
    from vitexplain.evaluate import PROTOCOLS

    return "\n\n".join(
        _entry(3, kind.title, f"{kind.__module__}.{kind.__name__}", f"`{kind.name}` · {kind.source}", kind.options())
        for kind in PROTOCOLS.values()
    )


def levels() -> str:
    """Which part of the package may import which, from the contract that the tests hold it to."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    downward = next(contract for contract in contracts if contract["id"] == "downward")
    lines = (re.sub(r" *[:|] *", "   ", layer) for layer in downward["layers"])
    return "\n".join(["```text", *lines, "```"])


WRITERS: dict[str, Callable[[], str]] = {"command": commands, "method": methods, "protocol": protocols, "level": levels}


def _about(kind: type[Method]) -> str:
    of_class = "class-specific" if kind.uses_target else "the same for every class"
    rows = "; all rows can be asked for" if kind.is_chain else ""
    return f"`{kind.name}` · {of_class}{rows} · cost: {kind.cost}  \n*{kind.paper}*"


def _entry(level: int, title: str, path: str, about: str, options: Iterable[Option]) -> str:
    """A class by its docstring alone, and its options in a table, with what each may be."""
    names = f'heading: "{title}", toc_label: "{title}", heading_level: {level}'
    switches = f"members: [], show_signature: false, separate_signature: false, {names}"
    lines = [f"| `{o.name}` | `{o.default}` | {_cell(o.values)} | {_cell(o.help)} |" for o in options]
    head = ["| option | default | values | |", "|---|---|---|---|"] if lines else []
    return "\n".join([f"::: {path}", f"    options: {{ {switches} }}", "", about, "", *head, *lines])


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
