"""Which part may import which: imports run downward only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the top to the bottom of the house; a module may import from lines below its own, and from its own.
LEVELS = [
    {"cli", "__main__"},
    {"dataset", "evaluate", "sources", "visualize", "loading"},
    {"explainer", "explanation"},
    {"methods"},
    {"relevance"},
    {"relevance_tap"},
    {"rules"},
    {"tap", "targets", "heatmap"},
    {"models", "fused_attention"},
    {"kernels"},
    {"compiled", "checkpoint", "cuda_graphs", "capture"},
    {"errors", "messages", "files", "options", "environment", "processes"},
]
FREE = {"testing", "__init__", "assets"}  # the reference stands beside the house; the package's front door sees all
LEVEL = {name: depth for depth, names in enumerate(LEVELS) for name in names}


def _modules() -> list[Path]:
    return sorted((ROOT / "vitexplain").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))


def _location(path: Path) -> tuple[str, ...]:
    """Dotted location inside the installed package."""
    relative = path.relative_to(ROOT)
    parts = relative.parts[1:] if relative.parts[0] == "vitexplain" else relative.parts
    return (*parts[:-1], parts[-1].removesuffix(".py"))


def _imported_parts(path: Path) -> set[str]:
    """First part, below the package, of everything a module imports from this package."""
    location = _location(path)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = location[: len(location) - node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {(*package, *name.split("."))[0] for name in names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found |= {name.split(".")[1] for name in names if name and name.startswith("vitexplain.")}
    return found


@pytest.mark.parametrize("path", _modules(), ids=lambda path: ".".join(_location(path)))
def test_imports_run_downward_only(path: Path) -> None:
    part = _location(path)[0]
    if part in FREE - {"testing"}:
        return
    imported = _imported_parts(path) - {"__version__"}
    if part == "testing":
        assert imported <= {"testing"}, "the reference is independent of the code it judges"
        return
    assert part in LEVEL, f"{part} has no place in the house: add it to LEVELS"
    allowed = {name for name, depth in LEVEL.items() if depth >= LEVEL[part]} | ({"testing"} if part == "explainer" else set())
    assert imported <= allowed, f"{part} imports {sorted(imported - allowed)} from above"
