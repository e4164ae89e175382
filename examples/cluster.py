"""The same on a Ray cluster: actors explain shards of the data.

    pip install '.[ray,demo]'
    python examples/cluster.py
    RAY_ADDRESS=head:6379 python examples/cluster.py --photos /shared/photos --output /shared/maps.zarr --actors 16

Without an address a cluster is started on this machine and ended with the run. The store has the bytes that one process writes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import skimage.data
from PIL import Image

from vitexplain import dataset, load_model


def example_photos(folder: Path) -> Path:
    """Quarters of scikit-image's cat."""
    cat = Image.fromarray(skimage.data.chelsea())
    for number in range(4):
        left, top = (number % 2) * cat.width // 2, (number // 2) * cat.height // 2
        cat.crop((left, top, left + cat.width // 2, top + cat.height // 2)).save(folder / f"{number}.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="under the same path on every node; four small ones where there is none")
    parser.add_argument("--model", default="demo", help="'demo', or the name of a timm model")
    parser.add_argument("--actors", type=int, help="one a GPU where there is none given")
    parser.add_argument("--output", type=Path, default=Path("cluster.zarr"), help="in a folder that all nodes share")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photos = options.photos or example_photos(Path(folder))
        # --8<-- [start:run]
        report = dataset.run(
            load_model(options.model, device="auto"),
            photos,
            options.output,
            "tokentm",
            engine="ray",
            actors=options.actors,
            workers=0 if options.photos is None else None,  # None: as many decoding processes as suit the machine
            batch=2 if options.photos is None else "auto",
        )
        # --8<-- [end:run]
    store = dataset.open(options.output)
    print(f"{report.images} images by {len(report.devices)} actor(s); complete: {store.is_complete}")


if __name__ == "__main__":
    main()
