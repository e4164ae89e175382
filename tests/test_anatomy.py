"""Models of one's own: a description is all it takes, whatever their attention calls look like."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitexplain
from vitexplain import Anatomy, BlockAnatomy, InputError, ResidualBranches, UnsupportedModelError

from .conftest import all_tokens, relative_error

DIM, HEADS, WIDTH, TOKENS = 24, 4, 6, 17

Mask = Callable[[int], Tensor | None]


class OwnAttention(nn.Module):
    """Attention with a mask, causality or grouped heads."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.key_heads = 2 if kind == "grouped heads" else HEADS
        self.query, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.key, self.value = (nn.Linear(DIM, self.key_heads * WIDTH) for _ in range(2))
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("bias", torch.randn(HEADS, TOKENS, TOKENS, generator=generator, dtype=torch.float64))

    def mask(self) -> Tensor | None:
        """(…, n, n) or None."""
        n = TOKENS
        if self.kind == "boolean mask":
            return (torch.arange(n)[:, None] - torch.arange(n)).abs() <= 5
        if self.kind == "additive mask, three axes":
            return self.bias
        if self.kind == "additive mask, one column":
            return self.bias[:, :, :1]
        return None

    def forward(self, tokens: Tensor) -> Tensor:
        heads = [layer(tokens).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        out = F.scaled_dot_product_attention(
            *heads,
            attn_mask=self.mask(),
            is_causal=self.kind == "causal",
            scale=0.5,
            enable_gqa=self.kind == "grouped heads",
        )
        return self.out(out.transpose(1, 2).flatten(2))

    def dense(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The map (B, H, n, n) and the output, written out."""
        query, key, value = (
            layer(tokens).unflatten(-1, (-1, WIDTH)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        groups = HEADS // self.key_heads
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = 0.5 * query @ key.mT
        mask = self.mask()
        if self.kind == "causal":
            mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        probabilities = scores.softmax(-1)
        return probabilities, self.out((probabilities @ value).transpose(1, 2).flatten(2))


class TorchAttention(nn.Module):
    """``nn.MultiheadAttention``, which calls its attention out of sight."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        batch_first = "sequence first" not in kind
        self.inner = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first, bias="no bias" not in kind)
        if "no bias" not in kind:
            nn.init.normal_(self.inner.in_proj_bias, std=0.3)

    def masks(self) -> dict[str, Tensor]:
        """Its own masks: True is left out."""
        if "masked" not in self.kind:
            return {}
        padding = torch.zeros(2, TOKENS, dtype=torch.bool)
        padding[1, 12:] = True
        return {"key_padding_mask": padding, "attn_mask": torch.randn(2 * HEADS, TOKENS, TOKENS, dtype=torch.float64).mul(0.3)}

    def forward(self, tokens: Tensor) -> Tensor:
        torch.manual_seed(7)
        if "sequence first" in self.kind:
            tokens = tokens.transpose(0, 1)
            return self.inner(tokens, tokens, tokens, need_weights=False, **self.masks())[0].transpose(0, 1)
        return self.inner(tokens, tokens, tokens, need_weights=False, **self.masks())[0]

    def dense(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The map and the output, written out."""
        torch.manual_seed(7)
        layer = self.inner
        packed = F.linear(tokens, layer.in_proj_weight, layer.in_proj_bias)
        query, key, value = packed.unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = WIDTH**-0.5 * query @ key.mT
        masks = self.masks()
        if masks:
            scores = scores + masks["attn_mask"].unflatten(0, (2, HEADS))
            scores = scores.masked_fill(masks["key_padding_mask"][:, None, None], -torch.inf)
        probabilities = scores.softmax(-1)
        return probabilities, layer.out_proj((probabilities @ value).transpose(1, 2).flatten(2))


class OwnBlock(nn.Module):
    """A pre-norm block."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class OwnModel(nn.Module):
    """Somebody's Vision Transformer."""

    def __init__(self, attention: type[nn.Module], kind: str) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, 8, stride=8)
        self.first = nn.Parameter(torch.randn(1, 1, DIM))
        self.layers = nn.ModuleList(OwnBlock(attention(kind)) for _ in range(3))
        self.head = nn.Linear(DIM, 5)

    def tokens(self, images: Tensor) -> Tensor:
        """What enters the first layer."""
        patches = self.embed(images).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(len(images), -1, -1), patches], 1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.tokens(images)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(tokens[:, 0])


def described(model: OwnModel, **changes: object) -> Anatomy:
    """What the README shows."""

    def branches(layer: OwnBlock) -> ResidualBranches | None:
        out = layer.attention.out if isinstance(layer.attention, OwnAttention) else layer.attention.inner.out_proj
        return ResidualBranches(
            output_weight=lambda: out.weight,
            mlp=lambda tokens: layer.mlp(layer.norm2(tokens)),
            mlp_input=layer.norm2,
            mlp_output=layer.mlp,
        )

    description = dict(
        model=model,
        blocks=tuple(BlockAnatomy(layer, layer.attention, branches(layer)) for layer in model.layers),
        num_classes=5,
        head=lambda tokens: model.head(tokens[:, 0]),
        grid=lambda height, width: (height // 8, width // 8),
    )
    return Anatomy(**{**description, **changes})


KINDS = [
    (OwnAttention, "plain"),
    (OwnAttention, "boolean mask"),
    (OwnAttention, "additive mask, three axes"),
    (OwnAttention, "additive mask, one column"),
    (OwnAttention, "causal"),
    (OwnAttention, "grouped heads"),
    (TorchAttention, "plain"),
    (TorchAttention, "no bias"),
    (TorchAttention, "sequence first"),
    (TorchAttention, "masked"),
]


def build(attention: type[nn.Module], kind: str) -> OwnModel:
    torch.manual_seed(3)
    model = OwnModel(attention, kind).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5 * 1.5)
    return model


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def dense_chains(model: OwnModel, target: int) -> dict[str, Tensor]:
    """transformer_mm, rollout and gmar (l2) written out: (B, n) each."""
    maps, tokens = [], model.tokens(IMAGES)
    for layer in model.layers:
        probabilities, out = layer.attention.dense(layer.norm1(tokens))
        maps.append(probabilities)
        tokens = tokens + out
        tokens = tokens + layer.mlp(layer.norm2(tokens))
    gradients = torch.autograd.grad(model.head(tokens[:, 0])[:, target].sum(), maps)
    eye = torch.eye(TOKENS, dtype=torch.float64).expand(2, -1, -1)
    chains = dict.fromkeys(("transformer_mm", "rollout", "gmar"), eye)
    for p, g in zip(maps, gradients, strict=True):
        norms = g.square().sum((-1, -2)).sqrt()
        weights = norms / norms.sum(1, keepdim=True)
        updates = {
            "transformer_mm": eye + (p * g).clamp(min=0).mean(1),
            "rollout": 0.5 * (eye + p.mean(1)),
            "gmar": 0.5 * (eye + torch.einsum("bh,bhij->bij", weights, p)),
        }
        chains = {name: updates[name] @ chain for name, chain in chains.items()}
    return {name: chain[:, 0].detach() for name, chain in chains.items()}


@pytest.mark.parametrize(("attention", "kind"), KINDS)
def test_masks_biases_and_grouped_heads_agree_with_matrices_written_out(attention: type[nn.Module], kind: str) -> None:
    model = build(attention, kind)
    exact = dense_chains(model, 2)
    ours = vitexplain.explain(model, IMAGES, 2, method=list(exact), norm="l2", anatomy=described(model))
    for name, expected in exact.items():
        assert relative_error(all_tokens(ours[name]), expected) <= 1e-6, name
    everything = vitexplain.explain(model, IMAGES, 2, method=list(exact), norm="l2", anatomy=described(model), rows="all")
    for name, expected in exact.items():
        assert relative_error(everything[name].contribution[:, 0], expected) <= 1e-6, name


@pytest.mark.parametrize(("attention", "kind"), KINDS)
def test_every_method_takes_a_model_that_is_described(attention: type[nn.Module], kind: str) -> None:
    model = build(attention, kind)
    methods = [info.name for info in vitexplain.methods()]
    results = vitexplain.explain(model, IMAGES, [[0, 1], [2, 3]], method=methods, steps=2, samples=2, anatomy=described(model))
    for name, result in results.items():
        assert result.maps.shape == ((2, 2, 32, 32) if result.prefix_values.shape[-1] == 0 else (2, 2, 4, 4)), name
        assert torch.isfinite(result.maps).all(), name
    # without biases relevance is complete, whatever the mask
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    complete = vitexplain.explain(model, IMAGES, 1, method="conservative_lrp", anatomy=described(model))
    torch.testing.assert_close(all_tokens(complete).sum(1).double(), complete.logits[:, 1], rtol=1e-5, atol=1e-6)


def test_a_description_without_branches_is_enough_for_most_methods() -> None:
    model = build(OwnAttention, "plain")
    blocks = tuple(BlockAnatomy(layer, layer) for layer in model.layers)
    with pytest.raises(UnsupportedModelError, match=r"tokentm.*block 0: its residual branches are not described"):
        vitexplain.Explainer(model, anatomy=described(model, blocks=blocks))
    ours = vitexplain.explain(model, IMAGES, method="gmar", anatomy=described(model, blocks=blocks))
    expected = vitexplain.explain(model, IMAGES, method="gmar", anatomy=described(model))
    assert torch.equal(ours.maps, expected.maps)


BAD_DESCRIPTIONS = {
    "another model": (lambda m: dict(anatomy=described(build(OwnAttention, "plain"))), InputError, "model that is to be explained"),
    "not a description": (lambda m: dict(anatomy={"blocks": m.layers}), InputError, "expected a vitexplain.Anatomy, received dict"),
    "no blocks": (lambda m: dict(anatomy=described(m, blocks=())), InputError, "at least one block"),
    "wrong number of classes": (lambda m: dict(anatomy=described(m, num_classes=4)), UnsupportedModelError, r"\(2, 4\), received \(2, 5\)"),
    "the dense backend": (lambda m: dict(anatomy=described(m), backend="dense"), UnsupportedModelError, "the dense reference knows no OwnModel"),
    "none at all": (lambda _: {}, UnsupportedModelError, "describe them in an Anatomy"),
    "another module's attention": (
        lambda m: dict(anatomy=described(m, blocks=tuple(BlockAnatomy(layer, layer.mlp) for layer in m.layers)), method="gmar"),
        UnsupportedModelError,
        r"block 0: expected its attention \(Sequential\).*received no call",
    ),
    "two blocks as one": (
        lambda m: dict(anatomy=described(m, blocks=(BlockAnatomy(m, m),)), method="gmar"),
        UnsupportedModelError,
        "one attention call a block, received a second one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DESCRIPTIONS)
def test_descriptions_that_do_not_fit_are_refused(case: str) -> None:
    model = build(OwnAttention, "plain")
    arguments, error, message = BAD_DESCRIPTIONS[case]
    with pytest.raises(error, match=message):
        vitexplain.explain(model, IMAGES, **arguments(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: setattr(layer, "bias_k", nn.Parameter(torch.zeros(1, 1, DIM))), "bias_k=None"),
        (lambda layer: setattr(layer, "add_zero_attn", True), "add_zero_attn=True"),
    ],
)
def test_multi_head_attention_with_extra_keys_is_refused(change: Callable[[nn.Module], None], message: str) -> None:
    model = build(TorchAttention, "plain")
    change(model.layers[1].attention.inner)
    with pytest.raises(UnsupportedModelError, match=message):
        vitexplain.explain(model, IMAGES, anatomy=described(model))


def test_attention_with_dropout_at_run_time_is_refused() -> None:
    model = build(OwnAttention, "plain")
    attention = model.layers[0].attention
    attention.forward = lambda tokens: (
        F.scaled_dot_product_attention(*(tokens.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2),) * 3, dropout_p=0.1)
        .transpose(1, 2)
        .flatten(2)
    )
    with pytest.raises(UnsupportedModelError, match=r"block 0 \(OwnBlock\).*dropout_p=0.1"):
        vitexplain.explain(model, IMAGES, anatomy=described(model))
