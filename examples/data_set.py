"""A whole folder of photos: maps into a store, read again by id, for a DataLoader, and as a stream that writes nothing.

    pip install '.[dataset,demo]'
    python examples/data_set.py
    python examples/data_set.py --photos photos/ --model deit_tiny_patch16_224 --workers 4 --output maps.zarr

Killed at any moment, the same command goes on where it was. Without --photos six of scikit-image's are written and explained.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import skimage.data
from PIL import Image
from torch.utils.data import DataLoader

from vitexplain import dataset, load_model


def example_photos(folder: Path) -> Path:
    """Scikit-image's photos, as a folder of files."""
    for name in ("astronaut", "cat", "chelsea", "coffee", "motorcycle_left", "rocket"):
        image = skimage.data.stereo_motorcycle()[0] if name == "motorcycle_left" else getattr(skimage.data, name)()
        Image.fromarray(image).save(folder / f"{name}.jpg")
    return folder


def explain(photos: Path, model_name: str, output: Path, workers: int) -> None:
    model = load_model(model_name, device="auto")
    # --8<-- [start:run]
    report = dataset.run(model, photos, output, ["tokentm", "gmar:norm=l2"], target="top2", batch=2, workers=workers)
    print(f"{report.images} explained, {report.found} found; {report.images_per_second:.1f} images/s")
    # --8<-- [end:run]

    # --8<-- [start:open]
    store = dataset.open(output)
    maps = store.maps(slice(None), "tokentm")  # (images, K, gh, gw) float32; by id, row, slice or list
    first = store.row(0)  # what the index says of it: id, prediction, score, target, status, reason …
    print(f"{len(store)} images, maps {maps.shape}; {first['id']}: {model.class_name(first['prediction'])} {first['score']:.0%}")
    # --8<-- [end:open]

    # --8<-- [start:loader]
    loader = DataLoader(store.torch_dataset("gmar:norm=l2"), batch_size=3)
    for batch in loader:
        print({name: tuple(value.shape) for name, value in batch.items() if hasattr(value, "shape")})
    # --8<-- [end:loader]

    # --8<-- [start:stream]
    for batch in dataset.stream(model, photos, "tokentm", batch=3, workers=workers):  # tensors on the model's device
        print(f"streamed {', '.join(batch.ids)}: {tuple(batch.maps['tokentm'].shape)}")
    # --8<-- [end:stream]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="folder, table or shards of yours; six photos where there is none")
    parser.add_argument("--model", default="demo", help="'demo', or the name of a timm model")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode photos")
    parser.add_argument("--output", type=Path, default=Path("maps.zarr"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        explain(options.photos or example_photos(Path(folder)), options.model, options.output, options.workers)


if __name__ == "__main__":  # decoding processes are started: Python's multiprocessing needs this guard in a script
    main()
