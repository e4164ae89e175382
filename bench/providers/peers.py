"""Other libraries' explanations, where they are installed."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import Unavailable

CAPTUM_METHODS = ("input_x_gradient", "integrated_gradients")


def captum(model: nn.Module, images: Tensor, method: str, target: Tensor | None = None, **options: Any) -> Tensor:
    """captum itself on pixels, summed over channels, (B, h, w): what this library's adapters of it return.

    Args:
        model: parameters frozen.
        images: (B, 3, h, w).
        method: one of ``CAPTUM_METHODS``.
        target: classes (B,); the predicted ones, after a forward, where there are none.
        **options: ``steps`` of integrated gradients.
    """
    library = _import("captum.attr", "captum")
    if target is None:
        with torch.no_grad():
            target = model(images).argmax(-1)
    if method == "input_x_gradient":
        found = library.InputXGradient(model).attribute(images.detach().requires_grad_(), target=target)
    else:
        found = library.IntegratedGradients(model).attribute(
            images, target=target, n_steps=options["steps"], internal_batch_size=len(images)
        )
    return found.detach().sum(1)


def grad_cam(model: nn.Module, images: Tensor) -> Tensor:
    """pytorch-grad-cam's own Grad-CAM, of the last block's normalised tokens: another map than attention Grad-CAM.

    As its instructions for Vision Transformers say; it ends in NumPy, scaled to the image's size.

    Args:
        model: its parameters' gradients are switched on for the call: the library hooks what parameters lead to.
        images: (B, 3, h, w).

    Returns:
        (B, h, w) on the CPU.
    """
    library = _import("pytorch_grad_cam", "grad-cam")
    if images.dtype == torch.bfloat16:
        raise Unavailable("pytorch-grad-cam goes through NumPy, which has no bfloat16")
    grid, prefix = model.patch_embed.grid_size, model.num_prefix_tokens

    def as_image(tokens: Tensor) -> Tensor:
        return tokens[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2)

    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        model.requires_grad_()
        with library.GradCAM(model, target_layers=[model.blocks[-1].norm1], reshape_transform=as_image) as explainer:
            return torch.from_numpy(explainer(images, targets=None))
    finally:
        model.zero_grad(set_to_none=True)
        for parameter in frozen:
            parameter.requires_grad_(False)


def _import(name: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{package} is not installed") from error
