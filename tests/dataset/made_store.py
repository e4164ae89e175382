"""Small stores and the photos they are of: a disc on a ground, and maps that are high where the disc is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vitexplain.dataset.layout import Layout, Row, ShardContent
from vitexplain.dataset.store import StoreWriter
from vitexplain.sources import Source, open_source

NAMES = ("tench, Tinca tinca", "cost in $ or $_{x}^2", "crane", "crane")
SIDE, GRID = 64, 8  # of the model's input, and of its patches
SHARD = 4


def make_photos(folder: Path, classes: int = 3, each: int = 4, size: tuple[int, int] = (96, 64)) -> Path:
    """JPEGs in folders by class, with a disc in the part that a model with a central crop sees."""
    for number in range(classes * each):
        path = folder / f"class_{number // each:02}" / f"photo {number % each}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        x, y = np.meshgrid(np.linspace(40, 160, size[0]), np.linspace(40, 120, size[1]))
        photo = Image.fromarray(np.stack([x, y, np.full_like(x, 90 + 10 * (number % 7))], -1).astype(np.uint8))
        u, v = place(number)
        side = min(size)
        left, top = (size[0] - side) / 2 + u * side, (size[1] - side) / 2 + v * side
        ImageDraw.Draw(photo).ellipse((left - 8, top - 8, left + 8, top + 8), fill=(240, 230, 90))
        photo.save(path, quality=95)
    return folder


def place(number: int) -> tuple[float, float]:
    """Where the disc of a photo is, as shares of the central square's width and height."""
    return 0.25 + 0.5 * ((number * 0.618) % 1), 0.25 + 0.5 * ((number * 0.382) % 1)


def make_store(
    path: Path,
    photos: Path,
    *,
    methods: Mapping[str, tuple[int, bool]] | None = None,
    num_targets: int | None = None,
    names: Sequence[str] | None = NAMES,
    labels: bool = True,
    lost: Mapping[int, tuple[str, str | None]] | None = None,
    shards: Collection[int] | None = None,
    images: str | None = None,
    resize: str = "model",
    source: Source | None = None,
) -> Path:
    """A store of the photos in a folder.

    Args:
        path: of the store.
        photos: as ``make_photos`` makes them.
        methods: by label, the side of its maps and whether they are signed.
        num_targets: K, or None.
        names: of the model's classes.
        labels: whether the images have labels.
        lost: by row, status and reason of images without maps.
        shards: those that are done; None for all.
        images: which of the photos, as a slice.
        resize: ``"model"`` or ``"squash"``.
        source: of the photos, where it is not what ``open_source`` makes of them.
    """
    source = source or open_source(photos, images=images)
    methods = methods or {"rollout": (GRID, False)}
    leading = () if num_targets is None else (num_targets,)
    shapes = {label: (*leading, side, side) for label, (side, _) in methods.items()}
    layout = Layout(len(source), SHARD, shapes, num_targets)
    settings = _settings(photos, source, methods, num_targets, names, images, resize)
    writer = StoreWriter.prepare(path, settings, layout)
    for number in writer.missing() if shards is None else shards:
        rows = [
            _row(
                source.ids[row], source.path(row), source.labels[row] if labels else None, num_targets, row, (lost or {}).get(row)
            )
            for row in layout.rows(number)
        ]
        writer.write(number, _content(rows, methods, leading))
    return path


def _content(rows: list[Row], methods: Mapping[str, tuple[int, bool]], leading: tuple[int, ...]) -> ShardContent:
    maps, scales = {}, {}
    for label, (side, signed) in methods.items():
        found = [
            np.full((*leading, side, side), np.nan) if row.status != "ok" else _map(row.row, side, signed, leading)
            for row in rows
        ]
        maps[label] = np.stack(found).astype(np.float16)
        # Far too small for float16 and different in each image: no image may count more in a mean.
        factors = np.array([2.0 ** (-40 - row.row % 7) if row.status == "ok" else np.nan for row in rows], dtype=np.float32)
        scales[label] = np.broadcast_to(factors.reshape(-1, *[1] * len(leading)), (len(rows), *leading)).copy()
    return ShardContent(maps, scales, rows)


def _map(number: int, side: int, signed: bool, leading: tuple[int, ...]) -> np.ndarray:
    """High at the disc, and for further targets at places beside it; a signed one is below zero elsewhere."""
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    u, v = place(number)
    peaks = [np.exp(-((x - u - 0.2 * k) ** 2 + (y - v) ** 2) / 0.02) for k in range(leading[0] if leading else 1)]
    values = np.stack(peaks) - (0.4 if signed else 0.0)
    return values if leading else values[0]


def _row(
    identity: str, path: str | None, label: int | None, num_targets: int | None, row: int, lost: tuple[str, str | None] | None
) -> Row:
    prediction = row // 4 if row % 4 else (row // 4 + 1) % 3  # three of four are right
    target: Any = prediction if num_targets is None else tuple((prediction + k) % 4 for k in range(num_targets))
    score: Any = 0.75 if num_targets is None else tuple(0.75 / 2**k for k in range(num_targets))
    if lost is not None and lost[0] == "unreadable":
        return Row(identity, path, label, None, None, None, None, row, *lost)
    return Row(identity, path, label, prediction, 0.75, target, score, row, *(lost or ("ok", None)))


def _settings(
    photos: Path,
    source: Source,
    methods: Mapping[str, tuple[int, bool]],
    num_targets: int | None,
    names: Sequence[str] | None,
    images: str | None,
    resize: str,
) -> dict[str, Any]:
    preprocessing = {
        "input_size": (3, SIDE, SIDE),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": None,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }
    return {
        "format": 1,
        "model": {
            "name": "small_vit",
            "weights_sha256": "0123456789abcdef" * 4,
            "resize": resize,
            "preprocessing": preprocessing,
            "class_names": None if names is None else list(names),
        },
        "data": {
            "name": photos.name,
            "kind": source.kind,
            "path": str(photos),
            "split": None,
            "images": images,
            "count": len(source),
            "sha256": source.fingerprint(),
        },
        "methods": {label: {"name": label.partition(":")[0], "options": {}} for label in methods},
        "target": "pred" if num_targets is None else f"top{num_targets}",
        "dtype": "float32",
        "backend": "auto",
        "device": "cpu",
        "deterministic": True,
        "batch": 4,
        "shard": SHARD,
        "versions": {"python": "3.12", "torch": "2.9.0"},
    }
