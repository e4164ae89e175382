"""Small pictures, tables and data sets for the tests."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image
from torch import nn

from vitexplain import InputError
from vitexplain.loading import LoadedModel
from vitexplain.sources import Source, open_source


def with_classes(demo: LoadedModel, count: int, names: Sequence[str] | None) -> LoadedModel:
    """The demo without its weights, for a number of classes of these names."""
    model = nn.Identity()
    model.num_classes = count
    return replace(demo, model=model, class_names=None if names is None else tuple(names))


def picture(value: int, size: tuple[int, int] = (12, 8)) -> Image.Image:
    """All of one red."""
    return Image.new("RGB", size, (value, 0, 0))


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The bytes of a file of an image."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def cut_photo(seed: int = 0) -> bytes:
    """A photo of which half is missing."""
    pixels = np.random.default_rng(seed).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    content = encode(Image.fromarray(pixels), "JPEG")
    return content[: len(content) // 2]


def put(folder: Path, *names: str) -> Path:
    """PNG and JPEG files whose red is ten times their place in the list."""
    for place, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(10 * place).save(folder / name)
    return folder


def reds(source: Source) -> list[int]:
    """Which pictures a source gives, by their red."""
    return [round(source.sample(index).photo.getpixel((3, 3))[0] / 10) for index in range(len(source))]


def refused(match: str, path: Path, **options: object) -> None:
    """Nothing is opened, and the error is one line."""
    with pytest.raises(InputError, match=match) as caught:
        open_source(path, **options)
    assert "\n" not in str(caught.value)


def npz_of(folder: Path, labels: object, class_names: Sequence[str] | None) -> Path:
    """An .npz file of black images with labels."""
    arrays = {} if class_names is None else {"class_names": np.array(class_names)}
    np.savez(folder / "d.npz", images=np.zeros((len(labels), 4, 4, 3), np.uint8), labels=np.array(labels), **arrays)
    return folder / "d.npz"


def make_table(folder: Path, columns: dict[str, list], kind: str) -> Path:
    """A CSV or Parquet table."""
    path = folder / f"table.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table(columns), path)
    else:
        rows = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def joined(images: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Files one behind the other, and where each begins."""
    return np.frombuffer(b"".join(images), np.uint8), np.cumsum([0, *map(len, images)])


def pictures(count: int) -> tuple[np.ndarray, np.ndarray]:
    """JPEG files, one behind the other, whose red is ten times their place."""
    return joined([encode(picture(10 * index), "JPEG", quality=100) for index in range(count)])


def make_dataset(library, count: int = 3, names: Sequence[str] = ("ship", "cat", "dog"), image: str = "image", **more: object):
    """A dataset of pictures as of ``put``, with labels 0, 1, 2, 0, …"""
    features = {image: library.Image(), "label": library.ClassLabel(names=list(names))}
    columns = {image: [picture(10 * index) for index in range(count)], "label": [index % len(names) for index in range(count)]}
    features |= {name: feature for name, (feature, _) in more.items()}
    columns |= {name: values for name, (_, values) in more.items()}
    return library.Dataset.from_dict(columns, features=library.Features(features))


def write_shard(path: Path, samples: Iterable[Mapping[str, object]]) -> Path:
    """A tar file as WebDataset writes it."""
    with webdataset.TarWriter(str(path)) as shard:
        for sample in samples:
            shard.write(dict(sample))
    return path
