"""What a fresh process waits for: imports, the first explanation, the second; and the compiler's share of the first on a GPU."""

from __future__ import annotations

import json
import os
import re
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

from vitexplain.kernels.attention_backward.choose import one_pass_is_faster
from vitexplain.kernels.launch import KernelVariant, architecture_of, recorded_launches

from ..record import Row, spread, unavailable
from ..registry import EXPLANATION, MODEL_ITSELF, TORCH, TRITON, Case, Entry, Setting, Size, Unavailable

METHOD, REPEATS = "tokentm", 3
LIBRARIES, IMPORT, FIRST, SECOND = (
    "import torch and timm",
    "import vitexplain",
    "first explanation",
    "second explanation",
)
AT_FIRST_USE, AHEAD = f"{TRITON}, compiled at first use", f"{TRITON}, compiled ahead of time"
ARCHITECTURE = "90"  # that the compiler's time is measured for
COMPILER = f"Triton's compiler, sm_{ARCHITECTURE}"
HEAD_DIM = 64
IMAGES = "VITEXPLAIN_AOT_IMAGES"
# What one explanation by tokentm may launch
LAUNCHED = r"^(single_row|token_transformation|attention_token_transformation|normalise|delta|attention_backward)_kernel$"

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
    """Milliseconds that a fresh process, with an empty cache of compiled kernels, measured of itself.

    Raises ``Unavailable`` where one that was given images compiled something nonetheless.
    """
    variables = variables or {}
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, **variables, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        compiled = sorted(path.stem for path in Path(cache).rglob("*.cubin"))
    if done.returncode:
        raise SystemExit(f"cold start: the process failed\n{done.stderr}")
    if compiled and IMAGES in variables:
        raise Unavailable(f"not compiled ahead: {', '.join(compiled)}")
    return json.loads(done.stdout.splitlines()[-1])


def steps(size: Size, device_type: str, variables: dict[str, str] | None = None) -> dict[str, list[float]]:
    """Milliseconds of import, first and second explanation, one sample a process."""
    arguments = [size.model, METHOD, str(size.batch), str(size.image_size), size.dtype, device_type]
    samples = [one_process(EXPLAINING, arguments, variables) for _ in range(REPEATS)]
    return dict(zip((IMPORT, FIRST, SECOND), map(list, zip(*samples, strict=True)), strict=True))


def launched_variants(size: Size, architecture: str) -> list[KernelVariant]:
    """The kernel variants that the first explanation of a size launches."""
    from vitexplain.kernels.shipped_variants import ShippedInputs

    with recorded_launches(architecture) as recorded:
        inputs = ShippedInputs(size.torch_dtype, HEAD_DIM, size.tokens)
        inputs.rows_launches(size.tokens)
        inputs.rows_launches(1)  # the last block
        inputs.transformation_launches()
        if one_pass_is_faster(inputs.query, size.tokens):
            inputs.backward_launches()
    return [variant for variant in dict.fromkeys(recorded) if is_launched(variant)]


def compile_milliseconds(size: Size, architecture: str) -> float:
    """Triton's compiler for the variants that the first explanation launches, one after the other, with an empty cache."""
    from vitexplain.kernels.aot.compile import compile_variant

    variants = launched_variants(size, architecture)
    compile_variant(variants[0], architecture)  # the compiler's own start
    with tempfile.TemporaryDirectory() as cache, _variable("TRITON_CACHE_DIR", cache):
        started = time.perf_counter()
        for variant in variants:
            compile_variant(variant, architecture)
        return 1e3 * (time.perf_counter() - started)


def is_launched(variant: KernelVariant) -> bool:
    """Whether an explanation by tokentm launches this variant."""
    constants = dict(variant.constants)
    if not re.search(LAUNCHED, variant.kernel) or constants.get("PHI", "p_relu_g") != "p_relu_g":
        return False
    if variant.kernel == "single_row_kernel":
        return "token_weights" not in constants
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
def compiled_ahead(size: Size, architecture: str) -> Iterator[Path]:
    """A folder of what the first explanation launches, compiled; all else would be built for nothing."""
    import triton

    from vitexplain.kernels.aot.compile import build_image
    from vitexplain.kernels.aot.manifest import Manifest

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / architecture
        folder.mkdir()
        variants = enumerate(launched_variants(size, architecture))
        images = (build_image(variant, architecture, folder, f"{number}_{variant.kernel}") for number, variant in variants)
        Manifest(architecture, triton.__version__, torch.__version__, tuple(images)).write(folder)
        yield folder.parent


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
        found: dict[str, dict[str, dict[str, object]]] = {}  # by provider; all steps are of the same processes
        for entry in entries:
            if entry.work == COMPILER and find_spec("triton") is None:
                yield self.row(entry, size, "time", "ms", unavailable("triton is not installed"), device)
                continue
            if entry.work in (LIBRARIES, COMPILER):
                figures = spread([self._alone(entry, size) for _ in range(REPEATS)])
            else:
                if entry.provider not in found:
                    found[entry.provider] = self._figures(entry.provider, size, device.type)
                figures = found[entry.provider][entry.work]
            yield self.row(entry, size, "time", "ms", figures, device)

    def _figures(self, provider: str, size: Size, device_type: str) -> dict[str, dict[str, object]]:
        """By step: how long it took, or why that cannot be said."""
        try:
            return {step: spread(samples) for step, samples in self._steps(provider, size, device_type).items()}
        except Unavailable as reason:
            return dict.fromkeys((IMPORT, FIRST, SECOND), unavailable(reason))

    @staticmethod
    def _alone(entry: Entry, size: Size) -> float:
        return one_process(IMPORTING)[0] if entry.work == LIBRARIES else compile_milliseconds(size, ARCHITECTURE)

    @staticmethod
    def _steps(provider: str, size: Size, device_type: str) -> dict[str, list[float]]:
        if provider != AHEAD:
            return steps(size, device_type, {"VITEXPLAIN_AOT": "0"})
        with compiled_ahead(size, architecture_of(torch.device("cuda", 0))) as images:
            return steps(size, device_type, {IMAGES: str(images)})
