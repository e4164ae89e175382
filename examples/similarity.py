"""Models that embed, such as CLIP: one map for each prompt that the photo is compared with.

    python examples/similarity.py
    python examples/similarity.py --model openai/clip-vit-base-patch32 --photo street.jpg --prompt "a bicycle" --prompt "a dog"

Without --model there is no network to ask for CLIP: the shipped model without its classifier embeds photos, and the classifier's
rows, one a class, stand for the embeddings of prompts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import skimage.data
import torch
from PIL import Image
from torch import Tensor, nn

import vitexplain
from vitexplain import load_model, load_photo
from vitexplain.visualize import save_panel


def clip(name: str, photo: Image.Image, prompts: list[str]) -> tuple[nn.Module, Tensor, Tensor]:
    """CLIP's vision tower, the photo as it takes it, and the embeddings (K, d) of the prompts."""
    # --8<-- [start:clip]
    from transformers import AutoProcessor, AutoTokenizer, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    tower = CLIPVisionModelWithProjection.from_pretrained(name).eval()
    images = AutoProcessor.from_pretrained(name)(images=photo, return_tensors="pt")["pixel_values"]
    tokens = AutoTokenizer.from_pretrained(name)(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        embeddings = CLIPTextModelWithProjection.from_pretrained(name).eval()(**tokens).text_embeds
    # --8<-- [end:clip]
    return tower, images, embeddings


def stand_in(photo: Image.Image, prompts: list[str]) -> tuple[nn.Module, Tensor, Tensor]:
    """The same of the shipped model: prompts are names of its classes."""
    demo = load_model("demo")
    rows = demo.model.head.weight.detach()[[demo.class_index(prompt) for prompt in prompts]]
    demo.model.reset_classifier(0)
    return demo.model, demo.transform(photo).unsqueeze(0), rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", type=Path, help="a photo of yours; scikit-image's cat where there is none")
    parser.add_argument("--model", help="a CLIP of transformers; the shipped model where there is none")
    parser.add_argument("--prompt", action="append", help="repeat for several")
    parser.add_argument("--output", type=Path, default=Path("similarity.png"))
    options = parser.parse_args()
    photo = load_photo(options.photo) if options.photo else Image.fromarray(skimage.data.chelsea())
    prompts = options.prompt or ["cat", "dog", "airplane"]
    tower, images, embeddings = clip(options.model, photo, prompts) if options.model else stand_in(photo, prompts)

    # --8<-- [start:explain]
    score = vitexplain.similarity(embeddings)  # (K, d): K maps an image, which share the forward
    explanation = vitexplain.explain(tower, images, score=score)
    similarities = score(explanation.logits)[0]  # cosines (K,); logits holds the embedding
    # --8<-- [end:explain]
    for prompt, value in zip(prompts, similarities.tolist(), strict=True):
        print(f"{prompt}: {value:.3f}")
    low, high = images.min(), images.max()
    save_panel(options.output, (images[0] - low) / (high - low), dict(zip(prompts, explanation.maps[0], strict=True)))
    print(f"wrote {options.output}: maps {tuple(explanation.maps.shape)}")


if __name__ == "__main__":
    main()
