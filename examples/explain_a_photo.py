"""The shortest way: one photo, the class that the model sees in it, and a picture of where it looked.

    python examples/explain_a_photo.py
    python examples/explain_a_photo.py --photo cat.jpg --model vit_base_patch16_224 --method gmar

Without --photo scikit-image's cat is explained; without --model by the small model that comes with this library.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import skimage.data
from PIL import Image

import vitexplain
from vitexplain import load_model, load_photo


def explain(photo: Image.Image, model_name: str, method: str, output: Path) -> None:
    """Print the predicted class and write the photo with the map laid over it."""
    # --8<-- [start:ten_lines]
    model = load_model(model_name)  # the shipped "demo", or any Vision Transformer of timm's
    images = model.transform(photo).unsqueeze(0)  # (1, 3, h, w), as the model takes them
    explanation = vitexplain.explain(model.model, images, method=method)

    predicted = int(explanation.target[0])
    share = float(explanation.logits.softmax(-1)[0, predicted])
    print(f"{model.class_name(predicted)} ({share:.0%}); a map of {tuple(explanation.maps.shape[1:])} patches by {method}")
    explanation.overlay(model.display(photo)).save(output)
    # --8<-- [end:ten_lines]
    print(f"wrote {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", type=Path, help="a photo of yours; scikit-image's cat where there is none")
    parser.add_argument("--model", default="demo", help="'demo', or the name of a timm model")
    parser.add_argument("--method", default="tokentm", help="see 'vitexplain methods'")
    parser.add_argument("--output", type=Path, default=Path("explained.png"))
    options = parser.parse_args()
    photo = load_photo(options.photo) if options.photo else Image.fromarray(skimage.data.chelsea())
    explain(photo, options.model, options.method, options.output)


if __name__ == "__main__":
    main()
