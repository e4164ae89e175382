"""Which words decide? A BERT-like text classifier, explained token by token; padding has no value.

    pip install '.[transformers]'
    python examples/text.py
    python examples/text.py --model textattack/bert-base-uncased-SST-2 --text "a fine film" --text "not a fine film at all"

Without --model a tiny BERT learns, in a few seconds, to tell friendly words from unfriendly ones among neutral ones: what the
maps must find is known.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
)

import vitexplain
from vitexplain.visualize import save_figure, tokens

GOOD, BAD = ["fine", "great", "lovely", "superb"], ["dull", "awful", "poor", "weak"]
NEUTRAL = ["the", "a", "film", "story", "actor", "music", "it", "was", "and", "with"]
TEXTS = ["the film was great", "a dull story with music and the actor", "lovely"]
METHODS = ["gmar", "legrad", "conservative_lrp"]


def tiny_model() -> tuple[Any, Any]:
    """A tokenizer of two dozen words, and a BERT that has learned which of them are friendly."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *NEUTRAL]
    tokenizer = BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})
    sizes = dict(vocab_size=len(words), hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96)
    model = BertForSequenceClassification(BertConfig(**sizes, id2label={0: "unfriendly", 1: "friendly"}))
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=2e-3), random.Random(0)
    for _ in range(60):
        classes = [draw.randrange(2) for _ in range(32)]
        texts = [[*draw.choices(NEUTRAL, k=draw.randrange(8)), draw.choice((BAD, GOOD)[label])] for label in classes]
        shuffled = [" ".join(draw.sample(text, len(text))) for text in texts]
        loss = model(**tokenizer(shuffled, padding=True, return_tensors="pt"), labels=torch.tensor(classes)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tokenizer, model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub, or a folder; a tiny model trained here where there is none")
    parser.add_argument("--text", action="append", help="repeat for several, which are padded to one length")
    parser.add_argument("--output", type=Path, default=Path("text.png"), help="picture of the longest text")
    options = parser.parse_args()
    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForSequenceClassification.from_pretrained(options.model).eval()
    else:
        tokenizer, model = tiny_model()
    texts = options.text or TEXTS

    # --8<-- [start:explain]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")  # input_ids, attention_mask (B, n)
    explanations = vitexplain.explain(model, inputs, method=METHODS)  # maps (B, n): one value a token, 0 for padding
    words = [tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in inputs["input_ids"]]
    # --8<-- [end:explain]
    special = torch.isin(inputs["input_ids"], torch.tensor(tokenizer.all_special_ids))
    for index, text in enumerate(texts):
        label = model.config.id2label[int(explanations["gmar"].target[index])]
        print(f"{label}: {text!r}")
        for name, explanation in explanations.items():
            strongest = explanation.maps[index].masked_fill(special[index], -torch.inf).argmax()
            print(f"  {name}: {words[index][strongest]}")
    longest = int((~special).sum(1).argmax())
    # --8<-- [start:picture]
    figure = tokens(words[longest], explanations["gmar"], index=longest, title="Which words decide?", width=6)
    save_figure(options.output, figure)
    # --8<-- [end:picture]
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
