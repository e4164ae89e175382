"""How the dense reference reads the models it knows: written apart from the library's own anatomy, which it judges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Structure:
    """Where things are in a model; ``model`` is what they are read of.

    Attributes:
        run: model, inputs to outputs.
        blocks: the blocks.
        attention: of a block, the module that queries, keys and values are made in.
        projection: of a block, the linear layer after the heads.
        scale: of a block, what multiplies the attention branch, or None.
        middle: of a block, the module whose first input is y.
        mlp_out: of a block, the module whose output is f; None where f is what the block adds to y.
        head: model, tokens (B, n, d) to outputs.
        pooling: model, number of tokens to weights; None for attention pooling.
        pool: the attention pool, or None.
        prefix: number of prefix tokens.
    """

    run: Callable[[Any, Any], Tensor]
    blocks: Callable[[Any], Any]
    attention: Callable[[Any], Any]
    projection: Callable[[Any], Any]
    scale: Callable[[Any], Tensor | None]
    middle: Callable[[Any], Any]
    mlp_out: Callable[[Any], Any] | None
    head: Callable[[Any, Tensor], Tensor]
    pooling: Callable[[Any, int], Tensor] | None
    pool: Callable[[Any], Any] = lambda model: None  # noqa: ARG005
    prefix: Callable[[Any], int] = lambda model: 1  # noqa: ARG005


Reads = Callable[[Any], Structure]


def structure_of(model: Any) -> Structure:
    """The structure of a model of a known class; raises ``NotImplementedError`` for others."""
    for kind in type(model).__mro__:
        package = kind.__module__.partition(".")[0]
        if (package, kind.__name__) in _STRUCTURES:
            return _STRUCTURES[package, kind.__name__](model)
    raise NotImplementedError(f"the dense reference knows no {type(model).__name__}")


def _leading(count: int) -> Callable[[Any, int], Tensor]:
    return lambda _, n: torch.tensor([1 / count] * count + [0.0] * (n - count))


def _mean_after(skipped: int) -> Callable[[Any, int], Tensor]:
    return lambda _, n: torch.tensor([0.0] * skipped + [1 / (n - skipped)] * (n - skipped))


def _half_and_half(prefix: int) -> Callable[[Any, int], Tensor]:
    return lambda _, n: torch.tensor([0.5] + [0.0] * (prefix - 1) + [0.5 / (n - prefix)] * (n - prefix))


def _timm(model: Any) -> Structure:
    distilled = type(model).__name__ == "VisionTransformerDistilled"
    pool = getattr(model, "attn_pool", None)
    if model.global_pool == "token":
        pooling = _leading(2 if distilled else 1)
    else:
        pooling = _mean_after(0 if getattr(model, "pool_include_prefix", False) else model.num_prefix_tokens)

    def scale(block: Any) -> Tensor | None:
        if hasattr(block, "ls1"):
            return getattr(block.ls1, "gamma", None)
        return getattr(block, "gamma_1", None)

    return Structure(
        run=lambda model, images: model(images),
        blocks=lambda model: model.blocks,
        attention=lambda block: getattr(block, "attn", block),
        projection=lambda block: block.attn.proj,
        scale=scale,
        middle=lambda block: block.norm2,
        mlp_out=None,
        head=lambda model, tokens: model.forward_head(model.norm(tokens)),
        pooling=None if pool is not None else pooling,
        pool=lambda model: getattr(model, "attn_pool", None),
        prefix=lambda model: model.num_prefix_tokens,
    )


def _torchvision(model: Any) -> Structure:  # noqa: ARG001
    return Structure(
        run=lambda model, images: model(images),
        blocks=lambda model: list(model.encoder.layers),
        attention=lambda block: block.self_attention,
        projection=lambda block: block.self_attention.out_proj,
        scale=lambda block: None,  # noqa: ARG005
        middle=lambda block: block.ln_2,
        mlp_out=None,
        head=lambda model, tokens: model.heads(model.encoder.ln(tokens)[:, 0]),
        pooling=_leading(1),
    )


def _transformers_image(
    encoder: str, head: Callable[[Any, Any, Tensor], Tensor], prefix: int, pooling: Any, **more: Any
) -> Reads:
    def build(model: Any) -> Structure:
        registers = getattr(model.config, "num_register_tokens", 0)
        return Structure(
            run=lambda model, images: getattr(model(pixel_values=images), more.get("field", "logits")),
            blocks=lambda model: _layers(getattr(model, encoder)),
            attention=lambda block: getattr(block, "attention", None) or block.self_attn,
            projection=_transformers_projection,
            scale=_transformers_scale,
            middle=lambda block: next(
                getattr(block, name) for name in ("layernorm_after", "norm2", "layer_norm2") if hasattr(block, name)
            ),
            mlp_out=None,
            head=lambda model, tokens: head(model, getattr(model, encoder), tokens),
            pooling=pooling(prefix + registers),
            prefix=lambda model: prefix + registers,  # noqa: ARG005
        )

    return build


def _transformers_projection(block: Any) -> Any:
    attention = getattr(block, "attention", None) or block.self_attn
    if hasattr(attention, "output"):  # before version 5
        return attention.output.dense
    return attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj


def _layers(encoder: Any) -> Any:
    if hasattr(encoder, "layers"):
        return encoder.layers
    return encoder.encoder.layer if hasattr(encoder.encoder, "layer") else encoder.encoder.layers


def _transformers_scale(block: Any) -> Tensor | None:
    if hasattr(block, "layer_scale1"):
        return block.layer_scale1.lambda1
    return getattr(block, "lambda_1", None)


def _transformers_text(encoder: str, head: Callable[[Any, Tensor], Tensor]) -> Reads:
    def build(model: Any) -> Structure:  # noqa: ARG001
        return Structure(
            run=lambda model, inputs: model(**inputs).logits,
            blocks=lambda model: getattr(model, encoder).encoder.layer,
            attention=lambda block: block.attention.self,
            projection=lambda block: block.attention.output.dense,
            scale=lambda block: None,  # noqa: ARG005
            middle=lambda block: block.intermediate,
            mlp_out=lambda block: block.output.dense,
            head=head,
            pooling=_leading(1),
            prefix=lambda model: 0,  # noqa: ARG005
        )

    return build


def _dinov2_head(model: Any, encoder: Any, tokens: Tensor) -> Tensor:
    tokens = encoder.layernorm(tokens)
    first = 1 + getattr(model.config, "num_register_tokens", 0)
    return model.classifier(torch.cat([tokens[:, 0], tokens[:, first:].mean(1)], -1))


def _first_head(model: Any, encoder: Any, tokens: Tensor) -> Tensor:
    return model.classifier(encoder.layernorm(tokens)[:, 0])


def _teacher_head(model: Any, encoder: Any, tokens: Tensor) -> Tensor:
    first, second = encoder.layernorm(tokens)[:, :2].unbind(1)
    return 0.5 * model.cls_classifier(first) + 0.5 * model.distillation_classifier(second)


_STRUCTURES: dict[tuple[str, str], Reads] = {
    ("timm", "VisionTransformer"): _timm,
    ("timm", "VisionTransformerDistilled"): _timm,
    ("timm", "VisionTransformerRelPos"): _timm,
    ("timm", "Beit"): _timm,
    ("timm", "Eva"): _timm,
    ("torchvision", "VisionTransformer"): _torchvision,
    ("transformers", "ViTForImageClassification"): _transformers_image("vit", _first_head, 1, lambda _: _leading(1)),
    ("transformers", "DeiTForImageClassification"): _transformers_image("deit", _first_head, 2, lambda _: _leading(1)),
    ("transformers", "DeiTForImageClassificationWithTeacher"): _transformers_image(
        "deit", _teacher_head, 2, lambda _: _leading(2)
    ),
    ("transformers", "Dinov2ForImageClassification"): _transformers_image("dinov2", _dinov2_head, 1, _half_and_half),
    ("transformers", "Dinov2WithRegistersForImageClassification"): _transformers_image(
        "dinov2_with_registers", _dinov2_head, 1, _half_and_half
    ),
    ("transformers", "BeitForImageClassification"): _transformers_image(
        "beit", lambda model, encoder, tokens: model.classifier(encoder.pooler(encoder.layernorm(tokens))), 1, _mean_after
    ),
    ("transformers", "SiglipForImageClassification"): _transformers_image(
        "vision_model", lambda model, encoder, tokens: model.classifier(encoder.post_layernorm(tokens).mean(1)), 0, _mean_after
    ),
    ("transformers", "CLIPForImageClassification"): _transformers_image(
        "vision_model",
        lambda model, encoder, tokens: model.classifier(tokens[:, 1:].mean(1)),  # noqa: ARG005
        1,
        _mean_after,
    ),
    ("transformers", "CLIPVisionModelWithProjection"): _transformers_image(
        "vision_model",
        lambda model, encoder, tokens: model.visual_projection(encoder.post_layernorm(tokens[:, 0])),
        1,
        lambda _: _leading(1),
        field="image_embeds",
    ),
    ("transformers", "BertForSequenceClassification"): _transformers_text(
        "bert", lambda model, tokens: model.classifier(torch.tanh(model.bert.pooler.dense(tokens[:, 0])))
    ),
    ("transformers", "RobertaForSequenceClassification"): _transformers_text(
        "roberta", lambda model, tokens: model.classifier.out_proj(torch.tanh(model.classifier.dense(tokens[:, 0])))
    ),
}
