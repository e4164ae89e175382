"""What a fresh process waits for: imports, the first explanation, the second; and the compiler's share of the first on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import torch

from vitexplain.kernels.launch import KernelVariant, architecture_of

from ..record import Row, spread, unavailable
from ..registry import EXPLANATION, MODEL_ITSELF, TORCH, TRITON, Case, Entry, Setting, Size

ROOT = Path(__file__).resolve().parent.parent.parent
METHOD, REPEATS = "tokentm", 3
LIBRARIES, IMPORT, FIRST, SECOND = STEPS = (
    "import torch and timm",
    "import vitexplain",
    "first explanation",
    "second explanation",
)
AT_FIRST_USE, AHEAD = f"{TRITON}, compiled at first use", f"{TRITON}, compiled ahead of time"
ARCHITECTURE = "90"  # that the compiler's time is measured for
COMPILER = f"Triton's compiler, sm_{ARCHITECTURE}"
# What one explanation by tokentm launches
LAUNCHED = r"^(single_row|token_transformation|attention_token_transformation|normalise)"

# Milliseconds of import, first and second explanation, for MODEL METHOD BATCH IMAGE_SIZE DTYPE DEVICE. The package loads its
# parts when they are named, so the explainer is: what it brings, torch and timm above all, is counted. One forward comes before
# the explanations: what a device needs for its own start is not theirs.
EXPLAINING = """
import json, sys, time
started = time.perf_counter()
from vitexplain import Explainer
seconds = [time.perf_counter() - started]
import timm, torch
name, method, batch, side, dtype, device = sys.argv[1:]
wait = torch.cuda.synchronize if device == "cuda" else int
model = timm.create_model(name).eval().to(device, getattr(torch, dtype))
images = torch.randn(int(batch), 3, int(side), int(side), device=device, dtype=getattr(torch, dtype))
with torch.no_grad():
    model(images)
wait()
explainer = None
for _ in range(2):
    started = time.perf_counter()
    explainer = explainer or Explainer(model, method)
    explainer.attribute(images)
    wait()
    seconds.append(time.perf_counter() - started)
print(json.dumps([1e3 * one for one in seconds]))
"""
IMPORTING = """
import json, time
started = time.perf_counter()
import torch, timm
print(json.dumps([1e3 * (time.perf_counter() - started)]))
"""


def one_process(code: str, arguments: Sequence[str] = (), variables: dict[str, str] | None = None) -> list[float]:
    """Milliseconds that a fresh process, with an empty cache of compiled kernels, measured of itself."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, **(variables or {}), "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"cold start: the process failed\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def steps(size: Size, device_type: str, variables: dict[str, str] | None = None) -> dict[str, list[float]]:
    """Milliseconds of import, first and second explanation, one sample a process."""
    arguments = [size.model, METHOD, str(size.batch), str(size.image_size), size.dtype, device_type]
    samples = [one_process(EXPLAINING, arguments, variables) for _ in range(REPEATS)]
    return dict(zip((IMPORT, FIRST, SECOND), map(list, zip(*samples, strict=True)), strict=True))


def compile_milliseconds(architecture: str, dtype: str) -> float:
    """Triton's compiler for the variants that the first explanation launches, one after the other, with an empty cache."""
    from vitexplain.kernels.aot.compile import compile_variant, shipped_variants

    variants = [variant for variant in shipped_variants(architecture, [dtype], [64], LAUNCHED) if is_launched(variant)]
    compile_variant(variants[0], architecture)  # the compiler's own start
    with tempfile.TemporaryDirectory() as cache, _variable("TRITON_CACHE_DIR", cache):
        started = time.perf_counter()
        for variant in variants:
            compile_variant(variant, architecture)
        return 1e3 * (time.perf_counter() - started)


def is_launched(variant: KernelVariant) -> bool:
    """Whether an explanation by tokentm launches this variant."""
    constants = dict(variant.constants)
    if variant.kernel == "single_row_kernel":
        return constants["PHI"] == "p_relu_g" and "token_weights" not in constants
    return constants.get("branch", "") is None or variant.kernel != "token_transformation_kernel"


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """An environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


@contextmanager
def compiled_ahead(dtype: str) -> Iterator[Path]:
    """A folder of kernels compiled for the GPU at hand."""
    with tempfile.TemporaryDirectory() as folder:
        images, architecture = Path(folder), architecture_of(torch.device("cuda", 0))
        build = ["-m", "kernels.aot.compile", "--architecture", architecture, "--output", str(images / architecture)]
        subprocess.run([sys.executable, *build, "--dtypes", dtype, "--head-dims", "64"], check=True, cwd=ROOT)
        yield images


class ColdStart(Case):
    """Import, first and second explanation, each repeat in a process of its own; what torch and timm take is listed beside."""

    name: ClassVar[str] = "cold_start"
    kind: ClassVar[str] = EXPLANATION
    title: ClassVar[str] = "imports, first and second explanation of a fresh process, and Triton's compiler"

    def sizes(self, device_type: str) -> Sequence[Size]:
        gpu = Size("vit_base_patch16_224", 8, 197, dtype="bfloat16")
        return [gpu] if device_type == "cuda" else [Size("vit_small_patch16_224", 8, 197), gpu]

    def entries(self, size: Size, device_type: str) -> Sequence[Entry]:
        """On a CPU the GPU's size has the compiler alone, which needs no GPU."""
        compiler = [Entry(COMPILER, TRITON)] if size.dtype == "bfloat16" else []
        if device_type == "cpu" and compiler:
            return compiler
        providers = (AT_FIRST_USE, AHEAD) if device_type == "cuda" else (TORCH,)
        found = [Entry(LIBRARIES, MODEL_ITSELF, baseline=True)]
        found += [Entry(step, provider) for provider in providers for step in (IMPORT, FIRST, SECOND)]
        return [*found, *compiler]

    def measure(self, size: Size, setting: Setting) -> Iterator[Row]:
        device = setting.device
        entries = [entry for entry in self.entries(size, device.type) if setting.wants(entry)]
        found: dict[str, dict[str, list[float]]] = {}  # by provider; all steps are of the same processes
        for entry in entries:
            if entry.work == COMPILER and find_spec("triton") is None:
                yield self.row(entry, size, "time", "ms", unavailable("triton is not installed"), device)
                continue
            if entry.work in (LIBRARIES, COMPILER):
                samples = [self._alone(entry, size) for _ in range(REPEATS)]
            else:
                if entry.provider not in found:
                    found[entry.provider] = self._steps(entry.provider, size, device.type)
                samples = found[entry.provider][entry.work]
            yield self.row(entry, size, "time", "ms", spread(samples), device)

    @staticmethod
    def _alone(entry: Entry, size: Size) -> float:
        return one_process(IMPORTING)[0] if entry.work == LIBRARIES else compile_milliseconds(ARCHITECTURE, size.dtype)

    @staticmethod
    def _steps(provider: str, size: Size, device_type: str) -> dict[str, list[float]]:
        if provider != AHEAD:
            return steps(size, device_type, {"VITEXPLAIN_AOT": "0"})
        with compiled_ahead(size.dtype) as images:
            return steps(size, device_type, {"VITEXPLAIN_AOT_IMAGES": str(images)})
