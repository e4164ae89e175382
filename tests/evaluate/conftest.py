"""A small model, a batch of random images and maps, and what the slow metrics read of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitexplain.evaluate.batch import Batch, Classifier, RankedMaps
from vitexplain.models import read_anatomy

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
SIZE = (20, 40)  # 5 % of its pixels is a whole number


@dataclass(frozen=True)
class Scene:
    """Three images with labels and masks, maps of them, and the same as arrays in [0, 1] and normalised."""

    model: VisionTransformer
    images01: Tensor
    batch: Batch
    maps: Tensor
    ranked: RankedMaps

    def predict(self, image: np.ndarray) -> np.ndarray:
        """Logits (C,) of one normalised image (3, h, w)."""
        with torch.no_grad():
            return self.model(torch.from_numpy(np.asarray(image, dtype=np.float64))[None])[0].numpy()

    def predict01(self, image: np.ndarray) -> np.ndarray:
        """Logits (C,) of one image in [0, 1]."""
        mean, std = (np.array(values)[:, None, None] for values in (MEAN, STD))
        return self.predict((image - mean) / std)

    def tie_break(self, row: int) -> np.ndarray:
        """(h, w): larger for what comes first among equals."""
        values = np.empty(self.batch.num_pixels)
        values[self.batch.tie_order[row].numpy()] = -np.arange(self.batch.num_pixels)
        return values.reshape(SIZE)

    @cached_property
    def ranks(self) -> np.ndarray:
        """(B, h, w)."""
        return self.ranked.ranks.view(-1, *SIZE).numpy()


@pytest.fixture(scope="session")
def scene() -> Scene:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    arguments = dict(img_size=SIZE, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=40)
    model = VisionTransformer(**arguments).eval().double().requires_grad_(False)
    images01 = torch.rand(3, 3, *SIZE, generator=generator, dtype=torch.float64)
    _sensitise(model, images01)
    classifier = Classifier(read_anatomy(model), MEAN, STD, forward_batch=7)
    images = (images01 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    masks = torch.rand(3, *SIZE, generator=generator) > 0.6
    clean = classifier.log_probabilities(images)
    labels = clean.argmax(-1).clone()
    labels[1] = (labels[1] + 1) % 40
    batch = Batch(images, ("a", "b", "c"), labels, masks, clean, classifier, seed=0)
    maps = torch.randn(3, 5, 10, generator=generator, dtype=torch.float64)
    return Scene(model, images01, batch, maps, RankedMaps.of(maps, batch, "some"))


def _sensitise(model: VisionTransformer, images: Tensor) -> None:
    """Set the head so that its logits are about 0 on images some of which is gone, and differ by about 1 between them."""
    partly = torch.where(torch.rand(16, 3, 1, *SIZE) < torch.rand(16, 3, 1, 1, 1), 0.0, images)
    features = model.forward_head(model.forward_features(partly.flatten(0, 1)), pre_logits=True)
    with torch.no_grad():
        model.head.weight.normal_()
        logits = features @ model.head.weight.T
        model.head.weight.div_(logits.std(0).unsqueeze(1))
        model.head.weight.mul_(3)
        model.head.bias.copy_(-(features @ model.head.weight.T).median(0).values)
