"""What a compiled kernel needs of its architecture, and which of the instructions that matter it holds.

NVIDIA images are read with the ``cuobjdump`` that Triton's wheel brings; AMD ones by their assembly text.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KIB = 1 << 10
# Shared memory a program can have (CUDA programming guide, per compute capability; AMD CDNA 3 ISA, LDS of a workgroup).
SHARED_MEMORY = {
    "80": 163 * KIB,
    "86": 99 * KIB,
    "89": 99 * KIB,
    "90": 227 * KIB,
    "100": 227 * KIB,
    "120": 99 * KIB,
    "gfx942": 64 * KIB,
}
# Matrix products on tensor cores, by generation; arithmetic; local memory, which is where spilled registers go.
TENSOR_CORE = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "v_mfma")
COUNTED = (*TENSOR_CORE, "FFMA", "FFMA2", "MUFU", "LDGSTS", "UTMALDG", "LDL", "STL", "scratch_load", "scratch_store")


@dataclass(frozen=True)
class Resources:
    """Registers and spilled bytes of a thread, shared memory of a program, counted instructions."""

    architecture: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: dict[str, int]

    @property
    def fits(self) -> bool:
        """Whether the architecture has that much shared memory."""
        return self.shared_bytes <= SHARED_MEMORY[self.architecture]


def resources_of(compiled: Any, architecture: str) -> Resources:
    """Of a kernel compiled by Triton for ``architecture`` (``"90"``, ``"gfx942"``)."""
    if architecture.startswith("gfx"):
        return _amd(compiled, architecture)
    return _nvidia(compiled, architecture)


def _nvidia(compiled: Any, architecture: str) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as image:
        image.write(compiled.asm["cubin"])
        image.flush()
        usage = _cuobjdump("--dump-resource-usage", image.name)
        instructions = _counted(_cuobjdump("-sass", image.name))
    registers, stack = (_number(rf"{name}:(\d+)", usage) for name in ("REG", "STACK"))
    return Resources(architecture, registers, stack, compiled.metadata.shared, instructions)


def _amd(compiled: Any, architecture: str) -> Resources:
    text = compiled.asm["amdgcn"]
    registers, scratch = (_number(rf"\.{name}:\s*(\d+)", text) for name in ("vgpr_count", "private_segment_fixed_size"))
    return Resources(architecture, registers, scratch, compiled.metadata.shared, _counted(text))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"expected {pattern!r} in what the tool says of the kernel, received {text[:500]!r}")
    return int(found[1])


def _counted(assembly: str) -> dict[str, int]:
    """How often each instruction of ``COUNTED`` stands in the assembly, whatever its suffixes; those that do not are left out."""
    found = Counter(re.findall(r"\b(" + "|".join(COUNTED) + r")(?=[\s._])", assembly))
    found += Counter({"v_mfma": len(re.findall(r"\bv_mfma_", assembly)) - found["v_mfma"]})
    return {name: found[name] for name in COUNTED if found[name]}


def _cuobjdump(option: str, path: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], check=True, capture_output=True, text=True).stdout
