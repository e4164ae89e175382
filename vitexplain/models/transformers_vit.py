"""Image models of Hugging Face transformers: ViT, DeiT, DINOv2 (with registers), BEiT, SigLIP, and CLIP's vision tower."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UnsupportedModelError
from .anatomy import Anatomy
from .transformers_common import class_name, is_transformers_model, logits_of, part, pre_norm_block, use_sdpa

FAMILY = "transformers image classifiers and CLIP vision towers"

Head = Callable[[nn.Module, nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class _Kind:
    """One class of models: where its encoder is, its prefix tokens, and how its head reads tokens (B, m, d).

    Attributes:
        base: attribute of the encoder.
        head: (model, encoder, tokens) to outputs.
        num_prefix_tokens: before the patches.
        num_read_tokens: as in ``Anatomy``.
        reads_both: the head reads the class token beside the mean over patches, each for one half.
        output: field of the model's output.
        has_classes: whether that field holds class logits.
    """

    base: str
    head: Head
    num_prefix_tokens: int = 1
    num_read_tokens: int | None = 1
    reads_both: bool = False
    output: str = "logits"
    has_classes: bool = True


def _class_token(model: Any, base: Any, tokens: Tensor) -> Tensor:
    return model.classifier(base.layernorm(tokens)[:, 0])


def _two_tokens(model: Any, base: Any, tokens: Tensor) -> Tensor:
    tokens = base.layernorm(tokens)
    return (model.cls_classifier(tokens[:, 0]) + model.distillation_classifier(tokens[:, 1])) / 2


def _class_and_mean(model: Any, base: Any, tokens: Tensor) -> Tensor:
    tokens = base.layernorm(tokens)
    patches = tokens[:, 1 + getattr(base.config, "num_register_tokens", 0) :]
    return model.classifier(torch.cat([tokens[:, 0], patches.mean(dim=1)], dim=1))


def _beit(model: Any, base: Any, tokens: Tensor) -> Tensor:
    return model.classifier(base.pooler(base.layernorm(tokens)))


def _siglip(model: Any, base: Any, tokens: Tensor) -> Tensor:
    return model.classifier(base.post_layernorm(tokens).mean(dim=1))


def _clip_mean(model: Any, base: Any, tokens: Tensor) -> Tensor:  # noqa: ARG001
    return model.classifier(tokens[:, 1:].mean(dim=1))


def _clip_embedding(model: Any, base: Any, tokens: Tensor) -> Tensor:
    return model.visual_projection(base.post_layernorm(tokens[:, 0]))


_KINDS: dict[str, _Kind] = {
    "ViTForImageClassification": _Kind("vit", _class_token),
    "DeiTForImageClassification": _Kind("deit", _class_token, num_prefix_tokens=2),
    "DeiTForImageClassificationWithTeacher": _Kind("deit", _two_tokens, num_prefix_tokens=2, num_read_tokens=2),
    "Dinov2ForImageClassification": _Kind("dinov2", _class_and_mean, num_read_tokens=None, reads_both=True),
    "Dinov2WithRegistersForImageClassification": _Kind(
        "dinov2_with_registers", _class_and_mean, num_read_tokens=None, reads_both=True
    ),
    "BeitForImageClassification": _Kind("beit", _beit, num_read_tokens=None),
    "SiglipForImageClassification": _Kind("vision_model", _siglip, num_prefix_tokens=0, num_read_tokens=None),
    "CLIPForImageClassification": _Kind("vision_model", _clip_mean, num_read_tokens=None),
    "CLIPVisionModelWithProjection": _Kind("vision_model", _clip_embedding, output="image_embeds", has_classes=False),
}


def reads(model: nn.Module) -> bool:
    """Whether this family covers the model."""
    return is_transformers_model(model, _KINDS)


def read(model: Any) -> Anatomy:
    """Anatomy of a transformers image model; raises ``UnsupportedModelError`` with the reason where it has none."""
    kind = _KINDS[class_name(model, _KINDS)]
    base = getattr(model, kind.base)
    config = base.config
    name = type(model).__name__
    if kind.has_classes and model.config.num_labels <= 0:
        raise UnsupportedModelError(
            f"{name} has no classifier (num_labels={model.config.num_labels}): expected a model with logits"
        )
    registers = getattr(config, "num_register_tokens", 0)
    prefix, read_tokens = kind.num_prefix_tokens + registers, kind.num_read_tokens
    if kind.base == "beit" and not config.use_mean_pooling:
        read_tokens = 1
    patch, size = _pair(config.patch_size), _pair(config.image_size)
    run = logits_of(model, kind.output)
    # DINOv2 always interpolates its position embeddings; the others have a switch, which is used where it is needed
    has_switch = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    interpolates = has_switch or kind.base.startswith("dinov2")

    def forward(images: Tensor) -> Tensor:
        extra = {"interpolate_pos_encoding": True} if has_switch and tuple(images.shape[-2:]) != size else {}
        return run(pixel_values=images, **extra)

    def check(channels: int, height: int, width: int) -> None:
        if channels != config.num_channels:
            raise InputError(
                f"images: expected {config.num_channels} channels (B, {config.num_channels}, h, w), received {channels}"
            )
        if not interpolates and (height, width) != size:
            raise InputError(f"images: expected height × width {size[0]}×{size[1]} for this model, received {height}×{width}")
        if height % patch[0] or width % patch[1]:
            raise InputError(f"images: expected multiples of the patch size {patch[0]}×{patch[1]}, received {height}×{width}")

    def both(num_tokens: int) -> list[float]:
        pooled = num_tokens - prefix
        return [0.5] + [0.0] * (prefix - 1) + [0.5 / pooled] * pooled

    return Anatomy(
        family=FAMILY,
        model=model,
        blocks=tuple(pre_norm_block(block) for block in part(base, "layers", "encoder.layer", "encoder.layers")),
        num_classes=model.config.num_labels if kind.has_classes else config.projection_dim,
        has_classes=kind.has_classes,
        head=lambda tokens: kind.head(model, base, tokens),
        grid=lambda height, width: (height // patch[0], width // patch[1]),
        num_prefix_tokens=prefix,
        num_read_tokens=read_tokens,
        pooling_weights=both if kind.reads_both else None,
        pooled_prefix=prefix,
        forward=forward,
        check_image_size=check,
        temporary=use_sdpa(model, base),
    )


def _pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width
