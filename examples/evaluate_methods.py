"""Which method is faithful to the model on your photos? The perturbation protocol on a few of them, with its controls.

    pip install '.[evaluate,demo]'
    python examples/evaluate_methods.py
    python examples/evaluate_methods.py --photos photos/ --model deit_tiny_patch16_224 --output results

Pixels are blackened in the order of the map enlarged to the image, the most important first (the accuracy should fall fast) or
the least important first (it should last). It writes results.json, results.md, curves and report.html. A handful of photos
decides nothing: look at the intervals.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import skimage.data
from PIL import Image

from vitexplain import load_model, open_source
from vitexplain.evaluate import evaluate


def example_photos(folder: Path) -> Path:
    """Scikit-image's cat, whole and in cut-outs; the folder's name is the label."""
    cat = Image.fromarray(skimage.data.chelsea())
    (folder / "cat").mkdir()
    for margin in (0, 15, 30, 45):
        cat.crop((margin, margin, cat.width - margin, cat.height - margin)).save(folder / "cat" / f"{margin}.png")
    return folder


def measure(photos: Path, model_name: str, output: Path) -> None:
    # --8<-- [start:evaluate]
    model = load_model(model_name)
    source = open_source(photos, classes=model)  # labels, where there are any, are looked up among the model's classes
    results = evaluate(model, source, output, ["tokentm", "rollout"], "perturbation", bootstrap=200, gallery=2)
    for column in results.columns:
        figures = {label: results.figure(label, column) for label in results.methods}
        print(f"{column.metric}: " + ", ".join(f"{label} {figure.mean:.3f}" for label, figure in figures.items() if figure))
    # --8<-- [end:evaluate]
    print(f"wrote {output / 'report.html'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--photos", type=Path, help="folder, table or shards of yours; four cut-outs of a cat where there is none"
    )
    parser.add_argument("--model", default="demo", help="'demo', or the name of a timm model")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options.photos or example_photos(Path(folder)), options.model, options.output)


if __name__ == "__main__":
    main()
