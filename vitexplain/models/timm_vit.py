"""timm's ``VisionTransformer`` and its distilled variant: every patch size, pooling, register and LayerScale option."""

from __future__ import annotations

from collections.abc import Callable

from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, DiffParallelScalingBlock, ParallelThingsBlock, VisionTransformer
from torch import Tensor, nn

from ..errors import InputError, UnsupportedModelError
from .anatomy import Anatomy, BlockAnatomy, ResidualBranches

FAMILY = "timm VisionTransformer"

_REFUSED_POOLING = {
    "": "it has no pooling (global_pool=''), so there is no single prediction to explain",
    "max": "its head takes a maximum over patches (global_pool='max'), which has no fixed pooling weights",
    "avgmax": "its head takes a maximum over patches (global_pool='avgmax'), which has no fixed pooling weights",
    "prr": "its pooling refines patches by a second self-attention (global_pool='prr')",
}


def reads(model: nn.Module) -> bool:
    """Whether this family covers the model."""
    return isinstance(model, VisionTransformer)


def read(model: VisionTransformer) -> Anatomy:
    """Anatomy of a timm VisionTransformer; raises ``UnsupportedModelError`` with the reason where it has none."""
    name = type(model).__name__
    if model.num_classes <= 0 or not isinstance(model.head, nn.Linear):
        raise UnsupportedModelError(f"{name} has no classifier (num_classes={model.num_classes}): expected a model with logits")
    if model.global_pool in _REFUSED_POOLING:
        raise UnsupportedModelError(f"{name} cannot be explained: {_REFUSED_POOLING[model.global_pool]}")
    blocks = tuple(_read_block(block, index) for index, block in enumerate(model.blocks))
    temporary = [(block.attention, "fused_attn", True) for block in blocks]
    temporary.append((model, "grad_checkpointing", False))
    return Anatomy(
        family=FAMILY,
        model=model,
        blocks=blocks,
        num_prefix_tokens=model.num_prefix_tokens,
        num_classes=model.num_classes,
        check_image_size=_image_size_check(model),
        grid=lambda height, width: tuple(model.patch_embed.dynamic_feat_size((height, width))),
        logits=lambda tokens: model.forward_head(model.norm(tokens)),
        num_read_tokens=_num_read_tokens(model),
        pooling_weights=_pooling_weights(model),
        attention_pool=model.attn_pool,
        pooled_prefix=0 if model.pool_include_prefix else model.num_prefix_tokens,
        temporary=tuple(temporary),
    )


def _num_read_tokens(model: VisionTransformer) -> int | None:
    if model.global_pool != "token":
        return None
    return 2 if isinstance(model, VisionTransformerDistilled) else 1


def _pooling_weights(model: VisionTransformer) -> Callable[[int], list[float]] | None:
    """Weights of n tokens in the head's input: the class token, both tokens of a distilled model, or the mean of patches."""
    if model.attn_pool is not None:
        return None
    read_tokens = _num_read_tokens(model)
    if read_tokens is not None:
        return lambda n: [1 / read_tokens] * read_tokens + [0.0] * (n - read_tokens)
    skipped = 0 if model.pool_include_prefix else model.num_prefix_tokens
    return lambda n: [0.0] * skipped + [1 / (n - skipped)] * (n - skipped)


def _image_size_check(model: VisionTransformer) -> Callable[[int, int, int], None]:
    embed = model.patch_embed

    def check(channels: int, height: int, width: int) -> None:
        if channels != model.in_chans:
            raise InputError(f"images: expected {model.in_chans} channels (B, {model.in_chans}, h, w), received {channels}")
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


def _read_block(block: nn.Module, index: int) -> BlockAnatomy:
    kind = type(block).__name__
    if isinstance(block, ParallelThingsBlock):
        raise UnsupportedModelError(
            f"block {index} ({kind}) runs {block.num_parallel} attentions side by side: expected one a block"
        )
    if isinstance(block, DiffParallelScalingBlock) or type(getattr(block, "attn", None)).__name__ == "DiffAttention":
        raise UnsupportedModelError(f"block {index} ({kind}) subtracts two attention maps (differential attention): expected one")
    attention = getattr(block, "attn", block)  # a parallel-scaling block is its own attention
    if not hasattr(attention, "fused_attn"):
        raise UnsupportedModelError(
            f"block {index} ({kind}) has an attention of class {type(attention).__name__}: expected timm's fused Attention"
        )
    reason = _inseparable(block)
    return BlockAnatomy(block, attention, None if reason else _branches(block), reason)


def _inseparable(block: nn.Module) -> str:
    """Why x, Ẽ = v W_O, y and f cannot be read apart in this block; empty where they can."""
    if not isinstance(block, Block):
        return f"{type(block).__name__} is not a pre-norm block with separate attention and MLP branches"
    if not isinstance(getattr(block.attn, "norm", nn.Identity()), nn.Identity):
        return "a normalisation stands between attention and output projection, so that values are not mapped linearly"
    if getattr(block.attn, "gate", None) is not None:
        return "a gate stands between attention and output projection, so that values are not mapped by one matrix"
    return ""


def _branches(block: Block) -> ResidualBranches:
    def output_weight() -> Tensor:
        weight = block.attn.proj.weight
        return weight if isinstance(block.ls1, nn.Identity) else weight * block.ls1.gamma.unsqueeze(-1)

    def mlp(tokens: Tensor) -> Tensor:
        return block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))

    return ResidualBranches(output_weight, mlp, mlp_input=block.norm2, mlp_output=block.drop_path2)
