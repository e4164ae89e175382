"""SaCo: do differences of salience match differences of influence?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...options import option
from ..batch import SUBSTRATES, Batch, RankedMaps
from .base import Metric, Protocol, of_class


@dataclass(frozen=True, kw_only=True)
class SaCo(Protocol):
    """The salience-guided faithfulness coefficient, from −1 to 1.

    Pixels fall into groups by rank; s_i is a group's mean of the map, d_i what the class's probability loses without it.
    F = Σ_{i<j} w_ij / Σ_{i<j} |w_ij| with w_ij = s_i − s_j where d_i ≥ d_j, else −(s_i − s_j); 0 for a constant map. The paper's
    sums are these means times the groups' size, which must be equal; means also serve where the pixels do not divide evenly.
    """

    name: ClassVar[str] = "saco"
    title: ClassVar[str] = "consistency of salience and influence over groups of pixels"
    source: ClassVar[str] = "On the Faithfulness of Vision Transformer Explanations (CVPR 2024), Algorithm 1"

    groups: int = option(10, "groups of pixels", minimum=2)
    substrate: str = option("mean", "what removed pixels become", choices=SUBSTRATES)

    def measure(self, batch: Batch, maps: RankedMaps, target: Tensor) -> dict[str, Tensor]:
        bounds = torch.tensor([i * batch.num_pixels // self.groups for i in range(self.groups + 1)])
        log_p = of_class(batch.probe(maps.ranks, torch.stack([bounds[:-1], bounds[1:]], 1), self.substrate), target)
        clean = batch.clean.gather(1, target.unsqueeze(1))
        return {"saco": _coefficient(self._salience(maps, bounds), clean.double().exp() - log_p.double().exp())}

    def _salience(self, maps: RankedMaps, bounds: Tensor) -> Tensor:
        """(B, groups) float64: the mean of the map over each group."""
        by_rank = torch.empty_like(maps.pixels.flatten(1)).scatter_(1, maps.ranks.long(), maps.pixels.flatten(1)).double()
        return torch.stack([by_rank[:, a:b].mean(1) for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)], 1)

    def metrics(self, explained: str, *, labels: bool) -> tuple[Metric, ...]:  # noqa: ARG002
        return (Metric("SaCo", "higher", "", lambda raw: raw["saco"][:, None]),)


def _coefficient(salience: Tensor, drop: Tensor) -> Tensor:
    """(B,) of (B, groups) each."""
    first, second = torch.triu_indices(salience.shape[1], salience.shape[1], 1, device=salience.device)
    difference = salience[:, first] - salience[:, second]
    weights = torch.where(drop[:, first] >= drop[:, second], difference, -difference)
    total = weights.abs().sum(1)
    return torch.where(total > 0, weights.sum(1) / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)
