"""What timm's families of plain Vision Transformers share: image sizes, pooling, heads, and pre-norm blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..errors import InputError, UnsupportedModelError
from .anatomy import Anatomy, BlockAnatomy, ResidualBranches

_REFUSED_POOLING = {
    "": "it has no pooling (global_pool=''), so there is no single prediction to explain",
    "max": "its head takes a maximum over patches (global_pool='max'), which has no fixed pooling weights",
    "avgmax": "its head takes a maximum over patches (global_pool='avgmax'), which has no fixed pooling weights",
    "prr": "its pooling refines patches by a second self-attention (global_pool='prr')",
}


def read_model(model: Any, family: str, blocks: tuple[BlockAnatomy, ...], *, num_class_tokens: int = 1) -> Anatomy:
    """Anatomy of a timm model with ``patch_embed``, ``blocks``, ``norm``, ``forward_head``, ``global_pool`` and ``head``.

    Raises:
        UnsupportedModelError: its pooling has no fixed weights.
    """
    name = type(model).__name__
    if model.global_pool in _REFUSED_POOLING:
        raise UnsupportedModelError(f"{name} cannot be explained: {_REFUSED_POOLING[model.global_pool]}")
    temporary = [(block.attention, "fused_attn", True) for block in blocks]
    temporary.append((model, "grad_checkpointing", False))
    if getattr(model, "attn_pool", None) is not None:
        temporary.append((model.attn_pool, "fused_attn", True))
    has_classes = model.num_classes > 0 and not isinstance(model.head, nn.Identity)
    return Anatomy(
        family=family,
        model=model,
        blocks=blocks,
        num_classes=model.num_classes if has_classes else model.num_features,
        has_classes=has_classes,
        head=lambda tokens: model.forward_head(model.norm(tokens)),
        grid=lambda height, width: tuple(model.patch_embed.dynamic_feat_size((height, width))),
        num_prefix_tokens=model.num_prefix_tokens,
        num_read_tokens=num_class_tokens if model.global_pool == "token" else None,
        attention_pool=getattr(model, "attn_pool", None),
        pooled_prefix=0 if pools_prefix(model) else model.num_prefix_tokens,
        check_image_size=_image_size_check(model),
        temporary=tuple(temporary),
    )


def pools_prefix(model: Any) -> bool:
    """Whether the pooling over patches takes prefix tokens in as well."""
    if getattr(model, "attn_pool", None) is not None and not hasattr(model, "pool_include_prefix"):
        return True  # Eva hands all its tokens to the attention pool
    return bool(getattr(model, "pool_include_prefix", False))


def _image_size_check(model: Any) -> Callable[[int, int, int], None]:
    """What refuses images, by channels, height and width, that the model does not take, with ``InputError``."""
    embed = model.patch_embed
    in_chans = getattr(model, "in_chans", None) or next(m for m in embed.modules() if isinstance(m, nn.Conv2d)).in_channels

    def check(channels: int, height: int, width: int) -> None:
        if channels != in_chans:
            raise InputError(f"images: expected {in_chans} channels (B, {in_chans}, h, w), received {channels}")
        if embed.img_size is not None and embed.strict_img_size:
            expected = tuple(embed.img_size)
            if (height, width) != expected:
                raise InputError(
                    f"images: expected height × width {expected[0]}×{expected[1]} for this model, received {height}×{width}"
                )
        elif not embed.dynamic_img_pad:
            patch = embed.feat_ratio(as_scalar=False)
            if height % patch[0] or width % patch[1]:
                raise InputError(f"images: expected multiples of the patch size {patch[0]}×{patch[1]}, received {height}×{width}")

    return check


def read_block(block: nn.Module, index: int, pre_norm: tuple[type, ...]) -> BlockAnatomy:
    """A block with a timm attention; its branches can be read apart where its class is among ``pre_norm``.

    Raises:
        UnsupportedModelError: its attention is none of timm's that can be fused.
    """
    kind = type(block).__name__
    attention = getattr(block, "attn", block)  # a parallel-scaling block is its own attention
    if not hasattr(attention, "fused_attn"):
        raise UnsupportedModelError(
            f"block {index} ({kind}) has an attention of class {type(attention).__name__}: expected timm's fused Attention"
        )
    reason = _inseparable(block, attention, pre_norm)
    return BlockAnatomy(block, attention, None if reason else _branches(block), reason)


def _inseparable(block: nn.Module, attention: nn.Module, pre_norm: tuple[type, ...]) -> str:
    """Why x, Ẽ = v W_O, y and f cannot be read apart in this block; empty where they can."""
    if not isinstance(block, pre_norm):
        return f"{type(block).__name__} is not a pre-norm block with separate attention and MLP branches"
    if not isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity):
        return "a normalisation stands between attention and output projection, so that values are not mapped linearly"
    if getattr(attention, "gate", None) is not None:
        return "a gate stands between attention and output projection, so that values are not mapped by one matrix"
    return ""


def _layer_scale(block: nn.Module, number: int) -> Tensor | None:
    """The factor of a branch: a LayerScale module in one family, a bare parameter in another, or none."""
    factor = getattr(getattr(block, f"ls{number}", None), "gamma", None)
    return factor if factor is not None else getattr(block, f"gamma_{number}", None)


def _branches(block: Any) -> ResidualBranches:
    def output_weight() -> Tensor:
        scale = _layer_scale(block, 1)
        weight = block.attn.proj.weight
        return weight if scale is None else weight * scale.unsqueeze(-1)

    def mlp(tokens: Tensor) -> Tensor:
        out = block.mlp(block.norm2(tokens))
        scale = _layer_scale(block, 2)
        return block.drop_path2(out if scale is None else out * scale)

    return ResidualBranches(output_weight, mlp, mlp_input=block.norm2, mlp_output=block.drop_path2)
