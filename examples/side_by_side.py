"""One model and one photo, explained by vitexplain, captum and pytorch-grad-cam; and vitexplain inside Quantus.

    pip install '.[bench,quantus,demo]'
    python examples/side_by_side.py
    python examples/side_by_side.py --photo cat.jpg --model deit_tiny_patch16_224

It prints what agrees and what does not, and writes a picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import skimage.data
import torch
from captum.attr import InputXGradient
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor

import vitexplain
from vitexplain import LoadedModel, load_model, load_photo
from vitexplain.evaluate import build_metric, quantus_explainer, quantus_scores
from vitexplain.visualize import save_panel


def captum_map(model: LoadedModel, images: Tensor, target: Tensor) -> Tensor:
    # --8<-- [start:captum]
    attributed = InputXGradient(model.model).attribute(images.clone().requires_grad_(), target=target)
    return attributed.sum(1).detach()  # (B, h, w): captum keeps colours apart
    # --8<-- [end:captum]


def grad_cam_map(model: LoadedModel, images: Tensor, target: Tensor) -> Tensor:
    # --8<-- [start:grad_cam]
    rows, columns = model.model.patch_embed.grid_size

    def to_grid(tokens: Tensor) -> Tensor:  # (B, n, d) to channels first, without the class token
        return tokens[:, model.model.num_prefix_tokens :].transpose(1, 2).unflatten(2, (rows, columns))

    with GradCAM(model.model, [model.model.blocks[-1].norm1], reshape_transform=to_grid) as cam:
        return torch.from_numpy(cam(images, [ClassifierOutputTarget(int(index)) for index in target]))  # (B, h, w) in [0, 1]
    # --8<-- [end:grad_cam]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", type=Path, help="a photo of yours; scikit-image's cat where there is none")
    parser.add_argument("--model", default="demo", help="'demo', or the name of a timm model")
    parser.add_argument("--output", type=Path, default=Path("side_by_side.png"))
    options = parser.parse_args()
    photo = load_photo(options.photo) if options.photo else Image.fromarray(skimage.data.chelsea())
    model = load_model(options.model)
    images = model.transform(photo).unsqueeze(0)

    # --8<-- [start:ours]
    ours = vitexplain.explain(model.model, images, method=["tokentm", "grad_cam", "input_x_gradient"])
    target = ours["tokentm"].target  # (B,), what captum takes; pytorch-grad-cam's targets are taken here, too
    same = vitexplain.explain(model.model, images, target=[ClassifierOutputTarget(int(target[0]))])
    # --8<-- [end:ours]
    assert torch.equal(same.maps, ours["tokentm"].maps)
    captum, cam = captum_map(model, images, target), grad_cam_map(model, images, target)
    error = (captum - ours["input_x_gradient"].maps).abs().max() / captum.abs().max()
    print(f"input x gradient, captum and vitexplain: {error:.1e} apart")
    both = torch.stack([cam.flatten(), ours["grad_cam"].to_image(tuple(cam.shape[1:])).flatten()])
    print(f"Grad-CAM of tokens (pytorch-grad-cam) and of attention (vitexplain): correlation {both.corrcoef()[0, 1]:.2f}")

    # --8<-- [start:quantus]
    explain_func = quantus_explainer("legrad")  # Quantus's explain_func(model, inputs, targets, …)
    pixels = torch.from_numpy(explain_func(model.model, images.numpy(), target.numpy()))  # (B, 1, h, w)
    metric = build_metric("PixelFlipping", features_in_step=pixels[0].numel() // 16)
    by_chance = torch.rand(pixels.shape, generator=torch.manual_seed(0))
    scores = [quantus_scores(metric, model.model, images, target, maps) for maps in (pixels, by_chance)]  # (B,) each; low is good
    # --8<-- [end:quantus]
    print(f"Quantus, Pixel-Flipping: legrad {scores[0][0]:.2f}, a random map {scores[1][0]:.2f}")
    maps = {f"vitexplain: {name}": one.maps[0] for name, one in ours.items()}
    maps |= {"captum: input x gradient": captum[0], "pytorch-grad-cam: GradCAM": cam[0]}
    save_panel(options.output, model.display(photo), maps)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
