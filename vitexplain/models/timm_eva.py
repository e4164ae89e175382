"""timm's ``Eva``: EVA, EVA-02, DINOv3, Perception Encoder and other ViTs with rotary position embeddings."""

from __future__ import annotations

from timm.models.eva import Eva, EvaBlock
from torch import nn

from .anatomy import Anatomy
from .timm_common import read_block, read_model

FAMILY = "timm Eva"


def reads(model: nn.Module) -> bool:
    """Whether this family covers the model."""
    return isinstance(model, Eva)


def read(model: Eva) -> Anatomy:
    """Anatomy of a timm Eva; raises ``UnsupportedModelError`` with the reason where it has none."""
    return read_model(model, FAMILY, tuple(read_block(block, i, (EvaBlock,)) for i, block in enumerate(model.blocks)))
