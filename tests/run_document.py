"""Run a document's commands in order and in one process: python tests/run_document.py DOCUMENT, in the folder to run them in.

A ``python`` block is executed in the namespace of those before it. Of a ``sh`` block each line that calls ``vitexplain`` goes to
its entry point; lines that set things up (``pip install``, ``make``) or run until they are stopped are checked for naming what
there is, and so is every line of a ``bash`` block, which needs a download or a GPU. Anything else is an error, so that no
command goes unseen.
"""

from __future__ import annotations

import glob
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import typer
import typer.exceptions

from vitexplain.cli import app

ROOT = Path(__file__).resolve().parent.parent
RUN, CHECKED, PYTHON = "sh", "bash", "python"
PLAIN = ("", "text", "json")  # shown, not run
_BLOCK = re.compile(r"^( *)(```+|~~~+)([^\n]*)\n(.*?)^\1\2 *$", re.DOTALL | re.MULTILINE)
_SERVERS = ("serve",)  # their own tests run them


@dataclass(frozen=True)
class Block:
    """A block of code and the line of the document on which it begins."""

    language: str
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    """The blocks of a document that are no plain text.

    Raises:
        SystemExit: one is in a language that nothing here runs or checks.
    """
    found = []
    for match in _BLOCK.finditer(text):
        indent, _, heading, code = match.groups()
        language, line = (heading.split() or [""])[0], text[: match.start()].count("\n") + 2
        if language not in (RUN, CHECKED, PYTHON, *PLAIN):
            raise SystemExit(f"line {line}: a block in {language!r}, which no test runs")
        if language not in PLAIN:
            found.append(Block(language, "\n".join(one.removeprefix(indent) for one in code.splitlines()), line))
    return found


def commands(block: Block) -> list[list[str]]:
    """A shell block's commands, each as words, without comments."""
    lines = block.code.replace("\\\n", " ").replace("&&", "\n").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def run(path: Path, skipped: frozenset[str] = frozenset()) -> None:
    """Run everything in a document; ``skipped`` are the languages that are left out."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(path.read_text(encoding="utf-8")):
        if block.language in skipped:
            continue
        if block.language == PYTHON:
            _execute(block, path, namespace)
            continue
        for words in commands(block):
            print(f"$ {shlex.join(words)}", flush=True)
            if block.language == RUN and words[0] == "vitexplain" and words[1] not in _SERVERS:
                _vitexplain(words[1:])
            else:
                check_command(words)


def check_command(words: list[str]) -> None:
    """See that a command is one: that program, command, options, extra and target exist.

    Raises:
        SystemExit: they do not, or it is another program's.
    """
    words = words[next(i for i, word in enumerate(words) if not re.fullmatch(r"\w+=.*", word)) :]
    program, *arguments = words
    if program == "torchrun":
        arguments = arguments[arguments.index("-m") + 1 :]
        program, *arguments = arguments
    if program == "vitexplain":
        _parse(arguments)
    elif program == "make":
        targets = [word for word in arguments if "=" not in word]
        subprocess.run(["make", "-n", "-C", str(ROOT), *targets], check=True, stdout=subprocess.DEVNULL)
    elif program == "pip" and arguments[0] == "install":
        _check_extras(" ".join(arguments))
    elif program == "python":
        name = arguments[1] if arguments[0] == "-m" else arguments[0]
        places = [ROOT / name, ROOT / f"{name.replace('.', '/')}.py", ROOT / name.replace(".", "/") / "__main__.py"]
        if name not in ("pytest", "mkdocs") and not any(place.is_file() for place in places):
            raise SystemExit(f"no such program: {shlex.join(words)}")
    else:
        raise SystemExit(f"a command that no test runs: {shlex.join(words)}")


def _parse(arguments: list[str]) -> None:
    """Parse a command of ``vitexplain`` without running it."""
    known = typer.main.get_command(app).commands
    name, *rest = arguments
    if name.startswith("-"):
        return
    if name not in known:
        raise SystemExit(f"vitexplain has no command {name!r}")
    try:
        known[name].make_context(name, rest)
    except typer.Exit:  # the help was asked for
        return
    except typer.exceptions.TyperException as error:
        raise SystemExit(f"vitexplain {shlex.join(arguments)}: {error.format_message()}") from error


def _check_extras(text: str) -> None:
    known = metadata("vitexplain").get_all("Provides-Extra") or []
    asked = re.findall(r"[\w-]+", " ".join(re.findall(r"\[(.*?)\]", text)))
    if unknown := [name for name in asked if name not in known]:
        raise SystemExit(f"no such extra: {', '.join(unknown)}")


def _execute(block: Block, path: Path, namespace: dict[str, Any]) -> None:
    try:
        # the lines' numbers in a traceback are the document's
        exec(compile("\n" * (block.line - 1) + block.code, str(path), "exec"), namespace)
    except SystemExit as stopped:
        raise RuntimeError(f"{path.name}, line {block.line}: the block ends the program") from stopped


def _vitexplain(arguments: list[str]) -> None:
    expanded = [name for word in arguments for name in (sorted(glob.glob(word)) if re.search(r"[*?]", word) else [word])]
    try:
        app(expanded, prog_name="vitexplain")
    except SystemExit as stopped:
        if stopped.code:
            raise SystemExit(f"vitexplain {shlex.join(arguments)}: exit code {stopped.code}") from stopped


if __name__ == "__main__":
    run(Path(sys.argv[1]))
