"""timm's BEiT and BEiTv2, whose attention adds a relative position bias to its scores."""

from __future__ import annotations

from timm.models.beit import Beit, Block
from torch import nn

from .anatomy import Anatomy
from .timm_common import read_block, read_model

FAMILY = "timm Beit"


def reads(model: nn.Module) -> bool:
    """Whether this family covers the model."""
    return isinstance(model, Beit)


def read(model: Beit) -> Anatomy:
    """Anatomy of a timm BEiT; raises ``UnsupportedModelError`` with the reason where it has none."""
    return read_model(model, FAMILY, tuple(read_block(block, i, (Block,)) for i, block in enumerate(model.blocks)))
