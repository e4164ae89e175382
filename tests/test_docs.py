"""The documentation: it builds without a warning, names everything public and every shape; the tutorial runs as printed."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import FunctionType

import pytest

import vitexplain
from vitexplain.cli import app

from .run_document import ROOT, run

TUTORIAL = ROOT / "docs" / "tutorial.md"

pytestmark = pytest.mark.xdist_group("docs")  # one process, which builds once

# What is public: every name of these modules' __all__; without one, what is defined there.
MODULES = ("", "methods", "models", "dataset", "evaluate", "sources", "kernels", "testing", "serve", "visualize", "loading")
# (B, n, d), (…), (3, h, w); or the name of what says it.
SAYS_A_SHAPE = re.compile(r"\((?:…|\w{1,12},|[\w…·]{1,12}(?:, [\w…·]{1,12})+)\)|see ``|as for ``")


def _public() -> Iterator[tuple[str, object]]:
    for part in MODULES:
        home = f"vitexplain.{part}".rstrip(".")
        module = importlib.import_module(home)
        defined = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == home]
        for name in getattr(module, "__all__", defined):
            if not name.startswith("_"):
                yield f"{home}.{name}", getattr(module, name)


# -- the built pages -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole documentation, built strictly: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr, built.stderr
    return folder


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    found = {line.split(" ")[0] for line in inventory.splitlines()}
    assert [name for name, _ in _public() if name not in found] == []


def test_the_reference_of_the_command_line_has_every_command(site: Path) -> None:
    page = (site / "reference" / "cli" / "index.html").read_text()
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert len(names) > 5
    assert [name for name in names if f"vitexplain {name}</code>" not in page] == []


def test_every_method_and_protocol_shows_its_options(site: Path) -> None:
    pages = {"methods": vitexplain.methods.REGISTRY, "evaluate": importlib.import_module("vitexplain.evaluate").PROTOCOLS}
    for page, registry in pages.items():
        text = (site / "reference" / page / "index.html").read_text()
        missing = [
            f"{name}: {option.name}"
            for name, kind in registry.items()
            for option in kind.options()
            if f"<code>{option.name}</code>" not in text or f"<code>{name}</code>" not in text
        ]
        assert missing == []


def test_pages_take_nothing_from_the_web(site: Path) -> None:
    loaded = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^\s\">]+")
    found = {match[0] for page in site.rglob("*.html") for match in loaded.finditer(page.read_text())}
    assert {link for link in found if "rel=canonical" not in link} == set()


# -- docstrings ----------------------------------------------------------------------------------------------------------


def _functions() -> Iterator[tuple[str, FunctionType, str]]:
    """Public functions, constructors and methods with what documents them; not what takes the docstring of a base class."""
    for name, value in _public():
        if inspect.isfunction(value):
            yield name, value, _docstring(value)
        elif inspect.isclass(value):
            if "__init__" in vars(value) and not is_dataclass(value):
                yield name, value.__init__, _docstring(value)
            for member, method in vars(value).items():
                plain = getattr(method, "__func__", method)
                inherited = not plain.__doc__ and any(hasattr(base, member) for base in value.__mro__[1:])
                is_default = member in vars(value).get("__annotations__", {})
                if inspect.isfunction(plain) and not member.startswith("_") and not inherited and not is_default:
                    yield f"{name}.{member}", plain, _docstring(plain)


def _docstring(value: object) -> str:
    text = (inspect.getdoc(value) or "").strip()
    return "" if text.startswith(f"{getattr(value, '__name__', '')}(") else text  # what dataclass makes of a class without one


def _entry(docstring: str, name: str) -> str:
    """What a docstring says of one argument: its entry, with the lines that follow, or all of a docstring without entries."""
    found = re.search(rf"(?m)^( *)(?:[\w*]+, )*{name}(?:, \w+)*: (.*(?:\n\1 +.*)*)", docstring)
    if found:
        return found[2]
    return docstring if f"``{name}``" in docstring or not re.search("(?m)^ *(Args|Attributes):", docstring) else ""


def _is_tensor(hint: object) -> bool:
    """A tensor or a tuple of some; a dict of them has no one shape, a function none."""
    return bool(re.search(r"\bTensor\b", str(hint))) and not re.search(r"Callable|ClassVar|^dict|^Mapping", str(hint))


def test_everything_public_has_a_docstring() -> None:
    classes = [(name, _docstring(value)) for name, value in _public() if inspect.isclass(value)]
    functions = [(name, docstring) for name, _, docstring in _functions()]
    assert len(functions) > 50
    assert [name for name, docstring in [*classes, *functions] if not docstring] == []


def test_every_tensor_argument_and_result_says_its_shape() -> None:
    silent = []
    for name, function, docstring in _functions():
        for argument, hint in function.__annotations__.items():
            said = docstring if argument == "return" else _entry(docstring, argument)
            if _is_tensor(hint) and not SAYS_A_SHAPE.search(said):
                silent.append(f"{name}: {argument}")
    assert silent == []


def test_every_tensor_attribute_of_a_public_class_says_its_shape() -> None:
    silent = []
    for name, value in _public():
        if inspect.isclass(value):
            for attribute, hint in vars(value).get("__annotations__", {}).items():
                if _is_tensor(hint) and not SAYS_A_SHAPE.search(_entry(_docstring(value), attribute)):
                    silent.append(f"{name}.{attribute}")
    assert silent == []


# -- the tutorial --------------------------------------------------------------------------------------------------------


def test_the_tutorial_runs_in_order_from_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(TUTORIAL)
    pictures = ["cat_explained", "overlay", "three", "cat_and_dog", "contrast", "chelsea_0"]
    made = [*(f"{name}.png" for name in pictures), "maps.parquet", "look/class_means.png", "results/report.html"]
    assert [name for name in made if not (tmp_path / name).exists()] == []
