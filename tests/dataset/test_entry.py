"""Whole runs: what stands in the store, what is reported, what is refused, and the iterator."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitexplain
from vitexplain import dataset
from vitexplain.dataset import entry
from vitexplain.dataset.compute import BatchExplainer
from vitexplain.dataset.settings import Plan
from vitexplain.dataset.store import StoreWriter
from vitexplain.errors import InputError, UnknownNameError
from vitexplain.loading import LoadedModel, load_model
from vitexplain.sources import Source, open_source

from . import forked

COUNT = 23
UNREADABLE = {4: b"", 11: b"GIF89a no picture"}


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model("demo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Photos in two class folders, one in CMYK, two that cannot be read."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        path = folder / ("cat", "dog")[i >= COUNT // 2] / f"{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        photo = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((40, 30))
        (photo.convert("CMYK") if i == 7 else photo).save(path)
        if i in UNREADABLE:
            path.write_bytes(UNREADABLE[i])
    return folder


@pytest.fixture(scope="module")
def source(folder, demo) -> Source:
    return open_source(folder, classes=demo)


def run(
    model: LoadedModel, source: Source | Path, output: Path, methods: object = ("tokentm", "iba"), **settings
) -> dataset.Report:
    return dataset.run(model, source, output, methods, **{"batch": 4, "shard": 8, "workers": 0, **settings})


def files(output: Path) -> dict[str, bytes]:
    """Everything that two runs of one command have in common."""
    index = output.with_suffix(".parquet")
    found = {str(path.relative_to(output.parent)): path for folder in (output, index) for path in folder.rglob("*")}
    return {name: path.read_bytes() for name, path in found.items() if path.is_file() and not path.name.startswith("_")}


# -- what stands in the store ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["pred", "label", "top2"])
def test_the_store_holds_what_attribute_gives(demo, source, tmp_path, target: str) -> None:
    report = run(demo, source, tmp_path / "maps.zarr", target=target)
    assert (report.total, report.ok, report.unreadable, report.not_finite) == (COUNT, COUNT - 2, 2, 0)
    store = dataset.open(tmp_path / "maps.zarr")
    assert store.is_complete
    assert store.verify() == []
    readable = [i for i in range(COUNT) if i not in UNREADABLE]
    images = torch.stack([demo.transform(source.sample(i).photo) for i in readable])
    asked = {"pred": None, "label": [source.labels[i] for i in readable], "top2": "top2"}[target]
    expected = vitexplain.Explainer(demo.model, ["tokentm", "iba"]).attribute(images, asked)
    for method, explanation in expected.items():
        found = store.maps(readable, method)
        assert found.shape == explanation.maps.shape
        error = np.abs(found - explanation.maps.numpy()).max() / explanation.maps.abs().max().item()
        assert error <= 2.0**-11 + 1e-5, "half precision, and batches of another size"
        assert np.isnan(store.maps(list(UNREADABLE), method)).all()
    index = store.index.to_pylist()
    assert [row["id"] for row in index] == list(source.ids)
    assert [row["row"] for row in index] == list(range(COUNT))
    assert [row["label"] for row in index] == list(source.labels)
    assert [row["path"] for row in index] == [source.path(i) for i in range(COUNT)]
    assert [index[i]["prediction"] for i in readable] == expected["iba"].logits.argmax(-1).tolist()
    assert [index[i]["target"] for i in readable] == expected["iba"].target.tolist()
    scores = expected["iba"].logits.softmax(-1)
    assert np.allclose([index[i]["score"] for i in readable], scores.amax(-1), atol=1e-5)
    columns = expected["iba"].target.reshape(len(readable), -1)
    assert np.allclose(
        [index[i]["target_score"] for i in readable], scores.gather(1, columns).reshape(expected["iba"].target.shape), atol=1e-5
    )


def test_what_cannot_be_read_is_in_the_index_with_its_reason(demo, source, tmp_path) -> None:
    run(demo, source, tmp_path / "maps.zarr")
    rows = dataset.open(tmp_path / "maps.zarr").index.to_pylist()
    for i, row in enumerate(rows):
        assert row["status"] == ("unreadable" if i in UNREADABLE else "ok")
        if i in UNREADABLE:
            assert {row[name] for name in ("prediction", "score", "target", "target_score")} == {None}
    assert "is empty (0 bytes)" in rows[4]["reason"]
    assert "11.jpg" in rows[11]["reason"]
    assert rows[7]["reason"] == "converted from CMYK to RGB"
    assert all(rows[i]["reason"] is None for i in range(COUNT) if i not in (4, 7, 11))


def test_what_is_not_finite_is_in_the_index_and_stops_nothing(demo, source, tmp_path) -> None:
    broken = replace(demo, model=copy.deepcopy(demo.model))
    with torch.no_grad():
        broken.model.head.weight *= 1e38
    report = run(broken, source, tmp_path / "maps.zarr", "iba")
    assert report.not_finite > 0
    store = dataset.open(tmp_path / "maps.zarr")
    statuses = store.index.column("status").to_pylist()
    odd = [i for i, status in enumerate(statuses) if status == "not_finite"]
    assert len(odd) == report.not_finite
    assert np.isnan(store.maps(odd)).all()
    assert all("NaN or infinity" in store.row(i)["reason"] for i in odd)


def test_a_map_that_is_not_finite_leaves_the_other_methods_of_its_image_alone(demo, source, tmp_path, monkeypatch) -> None:
    work = BatchExplainer._outputs

    def odd(self, photos, classes):
        outputs = work(self, photos, classes)
        outputs["finite/iba"][1] = False
        return outputs

    monkeypatch.setattr(BatchExplainer, "_outputs", odd)
    run(demo, source, tmp_path / "maps.zarr")
    store = dataset.open(tmp_path / "maps.zarr")
    row = store.row(1)
    assert (row["status"], row["reason"]) == ("not_finite", "NaN or infinity in the map of iba")
    assert row["prediction"] is not None
    assert np.isnan(store.maps(1, "iba")).all()
    assert np.isfinite(store.maps(1, "tokentm")).all()


@pytest.mark.parametrize(("batch", "shard", "expected"), [(1, 1, (1, 1)), (4, 6, (4, 8)), (5, None, (5, 260)), (64, 8, (64, 64))])
def test_any_batch_and_shard_give_the_same_maps(
    demo, source, tmp_path, batch: int, shard: int | None, expected: tuple[int, int]
) -> None:
    report = run(demo, source, tmp_path / "maps.zarr", batch=batch, shard=shard)
    assert (report.batch, report.shard) == expected
    run(demo, source, tmp_path / "others.zarr")
    found, others = (dataset.open(tmp_path / name) for name in ("maps.zarr", "others.zarr"))
    for method in ("tokentm", "iba"):
        assert np.allclose(found.maps(None, method), others.maps(None, method), rtol=2e-3, atol=1e-6, equal_nan=True)


def test_workers_change_nothing_but_the_time(demo, source, tmp_path) -> None:
    for workers in (0, 2):
        run(demo, source, tmp_path / str(workers) / "maps.zarr", workers=workers)
    assert files(tmp_path / "0" / "maps.zarr") == files(tmp_path / "2" / "maps.zarr")


# -- going on ----------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_another_one_stopped(demo, source, tmp_path) -> None:
    run(demo, source, tmp_path / "whole" / "maps.zarr")
    output = tmp_path / "stopped" / "maps.zarr"
    done: list[int] = []

    def stop(progress: dataset.Progress) -> None:
        done.append(progress.done)
        if progress.done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(demo, source, output, progress=stop)
    assert not dataset.open(output).is_complete
    report = run(demo, source, output)
    assert report.found == 8
    assert report.images == COUNT - 8
    assert files(output) == files(tmp_path / "whole" / "maps.zarr")
    again = run(demo, source, output)
    assert (again.images, again.found, again.waiting_share) == (0, COUNT, None)
    ended = [(entry["ended"], entry["images"]) for entry in dataset.open(output).runs()]
    assert ended == [("interrupted", 12), ("whole", COUNT - 8), ("whole", 0)]


def test_a_lost_file_is_written_anew(demo, source, tmp_path) -> None:
    output = tmp_path / "maps.zarr"
    run(demo, source, output)
    before = files(output)
    next(path for path in (output / "iba" / "maps").iterdir() if path.name.startswith("c.1")).unlink()
    (tmp_path / "maps.parquet" / "part-000002.parquet").write_bytes(b"no")
    report = run(demo, source, output)
    assert report.images == 8 + 7
    assert files(output) == before


def test_changed_options_are_refused_and_nothing_is_damaged(demo, source, tmp_path) -> None:
    output = tmp_path / "maps.zarr"
    run(demo, source, output)
    before = files(output)
    for change, message in (
        ({"target": "top2"}, 'target: "pred" there, "top2" asked for'),
        ({"dtype": "bf16"}, 'dtype: "float32" there, "bfloat16" asked for'),
        ({"batch": 2}, "batch: 4 there, 2 asked for"),
        ({"methods": "iba"}, "methods.tokentm"),
        ({"methods": ["tokentm:necc=false", "iba"]}, "methods"),
        ({"resize": "squash"}, "model.resize"),
    ):
        with pytest.raises(InputError, match="other settings") as error:
            run(demo, source, output, **change)
        assert message in str(error.value)
    with pytest.raises(InputError, match=r"data\.count"):
        run(demo, source.select(slice(0, 8)), output)
    assert files(output) == before
    report = run(demo, source, output, target="top2", overwrite=True)
    assert report.images == COUNT
    assert dataset.open(output).num_targets == 2


def test_what_decides_only_how_fast_may_change(demo, source, tmp_path) -> None:
    output = tmp_path / "maps.zarr"
    run(demo, source, output)
    assert run(demo, source, output, workers=1, cuda_graph=False).images == 0


def test_the_batch_of_a_store_that_stands_is_kept_where_it_is_to_be_found(demo, source, tmp_path) -> None:
    output = tmp_path / "maps.zarr"
    run(demo, source, output)
    report = run(demo, source, output, batch="auto", shard=None)
    assert (report.batch, report.shard, report.images) == (4, 8, 0)


def test_a_second_run_into_one_store_is_refused(demo, source, tmp_path) -> None:
    output = tmp_path / "maps.zarr"
    refused: list[str] = []

    def another(_progress: dataset.Progress) -> None:
        if not refused:
            with pytest.raises(InputError, match="another run is writing") as error:
                run(demo, source, output)
            refused.append(str(error.value))

    assert run(demo, source, output, progress=another).images == COUNT
    assert refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "spark"}, "engine: expected one of local, ray, received 'spark'"),
        ({"actors": 2}, "actors: expected them with engine 'ray' alone, received 2 with 'local'"),
        ({"batch": "big"}, "batch: expected a number or 'auto', received 'big'"),
        ({"batch": 0}, "batch: expected 1 or more images, received 0"),
        ({"batch": 3.7}, "batch: expected 1 or more images, received 3.7"),
        ({"batch": True}, "batch: expected 1 or more images, received True"),
        ({"batch": [4]}, "batch: expected 1 or more images"),
        ({"shard": 0}, "shard: expected 1 or more images, received 0"),
        ({"shard": "8"}, "shard: expected 1 or more images, received '8'"),
        ({"workers": "2"}, "workers: expected 0 or more processes, received '2'"),
        ({"actors": "2", "engine": "ray"}, "actors: expected 1 or more actors, received '2'"),
        ({"cuda_graph": "no"}, "cuda_graph: expected True or False, received 'no'"),
        ({"progress": 3}, "progress, measuring: expected functions, received int"),
        ({"target": None}, "target: expected pred, label or topK, such as top3, received None"),
        ({"target": 3}, "target: expected pred, label or topK"),
        ({"methods": "smoothgrad", "backend": "dense"}, "there is no reference of 'smoothgrad'"),
        ({"dtype": "int8"}, "dtype: expected one of"),
        ({"backend": "triton"}, "triton"),
        ({"methods": []}, "at least one method"),
        ({"methods": ["iba", "iba"]}, "each method once"),
        ({"methods": {"a/b": "iba"}}, "labels that can name a folder, received 'a/b'"),
        ({"target": "top0"}, "target: expected"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(demo, source, tmp_path, change, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(demo, source, tmp_path / "maps.zarr", **change)
    assert not (tmp_path / "maps.zarr").exists()
    if "methods" not in change and "backend" not in change:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "photos"), "model: expected a LoadedModel, as load_model or LoadedModel.of gives it, received str"),
        ((None, 3), "source: expected a Source or a path, received int"),
    ],
)
def test_arguments_of_another_kind_are_refused(demo, tmp_path, arguments, message: str) -> None:
    model, source = arguments
    with pytest.raises(InputError, match=message):
        run(model or demo, source, tmp_path / "maps.zarr")


def test_autocast_around_a_run_is_refused(demo, source, tmp_path) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="expected no autocast"):
        run(demo, source, tmp_path / "maps.zarr")


def test_a_run_is_whole_also_where_there_is_no_memory_to_compare_its_speed(demo, folder, tmp_path, monkeypatch) -> None:
    def full(_self: BatchExplainer) -> float:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(BatchExplainer, "bare_images_per_second", full)
    report = run(demo, folder, tmp_path / "maps.zarr", "iba", batch=1)
    assert report.ok == COUNT - 2
    assert report.bare_images_per_second is None


def test_an_error_of_writing_ends_the_run_before_the_next_shard_is_whole(demo, source, tmp_path, monkeypatch) -> None:
    def full(*_arguments) -> None:
        raise InputError("output: No space left on device")

    monkeypatch.setattr(StoreWriter, "write", full)
    seen: list[int] = []
    with pytest.raises(InputError, match="No space left"):
        run(demo, source, tmp_path / "maps.zarr", "iba", batch=1, progress=lambda progress: seen.append(progress.done))
    assert seen[-1] < 16
    (ended,) = (entry["ended"] for entry in dataset.open(tmp_path / "maps.zarr").runs())
    assert ended == "output: No space left on device"


def test_an_unknown_method_gets_near_ones(demo, source, tmp_path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean tokentm"):
        run(demo, source, tmp_path / "maps.zarr", "tokenm")


def test_a_source_can_be_named_by_its_path(demo, folder, tmp_path) -> None:
    report = run(demo, folder, tmp_path / "maps.zarr", "iba")
    assert report.total == COUNT
    assert dataset.open(tmp_path / "maps.zarr").settings["data"]["path"] == str(folder)


# -- what is reported --------------------------------------------------------------------------------------------------


def test_progress_and_report_say_how_it_went(demo, folder, tmp_path) -> None:
    seen: list[dataset.Progress] = []
    report = run(demo, folder, tmp_path / "maps.zarr", "iba", batch=1, progress=seen.append)
    assert [progress.done for progress in seen] == list(range(COUNT + 1))
    assert {progress.total for progress in seen} == {COUNT}
    assert all(0 <= progress.waiting_share < 1 for progress in seen)
    assert 0 <= report.waiting_share < 1
    assert report.images_per_second == pytest.approx(COUNT / report.seconds)
    assert report.ratio_to_bare == pytest.approx(report.images_per_second / report.bare_images_per_second)
    assert (report.devices, report.engine, report.workers, report.graphed) == (("cpu",), "local", 0, False)
    (log,) = dataset.open(tmp_path / "maps.zarr").runs()
    assert log == json.loads(json.dumps(report.as_log()))
    if sys.platform == "linux":
        assert 0 < log["memory_mib"]["10%"] <= 1.5 * log["memory_mib"]["90%"]


def test_a_short_run_is_not_measured_against_the_bare_loop(demo, source, tmp_path) -> None:
    report = run(demo, source, tmp_path / "maps.zarr", "iba")
    assert report.bare_images_per_second is None
    assert report.ratio_to_bare is None


def test_maps_of_pixels_make_smaller_shards(demo, source) -> None:
    plan = Plan(demo, source, vitexplain.methods.build_methods("lrp", {}))
    whole = 2 * 32 * 32 + 4
    assert plan.layout(1).image_bytes == whole
    for limit, expected in ((10 * whole, 12), (1 << 30, 256)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(entry, "SHARD_BYTES", limit)
            assert entry._sizes(plan, Path("none.zarr"), 4, None, False, None) == (4, expected)


# -- the iterator ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_the_iterator_gives_tensors_and_writes_nothing(demo, source, tmp_path, workers: int, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    batches = list(dataset.stream(demo, source, ["tokentm", "iba"], batch=4, target="top2", workers=workers))
    assert [len(batch.ids) for batch in batches] == [4, 4, 4, 4, 4, 3]
    assert [name for batch in batches for name in batch.ids] == list(source.ids)
    assert [row for batch in batches for row in batch.rows] == list(range(COUNT))
    statuses = [status for batch in batches for status in batch.status]
    assert [i for i, status in enumerate(statuses) if status != "ok"] == list(UNREADABLE)
    maps = torch.cat([batch.maps["iba"] for batch in batches])
    assert maps.dtype == torch.float32
    assert maps.shape == (COUNT, 2, 8, 8)
    run(demo, source, tmp_path / "store" / "maps.zarr", target="top2")
    store = dataset.open(tmp_path / "store" / "maps.zarr")
    readable = [i for i in range(COUNT) if i not in UNREADABLE]
    assert np.allclose(maps[readable].numpy(), store.maps(readable, "iba"), rtol=2.0**-11, atol=1e-7)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_the_iterator_refuses_before_the_first_batch(demo, source) -> None:
    with pytest.raises(InputError, match="target"):
        dataset.stream(demo, source, target="best", workers=0)


def test_an_iterator_that_is_left_early_leaves_no_process(demo, source) -> None:
    import psutil

    before = set(psutil.Process().children(recursive=True))
    batches = dataset.stream(demo, source, "iba", batch=2, workers=2)
    next(batches)
    batches.close()
    left = [
        process
        for process in set(psutil.Process().children(recursive=True)) - before
        if "spawn_main" in " ".join(process.cmdline())
    ]
    assert left == []


# -- several processes -------------------------------------------------------------------------------------------------


def test_torchrun_writes_the_same_store_with_two_processes(demo, source, folder, tmp_path) -> None:
    run(demo, source, tmp_path / "one" / "maps.zarr", "iba")
    output = tmp_path / "two" / "maps.zarr"
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [
        *(str(torchrun), "--nproc-per-node", "2", "--standalone", "-m", "vitexplain", "dataset", str(folder)),
        *(
            "--output",
            str(output),
            "--method",
            "iba",
            "--batch",
            "4",
            "--shard",
            "8",
            "--workers",
            "0",
            "--device",
            "cpu",
            "--json",
        ),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["images"] == COUNT
    assert report["devices"] == ["cpu", "cpu"]
    assert files(output) == files(tmp_path / "one" / "maps.zarr")


def test_an_error_of_the_first_process_is_everyones(folder, tmp_path) -> None:
    """Two processes as torchrun starts them, but that nobody ends one for the other's end."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        common["MASTER_PORT"] = str(found.getsockname()[1])
    command = ["-m", "vitexplain", "dataset", folder, "--output", "s3://bucket/maps.zarr", "--method", "iba"]
    command += ["--batch", "4", "--workers", "0", "--device", "cpu"]
    runs = [forked.start(command, tmp_path, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    for run in runs:
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 1
        assert "expected a path of a file system" in errors
