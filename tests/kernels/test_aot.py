"""Kernels compiled ahead of time: the CMake build, the budgets, and their use at run time, all without a GPU."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from vitexplain.kernels import aot, interpreting
from vitexplain.kernels.aot import driver
from vitexplain.kernels.aot.budgets import report
from vitexplain.kernels.aot.manifest import MANIFEST, Image, Manifest, digest, read_manifest

pytest.importorskip("triton", reason="needs triton, which this platform has no wheel for")
pytestmark = [
    pytest.mark.skipif(interpreting(), reason="interpreting and compiling cannot share a process"),
    pytest.mark.xdist_group("aot"),  # one build for all of them
]

ROOT = Path(__file__).resolve().parent.parent.parent
CMAKE, CTEST = (shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent)) for name in ("cmake", "ctest"))
KERNELS = "l2_head_norms|token|normalise"  # those that compile fast
needs_cmake = pytest.mark.skipif(CMAKE is None, reason="needs cmake, which is not installed")


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Path:
    """A CMake build of a few kernels for one architecture."""
    if CMAKE is None:
        pytest.skip("needs cmake, which is not installed")
    folder = tmp_path_factory.mktemp("build")
    options = {
        "VITEXPLAIN_AOT": "ON", "VITEXPLAIN_ARCHS": "90", "VITEXPLAIN_DTYPES": "bfloat16", "VITEXPLAIN_HEAD_DIMS": "64",
        "VITEXPLAIN_KERNELS": KERNELS, "VITEXPLAIN_JOBS": "1", "Python_EXECUTABLE": sys.executable,
    }  # fmt: skip
    defines = [f"-D{name}={value}" for name, value in options.items()]
    for command in ([CMAKE, "-S", str(ROOT), "-B", str(folder), *defines], [CMAKE, "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def images(build, tmp_path) -> Path:
    """A copy of the images, to damage."""
    return shutil.copytree(build / "images", tmp_path / "images")


@pytest.fixture(autouse=True)
def forget() -> None:
    """What was found in another test's folder is not found again."""
    for cached in (aot.images_folder, aot._images, driver.driver):
        cached.cache_clear()


def test_a_build_has_every_variant_that_its_kernels_launch(build) -> None:
    from vitexplain.kernels.aot.compile import shipped_variants

    manifest = read_manifest(build / "images" / "90")
    wanted = shipped_variants("90", ["bfloat16"], [64], KERNELS)
    assert [(image.kernel, image.types, image.constants) for image in manifest.images] == [
        (variant.kernel, variant.types, variant.constants) for variant in wanted
    ]
    assert all(image.trailing_pointers >= 0 for image in manifest.images)
    assert all(path.with_suffix(".ptx").exists() for path in (build / "images" / "90").glob("*.cubin"))


def test_the_builds_own_tests_hold_the_budgets(build) -> None:
    done = subprocess.run([CTEST, "--test-dir", str(build), "-R", "budgets", "--verbose"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "kernels within budget for 90" in done.stdout
    listed = subprocess.run([CTEST, "--test-dir", str(build), "-N"], capture_output=True, text=True).stdout
    assert "interpreter" in listed


def _image(**changes: object) -> Image:
    image = Image(
        file="a.cubin", sha256="", symbol="single_row_kernel", kernel="single_row_kernel",
        types=(("query", "*bf16"), ("num_keys", "i32"), ("scale_log2", "fp32"), ("stride_query_batch", "i64")),
        divisible=("query",), constants=(("BLOCK_M", 64), ("BLOCK_N", 64)), num_warps=4, num_stages=2,
        max_registers=0, trailing_pointers=2,
        shared_bytes=1024, registers=100, spilled_bytes=0, instructions={"HGMMA": 8}, seconds=1.0,
    )  # fmt: skip
    return dataclasses.replace(image, **changes)


OVER_BUDGET = {
    "spills": ({"spilled_bytes": 16}, "90", "spills 16 bytes a thread"),
    "local memory": ({"instructions": {"HGMMA": 8, "STL": 3}}, "90", "uses local memory: {'STL': 3}"),
    "shared memory": ({"shared_bytes": 120 << 10}, "89", "needs 122880 bytes of shared memory, the limit is 101376"),
    "no tensor cores": ({"instructions": {"FFMA": 800}}, "80", "expected products (HMMA), found {'FFMA': 800}"),
    "nothing left": (
        {"types": (("query", "*fp32"),), "constants": (("PRECISION", "ieee"),), "instructions": {}},
        "100",
        "expected products (FFMA or FFMA2), found {}",
    ),
    "no warp groups": ({"instructions": {"HMMA": 8}}, "90", "expected products (HGMMA), found {'HMMA': 8}"),
}


@pytest.mark.parametrize("name", OVER_BUDGET)
def test_a_kernel_over_budget_is_named(name: str, tmp_path) -> None:
    from vitexplain.kernels.aot import budgets

    changes, architecture, message = OVER_BUDGET[name]
    (tmp_path / "a.cubin").write_bytes(b"image")
    image = _image(sha256=digest(b"image"), **changes)
    manifest = Manifest(architecture, "3.9.0", "2.15.0", (image,))
    text, broken = report(manifest)
    assert broken == 1
    assert message in text
    manifest.write(tmp_path)
    with pytest.raises(SystemExit, match=f"1 of 1 kernels over budget for {architecture}"):
        budgets.main([str(tmp_path)])


def test_small_tiles_float32_and_kernels_without_products_need_no_warp_groups() -> None:
    fine = (
        _image(constants=(("BLOCK_M", 16), ("BLOCK_N", 64)), instructions={"HMMA": 1}),
        _image(types=(("query", "*fp32"),), instructions={"FFMA": 99}),
        _image(kernel="delta_kernel", instructions={}),
    )
    assert report(Manifest("90", "3.9.0", "2.15.0", fine))[1] == 0


class FakeDriver:
    """Stands for libcuda: notes every call and reads the arguments of a launch as the device would."""

    def __init__(self, kinds: list[type], fails: str = "") -> None:
        self.kinds, self.fails = kinds, fails
        self.calls: list[tuple[object, ...]] = []

    def __getattr__(self, name: str):
        def call(*arguments: object) -> int:
            if name == "cuGetErrorName":
                arguments[1]._obj.value = b"CUDA_ERROR_OUT_OF_MEMORY"
                return 0
            if name == self.fails:
                return 2
            if name == "cuLaunchKernel":
                *head, pointers, _ = arguments[1:]
                values = [
                    ctypes.cast(pointer, ctypes.POINTER(kind))[0] for pointer, kind in zip(pointers, self.kinds, strict=True)
                ]
                self.calls.append((name, *(getattr(value, "value", value) for value in head), values))
            else:
                self.calls.append((name, *arguments[1:]))
            return 0

        return call


@pytest.fixture
def cuda_on_a_cpu(monkeypatch) -> None:
    """torch's notion of a current device and stream, without one."""
    import types

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=77))


KINDS = [ctypes.c_uint64, ctypes.c_int32, ctypes.c_float, ctypes.c_int64, ctypes.c_uint64, ctypes.c_uint64]


@pytest.mark.usefixtures("cuda_on_a_cpu")
def test_a_launch_hands_the_driver_what_triton_would(monkeypatch, tmp_path) -> None:
    (tmp_path / "a.cubin").write_bytes(b"image")
    fake = FakeDriver(KINDS)
    monkeypatch.setattr(driver, "driver", lambda: fake)
    loaded = driver.LoadedImage(_image(shared_bytes=64 << 10), tmp_path)
    tensor = torch.zeros(4)[1:]
    for _ in range(2):
        loaded.launch((3, 2), [tensor, 197, 0.5, 2**40])
    names = [call[0] for call in fake.calls]
    assert names == ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel", "cuLaunchKernel"]
    assert fake.calls[0][1] == b"image"
    assert fake.calls[1][2] == b"single_row_kernel"
    assert fake.calls[2][1:] == (driver.MAX_DYNAMIC_SHARED_MEMORY, 64 << 10)
    grid_block_shared_stream = (3, 2, 1, 128, 1, 1, 64 << 10, 77)
    assert fake.calls[3][1:-1] == grid_block_shared_stream
    assert fake.calls[3][-1] == [tensor.data_ptr(), 197, 0.5, 2**40, 0, 0]


@pytest.mark.usefixtures("cuda_on_a_cpu")
@pytest.mark.parametrize("call", ["cuModuleLoadData", "cuLaunchKernel"])
def test_a_refusal_of_the_driver_is_raised_with_its_name(monkeypatch, tmp_path, call: str) -> None:
    (tmp_path / "a.cubin").write_bytes(b"image")
    fake = FakeDriver(KINDS, fails=call)
    monkeypatch.setattr(driver, "driver", lambda: fake)
    loaded = driver.LoadedImage(_image(), tmp_path)
    with pytest.raises(driver.DriverError, match=rf"{call}: the CUDA driver returned 2 \(CUDA_ERROR_OUT_OF_MEMORY\)"):
        loaded.launch((1,), [torch.zeros(1), 1, 1.0, 1])


def test_a_real_shared_library_receives_the_arguments(tmp_path, monkeypatch) -> None:
    """The same through ctypes and the C calling convention, with twenty lines of C in place of libcuda."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc, which is not installed")
    source = tmp_path / "fake.c"
    source.write_text(
        """
        #include <stdint.h>
        static unsigned seen[7]; static uint64_t pointer; static int32_t integer; static float real; static int64_t wide;
        int cuModuleLoadData(void **module, const void *image) { *module = (void *)image; return 0; }
        int cuModuleGetFunction(void **function, void *module, const char *name) { *function = module; return 0; }
        int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
        int cuGetErrorName(int code, const char **text) { *text = "CUDA_ERROR_FAKE"; return 0; }
        int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                           unsigned shared, void *stream, void **p, void **extra) {
          unsigned all[7] = {gx, gy, gz, bx, by, bz, shared};
          for (int i = 0; i < 7; i++) seen[i] = all[i];
          pointer = *(uint64_t *)p[0]; integer = *(int32_t *)p[1]; real = *(float *)p[2]; wide = *(int64_t *)p[3];
          return *(uint64_t *)p[4] || *(uint64_t *)p[5] ? 1 : 0;
        }
        unsigned number(int i) { return seen[i]; }
        uint64_t the_pointer(void) { return pointer; } int32_t the_integer(void) { return integer; }
        float the_real(void) { return real; } int64_t the_wide(void) { return wide; }
        """
    )
    library = tmp_path / "libfake.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    fake = ctypes.CDLL(str(library))
    fake.the_pointer.restype, fake.the_real.restype, fake.the_wide.restype = ctypes.c_uint64, ctypes.c_float, ctypes.c_int64
    monkeypatch.setattr(driver, "driver", lambda: fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 0}))
    (tmp_path / "a.cubin").write_bytes(b"image")
    tensor = torch.zeros(4)
    driver.LoadedImage(_image(), tmp_path).launch((5, 6, 7), [tensor, -3, 1.5, 2**40])
    assert [fake.number(i) for i in range(7)] == [5, 6, 7, 128, 1, 1, 1024]
    assert (fake.the_pointer(), fake.the_integer(), fake.the_real(), fake.the_wide()) == (tensor.data_ptr(), -3, 1.5, 2**40)


def _variants() -> list:
    from vitexplain.kernels.aot.compile import shipped_variants

    return shipped_variants("90", ["bfloat16"], [64], "l2_head_norms")


def test_images_are_found_by_what_a_launch_needs(images, monkeypatch) -> None:
    monkeypatch.setenv("VITEXPLAIN_AOT_IMAGES", str(images))
    variants = _variants()
    assert aot.installed()
    assert all(aot.find(variant, "90") is not None for variant in variants)
    variant = variants[0]
    assert aot.find(variant, "80") is None, "no images of this architecture"
    others = (
        dataclasses.replace(variant, num_warps=16),
        dataclasses.replace(variant, max_registers=99),
        dataclasses.replace(variant, types=variant.types[1:]),
        dataclasses.replace(variant, constants=(*variant.constants, ("MASK", "boolean"))),
        dataclasses.replace(variant, divisible=variant.divisible - {"value"}),
    )
    assert all(aot.find(other, "90") is None for other in others)
    assert aot.find(dataclasses.replace(variant, divisible=variant.divisible | {"num_keys"}), "90") is not None


def test_launches_of_real_shapes_find_their_image(images, monkeypatch) -> None:
    """A ViT-B/16's last but one block at 224 pixels, a ViT-L/16's at 384: the variants they launch are among those compiled."""
    from vitexplain.kernels.aot.compile import shipped_variants
    from vitexplain.kernels.head_norms.triton_kernel import launch_norms
    from vitexplain.kernels.launch import recorded_launches
    from vitexplain.kernels.row_propagation.triton_kernel import launch_rows

    monkeypatch.setenv("VITEXPLAIN_AOT_IMAGES", str(images))
    shipped = shipped_variants("90", ["bfloat16"], [64])
    for batch, heads, n in ((64, 12, 197), (1, 16, 577), (2, 16, 1024)):
        packed = torch.empty(batch, n, 3, heads, 64, dtype=torch.bfloat16, device="meta")
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        grad_out = torch.empty(batch, n, heads, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        logsumexp, weights = torch.empty(2, batch, heads, n, device="meta").unbind(0)
        rows = torch.empty(batch, 1, n, device="meta")
        with recorded_launches("90") as variants:
            launch_norms(value, grad_out)
        assert [aot.find(variant, "90") is not None for variant in variants] == [True], (batch, heads, n)
        with recorded_launches("90") as variants:
            launch_rows(query, key, value, grad_out, logsumexp, rows, None, weights, None, 0.125, 1.0, 1.0, "p_relu_g")
        assert [_is_shipped(variant, shipped) for variant in variants] == [True], (batch, heads, n)


def _is_shipped(variant, shipped: list) -> bool:
    """Whether there is one like it that needs no alignment that it has not."""
    return any(_key(one) == _key(variant) and variant.divisible >= one.divisible for one in shipped)


def test_they_can_be_switched_off(images, monkeypatch) -> None:
    monkeypatch.setenv("VITEXPLAIN_AOT_IMAGES", str(images))
    monkeypatch.setenv("VITEXPLAIN_AOT", "0")
    assert not aot.installed()


def test_a_folder_that_is_not_there_is_told(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("VITEXPLAIN_AOT_IMAGES", str(tmp_path / "nowhere"))
    with pytest.warns(UserWarning, match="VITEXPLAIN_AOT_IMAGES: expected a folder, received .*nowhere"):
        assert not aot.installed()


def _truncate(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_text(path.read_text()[:500])


def _other_format(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


def _missing_field(folder: Path) -> None:
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    del content["images"][0]["symbol"]
    path.write_text(json.dumps(content))


DAMAGES = {
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "manifest.json: expected a manifest of compiled kernels"),
    "truncated manifest": (_truncate, "manifest.json: expected a manifest of compiled kernels, received JSONDecodeError"),
    "another format": (_other_format, "expected format 1, received 99"),
    "a missing field": (_missing_field, "expected a manifest of compiled kernels, received TypeError"),
    "a missing image": (lambda folder: next(folder.glob("*.cubin")).unlink(), "cubin: expected an image that the manifest lists"),
    "another image": (
        lambda folder: next(folder.glob("*.cubin")).write_bytes(b"x"),
        "cubin: expected the image that the manifest records",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_set_is_told_once_and_left_alone(images, monkeypatch, name: str) -> None:
    damage, message = DAMAGES[name]
    variant = _variants()[0]
    damage(images / "90")
    monkeypatch.setenv("VITEXPLAIN_AOT_IMAGES", str(images))
    with pytest.warns(UserWarning, match=f"Triton compiles instead: .*{message}"):
        assert aot.find(variant, "90") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert aot.find(variant, "90") is None


@needs_cmake
def test_the_build_says_what_is_missing(tmp_path) -> None:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *triton*) echo "No module named triton" >&2; exit 1;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    command = [CMAKE, "-S", str(ROOT), "-B", str(tmp_path / "build"), "-DVITEXPLAIN_AOT=ON", f"-DPython_EXECUTABLE={python}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "expected torch and triton in the environment" in done.stderr
    assert "--no-build-isolation" in " ".join(done.stderr.split())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("passes", ["one pass", "two passes"])
@pytest.mark.parametrize("rows", [None, "all"])
@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_everything_that_an_explanation_launches_is_shipped(monkeypatch, pooling: str, rows, passes: str, dtype) -> None:
    """Explanations run with their launches recorded; what the kernels would have written is garbage and does not matter."""
    import vitexplain
    from vitexplain.kernels.aot.compile import shipped_variants
    from vitexplain.kernels.attention_backward.choose import forced
    from vitexplain.kernels.launch import recorded_launches

    from ..conftest import build_model, images_for

    model = build_model(embed_dim=128, num_heads=2, global_pool=pooling, class_token=pooling == "token").to(dtype)
    images = images_for(model, 2).to(dtype)
    methods = [info.name for info in vitexplain.methods() if (info.all_rows if rows else info.resolution == "tokens")]
    monkeypatch.setattr("vitexplain.kernels.dispatch.choose_backend", lambda *_: "triton")
    with recorded_launches("90") as launched, forced(passes):
        vitexplain.explain(model, images, method=methods, rows=rows, **({} if rows else {"precision": "float32"}))
    assert launched
    shipped: dict[tuple, list] = {}
    for variant in shipped_variants("90", [str(dtype).removeprefix("torch.")], [64]):
        shipped.setdefault(_key(variant), []).append(variant.divisible)
    for variant in launched:
        assert _key(variant) in shipped, f"not shipped: {variant}"
        assert any(variant.divisible >= divisible for divisible in shipped[_key(variant)]), f"not aligned so: {variant}"


def _key(variant) -> tuple:
    return variant.kernel, variant.types, variant.constants, variant.num_warps, variant.num_stages, variant.max_registers
