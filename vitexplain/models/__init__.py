"""Reading the anatomy of a model. A new family is one file with ``FAMILY``, ``reads`` and ``read``, and one row below."""

from __future__ import annotations

from torch import nn

from ..errors import UnsupportedModelError
from . import timm_beit, timm_eva, timm_relpos, timm_vit, torchvision_vit, transformers_text, transformers_vit
from .anatomy import Anatomy, BlockAnatomy, ResidualBranches

FAMILIES = (timm_vit, timm_beit, timm_eva, timm_relpos, torchvision_vit, transformers_vit, transformers_text)

__all__ = ["FAMILIES", "Anatomy", "BlockAnatomy", "ResidualBranches", "read_anatomy", "unwrap"]

_MERGES = "its tokens are merged or pooled between stages, which leaves no single chain of token-by-token maps"
_WINDOWS = "its attention is confined to windows, which leaves no single chain of token-by-token maps"
_SWIN = "its attention is confined to shifted windows and its tokens are merged: no single chain of maps"
_CONVOLUTIONAL = "it is a convolutional network without attention"
_REASONS = {
    "SwinTransformer": _SWIN,
    "SwinTransformerV2": _SWIN,
    "SwinForImageClassification": _SWIN,
    "Swinv2ForImageClassification": _SWIN,
    "PyramidVisionTransformerV2": _MERGES,
    "PvtForImageClassification": _MERGES,
    "PvtV2ForImageClassification": _MERGES,
    "PoolingVisionTransformer": _MERGES,
    "MultiScaleVit": _MERGES,
    "Hiera": _MERGES,
    "HieraDet": _MERGES,
    "Nest": _MERGES,
    "Twins": _MERGES,
    "LevitDistilled": _MERGES,
    "Levit": _MERGES,
    "MaxxVit": _WINDOWS,
    "VisionTransformerSAM": _WINDOWS,
    "Cait": "its talking heads mix scores and maps of different heads, which no fused attention computes",
    "Xcit": "it attends across channels, not across tokens",
    "CrossVit": "two chains of tokens at two scales exchange class tokens",
    "NaFlexVit": "it takes packed patches of varying sizes, not images",
    "CLIPModel": "it takes images and texts together: pass its CLIPVisionModelWithProjection, with score=similarity(prompts)",
    "ResNet": _CONVOLUTIONAL,
    "ConvNeXt": _CONVOLUTIONAL,
}


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, ``DataParallel`` or ``DistributedDataParallel``."""
    inner = getattr(model, "_orig_mod", None)
    if inner is not None:
        return unwrap(inner)
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
    # an unknown model is still of a known kind where one of its base classes is
    reason = next((_REASONS[kind.__name__] for kind in type(model).__mro__ if kind.__name__ in _REASONS), None)
    covered = ", ".join(family.FAMILY for family in FAMILIES)
    if reason is None:
        reason = "its blocks and head are not known to this library (describe them in an Anatomy and pass it as anatomy=)"
    raise UnsupportedModelError(f"model: expected one of: {covered}; received {name}: {reason}")
