"""Text classifiers of Hugging Face transformers: BERT and RoBERTa, with a padding mask; maps are over tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .anatomy import Anatomy, BlockAnatomy, ResidualBranches
from .transformers_common import class_name, is_transformers_model, logits_of, part, use_sdpa

FAMILY = "transformers text classifiers"

# class of the model: attribute of its encoder, and its head on tokens (B, m, d), which reads the first
_KINDS: dict[str, tuple[str, Callable[[Any, Tensor], Tensor]]] = {
    "BertForSequenceClassification": ("bert", lambda model, tokens: model.classifier(model.bert.pooler(tokens))),
    "RobertaForSequenceClassification": ("roberta", lambda model, tokens: model.classifier(tokens)),
}


def reads(model: nn.Module) -> bool:
    """Whether this family covers the model."""
    return is_transformers_model(model, _KINDS)


def read(model: Any) -> Anatomy:
    """Anatomy of a transformers text classifier; raises ``UnsupportedModelError`` with the reason where it has none."""
    name, head = _KINDS[class_name(model, _KINDS)]
    base = getattr(model, name)
    if base.config.is_decoder or base.config.add_cross_attention:
        raise UnsupportedModelError(f"{type(model).__name__} is built as a decoder: expected an encoder")
    run = logits_of(model, "logits")
    return Anatomy(
        family=FAMILY,
        model=model,
        blocks=tuple(_read_block(block) for block in base.encoder.layer),
        num_classes=model.config.num_labels,
        head=lambda tokens: head(model, tokens),
        grid=None,
        num_prefix_tokens=0,
        forward=lambda inputs: run(**inputs),
        token_mask=_token_mask,
        temporary=use_sdpa(model, base),
    )


def _token_mask(inputs: Mapping[str, Tensor]) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return None if mask is None else mask.bool()


def _read_block(block: nn.Module) -> BlockAnatomy:
    projection, hidden, out = part(block, "attention.output.dense"), part(block, "intermediate"), part(block, "output.dense")
    branches = ResidualBranches(lambda: projection.weight, lambda tokens: out(hidden(tokens)), hidden, out)
    return BlockAnatomy(block, part(block, "attention.self"), branches)
