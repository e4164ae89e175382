"""Reading the anatomy of a model. A new family is one file with ``FAMILY``, ``reads`` and ``read``, and one row below."""

from __future__ import annotations

from torch import nn

from ..errors import UnsupportedModelError
from . import timm_vit
from .anatomy import Anatomy, BlockAnatomy, ResidualBranches

FAMILIES = (timm_vit,)

__all__ = ["FAMILIES", "Anatomy", "BlockAnatomy", "ResidualBranches", "read_anatomy", "unwrap"]

_REASONS = {
    "SwinTransformer": "windows and merged tokens leave no single chain of token-by-token maps",
    "SwinTransformerV2": "windows and merged tokens leave no single chain of token-by-token maps",
    "PyramidVisionTransformerV2": "tokens are merged between stages, which leaves no single chain of token-by-token maps",
    "MultiScaleVit": "tokens are pooled between stages, which leaves no single chain of token-by-token maps",
    "ResNet": "it is a convolutional network without attention",
    "ConvNeXt": "it is a convolutional network without attention",
}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, ``DataParallel`` or ``DistributedDataParallel``."""
    if hasattr(model, "_orig_mod"):
        return unwrap(model._orig_mod)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrap(model.module)
    return model


def read_anatomy(model: nn.Module) -> Anatomy:
    """Find the family of a model and read its anatomy.

    Raises:
        UnsupportedModelError: no family covers the model, or this variant cannot be explained; the message says why.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"model: expected a torch.nn.Module, received {type(model).__name__}")
    model = unwrap(model)
    for family in FAMILIES:
        if family.reads(model):
            return family.read(model)
    name = type(model).__name__
    covered = ", ".join(family.FAMILY for family in FAMILIES)
    reason = _REASONS.get(name, "its blocks and head are not known to this library")
    raise UnsupportedModelError(f"model: expected one of: {covered}; received {name}: {reason}")
