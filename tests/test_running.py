"""Compiled blocks and activation checkpointing: the same maps, and what they are for."""

from __future__ import annotations

import shutil

import pytest
import timm
import torch
from torch import Tensor, nn

import vitexplain
from vitexplain import Anatomy, InputError, UnsupportedModelError
from vitexplain.methods import own_methods
from vitexplain.models import BlockAnatomy
from vitexplain.testing import relative_error

from .conftest import MODEL_SHAPES, build_model, images_for

SHAPES = ("class_token_n17", "mean_pooling", "attention_pooling")
TOLERANCE = 1e-5  # float32, other order of summation


def _values(explanation: vitexplain.Explanation) -> Tensor:
    return torch.cat([explanation.prefix_values.flatten(1), explanation.maps.flatten(1)], -1)


@pytest.mark.parametrize("shape", SHAPES)
def test_checkpointing_changes_no_map(shape: str) -> None:
    model = build_model(**MODEL_SHAPES[shape])
    images = images_for(model, 2)
    plain = vitexplain.Explainer(model, own_methods()).attribute(images)
    found = vitexplain.Explainer(model, own_methods(), checkpoint=True).attribute(images)
    for name in own_methods():
        assert torch.equal(found[name].maps, plain[name].maps), name
        alone = vitexplain.explain(model, images, method=name, checkpoint=True)
        assert relative_error(_values(alone), _values(plain[name])) < TOLERANCE, name


def test_checkpointing_serves_several_targets_of_one_forward_and_all_rows() -> None:
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    images, target = images_for(model, 2), [[1, 2], [3, 4]]
    for options in ({"method": ["tokentm", "attcat", "iba"]}, {"method": ["tokentm", "rollout"], "rows": "all"}):
        plain = vitexplain.Explainer(model, **options).attribute(images, target)
        found = vitexplain.Explainer(model, **options, checkpoint=True).attribute(images, target)
        for name in plain:
            assert torch.equal(found[name].maps, plain[name].maps)


def test_checkpointing_under_autocast_runs_blocks_again_in_the_same_precision() -> None:
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    images = images_for(model, 2)
    with torch.autocast("cpu", torch.bfloat16):
        plain = vitexplain.explain(model, images, method="gmar")
        found = vitexplain.explain(model, images, method="gmar", checkpoint=True)
    assert torch.equal(found.maps, plain.maps)


class _Saved:
    """Bytes that graphs keep at the same time, at most."""

    def __init__(self) -> None:
        self.now, self.most = 0, 0

    def __enter__(self) -> _Saved:
        def pack(tensor: Tensor) -> _Kept:
            return _Kept(self, tensor)

        self._hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)


class _Kept:
    def __init__(self, count: _Saved, tensor: Tensor) -> None:
        self.count, self.tensor, self.size = count, tensor, tensor.numel() * tensor.element_size()
        count.now += self.size
        count.most = max(count.most, count.now)

    def __del__(self) -> None:
        self.count.now -= self.size


@pytest.mark.parametrize("method", ["tokentm", "gmar"])
def test_a_checkpointed_model_keeps_the_input_of_each_block_and_the_inside_of_one(method: str) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=8).eval()
    images = torch.randn(1, 3, 32, 32)
    most = {}
    for checkpoint in (False, True):
        with _Saved() as saved:
            vitexplain.explain(model, images, method=method, checkpoint=checkpoint)
        most[checkpoint] = saved.most
    assert most[True] < most[False] / 3


class _TakesAWhole(nn.Module):
    """A block that returns a tuple and is called by name, as transformers' are."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, str]:  # noqa: ARG002
        return self.block(hidden_states), "more"


class _Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.wholes = nn.ModuleList(_TakesAWhole(block) for block in model.blocks)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.model._pos_embed(self.model.patch_embed(images))
        for whole in self.wholes:
            tokens, more = whole(hidden_states=tokens)
            assert more == "more"
        return self.model.forward_head(self.model.norm(tokens))


@pytest.mark.parametrize("options", [{"checkpoint": True}, {"compile": True}])
def test_blocks_that_return_tuples_and_are_called_by_name(options: dict[str, bool], eager_compiler: None) -> None:  # noqa: ARG001
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    images = images_for(model, 2)
    wrapped = _Wrapped(model).eval()
    anatomy = Anatomy(
        model=wrapped,
        blocks=tuple(BlockAnatomy(whole, whole.block.attn) for whole in wrapped.wholes),
        num_classes=model.num_classes,
        head=lambda tokens: model.forward_head(model.norm(tokens)),
        grid=lambda height, width: (height // 8, width // 8),
    )
    plain = vitexplain.explain(model, images, method="gmar")
    found = vitexplain.explain(wrapped, images, method="gmar", anatomy=anatomy, **options)
    assert relative_error(_values(found), _values(plain)) < TOLERANCE


# -- compiled ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def eager_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are taken apart by the compiler, forward and backward, but no C++ is made of them, which takes long."""
    from vitexplain import compiled

    compiled._compiled.cache_clear()
    torch._dynamo.reset()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, mode: real(forward, backend="aot_eager"))  # noqa: ARG005
    yield
    compiled._compiled.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_compiled_blocks_change_no_map(shape: str, checkpoint: bool, eager_compiler: None) -> None:  # noqa: ARG001
    model = build_model(**MODEL_SHAPES[shape])
    images = images_for(model, 2)
    plain = vitexplain.Explainer(model, own_methods()).attribute(images)
    explainer = vitexplain.Explainer(model, own_methods(), compile=True, checkpoint=checkpoint)
    for _ in range(2):
        found = explainer.attribute(images)
    for name in own_methods():
        assert relative_error(_values(found[name]), _values(plain[name])) < TOLERANCE, name


def test_blocks_of_one_class_are_compiled_once(eager_compiler: None) -> None:  # noqa: ARG001
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=6).eval()
    images = torch.randn(1, 3, 32, 32)
    explainer = vitexplain.Explainer(model, "tokentm", compile=True)
    torch._dynamo.utils.counters.clear()
    explainer.attribute(images)
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < made <= 8, "at most four parts, for the first block, whose input has no gradient, and for all others"
    explainer.attribute(images + 1)
    vitexplain.explain(model, images, method="tokentm", compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made, "nothing is compiled again"


def test_a_compiled_explanation_leaves_nothing_behind(eager_compiler: None) -> None:  # noqa: ARG001
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    images = images_for(model, 2)
    attributes = [dict(module.__dict__) for module in model.modules()]
    explainer = vitexplain.Explainer(model, "tokentm", compile=True, checkpoint=True)
    explainer.attribute(images)
    with pytest.raises(InputError):
        explainer.attribute(images, target=10**6)
    for module, before in zip(model.modules(), attributes, strict=True):
        assert module.__dict__.keys() == before.keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch compiles by a C++ compiler")
def test_the_real_compiler_agrees_too() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=48, num_heads=3).eval()
    images = torch.randn(2, 3, 32, 32)
    plain = vitexplain.explain(model, images, method="tokentm")
    found = vitexplain.explain(model, images, method="tokentm", compile=True)
    assert relative_error(_values(found), _values(plain)) < TOLERANCE


def test_what_cannot_be_compiled_is_refused() -> None:
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    images = images_for(model, 1)
    own = model.blocks[0].forward
    model.blocks[0].forward = lambda tokens: own(tokens)
    with pytest.raises(UnsupportedModelError, match="one that was set on a block"):
        vitexplain.explain(model, images, compile=True)


@pytest.mark.parametrize(
    "options",
    [{"compile": "fast"}, {"compile": "reduce-overhead"}, {"compile": None}, {"checkpoint": 1}, {"cuda_graph": "yes"}],
)
def test_other_values_of_the_switches_are_refused(options: dict[str, object]) -> None:
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    with pytest.raises(InputError, match="expected True"):
        vitexplain.Explainer(model, "tokentm", **options)
