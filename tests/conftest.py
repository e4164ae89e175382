"""Small random models whose attention is far from uniform, and the data folder where there is one."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vitexplain
from vitexplain import Explanation
from vitexplain.testing import relative_error as relative_error

from .browser import launched

torch.set_num_threads(1)  # tests run in parallel processes
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell leaves it to what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"

ALL_METHODS = [info.name for info in vitexplain.methods()]
# One value a token, and quotients of activations that float32 carries as well; LRP's own are near 0 / 0.
METHODS = [info.name for info in vitexplain.methods() if info.resolution == "tokens" and info.name != "partial_lrp"]
# With a rule of relevance float32 is further from float64, for plain torch as for tiles.
PLAIN_METHODS = [name for name in METHODS if vitexplain.methods.REGISTRY[name].rules is None]
REFERENCED_METHODS = [name for name in ALL_METHODS if name != "smoothgrad"]  # whose noise no other precision can draw

_BASE = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=7)

MODEL_SHAPES: dict[str, dict[str, object]] = {
    "class_token_n17": {},
    "one_block": dict(depth=1),
    "registers_layerscale": dict(reg_tokens=4, init_values=0.3, no_embed_class=True),
    "qk_norm_head_dim_24": dict(qk_norm=True, num_heads=2),
    "mean_pooling": dict(global_pool="avg", class_token=False),
    "mean_pooling_with_registers": dict(global_pool="avg", reg_tokens=3, depth=2),
    "mean_pooling_over_prefix": dict(global_pool="avg", pool_include_prefix=True),
    "attention_pooling": dict(global_pool="map", class_token=False),
    "attention_pooling_with_class_token": dict(global_pool="map", reg_tokens=1),
    "distilled": dict(distilled=True),
    "non_square": dict(img_size=(24, 80), patch_size=(8, 16)),
    "pre_norm": dict(pre_norm=True, fc_norm=False, final_norm=True),
    "n197": dict(img_size=224, patch_size=16, depth=2, embed_dim=64, num_heads=4),
    "n1025": dict(img_size=256, patch_size=8, depth=2, embed_dim=32, num_heads=2),
}


def build_model(seed: int = 0, distilled: bool = False, **options: object) -> VisionTransformer:
    """A timm ViT with random weights large enough that attention is peaked and every branch matters."""
    torch.manual_seed(seed)
    kind = VisionTransformerDistilled if distilled else VisionTransformer
    model = kind(**{**_BASE, **options})
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if "token" not in name and "pos" not in name else 0.5)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
        else:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    return model.eval()


def images_for(model: VisionTransformer, batch: int, seed: int = 1) -> torch.Tensor:
    """(B, 3, h, w) standard normal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=generator)


def rms_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square difference over root mean square expected."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def all_tokens(explanation: Explanation) -> torch.Tensor:
    """Prefix and patch values together, (B, n), or all pixels: the scale against which a rounding error is judged."""
    if explanation.maps.dim() == 2:  # text
        return explanation.maps
    return torch.cat([explanation.prefix_values, explanation.maps.flatten(-2)], -1)


@pytest.fixture
def model() -> VisionTransformer:
    """The plain class-token model."""
    return build_model()


@pytest.fixture
def images(model: VisionTransformer) -> torch.Tensor:
    """Two images for it."""
    return images_for(model, 2)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Path of a file in ../shared; skips, with the reason, where that folder is absent."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"needs ../shared/{name}, which is not part of the repository")
        return path

    return find


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """A headless Chromium, shared by the tests of a module."""
    with launched() as found:
        yield found
