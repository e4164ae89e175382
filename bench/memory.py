"""Peak memory of one explanation over the number of tokens: matrix-free beside the dense reference.

    python -m bench.memory                    # ViT-S width, CPU, n from 197 to 4097

Each figure is one fresh process: peak resident memory above what the process held before the explanation. The dense
reference runs under an address-space limit, and where it does not fit the row says so.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
import torch

from .record import RESULTS, Row, environment, spread, write_rows

IMAGE_SIZES = {197: 224, 577: 384, 1025: 512, 2305: 768, 4097: 1024}


def measure(tokens: int, provider: str, method: str, limit_gb: float) -> dict[str, float]:
    """Explain one image in this process; MiB above the start, and seconds."""
    import timm

    import vitexplain

    torch.manual_seed(0)
    size = IMAGE_SIZES[tokens]
    model = timm.create_model("vit_small_patch16_224", img_size=size).eval().requires_grad_(False)
    images = torch.randn(1, 3, size, size)
    backend = "dense" if provider == "dense" else "auto"
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # threads and libraries are up before the baseline is read
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if limit_gb:
        limit = int(limit_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    started = time.perf_counter()
    if provider == "forward + input gradient":
        images.requires_grad_()
        torch.autograd.grad(model(images).amax(-1).sum(), images)
    else:
        vitexplain.explain(model, images, method=method, backend=backend)
    seconds = time.perf_counter() - started
    return {"mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline) / 1024, "seconds": seconds}


def measure_apart(tokens: int, provider: str, method: str, limit_gb: float) -> dict[str, float] | None:
    """``measure`` in a process of its own; None where memory did not suffice."""
    command = [sys.executable, "-m", "bench.memory", "--one", str(tokens), provider, method, str(limit_gb)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode == 0:
        return json.loads(finished.stdout.splitlines()[-1])
    if "memory" in finished.stderr.lower() or finished.returncode < 0:
        return None
    raise SystemExit(finished.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=4, metavar=("TOKENS", "PROVIDER", "METHOD", "LIMIT"), help=argparse.SUPPRESS)
    parser.add_argument("--method", default="tokentm")
    parser.add_argument("--dense-limit-gb", type=float, default=20.0)
    options = parser.parse_args()
    if options.one:
        tokens, provider, method, limit = options.one
        print(json.dumps(measure(int(tokens), provider, method, float(limit))))
        return
    rows, peaks = [], []
    for tokens in IMAGE_SIZES:
        for provider, limit in (("matrix-free", 0.0), ("forward + input gradient", 0.0), ("dense", options.dense_limit_gb)):
            result = measure_apart(tokens, provider, options.method, limit)
            dtype = "float64" if provider == "dense" else "float32"
            common = {"case": f"memory {options.method}", "provider": provider, "model": "vit_small_patch16", "batch": 1}
            common |= {"tokens": tokens, "dtype": dtype, **environment(torch.device("cpu"))}
            for metric, unit, key in (("peak memory", "MiB", "mib"), ("time", "s", "seconds")):
                failed = f"out of memory (limit {limit:g} GB)"
                figures = spread([result[key]]) if result else {"p20": "", "p50": failed, "p80": "", "repeats": 1}
                rows.append(Row(metric=metric, unit=unit, **common, **figures))
                print(f"n={tokens:5d} {provider:26s} {metric:12s} {rows[-1].p50} {unit}", flush=True)
            if provider == "matrix-free":
                peaks.append((tokens, result["mib"]))
    path = write_rows(RESULTS / "cpu" / f"memory_{options.method}.csv", rows)
    large = peaks[1:]
    exponent = np.polyfit(np.log([n for n, _ in large]), np.log([mib for _, mib in large]), 1)[0]
    print(f"{path}\nfitted exponent of memory over n (from n = {large[0][0]}): {exponent:.2f}")


if __name__ == "__main__":
    main()
