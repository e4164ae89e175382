"""A loop over batches at full speed: compiled blocks, a CUDA graph, and no look at values.

    python examples/fast_loop.py
    python examples/fast_loop.py --model vit_base_patch16_224 --batch 32 --compile      # on a GPU

A CUDA graph needs a GPU; without one the loop says so and runs as it is. --compile takes the compiler's time once, and on a CPU
a C++ compiler. What a switch is worth depends on model and device: measure.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from vitexplain import Explainer, load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="'demo', or the name of a timm model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="run the blocks as torch.compile makes them")
    options = parser.parse_args()

    # --8<-- [start:loop]
    on_gpu = torch.cuda.is_available()
    model = load_model(options.model, device="auto", dtype=torch.bfloat16 if on_gpu else torch.float32)
    parameter = next(model.model.parameters())
    explainer = Explainer(model.model, "tokentm", compile=options.compile, cuda_graph=on_gpu)

    def batches(count: int) -> Iterator[Tensor]:
        for _ in range(count):  # of your loader: in the model's dtype, on its device
            yield torch.randn(options.batch, 3, *model.input_size, dtype=parameter.dtype, device=parameter.device)

    for images in batches(2):  # the compiler and the capture take their time here
        explainer.attribute(images)
    started = time.perf_counter()
    for images in batches(options.batches):
        maps = explainer.attribute(images, check_values=False).maps  # the GPU is not waited for
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    # --8<-- [end:loop]
    device = torch.cuda.get_device_name() if on_gpu else "a CPU, where there is no CUDA graph"
    blocks = "compiled blocks" if options.compile else "blocks as they are"
    print(f"on {device}; {parameter.dtype}; {blocks}; maps {tuple(maps.shape)}")
    print(f"{options.batch * options.batches / seconds:,.1f} images/s")


if __name__ == "__main__":
    main()
