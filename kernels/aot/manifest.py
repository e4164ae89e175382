"""The record of what was compiled ahead of time: one ``manifest.json`` beside the images of an architecture."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Image:
    """One compiled kernel variant.

    Attributes:
        file: name of the image beside the manifest; PTX or AMD assembly has the same stem.
        sha256: of the image.
        symbol: the kernel's name inside the image.
        kernel, types, divisible, constants, num_warps, num_stages, max_registers: the variant, see ``launch.KernelVariant``.
        trailing_pointers: scratch pointers that Triton's calling convention appends; always null here.
        shared_bytes: shared memory of one program.
        registers, spilled_bytes: of one thread; spilled to local memory, loads and stores counted by the stack frame.
        instructions: how many of the instructions that matter the image holds.
        seconds: time to compile.
    """

    file: str
    sha256: str
    symbol: str
    kernel: str
    types: tuple[tuple[str, str], ...]
    divisible: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    max_registers: int
    trailing_pointers: int
    shared_bytes: int
    registers: int
    spilled_bytes: int
    instructions: dict[str, int] = field(compare=False)
    seconds: float = field(compare=False)

    @property
    def key(self) -> tuple[Any, ...]:
        """What a launch must equal; its divisible arguments must include ``divisible``."""
        return self.kernel, self.types, self.constants, self.num_warps, self.num_stages, self.max_registers


@dataclass(frozen=True)
class Manifest:
    """All images of one architecture."""

    architecture: str
    triton: str
    torch: str
    images: tuple[Image, ...]

    def write(self, folder: Path) -> Path:
        """Write ``manifest.json`` into the folder of the images."""
        path = folder / MANIFEST
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")
        return path


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest and the images beside it.

    Raises:
        ValueError: unreadable, of another format, or an image is missing or is not the one that was recorded.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
        found = content.pop("format")
        images = tuple(_image(record) for record in content.pop("images"))
        manifest = Manifest(images=images, **content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: expected a manifest of compiled kernels, received {type(error).__name__}: {error}") from error
    if found != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT}, received {found}")
    for image in images:
        _check_file(folder / image.file, image.sha256)
    return manifest


def _image(record: dict[str, Any]) -> Image:
    record["types"] = tuple((name, kind) for name, kind in record["types"])
    record["constants"] = tuple((name, value) for name, value in record["constants"])
    record["divisible"] = tuple(record["divisible"])
    return Image(**record)


def _check_file(path: Path, sha256: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: expected an image that the manifest lists, received no such file")
    if digest(path.read_bytes()) != sha256:
        raise ValueError(f"{path}: expected the image that the manifest records, received other content")


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
