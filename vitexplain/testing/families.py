"""Small models of every family with random weights, on which every method is compared with the dense reference.

The weights are large enough that attention is peaked and every branch matters. transformers' models are built from their
configurations with the attention implementation left at its default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_TIMM = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=7)
_VISION: dict[str, Any] = dict(
    hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8
)  # fmt: skip
_BEIT = {**_VISION, "layer_scale_init_value": 0.3, "use_relative_position_bias": True}
_LABELS: dict[str, Any] = dict(num_labels=7)
_TEXT = dict(
    vocab_size=50, hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, max_position_embeddings=32,
    num_labels=3,
)  # fmt: skip


@dataclass(frozen=True)
class FamilyCase:
    """One small model.

    Attributes:
        family: what it stands for, as in the README's table.
        package: where its class comes from.
        build: makes the model, with its default random weights.
        is_text: whether its inputs are token ids.
        embeds: whether its output is an embedding, which needs a score.
    """

    family: str
    package: str
    build: Callable[[], nn.Module]
    is_text: bool = False
    embeds: bool = False

    def model(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        """The model with peaked random weights, in evaluation mode."""
        torch.manual_seed(seed)
        return randomised(self.build(), seed).eval().to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float64, batch: int = 2, seed: int = 1) -> Any:
        """Two images, or texts of which all but the first are padded."""
        generator = torch.Generator().manual_seed(seed)
        if not self.is_text:
            return torch.randn(batch, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
        ids = torch.randint(5, 50, (batch, 11), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(1, batch):
            mask[row, 11 - 3 * row :] = 0
        return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}

    def score(self) -> Callable[[Tensor], Tensor] | None:
        """For a model that embeds, similarity to a fixed direction."""
        if not self.embeds:
            return None
        return lambda outputs: nn.functional.normalize(outputs, dim=-1) @ _direction(outputs)


def _direction(outputs: Tensor) -> Tensor:
    return torch.linspace(-1, 1, outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Random weights of the size of the inverse root of their fan-in, norms' scales about 1, biases about 0.2."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: Tensor, mean: float, std: float) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "token" in name or "pos" in name or ("embedding" in name.lower() and "patch" not in name):
                normal(parameter, 0.0, 0.5)
            elif parameter.dim() > 1:
                normal(parameter, 0.0, parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                normal(parameter, 0.0, 0.2)
            else:
                normal(parameter, float(parameter.mean()), 0.1)
    return model


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, **{**_TIMM, **options})

    return build


def _torchvision() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    model = VisionTransformer(image_size=32, patch_size=8, num_layers=3, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=7)
    return model


def _transformers(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        make = getattr(transformers, model)
        built = getattr(transformers, config)(**options)
        return make.from_config(built) if model.startswith("Auto") else make(built)

    return build


def _siglip() -> nn.Module:
    import transformers

    vision = transformers.SiglipVisionConfig(**_VISION)
    config = transformers.SiglipConfig(vision_config=vision.to_dict(), **_LABELS)
    return transformers.AutoModelForImageClassification.from_config(config)


def _clip_classifier() -> nn.Module:
    import transformers

    vision = transformers.CLIPVisionConfig(**_VISION)
    config = transformers.CLIPConfig(vision_config=vision.to_dict(), **_LABELS)
    return transformers.AutoModelForImageClassification.from_config(config)


def _clip_tower() -> nn.Module:
    import transformers

    return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**_VISION, projection_dim=16))


_IMAGES = "AutoModelForImageClassification"
_TEXTS = "AutoModelForSequenceClassification"

FAMILY_CASES: tuple[FamilyCase, ...] = (
    FamilyCase("ViT", "timm", _timm("vit_tiny_patch16_224")),
    FamilyCase("ViT, mean pooling", "timm", _timm("vit_tiny_patch16_224", global_pool="avg")),
    FamilyCase("SigLIP (attention pooling)", "timm", _timm("vit_base_patch16_siglip_224")),
    FamilyCase("DeiT", "timm", _timm("deit_tiny_patch16_224")),
    FamilyCase("DeiT, distilled", "timm", _timm("deit_tiny_distilled_patch16_224")),
    FamilyCase("DeiT-3 (LayerScale)", "timm", _timm("deit3_small_patch16_224", init_values=0.3)),
    FamilyCase("DINOv2 (registers, LayerScale)", "timm", _timm("vit_small_patch14_reg4_dinov2", init_values=0.3)),
    FamilyCase("DINOv2, SwiGLU", "timm", _timm("vit_giant_patch14_dinov2", init_values=0.3, mlp_ratio=2.0)),
    FamilyCase("BEiT (relative position bias)", "timm", _timm("beit_base_patch16_224", init_values=0.3)),
    FamilyCase("BEiTv2", "timm", _timm("beitv2_base_patch16_224", init_values=0.3)),
    FamilyCase("EVA", "timm", _timm("eva_giant_patch14_224", mlp_ratio=2.0)),
    FamilyCase("EVA-02 (RoPE, SwiGLU)", "timm", _timm("eva02_tiny_patch14_224", embed_dim=48)),
    FamilyCase("EVA-02, inner normalisation", "timm", _timm("eva02_base_patch16_clip_224")),
    FamilyCase("DINOv3 (RoPE, registers)", "timm", _timm("vit_small_patch16_dinov3", init_values=0.3)),
    FamilyCase("Perception Encoder (RoPE, attention pooling)", "timm", _timm("vit_pe_core_tiny_patch16_384")),
    FamilyCase("ViT, relative positions", "timm", _timm("vit_relpos_small_patch16_224", init_values=0.3)),
    FamilyCase("ViT, post-normalised residuals", "timm", _timm("vit_relpos_base_patch16_rpn_224")),
    FamilyCase("ViT, parallel branches", "timm", _timm("vit_base_patch16_xp_224")),
    FamilyCase("ViT", "torchvision", _torchvision),
    FamilyCase("ViT", "transformers", _transformers(_IMAGES, "ViTConfig", **_VISION, **_LABELS)),
    FamilyCase("DeiT", "transformers", _transformers("DeiTForImageClassification", "DeiTConfig", **_VISION, **_LABELS)),
    FamilyCase(
        "DeiT, distilled",
        "transformers",
        _transformers("DeiTForImageClassificationWithTeacher", "DeiTConfig", **_VISION, **_LABELS),
    ),
    FamilyCase("DINOv2", "transformers", _transformers(_IMAGES, "Dinov2Config", **_VISION, **_LABELS, layerscale_value=0.3)),
    FamilyCase(
        "DINOv2 with registers",
        "transformers",
        _transformers(_IMAGES, "Dinov2WithRegistersConfig", **_VISION, **_LABELS, layerscale_value=0.3),
    ),
    FamilyCase("BEiT", "transformers", _transformers(_IMAGES, "BeitConfig", **_BEIT, **_LABELS)),
    FamilyCase("SigLIP", "transformers", _siglip),
    FamilyCase("CLIP, classifier", "transformers", _clip_classifier),
    FamilyCase("CLIP vision tower, prompt score", "transformers", _clip_tower, embeds=True),
    FamilyCase("BERT, padded texts", "transformers", _transformers(_TEXTS, "BertConfig", **_TEXT), is_text=True),
    FamilyCase("RoBERTa, padded texts", "transformers", _transformers(_TEXTS, "RobertaConfig", **_TEXT), is_text=True),
)
