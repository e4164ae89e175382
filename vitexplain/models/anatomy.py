"""What an explanation has to know of a model: its blocks, its tokens, and how its head reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class ResidualBranches:
    """The two residual branches of a block, read apart.

    Before a normalisation, as in most Vision Transformers, y = x + attention(x) and x' = y + mlp(y); after one, as in BERT,
    y = norm(x + attention(x)) and x' = norm(y + mlp(y)).

    Attributes:
        output_weight: returns the attention's output projection (d, H·dh), LayerScale multiplied in, without bias.
        mlp: the whole MLP branch as a function of y, (B, m, d) to (B, m, d); acts on each token alone.
        mlp_input: module whose first input is y.
        mlp_output: module whose output, times ``mlp_scale``, is the branch's output f.
        mlp_scale: returns what multiplies that output on its way to the sum, (d,), or None.
    """

    output_weight: Callable[[], Tensor]
    mlp: Callable[[Tensor], Tensor]
    mlp_input: nn.Module
    mlp_output: nn.Module
    mlp_scale: Callable[[], Tensor | None] = lambda: None


@dataclass(frozen=True)
class BlockAnatomy:
    """One transformer block.

    Attributes:
        block: called with tokens (B, n, d) first, returns tokens (B, n, d) or a tuple that begins with them; tokens meet
            nowhere but in its attention.
        attention: the module inside which ``F.scaled_dot_product_attention`` is called exactly once (``nn.MultiheadAttention``
            counts); its first input is what queries, keys and values are made of. May be the block itself.
        branches: the residual branches where they can be read apart, else None.
        inseparable: why ``branches`` is None.
        absent_in_replay: (module, attribute) of what depends on the number of tokens and acts on scores alone; they are None
            while a few rows of the block are run again with the attention's output given.
    """

    block: nn.Module
    attention: nn.Module
    branches: ResidualBranches | None = None
    inseparable: str = "its residual branches are not described"
    absent_in_replay: tuple[tuple[nn.Module, str], ...] = ()


def _no_token_check(ids: Tensor) -> None: ...


def _no_check(channels: int, height: int, width: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """A model, opened up for explanation. Built by this library for the families it knows, and by users for their own models.

    Attributes:
        model: the whole model.
        blocks: first to last.
        num_classes: width of the model's output (B, num_classes), logits or an embedding.
        head: normalisation, pooling and classifier on the last block's tokens (B, m, d); m may be ``num_read_tokens``.
        grid: patch rows and columns for an image of (height, width); None for a model of text.
        num_prefix_tokens: tokens before the patches: class, distillation, registers.
        num_read_tokens: the head reads this many leading tokens, in equal parts; None where it reads all patches.
        pooling_weights: weight of each of n tokens in the head's input, as a list; where None, the leading tokens' equal parts
            or the mean over patches, as ``num_read_tokens`` says. Not asked for where there is an ``attention_pool``.
        attention_pool: the pooling module inside which ``F.scaled_dot_product_attention`` is called once, if any.
        pooled_prefix: number of leading tokens that the mean over patches or the attention pool leaves out.
        has_classes: whether the output holds class logits; explaining anything else needs a score of its own.
        forward: runs the model on the inputs that ``attribute`` was given and returns (B, num_classes); where None the model
            is called with them.
        check_image_size: raises ``InputError`` where the model cannot take images of (channels, height, width).
        check_tokens: for text, raises ``InputError`` where the model cannot take these ids (B, n).
        token_mask: for text, from the inputs to (B, n) bool, False for padding, or to None where there is none.
        family: name of the model family.
        temporary: (object, attribute, value) to set while an explanation runs.
    """

    model: nn.Module
    blocks: tuple[BlockAnatomy, ...]
    num_classes: int
    head: Callable[[Tensor], Tensor]
    grid: Callable[[int, int], tuple[int, int]] | None
    num_prefix_tokens: int = 1
    num_read_tokens: int | None = 1
    pooling_weights: Callable[[int], list[float]] | None = None
    attention_pool: nn.Module | None = None
    pooled_prefix: int = 0
    has_classes: bool = True
    forward: Callable[[Any], Tensor] | None = None
    check_image_size: Callable[[int, int, int], None] = _no_check
    check_tokens: Callable[[Tensor], None] = _no_token_check
    token_mask: Callable[[Mapping[str, Tensor]], Tensor | None] | None = None
    family: str = "described by the user"
    temporary: tuple[tuple[Any, str, object], ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether the model reads text: inputs are mappings, and maps are over tokens."""
        return self.grid is None

    def run(self, inputs: Any) -> Tensor:
        """The model's output (B, num_classes)."""
        return self.model(inputs) if self.forward is None else self.forward(inputs)

    def pooling(self, num_tokens: int) -> list[float]:
        """The weight of each token in the head's input."""
        if self.pooling_weights is not None:
            return self.pooling_weights(num_tokens)
        if self.num_read_tokens is not None:
            return [1 / self.num_read_tokens] * self.num_read_tokens + [0.0] * (num_tokens - self.num_read_tokens)
        pooled = num_tokens - self.pooled_prefix
        return [0.0] * self.pooled_prefix + [1 / pooled] * pooled
