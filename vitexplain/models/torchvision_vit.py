"""torchvision's ``VisionTransformer`` (``vit_b_16`` and its like)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import InputError, UnsupportedModelError
from .anatomy import Anatomy, BlockAnatomy, ResidualBranches

FAMILY = "torchvision VisionTransformer"


def reads(model: nn.Module) -> bool:
    """Whether this family covers the model; torchvision is not imported."""
    return any(
        kind.__name__ == "VisionTransformer" and kind.__module__.startswith("torchvision.") for kind in type(model).__mro__
    )


def read(model: Any) -> Anatomy:
    """Anatomy of a torchvision VisionTransformer; raises ``UnsupportedModelError`` with the reason where it has none."""
    last = next((m for m in reversed(list(model.heads.modules())) if isinstance(m, nn.Linear)), None)
    if last is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no classifier: expected a linear layer in its heads")

    def check(channels: int, height: int, width: int) -> None:
        expected = (3, model.image_size, model.image_size)
        if (channels, height, width) != expected:
            raise InputError(f"images: expected (B, {', '.join(map(str, expected))}), received {(channels, height, width)}")

    return Anatomy(
        family=FAMILY,
        model=model,
        blocks=tuple(_read_block(block) for block in model.encoder.layers),
        num_classes=last.out_features,
        head=lambda tokens: model.heads(model.encoder.ln(tokens)[:, 0]),
        grid=lambda height, width: (height // model.patch_size, width // model.patch_size),
        check_image_size=check,
    )


def _read_block(block: Any) -> BlockAnatomy:
    def mlp(tokens: Tensor) -> Tensor:
        return block.mlp(block.ln_2(tokens))

    branches = ResidualBranches(lambda: block.self_attention.out_proj.weight, mlp, block.ln_2, block.mlp)
    return BlockAnatomy(block, block.self_attention, branches)
