"""Adapters over captum: input × gradient, integrated gradients and SmoothGrad, to compare with in one call."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from ..models import Anatomy
from ..options import option
from ..targets import Target
from .base import Method


@dataclass(frozen=True, kw_only=True)
class CaptumMethod(Method):
    """A method of captum's on pixels; it takes part in no walk, and runs the model by itself.

    Class attributes:
        one_forward: it runs the model once, on the images as they are, so that what is explained can be read off that run.
    """

    uses_target: ClassVar[bool] = True
    resolution: ClassVar[str] = "pixels"
    one_forward: ClassVar[bool] = False

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        _captum(self.name)

    def values(self, anatomy: Anatomy, images: Tensor, target_of: Callable[[Tensor | None], Target]) -> Tensor:
        """Values (B, 1, h, w), summed over channels.

        ``target_of``: what is explained, given the model's output (B, C); without it where ``one_forward`` is not set.
        """
        with torch.enable_grad():
            if self.one_forward:
                attributions = self.attribute(_captum(self.name), self._scalars_of_one_forward(anatomy, target_of), images, ())
            else:
                attributions = self._of_known_target(anatomy, images, target_of(None))
        return attributions.detach().sum(1, keepdim=True)

    def _of_known_target(self, anatomy: Anatomy, images: Tensor, target: Target) -> Tensor:
        def scalars(pixels: Tensor, classes: Tensor | None = None) -> Tensor:
            outputs = anatomy.run(pixels.to(images.dtype))  # captum's noise is float32, whatever the images are
            return Target(classes, target.score, target.column).value(outputs)

        extra = () if target.classes is None else (target.classes,)
        return self.attribute(_captum(self.name), scalars, images, extra)

    @staticmethod
    def _scalars_of_one_forward(anatomy: Anatomy, target_of: Callable[[Tensor | None], Target]) -> Callable[[Tensor], Tensor]:
        def scalars(pixels: Tensor) -> Tensor:
            outputs = anatomy.run(pixels)
            return target_of(outputs).value(outputs)

        return scalars

    @abstractmethod
    def attribute(self, captum: Any, scalars: Callable[..., Tensor], images: Tensor, extra: tuple[Tensor, ...]) -> Tensor:
        """captum's attributions (B, c, h, w); ``extra`` are further arguments of ``scalars``, one row an image."""


@dataclass(frozen=True, kw_only=True)
class InputXGradient(CaptumMethod):
    """x ⊙ ∂z/∂x, summed over channels; signed."""

    name: ClassVar[str] = "input_x_gradient"
    title: ClassVar[str] = "Input × gradient"
    paper: ClassVar[str] = "Not Just a Black Box (2016); by captum"
    cost: ClassVar[str] = "forward + backward"
    one_forward: ClassVar[bool] = True

    def attribute(self, captum: Any, scalars: Callable[..., Tensor], images: Tensor, extra: tuple[Tensor, ...]) -> Tensor:
        return captum.InputXGradient(scalars).attribute(images.clone().requires_grad_(), additional_forward_args=extra or None)


@dataclass(frozen=True, kw_only=True)
class IntegratedGradients(CaptumMethod):
    """(x − x') ⊙ ∫ ∂z/∂x along the line from a baseline x', summed over channels; signed."""

    name: ClassVar[str] = "integrated_gradients"
    title: ClassVar[str] = "Integrated gradients"
    paper: ClassVar[str] = "Axiomatic Attribution for Deep Networks (ICML 2017); by captum"
    cost: ClassVar[str] = "steps × (forward + backward)"

    steps: int = option(50, "points on the line (Gauss–Legendre)", minimum=1)
    baseline: float = option(0.0, "every pixel of the baseline, in the model's normalised units")

    def attribute(self, captum: Any, scalars: Callable[..., Tensor], images: Tensor, extra: tuple[Tensor, ...]) -> Tensor:
        return captum.IntegratedGradients(scalars).attribute(
            images,
            baselines=float(self.baseline),
            additional_forward_args=extra or None,
            n_steps=self.steps,
            internal_batch_size=len(images),  # memory of one batch, whatever the number of steps
        )


@dataclass(frozen=True, kw_only=True)
class SmoothGrad(CaptumMethod):
    """The mean of |∂z/∂x| over noisy copies of the image, summed over channels."""

    name: ClassVar[str] = "smoothgrad"
    title: ClassVar[str] = "SmoothGrad"
    paper: ClassVar[str] = "SmoothGrad: removing noise by adding noise (2017); by captum"
    cost: ClassVar[str] = "samples × (forward + backward)"

    samples: int = option(25, "noisy copies", minimum=1)
    noise: float = option(0.5, "standard deviation of the noise, in the model's normalised units", minimum=0.0)
    seed: int = option(0, "of the noise", minimum=0)

    def attribute(self, captum: Any, scalars: Callable[..., Tensor], images: Tensor, extra: tuple[Tensor, ...]) -> Tensor:
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            return captum.NoiseTunnel(captum.Saliency(scalars)).attribute(
                images.clone().requires_grad_(),
                nt_type="smoothgrad",
                nt_samples=self.samples,
                nt_samples_batch_size=1,  # memory of one batch, whatever the number of samples
                stdevs=float(self.noise),
                additional_forward_args=extra or None,
            )


def _captum(method: str) -> Any:
    try:
        return importlib.import_module("captum.attr")
    except ImportError as error:
        raise InputError(f"method {method!r} needs captum, which is not installed: pip install 'vitexplain[captum]'") from error
