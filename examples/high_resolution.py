"""A photo in its own proportions and at high resolution: memory grows with the number of tokens, not with its square.

    python examples/high_resolution.py
    python examples/high_resolution.py --model vit_base_patch14_dinov2.lvd142m --photo large.jpg --side 1022

``dynamic_img_size=True`` lets timm's models take any size that patches fill; ``checkpoint=True`` keeps the input alone of every
block, for a second forward. The demo's positions are stretched far beyond what it was trained on: look at its figures alone.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import skimage.data
import timm
import timm.data
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from vitexplain import Explainer, load_model, load_photo


def dynamic_model(name: str) -> VisionTransformer:
    """A model that takes images of any size that its patches fill."""
    if name != "demo":
        return timm.create_model(name, pretrained=True, dynamic_img_size=True).eval()
    model = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3, num_classes=10, dynamic_img_size=True
    )
    model.load_state_dict(load_model("demo").model.state_dict())
    return model.eval()


def peak_memory(device: torch.device) -> float:
    """The most memory held so far, MiB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", type=Path, help="a photo of yours; scikit-image's cat where there is none")
    parser.add_argument("--model", default="demo", help="'demo', or the name of a timm model")
    parser.add_argument("--side", type=int, default=112, help="shorter side in pixels, rounded down to whole patches")
    parser.add_argument("--output", type=Path, default=Path("high_resolution.png"))
    options = parser.parse_args()
    photo = load_photo(options.photo) if options.photo else Image.fromarray(skimage.data.chelsea())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = dynamic_model(options.model).to(device)
    patch, config = model.patch_embed.patch_size[0], timm.data.resolve_model_data_config(model)

    # --8<-- [start:explain]
    scale = options.side / min(photo.size)
    width, height = (int(side * scale) // patch * patch for side in photo.size)  # whole patches
    pixels = torch.from_numpy(skimage.util.img_as_float32(photo.resize((width, height)))).permute(2, 0, 1)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    images = ((pixels - mean) / std).unsqueeze(0).to(device)

    maps = {}
    for checkpoint in (True, False):  # the frugal way first: a peak does not come down again
        started = time.perf_counter()
        maps[checkpoint] = Explainer(model, "tokentm", checkpoint=checkpoint).attribute(images)
        seconds = time.perf_counter() - started
        print(f"checkpoint={checkpoint}: {seconds:.1f} s, peak memory so far {peak_memory(device):,.0f} MiB")
    # --8<-- [end:explain]
    rows, columns = maps[True].maps.shape[1:]
    difference = (maps[True].maps - maps[False].maps).abs().max() / maps[False].maps.abs().max()
    print(f"{width} × {height} pixels, {rows} × {columns} patches, {rows * columns + 1:,} tokens")
    print(f"largest difference of the two maps: {difference:.1e} of the largest value")
    maps[True].overlay(photo).save(options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
