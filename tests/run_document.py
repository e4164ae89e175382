"""Run a document's commands in order and in one process: python tests/run_document.py DOCUMENT, in the folder to run them in.

A line of a ``sh`` block that calls ``vitexplain`` goes to its entry point; a ``python`` block is executed in the namespace of
those before it. ``pip install`` and ``make`` set things up: of them it is seen that the extra and the target exist. Anything
else is an error, so that no command goes unseen.
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

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"^( *)```(sh|python)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
# Makes a command of one that runs until it is stopped; its own tests run it.
_SERVERS = ("serve",)


@dataclass(frozen=True)
class Block:
    """A block of code and the line of the document on which it begins."""

    language: str
    code: str
    line: int


def blocks(text: str) -> list[Block]:
    """The ``sh`` and ``python`` blocks of a document."""
    return [
        Block(
            match[2],
            "\n".join(line.removeprefix(match[1]) for line in match[3].splitlines()),
            text[: match.start()].count("\n") + 2,
        )
        for match in _BLOCK.finditer(text)
    ]


def run(path: Path, skipped: frozenset[str] = frozenset()) -> None:
    """Run everything in a document; ``skipped`` are the languages that are left out."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(path.read_text(encoding="utf-8")):
        if block.language in skipped:
            continue
        if block.language == "python":
            # the lines' numbers in a traceback are the document's
            exec(compile("\n" * (block.line - 1) + block.code, str(path), "exec"), namespace)
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                print(f"$ {line}", flush=True)
                run_command(words)


def run_command(words: list[str]) -> None:
    """Run one command, or see that it is one."""
    program, *arguments = words
    if program == "vitexplain":
        _vitexplain(arguments)
    elif program == "make":
        for target in arguments:
            subprocess.run(["make", "-n", "-C", str(ROOT), target], check=True, stdout=subprocess.DEVNULL)
    elif program == "pip" and arguments[0] == "install":
        known = metadata("vitexplain").get_all("Provides-Extra") or []
        asked = re.findall(r"[\w-]+", " ".join(re.findall(r"\[(.*?)\]", " ".join(arguments))))
        if unknown := [name for name in asked if name not in known]:
            raise SystemExit(f"no such extra: {', '.join(unknown)}")
    else:
        raise SystemExit(f"a command that no test runs: {shlex.join(words)}")


def _vitexplain(arguments: list[str]) -> None:
    from vitexplain.cli import app

    if arguments[0] in _SERVERS:
        arguments = [*arguments, "--help"]
    expanded = [name for word in arguments for name in (sorted(glob.glob(word)) if re.search(r"[*?]", word) else [word])]
    try:
        app(expanded, prog_name="vitexplain")
    except SystemExit as stopped:
        if stopped.code:
            raise SystemExit(f"vitexplain {shlex.join(arguments)}: exit code {stopped.code}") from stopped


if __name__ == "__main__":
    run(Path(sys.argv[1]))
