"""What an explanation has to know of a model: its blocks, its tokens, and how its head reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class ResidualBranches:
    """The two residual branches of a pre-norm block, y = x + attention(x) and x' = y + mlp(y), read apart.

    Attributes:
        output_weight: returns the attention's output projection (d, H·dh), LayerScale multiplied in, without bias.
        mlp: the whole MLP branch as a function of y, (B, m, d) to (B, m, d); acts on each token alone.
        mlp_input: module whose input is y.
        mlp_output: module whose output is the branch's output f.
    """

    output_weight: Callable[[], Tensor]
    mlp: Callable[[Tensor], Tensor]
    mlp_input: nn.Module
    mlp_output: nn.Module


@dataclass(frozen=True)
class BlockAnatomy:
    """One transformer block.

    Attributes:
        block: called with tokens (B, n, d), returns tokens (B, n, d); tokens meet nowhere but in its attention.
        attention: the module inside which ``F.scaled_dot_product_attention`` is called exactly once.
        branches: the residual branches where they can be read apart, else None.
        inseparable: why ``branches`` is None.
    """

    block: nn.Module
    attention: nn.Module
    branches: ResidualBranches | None = None
    inseparable: str = ""


@dataclass(frozen=True)
class Anatomy:
    """A model, opened up for explanation.

    Attributes:
        family: name of the model family.
        model: the whole model, images (B, c, h, w) to logits (B, classes).
        blocks: first to last.
        num_prefix_tokens: tokens before the patches: class, distillation, registers.
        num_classes: number of logits.
        check_image_size: raises ``InputError`` where the model cannot take images of (channels, height, width).
        grid: patch rows and columns for an image of (height, width).
        logits: normalisation, pooling and classifier on tokens (B, m, d); m may be ``num_read_tokens``.
        num_read_tokens: the head reads this many leading tokens; None where it reads all patches.
        pooling_weights: weight of each of n tokens in the head's input, (n,) list; None for attention pooling.
        attention_pool: the pooling module inside which ``F.scaled_dot_product_attention`` is called once, if any.
        pooled_prefix: number of leading tokens that the attention pool does not see.
        temporary: (module, attribute, value) to set while an explanation runs.
    """

    family: str
    model: nn.Module
    blocks: tuple[BlockAnatomy, ...]
    num_prefix_tokens: int
    num_classes: int
    check_image_size: Callable[[int, int, int], None]
    grid: Callable[[int, int], tuple[int, int]]
    logits: Callable[[Tensor], Tensor]
    num_read_tokens: int | None = 1
    pooling_weights: Callable[[int], list[float]] | None = None
    attention_pool: nn.Module | None = None
    pooled_prefix: int = 0
    temporary: tuple[tuple[nn.Module, str, object], ...] = field(default=())
