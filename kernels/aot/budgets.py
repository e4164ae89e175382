"""Hold every compiled kernel to its budget: ``python -m kernels.aot.budgets FOLDER`` from the root; CMake's tests run it.

Nothing spills; shared memory is within the architecture's limit; products of half-precision inputs run on tensor cores, on
sm_90 by whole warp groups (HGMMA) wherever the tile is large enough for them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .manifest import Image, Manifest, read_manifest
from .resources import SHARED_MEMORY, TENSOR_CORE

Types = tuple[tuple[str, str], ...]
Constants = tuple[tuple[str, Any], ...]

WARP_GROUP_ROWS = 64
WITHOUT_PRODUCTS = frozenset({"token_transformation_kernel", "delta_kernel", "normalise_kernel"})
INSTRUCTIONS = {"80": ("HMMA",), "89": ("HMMA",), "90": ("HGMMA", "HMMA"), "100": ("UTCHMMA", "HMMA"), "gfx942": ("v_mfma",)}


def violations(image: Image, architecture: str) -> Iterator[str]:
    """What of the budget an image breaks, in words."""
    if image.spilled_bytes:
        yield f"spills {image.spilled_bytes} bytes a thread"
    local = {name: image.instructions[name] for name in ("LDL", "STL") if name in image.instructions}
    if local:
        yield f"uses local memory: {local}"
    limit = SHARED_MEMORY[architecture]
    if image.shared_bytes > limit:
        yield f"needs {image.shared_bytes} bytes of shared memory, the limit is {limit}"
    wanted = expected_products(image.kernel, image.types, image.constants, architecture)
    if wanted and not any(name in image.instructions for name in wanted):
        yield f"expected products ({' or '.join(wanted)}), found {image.instructions}"


def expected_products(kernel: str, types: Types, constants: Constants, architecture: str) -> tuple[str, ...]:
    """Instructions of which at least one must be there, or the compiler has lost the products; empty where none is known."""
    if kernel in WITHOUT_PRODUCTS:
        return ()
    values = dict(constants)
    if any(kind in ("*fp16", "*bf16") for _, kind in types):
        fills_warp_groups = min(values.get("BLOCK_M", 0), values.get("BLOCK_N", 0)) >= WARP_GROUP_ROWS
        return ("HGMMA",) if architecture == "90" and fills_warp_groups else INSTRUCTIONS[architecture]
    exact = values.get("PRECISION") == "ieee" and not architecture.startswith("gfx")
    return ("FFMA", "FFMA2") if exact else ()


def report(manifest: Manifest) -> tuple[str, int]:
    """A line per image, and how many break their budget."""
    lines, broken = [], 0
    for image in manifest.images:
        constants = dict(image.constants)
        tile = "×".join(str(constants[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_D", "BLOCK_T") if name in constants)
        kind = next(kind for _, kind in image.types)
        tensor = {name: count for name, count in image.instructions.items() if name in TENSOR_CORE}
        lines.append(
            f"{image.kernel:40s} {kind:6s} {constants.get('PHI', ''):9s} {tile:12s} {image.num_warps} warps "
            f"{image.registers:4d} registers {image.shared_bytes:7d} B shared {image.spilled_bytes:4d} B spilled {tensor or ''}"
        )
        found = list(violations(image, manifest.architecture))
        broken += bool(found)
        lines += [f"    OVER BUDGET ({image.file}): {violation}" for violation in found]
    return "\n".join(lines), broken


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="images and manifest of one architecture")
    manifest = read_manifest(parser.parse_args(arguments).folder)
    text, broken = report(manifest)
    print(f"sm/target {manifest.architecture}, triton {manifest.triton}\n{text}")
    if broken:
        raise SystemExit(f"{broken} of {len(manifest.images)} kernels over budget for {manifest.architecture}")
    print(f"all {len(manifest.images)} kernels within budget for {manifest.architecture}")


if __name__ == "__main__":
    main()
