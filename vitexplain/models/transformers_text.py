"""Text classifiers of Hugging Face transformers: BERT and RoBERTa, with a padding mask; maps are over tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import InputError, UnsupportedModelError
from ..value_checks import expect
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
        check_tokens=_token_check(base),
        token_mask=_token_mask,
        temporary=(
            *use_sdpa(model, base),
            *(
                (block, "chunk_size_feed_forward", 0) for block in base.encoder.layer
            ),  # a chunk of tokens is not a row of the block
        ),
    )


def _token_check(base: Any) -> Callable[[Tensor], None]:
    words, positions = base.embeddings.word_embeddings.num_embeddings, base.embeddings.position_embeddings
    # RoBERTa counts positions from behind its padding index
    longest = positions.num_embeddings - (0 if positions.padding_idx is None else positions.padding_idx + 1)

    def check(ids: Tensor) -> None:
        if ids.shape[1] > longest:
            raise InputError(f"input_ids: expected at most {longest} tokens a text for this model, received {ids.shape[1]}")
        expect(
            lambda: ((ids >= 0) & (ids < words)).all(),
            ids.device,
            lambda: InputError(f"input_ids: expected 0 to {words - 1}, received {int(ids.min())} to {int(ids.max())}"),
        )

    return check


def _token_mask(inputs: Mapping[str, Tensor]) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return None if mask is None else mask.bool()


def _read_block(block: nn.Module) -> BlockAnatomy:
    projection, hidden, out = part(block, "attention.output.dense"), part(block, "intermediate"), part(block, "output.dense")
    branches = ResidualBranches(lambda: projection.weight, lambda tokens: out(hidden(tokens)), hidden, out)
    return BlockAnatomy(block, part(block, "attention.self"), branches)
