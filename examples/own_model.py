"""A Vision Transformer written from scratch, described by an ``Anatomy``, and an explanation that can be checked.

    python examples/own_model.py

The model learns in a few seconds which colour a small square in noise has. What it must look at is known: the patch with the
square. The script prints how often the largest value of the map is there, and writes a picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitexplain
from vitexplain import Anatomy, BlockAnatomy, ResidualBranches
from vitexplain.visualize import save_panel

PATCH, SIDE, WIDTH, COLOURS = 8, 40, 48, 3


# --8<-- [start:model]
class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), Attention(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class OwnViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (SIDE // PATCH) ** 2, WIDTH))
        self.layers = nn.ModuleList(Layer(WIDTH) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, COLOURS))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], 1) + self.positions
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(tokens[:, 0])


# --8<-- [end:model]


# --8<-- [start:anatomy]
def describe(model: OwnViT) -> Anatomy:
    """Where the blocks are, and how the head reads them."""

    def block(layer: Layer) -> BlockAnatomy:
        branches = ResidualBranches(  # what tokentm needs; leave them out where there are none to be told apart
            output_weight=lambda: layer.attention.out.weight,
            mlp=lambda tokens: layer.mlp(layer.norm2(tokens)),
            mlp_input=layer.norm2,
            mlp_output=layer.mlp,
        )
        return BlockAnatomy(layer, layer.attention, branches)

    return Anatomy(
        model=model,
        blocks=tuple(block(layer) for layer in model.layers),
        num_classes=COLOURS,
        head=lambda tokens: model.head(tokens[:, 0]),
        grid=lambda height, width: (height // PATCH, width // PATCH),
    )


# --8<-- [end:anatomy]


def squares(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 3, h, w) of noise with a square in one patch, its colour (B,), and the patch's number (B,)."""
    images, colours = 0.3 * torch.randn(batch, 3, SIDE, SIDE), torch.randint(COLOURS, (batch,))
    places = torch.randint((SIDE // PATCH) ** 2, (batch,))
    for image, colour, place in zip(images, colours.tolist(), places.tolist(), strict=True):
        top, left = (PATCH * index for index in divmod(place, SIDE // PATCH))
        image[colour, top : top + PATCH, left : left + PATCH] += 1
    return images, colours, places


def trained(steps: int) -> OwnViT:
    model = OwnViT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        images, colours, _ = squares(64)
        loss = F.cross_entropy(model(images), colours)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help="of training")
    parser.add_argument("--output", type=Path, default=Path("own_model.png"))
    options = parser.parse_args()
    torch.manual_seed(0)
    model = trained(options.steps)
    images, colours, places = squares(200)
    # --8<-- [start:explain]
    explanations = vitexplain.explain(model, images, method=["tokentm", "transformer_mm", "rollout"], anatomy=describe(model))
    # --8<-- [end:explain]
    right = explanations["tokentm"].logits.argmax(-1) == colours
    print(f"the model is right on {right.float().mean():.0%} of 200 images")
    for name, explanation in explanations.items():
        found = explanation.maps.flatten(1).argmax(-1) == places
        print(f"{name}: the largest value is in the square's patch on {found.float().mean():.0%}")
    maps = {name: explanation.maps[0] for name, explanation in explanations.items()}
    save_panel(options.output, images[0].sigmoid(), maps, title="where is the square?")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
