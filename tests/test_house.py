"""Which part may import which: the contracts of pyproject.toml, checked by import-linter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _laid_out(folder: Path) -> Path:
    """The sources as they are installed, ``kernels`` inside ``vitexplain``."""
    for source, place in (("vitexplain", "vitexplain"), ("kernels", "vitexplain/kernels")):
        shutil.copytree(ROOT / source, folder / place, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    return folder


def _checked(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter on the package in a folder; ``-S``, as the finder of an editable install would show the checkout's."""
    paths = dict.fromkeys([str(folder), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    arguments = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", "--no-logo"]
    return subprocess.run(
        [sys.executable, "-S", "-c", code, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUTF8": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def test_imports_follow_the_contracts(tmp_path: Path) -> None:
    checked = _checked(_laid_out(tmp_path))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert " 0 broken" in checked.stdout


FORBIDDEN = {  # module: what it must not import, and the contract that says so
    "vitexplain.methods.gmar": ("vitexplain.explainer", "Imports run downward only"),
    "vitexplain.kernels.tiles": ("vitexplain.errors", "Imports run downward only"),
    "vitexplain.testing.dense": ("vitexplain.tap", "Imports run downward only"),
    "vitexplain.evaluate.batch": ("vitexplain.testing.errors", "Only the explainer asks the reference"),
    "vitexplain.relevance": ("triton", "Only the kernels know Triton"),
    "vitexplain.cli.serve": ("gradio", "Only the page of serve knows gradio"),
    "vitexplain.kernels.row_propagation.torch_tiles": ("vitexplain.kernels.contribution_map", "An operation builds on"),
    "vitexplain.kernels.head_norms.torch_gram": ("vitexplain.kernels.head_norms.triton_kernel", "No implementation of an"),
}


def test_every_forbidden_import_breaks_its_contract(tmp_path: Path) -> None:
    folder = _laid_out(tmp_path)
    (folder / "vitexplain" / "a_new_part.py").touch()
    for module, (imported, _) in FORBIDDEN.items():
        with (folder / f"{module.replace('.', '/')}.py").open("a", encoding="utf-8") as source:
            source.write(f"\n\ndef _planted():\n    import {imported}\n")
    checked = _checked(folder)
    assert checked.returncode != 0
    kept = [line for line in checked.stdout.splitlines() if "KEPT" in line]
    for module, (imported, contract) in FORBIDDEN.items():
        assert f"{module} -> {imported} (" in checked.stdout, checked.stdout + checked.stderr
        assert not any(line.startswith(contract) for line in kept), kept
    assert "- vitexplain.a_new_part\n" in checked.stdout, "a part without a place is refused"


@pytest.mark.xdist_group("together")
def test_tests_of_a_group_stay_together(request: pytest.FixtureRequest) -> None:
    """What several share is built once, and not twice at once: xdist knows a group by the end of a test's name."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("needs pytest -n 2 --dist loadgroup, as make test has it")
    assert request.node.nodeid.endswith("@together")
