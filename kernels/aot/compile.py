"""Compile every shipped kernel variant for one architecture, without a GPU: ``python -m kernels.aot.compile`` from the root.

CMake runs this once per architecture (``-DVITEXPLAIN_AOT=ON``). What is compiled is what the launchers themselves ask for:
they are run on tensors without data while launches are recorded.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..launch import KernelVariant, options, recorded_launches
from ..shipped_variants import record_shipped_launches
from .manifest import Image, Manifest, digest
from .resources import resources_of

DTYPES = ("float16", "bfloat16", "float32")
HEAD_DIMS = (64, 80)
BINARIES = {"cuda": ("cubin", "ptx"), "hip": ("hsaco", "amdgcn")}


def target_of(architecture: str) -> GPUTarget:
    """Triton's name of ``"90"`` or ``"gfx942"``."""
    if architecture.startswith("gfx9"):
        return GPUTarget("hip", architecture, 64)
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 32)
    return GPUTarget("cuda", int(architecture), 32)


def compile_variant(variant: KernelVariant, architecture: str) -> Any:
    """Triton's compiled kernel of a recorded launch."""
    kernel = variant.function
    position = {name: index for index, name in enumerate(kernel.arg_names)}
    types = dict(variant.types)
    source = ASTSource(
        kernel,
        signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={(position[name],): value for name, value in variant.constants},
        attrs={(position[name],): [["tt.divisibility", 16]] for name in sorted(variant.divisible)},
    )
    target = target_of(architecture)
    chosen = options(variant.num_warps, variant.num_stages, variant.max_registers, nvidia=target.backend == "cuda")
    return triton.compile(source, target=target, options=chosen)


def shipped_variants(architecture: str, dtypes: list[str], head_dims: list[int], kernels: str = "") -> list[KernelVariant]:
    """Every different variant that explanations launch, in a stable order; ``kernels`` is a pattern of names."""
    variants: dict[KernelVariant, None] = {}
    with recorded_launches(architecture) as recorded:
        for dtype in dtypes:
            for head_dim in head_dims:
                record_shipped_launches(getattr(torch, dtype), head_dim)
        variants = dict.fromkeys(recorded)
    return [variant for variant in variants if re.search(kernels, variant.kernel)]


def build_image(variant: KernelVariant, architecture: str, folder: Path, stem: str) -> Image:
    """Compile one variant, write image and assembly, and say what it needs."""
    started = time.perf_counter()
    compiled = compile_variant(variant, architecture)
    seconds = time.perf_counter() - started
    _expect_no_scratch(compiled, variant)
    binary, assembly = BINARIES[target_of(architecture).backend]
    content = compiled.asm[binary]
    (folder / f"{stem}.{binary}").write_bytes(content)
    (folder / f"{stem}.{assembly}").write_text(compiled.asm[assembly])
    found = resources_of(compiled, architecture)
    return Image(
        file=f"{stem}.{binary}",
        sha256=digest(content),
        symbol=compiled.metadata.name,
        kernel=variant.kernel,
        types=variant.types,
        divisible=tuple(sorted(variant.divisible)),
        constants=variant.constants,
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        max_registers=variant.max_registers,
        trailing_pointers=_parameters(compiled.asm[assembly], assembly) - len(variant.types),
        shared_bytes=found.shared_bytes,
        registers=found.registers,
        spilled_bytes=found.spilled_bytes,
        instructions=found.instructions,
        seconds=round(seconds, 3),
    )


def _expect_no_scratch(compiled: Any, variant: KernelVariant) -> None:
    sizes = [getattr(compiled.metadata, f"{kind}_scratch_size", 0) for kind in ("global", "profile")]
    if any(sizes):
        raise RuntimeError(f"{variant.kernel}: expected a kernel without scratch memory, received {sizes} bytes")


def _parameters(text: str, kind: str) -> int:
    """How many parameters the compiled kernel takes: Triton appends scratch pointers, how many depends on its version."""
    if kind == "ptx":
        header = text[text.index(".entry") :]
        return header[: header.index(")")].count(".param")
    return len(re.findall(r"\.value_kind:\s+(?:global_buffer|by_value)", text))


_VARIANTS: list[KernelVariant] = []


def _numbered(task: tuple[int, str, Path]) -> Image:
    number, architecture, folder = task
    variant = _VARIANTS[number]
    return build_image(variant, architecture, folder, f"{number:03d}_{variant.kernel}")


def compile_all(
    architecture: str, folder: Path, dtypes: list[str], head_dims: list[int], kernels: str = "", jobs: int = 1
) -> Manifest:
    """Compile all shipped variants for an architecture into a folder, with a manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    _VARIANTS[:] = shipped_variants(architecture, dtypes, head_dims, kernels)
    if not _VARIANTS:
        raise SystemExit(f"no kernel matches {kernels!r}")
    tasks = [(number, architecture, folder) for number in range(len(_VARIANTS))]
    # forked workers find the variants, which hold functions and cannot be sent, where this process left them
    with get_context("fork").Pool(jobs) as pool:
        images = pool.map(_numbered, tasks, chunksize=1)
    manifest = Manifest(architecture, triton.__version__, torch.__version__, tuple(images))
    manifest.write(folder)
    return manifest


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", required=True, metavar="SM", help="80, 89, 90, 100, gfx942")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(HEAD_DIMS))
    parser.add_argument("--kernels", default="", metavar="PATTERN", help="only kernels whose name matches")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set: expected a process that compiles kernels, received one that interprets them")
    started = time.perf_counter()
    manifest = compile_all(asked.architecture, asked.output, asked.dtypes, asked.head_dims, asked.kernels, asked.jobs)
    size = sum(file.stat().st_size for file in asked.output.glob("*") if file.suffix in (".cubin", ".hsaco"))
    print(
        f"{asked.architecture}: {len(manifest.images)} images, {size / 2**20:.1f} MiB, {time.perf_counter() - started:.0f} s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
