"""timm's ``VisionTransformerRelPos``: relative position biases, by a table or by a small network."""

from __future__ import annotations

from timm.models.vision_transformer_relpos import RelPosBlock, VisionTransformerRelPos
from torch import nn

from .anatomy import Anatomy
from .timm_common import read_block, read_model

FAMILY = "timm VisionTransformerRelPos"


def reads(model: nn.Module) -> bool:
    """Whether this family covers the model."""
    return isinstance(model, VisionTransformerRelPos)


def read(model: VisionTransformerRelPos) -> Anatomy:
    """Anatomy of a timm VisionTransformerRelPos; raises ``UnsupportedModelError`` with the reason where it has none."""
    return read_model(model, FAMILY, tuple(read_block(block, i, (RelPosBlock,)) for i, block in enumerate(model.blocks)))
