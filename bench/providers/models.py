"""The models that explanations are measured on, the two baselines, and what a forward costs by count."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..registry import FORWARD, FORWARD_BACKWARD, Counted, Size

CLASSES = 1000
GRADIENT_PASSES = 2  # a backward that stops at the activations costs about what the forward does


def build(size: Size, device: torch.device, depth: int | None = None) -> nn.Module:
    """The model with random weights, always the same ones, and parameters frozen; of so many blocks, where a depth is given."""
    torch.manual_seed(0)
    cut = {} if depth is None else {"depth": depth}
    model = timm.create_model(size.model, img_size=size.image_size, num_classes=CLASSES, **cut)
    return model.eval().to(device, size.torch_dtype).requires_grad_(False)


def draw(size: Size, device: torch.device) -> Tensor:
    """Images (B, 3, h, w), standard normal, always the same ones."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size.batch, 3, size.image_size, size.image_size, generator=generator)
    return images.to(device, size.torch_dtype)


def own_copy(model: nn.Module) -> nn.Module:
    """A copy that a provider may change, and that ``copy.deepcopy`` hands back as it is: copying weights is nobody's work."""
    copied = copy.deepcopy(model)
    copied.__deepcopy__ = lambda memo: copied  # noqa: ARG005
    return copied


def forward(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (B, C), no graph."""
    with torch.no_grad():
        return model(images)


def forward_backward(model: nn.Module, images: Tensor) -> Tensor:
    """The gradient of the largest logit with respect to the images (B, 3, h, w): frozen parameters get none."""
    images = images.detach().requires_grad_()
    return torch.autograd.grad(model(images).amax(-1).sum(), images)[0]


def baseline(work: str, model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """The call of one of ``BASELINES``."""
    return partial({FORWARD: forward, FORWARD_BACKWARD: forward_backward}[work], model, images)


@cache
def sketched(name: str, image_size: int) -> nn.Module:
    """The model without numbers, to count with."""
    with torch.device("meta"):
        return timm.create_model(name, img_size=image_size, num_classes=CLASSES).eval()


@cache
def forward_flops(name: str, image_size: int) -> float:
    """FLOPs of the matrix products of one image's forward, attention among them, counted without computing anything."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        sketched(name, image_size)(torch.empty(1, 3, image_size, image_size, device="meta"))
    return float(counter.get_total_flops())


def least_work(size: Size, passes: int = GRADIENT_PASSES) -> Counted:
    """What cannot be avoided, ``passes`` forwards: a fraction of the peak counts all that an explanation adds as lost."""
    return Counted(passes * size.batch * forward_flops(size.model, size.image_size))
