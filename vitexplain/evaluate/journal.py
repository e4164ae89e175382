"""What has been measured so far, on disk: an interrupted evaluation goes on where it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import remove_partials, write_whole
from ..messages import differences, some

FOLDER = "per_image"
_SETTINGS = "settings.json"


class Journal:
    """Chunks of measurements under ``output/per_image``, each written whole or not at all.

    Args:
        output: the evaluation's folder; made where it is not there.
        settings: everything the figures depend on; those of the journal that stands there must be the same.
        overwrite: throw away what stands there.

    Raises:
        InputError: other settings stand there, or the folder cannot be written.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.folder = output / FOLDER
        try:
            if overwrite:
                _remove_all(output)
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_partials(output)
            remove_partials(self.folder)
        except OSError as error:
            raise InputError(f"output: cannot use the folder {str(output)!r}: {error.strerror}") from error
        self._claim(dict(settings))

    def _claim(self, settings: dict[str, Any]) -> None:
        path = self.folder / _SETTINGS
        if not path.exists():
            if any(self.folder.glob("chunk_*")):
                raise InputError(
                    f"output: expected {_SETTINGS} beside what stands in {str(self.folder)!r}, to know what it is; use another "
                    "folder, or --overwrite"
                )
            write_whole(path, json.dumps(settings, indent=1).encode())
            return
        try:
            standing = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"output: {str(path)!r} is damaged: expected JSON; use another folder, or --overwrite") from error
        settings = json.loads(json.dumps(settings))
        different = differences(standing, settings)
        if different:
            raise InputError(
                f"output: {str(self.folder.parent)!r} holds an evaluation with other settings "
                f"({some(different, separator='; ')}); expected the same ones to go on with it, another folder, or --overwrite"
            )

    def has(self, number: int) -> bool:
        """Whether a chunk is there."""
        return self._path(number).exists()

    def write(self, number: int, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> None:
        """Keep a chunk: arrays, and what else there is to say of it."""
        content = BytesIO()
        # numpy's annotation cannot tell a switch of its own from the arrays
        np.savez(content, __notes__=np.array(json.dumps(notes)), **arrays)  # type: ignore[arg-type]
        write_whole(self._path(number), content.getvalue())

    def read(self, number: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """A chunk's arrays and notes.

        Raises:
            InputError: it is damaged.
        """
        path = self._path(number)
        try:
            with np.load(path) as content:
                arrays = {name: content[name] for name in content.files}
            return arrays, json.loads(str(arrays.pop("__notes__")))
        except Exception as error:  # a damaged archive can raise anything inside a parser
            raise InputError(
                f"output: {str(path)!r} is damaged: delete it and run again, its images are then measured anew"
            ) from error

    def _path(self, number: int) -> Path:
        return self.folder / f"chunk_{number:06d}.npz"


def _remove_all(output: Path) -> None:
    """Take away what an evaluation wrote; what it measured at once, so that no part of it can be taken for another's."""
    measured = output / FOLDER
    if measured.exists():
        doomed = measured.with_name(f"{FOLDER}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        measured.rename(doomed)
        shutil.rmtree(doomed)
    shutil.rmtree(output / "curves", ignore_errors=True)
    for name in ("results.json", "results.md", "report.html"):
        (output / name).unlink(missing_ok=True)
