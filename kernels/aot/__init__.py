"""Kernels compiled ahead of time: found by what a launch needs, used in place of Triton's compiler.

An installation built with ``-DVITEXPLAIN_AOT=ON`` has them in ``images/<architecture>/``. ``VITEXPLAIN_AOT=0`` leaves them
alone; ``VITEXPLAIN_AOT_IMAGES`` names another folder, for example that of a CMake build. AMD images are built but not loaded.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .driver import LoadedImage
from .manifest import read_manifest

if TYPE_CHECKING:
    from ..launch import KernelVariant

INSTALLED = Path(__file__).resolve().parent / "images"


@cache
def images_folder() -> Path | None:
    """Where the images lie; None where there are none or they are switched off."""
    if os.environ.get("VITEXPLAIN_AOT") == "0":
        return None
    folder = Path(os.environ.get("VITEXPLAIN_AOT_IMAGES", INSTALLED))
    if folder.is_dir():
        return folder
    if "VITEXPLAIN_AOT_IMAGES" in os.environ:
        warnings.warn(f"VITEXPLAIN_AOT_IMAGES: expected a folder, received {folder}: Triton compiles instead", stacklevel=2)
    return None


def installed() -> bool:
    """Whether there may be images to use; asked at every launch."""
    return images_folder() is not None


def find(variant: KernelVariant, architecture: str) -> LoadedImage | None:
    """The image that can run a launch; None where Triton has to compile."""
    key = (variant.kernel, variant.types, variant.constants, variant.num_warps, variant.num_stages, variant.max_registers)
    for loaded in _images(architecture).get(key, ()):
        if variant.divisible.issuperset(loaded.image.divisible):
            return loaded
    return None


@cache
def _images(architecture: str) -> dict[tuple[Any, ...], list[LoadedImage]]:
    """All images of an architecture by what they run; empty, with a warning, where the folder is damaged."""
    root = images_folder()
    if root is None or not (root / architecture).is_dir() or architecture.startswith("gfx"):
        return {}
    folder = root / architecture
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        warnings.warn(f"kernels compiled ahead of time cannot be used, Triton compiles instead: {error}", stacklevel=2)
        return {}
    found: dict[tuple[Any, ...], list[LoadedImage]] = {}
    for image in manifest.images:
        found.setdefault(image.key, []).append(LoadedImage(image, folder))
    return found
