"""Compiled blocks and activation checkpointing: the same maps, and what they are for."""

from __future__ import annotations

import shutil

import pytest
import timm
import torch
from torch import Tensor, nn

import vitexplain
from vitexplain import Anatomy, InputError, UnsupportedModelError
from vitexplain.methods import GMAR, TokenTM, own_methods
from vitexplain.models import BlockAnatomy, read_anatomy
from vitexplain.relevance import Trace
from vitexplain.tap import BlockTrace
from vitexplain.testing import relative_error

from .conftest import MODEL_SHAPES, build_model, images_for
from .test_families import CASES, taken

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


class _AddsInPlace(nn.Module):
    """A block that changes its tokens in place, as some do."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.attn = block, block.attn

    def forward(self, tokens: Tensor) -> Tensor:
        added = self.attn(self.block.norm1(tokens))
        tokens = tokens.clone()
        tokens += added
        return tokens + self.block.mlp(self.block.norm2(tokens))


def test_relevance_of_blocks_that_add_in_place() -> None:
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    images = images_for(model, 2)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = _AddsInPlace(block)
    anatomy = Anatomy(
        model=model,
        blocks=tuple(BlockAnatomy(block, block.attn) for block in model.blocks),
        num_classes=model.num_classes,
        head=lambda tokens: model.forward_head(model.norm(tokens)),
        grid=lambda height, width: (height // 8, width // 8),
    )
    found, plain = (
        vitexplain.explain(model, images, method="transformer_attribution", anatomy=anatomy, checkpoint=checkpoint)
        for checkpoint in (True, False)
    )
    assert relative_error(_values(found), _values(plain)) < TOLERANCE


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


def test_a_checkpointed_block_lets_go_of_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    step = GMAR.step

    def counting(self: GMAR, state: object, trace: Trace, block: BlockTrace, grad_out: Tensor | None) -> object:
        held.append(sum(hasattr(other, "query") for other in trace.blocks))
        return step(self, state, trace, block, grad_out)

    monkeypatch.setattr(GMAR, "step", counting)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=5).eval()
    for checkpoint, expected in ((False, [5] * 5), (True, [1, 2, 2, 2, 2])):
        held.clear()
        vitexplain.explain(model, torch.randn(1, 3, 32, 32), method="gmar", checkpoint=checkpoint)
        assert held == expected, "the last block's, which is not run again, and the one that is being run again"


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


# How the head reads the tokens and whether blocks are run again are apart from each other.
@pytest.mark.parametrize(("shape", "checkpoint"), [*((shape, False) for shape in SHAPES), (SHAPES[0], True)])
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
    with pytest.raises(InputError, match="compile: expected a method without rules of its own"):
        vitexplain.Explainer(model, ["lrp", "conservative_lrp"], compile=True)


def test_hooks_where_a_branch_is_read_are_refused(eager_compiler: None) -> None:  # noqa: ARG001
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    images = images_for(model, 1)
    read_anatomy(model).blocks[0].branches.mlp_output.register_forward_hook(lambda _m, _i, out: 2 * out)
    with pytest.raises(UnsupportedModelError, match="without hooks and with its class's forward"):
        vitexplain.explain(model, images, compile=True)
    found, plain = (vitexplain.explain(model, images, method="gmar", compile=compiled) for compiled in (True, False))
    assert relative_error(_values(found), _values(plain)) < TOLERANCE


def test_hooks_are_run_whenever_they_come(eager_compiler: None) -> None:  # noqa: ARG001
    """Compiled code is shared by all models of a class, with hooks or without."""
    model, other = (build_model(**MODEL_SHAPES["class_token_n17"]) for _ in range(2))
    images = images_for(model, 2)
    before = vitexplain.explain(model, images, method="gmar", compile=True)
    other.blocks[1].attn.proj.register_forward_hook(lambda _m, _i, out: -out)
    for explained in (other, model, other):
        found, plain = (vitexplain.explain(explained, images, method="gmar", compile=compiled) for compiled in (True, False))
        assert relative_error(_values(found), _values(plain)) < TOLERANCE
    assert not torch.equal(_values(found), _values(before))


def test_another_forward_of_the_class_is_compiled_anew(monkeypatch: pytest.MonkeyPatch, eager_compiler: None) -> None:  # noqa: ARG001
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    images = images_for(model, 2)
    before = vitexplain.explain(model, images, method="gmar", compile=True)
    kind = type(model.blocks[0])
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, tokens, **more: 2 * own(self, tokens, **more))
    found, plain = (vitexplain.explain(model, images, method="gmar", compile=compiled) for compiled in (True, False))
    assert relative_error(_values(found), _values(plain)) < TOLERANCE
    assert not torch.equal(_values(found), _values(before))


def test_compiled_blocks_serve_one_target_then_several_and_several_scores(eager_compiler: None) -> None:  # noqa: ARG001
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    images = images_for(model, 2)
    methods = {"logit": "tokentm", "probability": TokenTM(score="probability"), "attcat": "attcat"}
    plain, explainer = vitexplain.Explainer(model, methods), vitexplain.Explainer(model, methods, compile=True)
    for count, target in ((2, None), (2, "top3"), (1, None), (2, 1)):
        expected, found = plain.attribute(images[:count], target), explainer.attribute(images[:count], target)
        for label in methods:
            assert relative_error(found[label].maps, expected[label].maps) < TOLERANCE


def test_nothing_stays_behind_where_a_compiled_block_fails(monkeypatch: pytest.MonkeyPatch, eager_compiler: None) -> None:  # noqa: ARG001
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    attributes = [set(module.__dict__) for module in model.modules()]

    class Broken(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:  # noqa: ARG002
            raise KeyError("broken")

    act = model.blocks[1].mlp.act
    model.blocks[1].mlp.act = Broken()
    with pytest.raises(KeyError):
        vitexplain.explain(model, images_for(model, 1), compile=True)
    model.blocks[1].mlp.act = act
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch._functorch.config.donated_buffer


@pytest.mark.parametrize("switch", ["compile", "checkpoint"])
@pytest.mark.parametrize(
    "name",
    ["torchvision ViT", "transformers BERT, padded texts", "timm BEiT (relative position bias)", "timm EVA-02 (RoPE, SwiGLU)"],
)
def test_other_families(name: str, switch: str, eager_compiler: None) -> None:  # noqa: ARG001
    case = CASES[name]
    pytest.importorskip(case.package, reason=f"{case.package} is an extra, and is not installed")
    model, inputs, score = case.model(torch.float32), case.inputs(torch.float32), case.score()
    methods = taken(case, ["gmar", "iba", "attcat", "transformer_attribution"])
    found, plain = (vitexplain.explain(model, inputs, method=methods, score=score, **{switch: on}) for on in (True, False))
    for method in methods:
        assert relative_error(_values(found[method]), _values(plain[method])) < TOLERANCE, method


@pytest.mark.parametrize(
    "options",
    [{"compile": "fast"}, {"compile": "reduce-overhead"}, {"compile": None}, {"checkpoint": 1}, {"cuda_graph": "yes"}],
)
def test_other_values_of_the_switches_are_refused(options: dict[str, object]) -> None:
    model = build_model(**MODEL_SHAPES["class_token_n17"])
    with pytest.raises(InputError, match="expected True"):
        vitexplain.Explainer(model, "tokentm", **options)
