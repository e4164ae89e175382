"""timm's ``VisionTransformer`` and its distilled variant: every patch size, pooling, register and LayerScale option."""

from __future__ import annotations

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, DiffParallelScalingBlock, ParallelThingsBlock, VisionTransformer
from torch import nn

from ..errors import UnsupportedModelError
from .anatomy import Anatomy, BlockAnatomy
from .timm_common import read_block, read_model

FAMILY = "timm VisionTransformer"


def reads(model: nn.Module) -> bool:
    """Whether this family covers the model."""
    return isinstance(model, VisionTransformer)


def read(model: VisionTransformer) -> Anatomy:
    """Anatomy of a timm VisionTransformer; raises ``UnsupportedModelError`` with the reason where it has none."""
    blocks = tuple(_read_block(block, index) for index, block in enumerate(model.blocks))
    return read_model(model, FAMILY, blocks, num_class_tokens=2 if isinstance(model, VisionTransformerDistilled) else 1)


def _read_block(block: nn.Module, index: int) -> BlockAnatomy:
    kind = type(block).__name__
    if isinstance(block, ParallelThingsBlock):
        raise UnsupportedModelError(
            f"block {index} ({kind}) runs {block.num_parallel} attentions side by side: expected one a block"
        )
    if isinstance(block, DiffParallelScalingBlock) or type(getattr(block, "attn", None)).__name__ == "DiffAttention":
        raise UnsupportedModelError(f"block {index} ({kind}) subtracts two attention maps (differential attention): expected one")
    return read_block(block, index, (Block,))
