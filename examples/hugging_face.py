"""A model of Hugging Face transformers with its own image processor.

    pip install '.[transformers,demo]'
    python examples/hugging_face.py                                                     # a tiny random model; no network
    python examples/hugging_face.py --model facebook/dinov2-base-imagenet1k-1-layer
    python examples/hugging_face.py --model google/vit-base-patch16-224 --photo cat.jpg

Load the model as it comes: its attention stays fused. ``attn_implementation="eager"``, which other tools ask for, is not needed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import skimage.data
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessor,
    Dinov2Config,
    Dinov2ForImageClassification,
)

import vitexplain
from vitexplain import load_photo


def tiny_model(folder: Path) -> Path:
    """A DINOv2 of random weights and its image processor, saved as ``save_pretrained`` does it: a stand-in without a network."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=112,
        patch_size=14,
        num_labels=10,
        layerscale_value=0.5,
    )
    Dinov2ForImageClassification(config).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 128}, crop_size={"height": 112, "width": 112}).save_pretrained(folder)
    return folder


def explain(name: str | Path, photo: Image.Image, output: Path) -> None:
    # --8<-- [start:explain]
    processor = AutoImageProcessor.from_pretrained(name)
    model = AutoModelForImageClassification.from_pretrained(name).eval()
    images = processor(photo, return_tensors="pt")["pixel_values"]

    explanation = vitexplain.explain(model, images)  # TokenTM, the predicted class
    predicted = model.config.id2label[int(explanation.target[0])]
    print(f"{type(model).__name__} says {predicted}; a map of {tuple(explanation.maps.shape[1:])} patches")

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    seen = (images[0] * std + mean).clamp(0, 1)  # the part of the photo that the processor kept
    explanation.overlay(seen).resize((448, 448)).save(output)
    # --8<-- [end:explain]
    print(f"wrote {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", type=Path, help="a photo of yours; scikit-image's cat where there is none")
    parser.add_argument("--model", help="name on the hub, or a folder; a tiny random model where there is none")
    parser.add_argument("--output", type=Path, default=Path("hugging_face.png"))
    options = parser.parse_args()
    photo = load_photo(options.photo) if options.photo else Image.fromarray(skimage.data.chelsea())
    with tempfile.TemporaryDirectory() as folder:
        explain(options.model or tiny_model(Path(folder)), photo, options.output)


if __name__ == "__main__":
    main()
