"""How long the first explanation of a process takes, with kernels compiled ahead of time and without.

    python -m bench.first_call                     # on a GPU: import, first and second explanation, in processes of their own
    python -m bench.first_call --not-measured nvidia-h200

Without a GPU nothing is launched; what can be measured is how long Triton's compiler takes for the kernels of that first
explanation, which is what an ahead-of-time set saves: it is measured and written beside the lines that are not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from vitexplain.kernels.launch import architecture_of

from .operations import BLANK, NOT_MEASURED, folder_of
from .record import RESULTS, Row, environment, spread, write_rows

MODEL, METHOD, BATCH = "vit_base_patch16_224", "tokentm", 8
SETTINGS = {"compiled by Triton at first use": False, "compiled ahead of time": True}
STEPS = ("import", "first explanation", "second explanation")
# What one explanation by tokentm launches: kernel, φ
LAUNCHED = r"^(single_row|token_transformation|attention_token_transformation|normalise)"

_PROCESS = """
import json, sys, time
started = time.perf_counter()
import timm, torch, vitexplain
imported = time.perf_counter()
model = timm.create_model(sys.argv[1]).eval().to("cuda", torch.bfloat16)
images = torch.randn(int(sys.argv[3]), 3, 224, 224, device="cuda", dtype=torch.bfloat16)
with torch.no_grad():
    model(images)
torch.cuda.synchronize()
seconds = [imported - started]
explainer = vitexplain.Explainer(model, sys.argv[2])
for _ in range(2):
    begun = time.perf_counter()
    explainer.attribute(images)
    torch.cuda.synchronize()
    seconds.append(time.perf_counter() - begun)
print(json.dumps(seconds))
"""


def one_process(images: Path | None) -> list[float]:
    """Seconds of import, first and second explanation in a fresh process with an empty Triton cache."""
    with tempfile.TemporaryDirectory() as cache:
        switches = {"VITEXPLAIN_AOT": "0"} if images is None else {"VITEXPLAIN_AOT_IMAGES": str(images)}
        command = [sys.executable, "-c", _PROCESS, MODEL, METHOD, str(BATCH)]
        variables = {**os.environ, **switches, "TRITON_CACHE_DIR": cache}
        done = subprocess.run(command, env=variables, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compile_seconds(architecture: str) -> float:
    """Seconds of Triton's compiler for the variants that the first explanation launches, one after the other."""
    from vitexplain.kernels.aot.compile import compile_variant, shipped_variants

    variants = [variant for variant in shipped_variants(architecture, ["bfloat16"], [64], LAUNCHED) if _is_launched(variant)]
    compile_variant(variants[0], architecture)  # the compiler's own start
    with tempfile.TemporaryDirectory() as cache:
        was = os.environ.get("TRITON_CACHE_DIR")
        os.environ["TRITON_CACHE_DIR"] = cache
        try:
            started = time.perf_counter()
            for variant in variants:
                compile_variant(variant, architecture)
            return time.perf_counter() - started
        finally:
            os.environ.pop("TRITON_CACHE_DIR") if was is None else os.environ.update(TRITON_CACHE_DIR=was)


def _is_launched(variant) -> bool:
    constants = dict(variant.constants)
    if variant.kernel == "single_row_kernel":
        return constants["PHI"] == "p_relu_g" and "token_weights" not in constants
    return constants.get("branch", "") is None or variant.kernel != "token_transformation_kernel"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--not-measured", metavar="DEVICE", help="write this device's lines, each marked as not measured")
    parser.add_argument("--architecture", default="90", help="that the compiler's time is measured for")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    where = {"case": "first call", "model": MODEL, "batch": BATCH, "tokens": 197, "dtype": "bfloat16", "unit": "s"}
    rows = []
    if options.not_measured:
        name = options.not_measured
        blank = {**BLANK, "device": name, "threads": 0, "versions": NOT_MEASURED}
        rows += [Row(provider=setting, metric=step, **where, **blank) for setting in SETTINGS for step in STEPS]
    else:
        if not torch.cuda.is_available():
            raise SystemExit("expected a CUDA device, found none (--not-measured DEVICE writes the empty table)")
        device = torch.device("cuda", 0)
        name, found = folder_of(device), environment(device)
        with tempfile.TemporaryDirectory() as folder:
            images = Path(folder)
            root = Path(__file__).resolve().parent.parent
            architecture = architecture_of(device)
            build = ["-m", "kernels.aot.compile", "--architecture", architecture, "--output", str(images / architecture)]
            subprocess.run([sys.executable, *build, "--dtypes", "bfloat16", "--head-dims", "64"], check=True, cwd=root)
            for setting, ahead in SETTINGS.items():
                samples = [one_process(images if ahead else None) for _ in range(options.repeats)]
                for step, values in zip(STEPS, zip(*samples, strict=True), strict=True):
                    rows.append(Row(provider=setting, metric=step, **where, **spread(list(values)), **found))
    host = environment(torch.device("cpu"))
    seconds = [compile_seconds(options.architecture) for _ in range(options.repeats)]
    label = f"Triton's compiler, sm_{options.architecture}"
    rows.append(Row(provider=label, metric="compile time", **where, **spread(seconds), **host))
    path = write_rows(RESULTS / name / "first_call.csv", rows)
    for row in rows:
        print(f"{row.provider:36s} {row.metric:20s} {row.p50:>12s} {row.unit}")
    print(path)


if __name__ == "__main__":
    main()
