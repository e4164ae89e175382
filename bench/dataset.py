"""Whole data sets: images a second, waiting, memory over the run, and the speed of each stage by itself.

    python -m bench.dataset                   # all cases on the CPU, then the stages
    python -m bench.dataset --case photos     # one of them
    python -m bench.dataset --stages          # decoding and writing alone
    python -m bench.dataset --device cuda     # photos made on the spot through a ViT-B/16 and a ViT-L/16, nothing written

The CPU's cases read ``../shared/data`` (``--data`` for another folder). Each run is a process of its own; memory is what it and
its decoding processes hold, pages that they share (libraries, above all) counted in each.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitexplain import dataset
from vitexplain.dataset.compute import BatchExplainer
from vitexplain.dataset.loader import decode_rows
from vitexplain.dataset.store import Layout, ShardContent, StoreWriter
from vitexplain.dataset.store import Row as IndexRow
from vitexplain.loading import load_model
from vitexplain.methods import build_methods
from vitexplain.sources import Source, open_source

from .faithfulness import DATA
from .operations import folder_of
from .record import RESULTS, Row, environment, spread, write_rows

METHOD = "tokentm"
SAMPLE_SECONDS = 0.5
DECODED, REPEATS = 200, 5
PHOTO_SIZE, PHOTO_QUALITY = (500, 375), 90  # width and height of a usual ImageNet photo
HELD_CLASSES, HELD_A_CLASS = 100, 200  # links to one file, with names of their own
STORED, STORED_GRID, STORED_SHARDS = 1024, (14, 14), 8
MADE_PHOTOS, MADE_ROWS, MADE_BATCH = 256, 8192, 256
GPU_MODELS = ("vit_base_patch16_224", "vit_large_patch16_224")


@dataclass(frozen=True)
class Case:
    """One data set and the model it is explained with."""

    model: str
    weights: str | None
    data: str
    split: str | None
    tokens: int
    batch: int


CASES = {
    "cifar10": Case("demo", None, "cifar10_jpeg.npz", "test", 65, 16),
    "photos": Case("deit_tiny_patch16_224", "deit_tiny_patch16_224_fp16.safetensors", "imagenet_sample_500.npz", None, 197, 8),
}


# -- whole runs ----------------------------------------------------------------------------------------------------------


def measure_apart(name: str, data: Path) -> dict[str, float]:
    """``measure`` in a process of its own."""
    command = [sys.executable, "-m", "bench.dataset", "--one", name, "--data", str(data)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        raise SystemExit(f"{name}: the run failed")
    return json.loads(finished.stdout.splitlines()[-1])


def measure(name: str, data: Path) -> dict[str, float]:
    """Explain a data set into a store in this process, and watch it."""
    case = CASES[name]
    model = load_model(case.model, None if case.weights is None else data / case.weights)
    source = open_source(data / case.data, split=case.split, classes=model)
    watch = _Watch(len(source))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "maps.zarr"
        report = dataset.run(model, source, METHOD, output, batch=case.batch, progress=watch)
        bytes_on_disk = {
            kind: sum(path.stat().st_size for path in output.with_suffix(kind).rglob("*") if path.is_file())
            for kind in (".zarr", ".parquet")
        }
        problems = dataset.open(output).verify()
    if report.ok != len(source) or problems:
        raise SystemExit(f"{name}: {report.ok} of {len(source)} images explained; {problems}")
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


def rows_of_run(name: str, found: dict[str, float]) -> list[Row]:
    """Everything that was found of a case."""
    case = CASES[name]
    common = {
        "case": "run",
        "provider": name,
        "model": case.model,
        "batch": case.batch,
        "tokens": case.tokens,
        "dtype": "float32",
    }
    return [
        Row(metric=metric, unit=_unit(metric), **common, **spread([value]), **environment(torch.device("cpu")))
        for metric, value in found.items()
    ]


def _unit(metric: str) -> str:
    if "memory" in metric:
        return "MiB"
    if "bytes" in metric:
        return "bytes"
    return "s" if metric.endswith("seconds") else UNITS.get(metric, "1")


# -- stages --------------------------------------------------------------------------------------------------------------


def measure_stages(data: Path) -> list[Row]:
    """Decoding in one process, and writing in one thread, each by itself."""
    torch.set_num_threads(1)
    case = CASES["photos"]
    model = load_model(case.model, data / case.weights)
    source = open_source(data / case.data, images=f":{DECODED}", classes=model)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        usual = _enlarged(source, Path(folder) / "photos")
        for name, photos, size in (("photos", source, _bytes_of(data / case.data)), ("usual photos", usual, _bytes_of(usual))):
            slots = torch.zeros((DECODED, 3, *model.input_size), dtype=torch.uint8)
            rates = []
            for _ in range(REPEATS):
                started = time.perf_counter()
                outcomes = decode_rows(photos, model.preprocess(), slots, 0, range(DECODED))
                rates.append(DECODED / (time.perf_counter() - started))
                assert not any(outcome.failure for outcome in outcomes)
            rows += [_stage(f"decode {name}", "images per second a core", "1/s", rates, case.model)]
            rows += [_stage(f"decode {name}", "bytes an image", "bytes", [size], case.model)]
        rows += [_stage("source", "bytes an image", "bytes", [_held_an_image(Path(folder))], case.model)]
        rates, sizes = _writing(Path(folder))
        rows += [_stage("write", "images per second a thread", "1/s", rates, case.model)]
        rows += [_stage("write", "bytes an image", "bytes", sizes, case.model)]
    return rows


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


def _stage(provider: str, metric: str, unit: str, samples: list[float], model: str) -> Row:
    common = {"case": "stage", "model": model, "batch": 1, "tokens": 197, "dtype": "uint8"}
    return Row(provider=provider, metric=metric, unit=unit, **common, **spread(samples), **environment(torch.device("cpu")))


# -- on a GPU ------------------------------------------------------------------------------------------------------------


def measure_on_gpu(name: str) -> Iterator[Row]:
    """Photos made on the spot through a model with random weights, in bfloat16: the iterator's pace beside the bare loop's."""
    import timm

    from vitexplain.loading import LoadedModel

    torch.manual_seed(0)
    built = timm.create_model(name).eval().cuda().bfloat16()
    model = LoadedModel(name, built, timm.data.resolve_model_data_config(built), None)
    with tempfile.TemporaryDirectory() as folder:
        source = _made_photos(Path(folder))
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
    common = {"case": "stream", "provider": "made photos", "model": name, "batch": MADE_BATCH, "tokens": 197, "dtype": "bfloat16"}
    for metric, value in (("images per second", pace), ("bare images per second", bare), ("ratio to bare", pace / bare)):
        yield Row(metric=metric, unit=_unit(metric), **common, **spread([value]), **environment(torch.device("cuda")))


def _made_photos(folder: Path) -> Source:
    """Files of smooth noise, each named by many rows of a table."""
    generator = np.random.default_rng(0)
    width, height = PHOTO_SIZE
    for i in range(MADE_PHOTOS):
        coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        stream = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=PHOTO_QUALITY)
        (folder / f"{i:04d}.jpg").write_bytes(stream.getvalue())
    lines = ["path,id", *(f"{row % MADE_PHOTOS:04d}.jpg,{row}" for row in range(MADE_ROWS))]
    (folder / "photos.csv").write_text("\n".join(lines))
    return open_source(folder / "photos.csv")


# -- the command ---------------------------------------------------------------------------------------------------------


def results_path(device_name: str, part: str) -> Path:
    """Where a device's figures are kept."""
    return RESULTS / device_name / f"dataset_{part}.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=tuple(CASES), help="one case; repeat; default: all")
    parser.add_argument("--stages", action="store_true", help="decoding and writing alone, and nothing else")
    parser.add_argument("--one", choices=tuple(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.data)))
        return
    if options.device == "cuda":
        rows = [row for name in GPU_MODELS for row in measure_on_gpu(name)]
        _show(rows)
        print(write_rows(results_path(folder_of(torch.device("cuda")), "stream"), rows))
        return
    if not options.stages:
        for name in options.case or CASES:
            rows = rows_of_run(name, measure_apart(name, options.data))
            _show(rows)
            print(write_rows(results_path("cpu", name), rows))
    if options.stages or not options.case:
        rows = measure_stages(options.data)
        _show(rows)
        print(write_rows(results_path("cpu", "stages"), rows))


def _show(rows: list[Row]) -> None:
    for row in rows:
        print(f"{row.provider:24s} {row.metric:28s} {row.p50} {row.unit}", flush=True)


if __name__ == "__main__":
    main()
