"""Pictures of one explanation: laid over the photo, one class against another, and block by block.

    python examples/pictures.py --output pictures
    python examples/pictures.py --photo cat.jpg --model deit_tiny_patch16_224 --output pictures

It writes overlay.png, contrast.png and evolution.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import skimage.data
from PIL import Image

from vitexplain import Explainer, load_model, load_photo
from vitexplain.visualize import contrast, evolution, save_figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", type=Path, help="a photo of yours; scikit-image's cat where there is none")
    parser.add_argument("--model", default="demo", help="'demo', or the name of a timm model")
    parser.add_argument("--output", type=Path, default=Path("pictures"), help="folder for the pictures")
    options = parser.parse_args()
    photo = load_photo(options.photo) if options.photo else Image.fromarray(skimage.data.chelsea())
    model, folder = load_model(options.model), options.output
    folder.mkdir(parents=True, exist_ok=True)

    # --8<-- [start:explain]
    images, seen = model.transform(photo).unsqueeze(0), model.display(photo)  # what the model takes; what people see of it
    explanation = Explainer(model.model, "tokentm", rows="by_block").attribute(images, target="top2")
    names = [model.class_name(index) for index in explanation.target[0].tolist()]
    # --8<-- [end:explain]
    # --8<-- [start:overlay]
    explanation.overlay(seen, target_index=0).save(folder / "overlay.png")  # a PIL image, at the size of the photo
    # --8<-- [end:overlay]
    # --8<-- [start:contrast]
    save_figure(folder / "contrast.png", contrast(seen, explanation, names=names))
    # --8<-- [end:contrast]
    # --8<-- [start:evolution]
    save_figure(folder / "evolution.png", evolution(seen, explanation, name=names[0]))
    # --8<-- [end:evolution]
    print(f"{names[0]} rather than {names[1]}: overlay.png, contrast.png and evolution.png in {folder}")


if __name__ == "__main__":
    main()
