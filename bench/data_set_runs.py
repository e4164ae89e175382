"""Runs over whole data sets, and their stages by themselves: what ``bench.cases.data_sets`` makes rows of.

The CPU's runs read ``../shared/data``; ``VITEXPLAIN_BENCH_DATA`` names another folder. Each run is a process of its own
(``python -m bench.data_set_runs NAME``); memory is what it and its decoding processes hold, pages that they share (libraries,
above all) counted in each.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitexplain import dataset
from vitexplain.dataset.compute import BatchExplainer
from vitexplain.dataset.layout import Layout, ShardContent
from vitexplain.dataset.layout import Row as IndexRow
from vitexplain.dataset.loader import decode_rows
from vitexplain.dataset.store import StoreWriter
from vitexplain.loading import LoadedModel, load_model
from vitexplain.methods import build_methods
from vitexplain.sources import Source, open_source

from .faithfulness import data_folder
from .registry import Unavailable

METHOD = "tokentm"
SAMPLE_SECONDS = 0.5
DECODED, REPEATS = 200, 5
PHOTO_SIZE, PHOTO_QUALITY = (500, 375), 90  # width and height of a usual ImageNet photo
HELD_CLASSES, HELD_A_CLASS = 100, 200  # links to one file, with names of their own
STORED, STORED_GRID, STORED_SHARDS = 1024, (14, 14), 8
MADE_PHOTOS, MADE_ROWS, MADE_BATCH = 256, 8192, 256


@dataclass(frozen=True)
class Run:
    """One data set and the model it is explained with."""

    model: str
    weights: str | None
    data: str
    split: str | None
    tokens: int
    batch: int


RUNS = {
    "cifar10": Run("demo", None, "cifar10_jpeg.npz", "test", 65, 16),
    "photos": Run("deit_tiny_patch16_224", "deit_tiny_patch16_224_fp16.safetensors", "imagenet_sample_500.npz", None, 197, 8),
}


@dataclass(frozen=True)
class Found:
    """One figure: what of, what, in which unit, and its samples."""

    work: str
    metric: str
    unit: str
    samples: list[float]


def expect_packages() -> None:
    """Raise ``Unavailable`` where stores cannot be written."""
    for package in ("zarr", "pyarrow"):
        if find_spec(package) is None:
            raise Unavailable(f"{package} is not installed")


def expect_data(run: Run) -> None:
    """Raise ``Unavailable`` where a run's files are absent."""
    for name in (run.data, run.weights):
        if name is not None and not (data_folder() / name).exists():
            raise Unavailable(f"no {name} in {data_folder().name}")


# -- whole runs ----------------------------------------------------------------------------------------------------------


def measure_apart(name: str) -> list[Found]:
    """``measure`` in a process of its own."""
    run = RUNS[name]
    expect_packages()
    expect_data(run)
    finished = subprocess.run([sys.executable, "-m", "bench.data_set_runs", name], stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        raise SystemExit(f"{name}: the run failed")
    found = json.loads(finished.stdout.splitlines()[-1])
    return [Found(name, metric, unit_of(metric), [value]) for metric, value in found.items() if value is not None]


def measure(run: Run, data: Path) -> dict[str, float | None]:
    """Explain a data set into a store in this process, and watch it; nothing is held against the bare loop in a short run."""
    model = load_model(run.model, None if run.weights is None else data / run.weights)
    source = open_source(data / run.data, split=run.split, classes=model)
    watch = _Watch(len(source))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "maps.zarr"
        report = dataset.run(model, source, output, METHOD, batch=run.batch, progress=watch)
        bytes_on_disk = {
            kind: sum(path.stat().st_size for path in output.with_suffix(kind).rglob("*") if path.is_file())
            for kind in (".zarr", ".parquet")
        }
        problems = dataset.open(output).verify()
    if report.ok != len(source) or problems:
        raise SystemExit(f"{run.data}: {report.ok} of {len(source)} images explained; {problems}")
    return {
        "images per second": report.images_per_second,
        "bare images per second": report.bare_images_per_second,
        "ratio to bare": report.ratio_to_bare,
        "waiting share": report.waiting_share,
        "seconds": report.seconds,
        "preparing seconds": report.preparing_seconds,
        "images": report.images,
        "workers": report.workers,
        **watch.memory,
        "bytes of maps an image": bytes_on_disk[".zarr"] / len(source),
        "bytes of index an image": bytes_on_disk[".parquet"] / len(source),
    }


class _Watch:
    """Memory of this process and its children while a run goes on, as MiB at 10 % and 90 % of it and the most until then."""

    def __init__(self, total: int) -> None:
        self.total, self.memory = total, {}
        self._most, self._last = 0.0, 0.0

    def __call__(self, progress: dataset.Progress) -> None:
        share = progress.done / self.total
        due = [name for name, at in (("10 %", 0.1), ("90 %", 0.9)) if share >= at and f"memory at {name}" not in self.memory]
        if not due and time.perf_counter() - self._last < SAMPLE_SECONDS:
            return
        self._last, now = time.perf_counter(), _memory_mib()
        self._most = max(self._most, now)
        for name in due:
            self.memory |= {f"memory at {name}": now, f"peak memory until {name}": self._most}


def _memory_mib() -> float:
    import psutil  # the GPU machine may not have it, and does not need it

    here = psutil.Process()
    total = 0
    for process in (here, *here.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it has just ended
            continue
    return total / 2**20


UNITS = {"images per second": "1/s", "bare images per second": "1/s", "ratio to bare": "1", "waiting share": "1", "images": "1"}


def unit_of(metric: str) -> str:
    """What a run's figure is in."""
    if "memory" in metric:
        return "MiB"
    if "bytes" in metric:
        return "bytes"
    return "s" if metric.endswith("seconds") else UNITS.get(metric, "1")


# -- stages --------------------------------------------------------------------------------------------------------------


def measure_decoding() -> Iterator[Found]:
    """Images a second of one process that decodes, and the size of what it reads, for photos as they are and of usual size."""
    run = RUNS["photos"]
    expect_data(run)
    data = data_folder()
    model = load_model(run.model, data / run.weights)
    source = open_source(data / run.data, images=f":{DECODED}", classes=model)
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        usual = _enlarged(source, Path(folder) / "photos")
        for work, photos, size in (
            ("decode photos", source, _bytes_of(data / run.data)),
            ("decode usual photos", usual, _bytes_of(usual)),
        ):
            yield Found(work, "images per second a core", "1/s", _decoding(photos, model))
            yield Found(work, "bytes an image", "bytes", [size])


def _decoding(photos: Source, model: LoadedModel) -> list[float]:
    slots = torch.zeros((len(photos), 3, *model.input_size), dtype=torch.uint8)
    rates = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        outcomes = decode_rows(photos, model.preprocess(), slots, 0, range(len(photos)))
        rates.append(len(photos) / (time.perf_counter() - started))
        assert not any(outcome.failure for outcome in outcomes)
    return rates


def measure_source() -> Iterator[Found]:
    """What an open source holds of each image."""
    with tempfile.TemporaryDirectory() as folder:
        yield Found("source", "bytes an image", "bytes", [_held_an_image(Path(folder))])


def measure_writing() -> Iterator[Found]:
    """Images a second of one thread that writes maps, and what they take on the disk."""
    expect_packages()
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        rates, sizes = _writing(Path(folder))
        yield Found("write", "images per second a thread", "1/s", rates)
        yield Found("write", "bytes an image", "bytes", sizes)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's work on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _enlarged(source: Source, folder: Path) -> Source:
    """The photos at the size of usual ones, as JPEG."""
    folder.mkdir()
    for i in range(len(source)):
        source.sample(i).photo.resize(PHOTO_SIZE, Image.Resampling.BICUBIC).save(folder / f"{i:04d}.jpg", quality=PHOTO_QUALITY)
    return open_source(folder)


def _bytes_of(photos: Source | Path) -> float:
    """Mean size of an encoded photo."""
    if isinstance(photos, Path):
        with np.load(photos) as arrays:
            return float(np.diff(arrays["offsets"]).mean())
    return float(np.mean([Path(photos.path(i)).stat().st_size for i in range(len(photos))]))


def _held_an_image(folder: Path) -> float:
    """Bytes of memory that an open source, a folder of class folders, takes for each image once its fingerprint is known."""
    Image.new("RGB", (8, 8)).save(folder / "0.jpg")
    for label in range(HELD_CLASSES):
        inside = folder / "held" / f"n{label:08d}"
        inside.mkdir(parents=True)
        for row in range(HELD_A_CLASS):
            (inside / f"n{label:08d}_{row:08d}.JPEG").hardlink_to(folder / "0.jpg")
    tracemalloc.start()
    try:
        source = open_source(folder / "held")
        source.fingerprint()
        return tracemalloc.get_traced_memory()[0] / len(source)
    finally:
        tracemalloc.stop()


def _writing(folder: Path) -> tuple[list[float], list[float]]:
    """Images a second and bytes an image of shards of maps that are noise, with every file flushed to the disk."""
    generator = np.random.default_rng(0)
    layout = Layout(STORED * STORED_SHARDS, STORED, {METHOD: STORED_GRID})
    settings = {"methods": {METHOD: {"name": METHOD, "options": {}}}}
    writer = StoreWriter.prepare(folder / "maps.zarr", settings, layout)
    rates, sizes = [], []
    for number in range(STORED_SHARDS):
        maps = generator.standard_normal((STORED, *STORED_GRID)).astype(np.float16)
        index = [
            IndexRow(f"n{row:08d}.jpg", f"/photos/n{row:08d}.jpg", 1, 1, 0.5, 1, 0.5, row, "ok", None)
            for row in layout.rows(number)
        ]
        content = ShardContent({METHOD: maps}, {METHOD: np.ones(STORED, np.float32)}, index)
        before, started = _disk(folder), time.perf_counter()
        writer.write(number, content)
        rates.append(STORED / (time.perf_counter() - started))
        sizes.append((_disk(folder) - before) / STORED)
    return rates, sizes


def _disk(folder: Path) -> int:
    return sum(
        path.stat().st_size
        for kind in ("*.zarr", "*.parquet")
        for root in folder.glob(kind)
        for path in root.rglob("*.*")
        if path.is_file()
    )


# -- on a GPU ------------------------------------------------------------------------------------------------------------


def random_model(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """A timm model with random weights."""
    import timm

    torch.manual_seed(0)
    return LoadedModel.of(timm.create_model(name).to(device, dtype), name=name)


def measure_stream(name: str, device: torch.device) -> Iterator[Found]:
    """Photos made on the spot through a model with random weights, in bfloat16: the iterator's pace beside the bare loop's."""
    model = random_model(name, device, torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        source = made_photos(Path(folder))
        options = {"batch": MADE_BATCH, "dtype": "bfloat16"}
        for _ in dataset.stream(model, source.select(slice(0, 4 * MADE_BATCH)), METHOD, **options):
            pass  # kernels are compiled and chosen
        started = time.perf_counter()
        count = sum(len(batch.ids) for batch in dataset.stream(model, source, METHOD, **options))
        torch.cuda.synchronize()
        pace = count / (time.perf_counter() - started)
    explainer = BatchExplainer(
        model, build_methods(METHOD, {}), target="pred", dtype=torch.bfloat16, backend="auto", batch=MADE_BATCH
    )
    bare = explainer.bare_images_per_second(10)
    for metric, value in (("images per second", pace), ("bare images per second", bare), ("ratio to bare", pace / bare)):
        yield Found("stream", metric, unit_of(metric), [value])


def made_photos(folder: Path, photos: int = MADE_PHOTOS, rows: int = MADE_ROWS) -> Source:
    """Files of smooth noise, each named by many rows of a table."""
    generator = np.random.default_rng(0)
    width, height = PHOTO_SIZE
    for i in range(photos):
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        stream = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=PHOTO_QUALITY)
        (folder / f"{i:04d}.jpg").write_bytes(stream.getvalue())
    lines = ["path,id", *(f"{row % photos:04d}.jpg,{row}" for row in range(rows))]
    (folder / "photos.csv").write_text("\n".join(lines))
    return open_source(folder / "photos.csv")


if __name__ == "__main__":
    print(json.dumps(measure(RUNS[sys.argv[1]], data_folder())))
