"""What an evaluation found: figures with their intervals, curves, and everything needed to repeat it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import check_file
from ..messages import brief


@dataclass(frozen=True)
class Column:
    """One metric of one protocol for one explained class: a column of a table.

    Attributes:
        protocol: the protocol's label, such as ``"perturbation"`` or ``"localisation"``.
        metric: short name, such as ``"positive"``, ``"AOPC"``, ``"mIoU"``.
        explained: ``"pred"`` (the predicted class was explained) or ``"gt"`` (the ground truth).
        better: ``"lower"`` or ``"higher"``.
        unit: ``"%"`` or ``""``.
        winner: the one row that is better than every other with a paired 95 % interval that excludes zero, else None.
        contenders: the rows that cannot be told from the best (the best among them).
    """

    protocol: str
    metric: str
    explained: str
    better: str
    unit: str
    winner: str | None
    contenders: tuple[str, ...]

    @property
    def title(self) -> str:
        """With an arrow that says which way is better."""
        return f"{self.metric} {'↓' if self.better == 'lower' else '↑'}"


@dataclass(frozen=True)
class Figure:
    """One cell of a table: the value over all images and its bootstrap 95 % interval over images.

    ``count`` is the number of images it was computed from.
    """

    method: str
    protocol: str
    metric: str
    explained: str
    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Curve:
    """A mean over images along the share of pixels changed, with its interval at each point.

    Attributes:
        name: such as ``"positive"`` or ``"insertion"``.
        quantity: what is on the y axis, such as ``"accuracy, %"``.
        share: x axis, percent of pixels changed.
    """

    method: str
    protocol: str
    name: str
    explained: str
    quantity: str
    share: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class MethodEntry:
    """One row of the tables.

    Attributes:
        title: for people, such as ``"TokenTM / VTranM"``.
        kind: ``"method"``, ``"control"`` or ``"ablation"``.
        options: as used.
    """

    title: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """An evaluation's results; what ``results.json`` holds.

    Attributes:
        methods: by label, in the order of the tables' rows.
        columns, figures, curves: see there.
        settings: model, data and every option: two runs with the same settings have the same figures.
        environment: device and versions.
        left_out: images that could not be read, with the reason.
        timing: seconds and rates; the only part that differs from run to run.
    """

    methods: dict[str, MethodEntry]
    columns: tuple[Column, ...]
    figures: tuple[Figure, ...]
    curves: tuple[Curve, ...]
    settings: dict[str, Any]
    environment: dict[str, Any]
    left_out: tuple[dict[str, str], ...]
    timing: dict[str, Any]

    def figure(self, method: str, column: Column) -> Figure | None:
        """The cell of a method in a column; None where that was not measured."""
        wanted = (method, column.protocol, column.metric, column.explained)
        return next((f for f in self.figures if (f.method, f.protocol, f.metric, f.explained) == wanted), None)

    def to_json(self) -> str:
        """As text, the same for the same results."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"  # ASCII: names of files can be no text

    @classmethod
    def from_json(cls, text: str) -> Results:
        """From ``to_json``.

        Raises:
            InputError: another text, or a damaged one.
        """
        try:
            return cls._of(json.loads(text))
        except _NOT_RESULTS as error:
            raise InputError(f"results: expected the text of a results.json, received {_described(error)}") from error

    @classmethod
    def read(cls, path: str | Path) -> Results:
        """From a ``results.json``.

        Raises:
            InputError: no such file, one that cannot be read, another file, or a damaged one.
        """
        path = Path(path)
        check_file(path, "results")
        try:
            return cls._of(json.loads(path.read_bytes()))
        except OSError as error:
            raise InputError(f"results: cannot read {str(path)!r}: {brief(error)}") from error
        except _NOT_RESULTS as error:
            raise InputError(f"results: expected a results.json in {str(path)!r}, received {_described(error)}") from error

    @classmethod
    def _of(cls, content: Mapping[str, Any]) -> Results:
        return cls(
            methods={label: MethodEntry(**entry) for label, entry in content["methods"].items()},
            columns=tuple(Column(**_with_tuples(column)) for column in content["columns"]),
            figures=tuple(Figure(**figure) for figure in content["figures"]),
            curves=tuple(Curve(**_with_tuples(curve)) for curve in content["curves"]),
            settings=content["settings"],
            environment=content["environment"],
            left_out=tuple(content["left_out"]),
            timing=content["timing"],
        )


_NOT_RESULTS = (ValueError, KeyError, TypeError, AttributeError)  # no JSON, or JSON of something else


def _described(error: Exception) -> str:
    return f"something else, or a damaged one ({type(error).__name__}: {brief(error)})"


def _with_tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows lists alone."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}


@dataclass(frozen=True)
class GalleryPhoto:
    """One photo of the report's gallery.

    Attributes:
        name: the photo's id in its source.
        caption: predicted class with its probability, and the true one where it is known.
        photo: (h, w, 3) uint8, as the model saw it.
        maps: by method label, (gh, gw) float32 on the patch grid, not normalised.
        signed: labels of those methods whose maps have values below zero that carry meaning.
        disagreement: mean over pairs of methods of 1 − Spearman's rank correlation of their maps.
    """

    name: str
    caption: str
    photo: Any
    maps: dict[str, Any]
    signed: frozenset[str]
    disagreement: float
