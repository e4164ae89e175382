"""A whole evaluation on a GPU: the CPU's figures, up to rounding."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitexplain.evaluate import Evaluation
from vitexplain.loading import load_model
from vitexplain.sources import open_source

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROTOCOLS = ("perturbation", "insertion_deletion", "average_drop", "saco", "localisation", "ablation", "quantus")


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    lines = ["path,label,mask"]
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((32, 32)).save(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 2, (32, 32), dtype=np.uint8) * 255).save(tmp_path / f"mask{i}.png")
        lines.append(f"{i}.png,{('cat', 'dog')[i % 2]},mask{i}.png")
    (tmp_path / "photos.csv").write_text("\n".join(lines))
    return tmp_path / "photos.csv"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_figures_are_those_of_the_cpu(folder, tmp_path, dtype: str) -> None:
    extras = {"localisation": "sklearn", "quantus": "quantus"}  # the others are measured also where these are absent
    protocols = [name for name in PROTOCOLS if name not in extras or find_spec(extras[name])]
    found = {}
    for device in ("cpu", "cuda"):
        model = load_model("demo", device=device)
        settings = {"explained": ("pred", "gt"), "dtype": dtype if device == "cuda" else "float32", "bootstrap": 20}
        source = open_source(folder, classes=model)
        found[device] = Evaluation(model, source, tmp_path / device, ["tokentm", "rollout"], protocols, **settings).run()
    for figure, again in zip(found["cpu"].figures, found["cuda"].figures, strict=True):
        assert (figure.method, figure.metric, figure.explained) == (again.method, again.metric, again.explained)
        scale = 100 if abs(figure.mean) > 2 else 1
        assert again.mean == pytest.approx(figure.mean, abs=scale * (1e-2 if dtype == "float32" else 0.1)), figure


def test_random_maps_and_ties_are_those_of_the_cpu(folder, tmp_path) -> None:
    ranks = {}
    for device in ("cpu", "cuda"):
        model = load_model("demo", device=device)
        evaluation = Evaluation(model, open_source(folder, classes=model), tmp_path / device, ["rollout"], ["saco"])
        batch = evaluation._batch(evaluation._load(0))
        ranks[device] = (batch.tie_order.cpu(), evaluation._maps(batch, batch.predicted)["random"].cpu())
    assert all(torch.equal(a, b) for a, b in zip(ranks["cpu"], ranks["cuda"], strict=True))
