"""What an explanation costs beside the model itself: time of every method, interleaved with plain forwards and backwards.

    python -m bench.cost                      # ViT-S/16 at 224, batch 8, on this machine
    python -m bench.cost --device cuda --dtype bfloat16 --model vit_base_patch16_224 --batch 64

Before any timing each method's map is compared with the dense float64 reference; outside the error budget nothing is timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

import vitexplain
from vitexplain.methods import REGISTRY, own_methods
from vitexplain.testing import DenseReference

from .record import RESULTS, Row, environment, spread, write_rows

FLOAT32_TOLERANCE = 1e-5


def plain_forward(model: nn.Module, images: Tensor) -> None:
    """The model alone, no graph."""
    with torch.no_grad():
        model(images)


def forward_backward(model: nn.Module, images: Tensor) -> None:
    """Forward and gradient with respect to the input: parameters get none."""
    images = images.clone().requires_grad_()
    torch.autograd.grad(model(images).amax(-1).sum(), images)


def gate(model: nn.Module, images: Tensor, methods: list[str]) -> dict[str, float]:
    """Relative error of every method against the dense float64 reference; raises where one is outside the error budget.

    In float32 the budget is 1e-5 of the largest value; in half precision, and for methods that send relevance back, whose
    quotients are ill-conditioned, twice the root mean square error of plain torch in that precision, plus four roundings.
    """
    exact_run = DenseReference(model, images)
    target = exact_run.logits.argmax(-1)
    narrow = {method for method in methods if images.dtype != torch.float32 or REGISTRY[method].rules is not None}
    plain_run = DenseReference(model, images, images.dtype) if narrow else None
    errors = {}
    for method in methods:
        result = vitexplain.explain(model, images, target=target, method=method)
        exact = exact_run.explain(method, target)
        ours = torch.cat([result.prefix_values, result.maps.flatten(1)], -1)
        exact = exact.flatten(1)
        if method not in narrow:
            errors[method], limit = float((ours - exact).abs().max() / exact.abs().max()), FLOAT32_TOLERANCE
        else:
            plain = plain_run.explain(method, target).flatten(1)
            errors[method] = float((ours - exact).norm() / exact.norm())
            limit = 2 * float((plain - exact).norm() / exact.norm()) + 4 * torch.finfo(images.dtype).eps
        if not errors[method] <= limit:
            raise SystemExit(f"{method}: relative error {errors[method]:.2e} exceeds {limit:.0e}: not timed")
    return errors


def interleaved(cases: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each case, taken in turns so that a drift of the machine hits all alike; two warm-up rounds."""
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for round_number in range(repeats + 2):
        for name, case in cases.items():
            started = time.perf_counter()
            case()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_number >= 2:
                samples[name].append(1e3 * (time.perf_counter() - started))
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    model = timm.create_model(options.model).eval().to(device, dtype).requires_grad_(False)
    size = model.patch_embed.img_size
    images = torch.randn(options.batch, 3, *size, device=device).to(dtype)
    methods = own_methods()
    errors = gate(model, images[:2], methods)

    baselines: dict[str, Callable[[], None]] = {
        "forward": lambda: plain_forward(model, images),
        "forward + input gradient": lambda: forward_backward(model, images),
    }
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    common = {"model": options.model, "batch": options.batch, "tokens": tokens, "dtype": options.dtype, **environment(device)}
    rows = []
    # A relevance pass takes much memory and hands it back to the system: whoever is timed next would pay for that.
    alone = [method for method in methods if REGISTRY[method].rules is not None]
    together = [method for method in methods if method not in alone]
    for number, group in enumerate([together, *([method] for method in alone)]):
        explainers = {method: vitexplain.Explainer(model, method) for method in group}
        cases = {
            **baselines,
            **{method: (lambda explainer=explainer: explainer.attribute(images)) for method, explainer in explainers.items()},
        }
        samples = interleaved(cases, options.repeats, device)
        for name, values in samples.items():
            if number and name in baselines:
                continue  # measured again for the ratios of their group, listed once
            rows.append(Row(case="cost", provider=name, metric="time", unit="ms", **spread(values), **common))
            for base in baselines:
                ratios = [time / reference for time, reference in zip(values, samples[base], strict=True)]
                rows.append(Row(case="cost", provider=name, metric=f"ratio to {base}", unit="×", **spread(ratios), **common))
    for name, error in errors.items():
        rows.append(Row(case="gate", provider=name, metric="relative error", unit="1", **spread([error]), **common))
    path = write_rows(RESULTS / device.type / f"cost_{options.model}_{options.dtype}.csv", rows)
    for row in rows:
        if row.metric != "relative error":
            print(f"{row.provider:26s} {row.metric:36s} {row.p50:>9s} {row.unit}  [{row.p20}, {row.p80}]")
    print(path)


if __name__ == "__main__":
    main()
