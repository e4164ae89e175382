"""A method of your own in a few lines, held against its dense formula.

    python examples/own_method.py

The method: Transformer-MM whose two paths share one whole, U = (1 − s)·I + s · mean_h relu(P_h ⊙ G_h). It says what the update
map of a block is; that no map is stored, several classes an image, texts and ``rows="all"`` come by themselves.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import skimage.data
import torch
from PIL import Image
from torch import Tensor, nn

import vitexplain
from vitexplain import load_model
from vitexplain.methods.base import ChainMethod
from vitexplain.options import option
from vitexplain.relevance import Trace, Update
from vitexplain.tap import BlockTrace
from vitexplain.visualize import save_panel


# --8<-- [start:method]
@dataclass(frozen=True, kw_only=True)
class Shared(ChainMethod):
    """The class row of Π_l ((1 − s)·I + s · mean_h relu(P_h ⊙ G_h))."""

    name: ClassVar[str] = "shared"
    title: ClassVar[str] = "Shared residual"
    paper: ClassVar[str] = "this file"
    cost: ClassVar[str] = "forward + backward + one attention forward per block"
    uses_gradient: ClassVar[bool] = True  # G, the gradient of the explained logit with respect to P
    uses_target: ClassVar[bool] = True

    share: float = option(0.5, "s, of the attention path", minimum=0.0)

    def update(self, trace: Trace, block: BlockTrace, grad_out: Tensor | None) -> Update:  # noqa: ARG002
        return Update(phi="p_relu_g", factor=self.share, residual=1 - self.share)


# --8<-- [end:method]


# --8<-- [start:dense]
def dense(model: nn.Module, image: Tensor, target: int, share: float) -> Tensor:
    """The formula as it is written, for one image of a timm model: every map and its gradient is stored."""
    maps: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, attention: Tensor) -> None:  # noqa: ARG001
        attention.retain_grad()
        maps.append(attention)

    hooks = [block.attn.attn_drop.register_forward_hook(keep) for block in model.blocks]
    for block in model.blocks:
        block.attn.fused_attn = False  # a fused attention has no map to look at
    model(image)[0, target].backward()
    row = torch.eye(maps[0].shape[-1])[:1]  # the class token's
    for attention in reversed(maps):
        row = (1 - share) * row + share * row @ (attention * attention.grad).clamp(min=0).mean(1)[0]
    for block, hook in zip(model.blocks, hooks, strict=True):
        hook.remove()
        block.attn.fused_attn = True
    return row[0, 1:].detach()


# --8<-- [end:dense]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.5, help="s, of the attention path")
    parser.add_argument("--output", type=Path, default=Path("own_method.png"))
    options = parser.parse_args()
    model, photo = load_model("demo"), Image.fromarray(skimage.data.chelsea())
    image = model.transform(photo).unsqueeze(0)

    # --8<-- [start:use]
    explanations = vitexplain.explain(model.model, image, method=[Shared(share=options.share), "transformer_mm"])
    ours = explanations["shared"]
    # --8<-- [end:use]
    expected = dense(model.model, image, int(ours.target[0]), options.share)
    error = (ours.maps.flatten() - expected).abs().max() / expected.abs().max()
    print(f"largest difference from the dense formula: {error:.1e} of the largest value")
    save_panel(options.output, model.display(photo), {name: one.maps[0] for name, one in explanations.items()})
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
