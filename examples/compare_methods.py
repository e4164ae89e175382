"""Several methods on one photo, side by side: they share one forward, and those with a gradient one backward.

    python examples/compare_methods.py
    python examples/compare_methods.py --photo cat.jpg --model deit_tiny_patch16_224 --output compared.png

An explanation is a property of the method as much as of the model: compare before you believe one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import skimage.data
from PIL import Image

from vitexplain import Explainer, Explanation, LoadedModel, load_model, load_photo
from vitexplain.methods import GMAR
from vitexplain.visualize import save_panel


# --8<-- [start:compare]
def compare(model: LoadedModel, photo: Image.Image) -> dict[str, Explanation]:
    """Maps by label; a label is what one method with several options is told apart by."""
    methods = {
        "tokentm": "tokentm",
        "gmar, l1": "gmar",
        "gmar, l2": GMAR(norm="l2"),
        "rollout (of no class)": "rollout",
        "attcat (signed)": "attcat",
    }
    return Explainer(model.model, method=methods).attribute(model.transform(photo).unsqueeze(0))


# --8<-- [end:compare]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", type=Path, help="a photo of yours; scikit-image's cat where there is none")
    parser.add_argument("--model", default="demo", help="'demo', or the name of a timm model")
    parser.add_argument("--output", type=Path, default=Path("compared.png"))
    options = parser.parse_args()
    photo = load_photo(options.photo) if options.photo else Image.fromarray(skimage.data.chelsea())
    model = load_model(options.model)

    forwards: list[object] = []
    model.model.register_forward_pre_hook(lambda *_: forwards.append(None))
    explanations = compare(model, photo)
    print(f"{len(explanations)} maps from {len(forwards)} forward")
    maps = {label: explanation.maps[0] for label, explanation in explanations.items()}
    predicted = int(next(iter(explanations.values())).target[0])
    save_panel(options.output, model.display(photo), maps, title=f"why {model.class_name(predicted)}?")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
