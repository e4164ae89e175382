"""What is installed: the archives' content and metadata, a first run from an empty folder, and the files about the project."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import BytesParser
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SMOKE = Path(__file__).with_name("smoke.py")
ARCHIVED = ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "kernels", "vitexplain")
ABOUT = ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md")
PLANTED = (".ci/run", ".venv/lib/x.py", "build/x.py", "bench/x.py", "docs/x.md", "tests/x.py", "vitexplain/__pycache__/x.pyc")
# import names that differ from the names they are installed by
DISTRIBUTIONS = {"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn"}

pytestmark = pytest.mark.xdist_group("packaging")


# -- the archives --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive of the checkout, among things that belong in no archive, and the wheel made from it."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in (*ARCHIVED, *ABOUT, ".gitignore"):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    for name in PLANTED:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(built), str(source), cwd=source)
    (archive,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    return archive, wheel


def _run(*command: str, cwd: Path) -> str:
    """What a command says; nothing of the environment that this process was given shows it another package."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    env["OMP_NUM_THREADS"] = "1"  # tests run in parallel processes
    finished = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def _in_wheel() -> set[str]:
    """Every file of the sources, by its place in the wheel."""
    found: set[str] = set()
    for folder, place in ((ROOT / "vitexplain", "vitexplain"), (ROOT / "kernels", "vitexplain/kernels")):
        files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        found |= {f"{place}/{path.relative_to(folder).as_posix()}" for path in files}
    return found


def test_the_source_archive_holds_what_a_wheel_is_made_of(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {name.partition("/")[0] for name in names} == {*ARCHIVED, *ABOUT, "PKG-INFO"}
    assert {
        name.replace("kernels/", "vitexplain/kernels/", 1) if name.startswith("kernels/") else name for name in names
    } >= _in_wheel()
    assert not {name for name in names if "__pycache__" in name}


def test_the_wheel_holds_the_package_and_nothing_else(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        names = set(wheel.namelist())
    information = f"vitexplain-{PROJECT['version']}.dist-info"
    assert {name for name in names if not name.startswith(f"{information}/")} == _in_wheel()
    assert {
        "vitexplain/py.typed",
        "vitexplain/assets/demo_vit_cifar10.safetensors",
        "vitexplain/evaluate/report.html.j2",
        "vitexplain/kernels/launch_table.csv",
        "vitexplain/kernels/attention_backward/decisions.csv",
    } < names
    assert f"{information}/licenses/LICENSE" in names


def test_the_metadata_say_what_the_project_says(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        information = f"vitexplain-{PROJECT['version']}.dist-info"
        metadata: Message = BytesParser().parsebytes(wheel.read(f"{information}/METADATA"))
        entry_points = wheel.read(f"{information}/entry_points.txt").decode()
        assert "Tag: py3-none-any" in wheel.read(f"{information}/WHEEL").decode()
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload(decode=True).decode() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(metadata.get_all("Classifier", [])) == set(PROJECT["classifiers"])
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert "vitexplain = vitexplain.cli:main" in entry_points.replace("=", " = ").replace("  ", " ")
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    plain = {requirement.name for requirement in required if requirement.marker is None}
    assert plain == {Requirement(text).name for text in PROJECT["dependencies"]}


# -- a first run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(archives: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that holds the wheel alone; what it requires is seen in the running one.

    A line of a .pth file adds a folder and reads no .pth file in it, so that the checkout's editable install stays unseen.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    packages = Path(_run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    install = ["install", "--quiet", "--no-index", "--no-deps", "--no-compile", str(archives[1])]
    _run(sys.executable, "-m", "pip", "--python", str(python), *install, cwd=folder)
    outer = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (packages / "outer.pth").write_text("\n".join(outer) + "\n", encoding="utf-8")
    return python


@pytest.mark.parametrize("bare", [False, True], ids=["as_it_is", "without_extras_triton_and_posix"])
def test_the_wheel_explains_a_photo_from_an_empty_folder(installed: Path, tmp_path: Path, bare: bool) -> None:
    said = json.loads(_run(str(installed), "-I", str(SMOKE), *["--bare"] * bare, cwd=tmp_path).splitlines()[-1])
    assert Path(said["file"]).is_relative_to(installed.parent.parent), "the wheel's package runs, not the checkout's"
    assert said["version"] == PROJECT["version"]
    if bare:
        assert said["modules"] == sum(name.endswith(".py") for name in _in_wheel()) - 1, "every module but the package itself"
        assert said["loaded"] == []


def test_the_command_is_installed(installed: Path, tmp_path: Path) -> None:
    command = installed.with_name("vitexplain.exe" if os.name == "nt" else "vitexplain")
    assert _run(str(command), "--version", cwd=tmp_path).strip().endswith(PROJECT["version"])


# -- requirements --------------------------------------------------------------------------------------------------------


def _sources() -> Iterator[Path]:
    yield from (ROOT / "vitexplain").rglob("*.py")
    yield from (ROOT / "kernels").rglob("*.py")


def _imported(path: Path) -> set[str]:
    """Top-level names that a module imports, by a statement or by ``import_module`` of a text."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute) and node.args:
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name == "import_module" and isinstance(node.args[0], ast.Constant):
                found.add(str(node.args[0].value))
    return {name.partition(".")[0] for name in found if not name.startswith(".")}


def _required(*extras: str) -> set[str]:
    """Distributions that the project requires with extras, those of its own extras' extras as well."""
    found: set[str] = set()
    for requirement in map(Requirement, [*PROJECT["dependencies"], *_of(extras)]):
        name = canonicalize_name(requirement.name)
        found |= _required(*requirement.extras) if name == PROJECT["name"] else {name}
    return found


def _of(extras: tuple[str, ...]) -> list[str]:
    return [text for extra in extras for text in PROJECT["optional-dependencies"][extra]]


def test_everything_the_package_imports_is_required() -> None:
    by_timm = {canonicalize_name(Requirement(text).name) for text in distribution("timm").requires or []}
    for_users = _required("all", "triton") | by_timm
    imported = {name: path for path in _sources() for name in _imported(path)}
    others = {name: path for name, path in imported.items() if name not in sys.stdlib_module_names and name != PROJECT["name"]}
    assert {"torch", "ray", "gradio", "captum", "triton"} <= set(others), "imports are found"
    missing = {
        name: path.name for name, path in others.items() if canonicalize_name(DISTRIBUTIONS.get(name, name)) not in for_users
    }
    assert not missing, f"neither a requirement nor in an extra: {missing}"


def test_every_extra_that_is_named_exists() -> None:
    named = re.compile(r"(?:vitexplain|\.)\[([a-z, ]+)\]")
    texts = [*_sources(), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *(ROOT / "docs").rglob("*.md")]
    texts += [*(ROOT / "examples").rglob("*.py"), *(ROOT / "examples").rglob("*.ipynb")]
    found = {
        extra.strip(): path for path in texts for match in named.findall(path.read_text("utf-8")) for extra in match.split(",")
    }
    assert {"evaluate", "dataset", "serve", "test"} <= set(found), "extras are found"
    unknown = {extra: path.name for extra, path in found.items() if extra not in PROJECT["optional-dependencies"]}
    assert not unknown, f"named, but not there: {unknown}"


def test_all_holds_every_extra_of_a_user() -> None:
    extras = set(PROJECT["optional-dependencies"]) - {"all", "bench", "docs", "test", "triton"}
    assert Requirement(*PROJECT["optional-dependencies"]["all"]).extras == extras


def test_what_runs_on_linux_alone_is_required_there_alone() -> None:
    for text in (*PROJECT["dependencies"], *_of(tuple(PROJECT["optional-dependencies"]))):
        requirement = Requirement(text)
        if requirement.name == "triton":
            assert requirement.marker is not None
            assert [requirement.marker.evaluate({"sys_platform": name}) for name in ("linux", "darwin", "win32")] == [
                True,
                False,
                False,
            ]


# -- files about the project ---------------------------------------------------------------------------------------------


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]


def test_the_changelog_has_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(PROJECT['version'])}\]", text, re.MULTILINE)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_files_that_are_there(name: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not missing


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_a_workflow_is_bounded_and_may_only_read(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 60
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)
