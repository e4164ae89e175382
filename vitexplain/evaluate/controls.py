"""Maps that know nothing of the model: what every method has to beat."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import Batch

RANDOM, CENTRE_PRIOR = "random", "centre prior"
CONTROLS = (RANDOM, CENTRE_PRIOR)
CENTRE_SIGMA = 0.25  # of the image's side


def random_maps(batch: Batch, grid: tuple[int, int]) -> Tensor:
    """(B, gh, gw): uniform noise on the patch grid, seeded by each image's id."""
    return torch.stack([torch.rand(grid, generator=generator) for generator in batch.generators(RANDOM)]).to(batch.images.device)


def centre_prior(batch: Batch, grid: tuple[int, int]) -> Tensor:
    """(B, gh, gw): a Gaussian on the middle of the image, a quarter of its side wide, the same for every image."""
    axes = [(torch.arange(side) + 0.5) / side - 0.5 for side in grid]
    distance = axes[0].square().unsqueeze(1) + axes[1].square()
    prior = torch.exp(-distance / (2 * CENTRE_SIGMA**2)).to(batch.images.device)
    return prior.expand(len(batch.images), -1, -1)


def control_maps(name: str, batch: Batch, grid: tuple[int, int]) -> Tensor:
    """The maps of a control by name."""
    return {RANDOM: random_maps, CENTRE_PRIOR: centre_prior}[name](batch, grid)
