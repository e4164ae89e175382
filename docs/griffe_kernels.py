"""Shows mkdocstrings where ``vitexplain.kernels`` lies: in the repository it is the folder ``kernels`` at the top."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import griffe


class KernelsInside(griffe.Extension):
    """Loads the folder as a part of the package, as an installation has it."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Called once for each package that is loaded."""
        if pkg.path == "vitexplain":
            kernels = loader.load("kernels")
            pkg.set_member("kernels", kernels)
            for member in kernels.members.values():
                if isinstance(member, griffe.Alias):
                    with suppress(griffe.AliasResolutionError):  # torch and the standard library are not read
                        member.resolve_target()
