"""Maps as they stand after each block: against models that begin there, start_block, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitexplain
from vitexplain import InputError, explainer
from vitexplain.methods import Method, TokenTM
from vitexplain.relevance import BlockTrace, Trace
from vitexplain.targets import Target
from vitexplain.testing import DenseReference
from vitexplain.testing.families import FAMILY_CASES

from .conftest import MODEL_SHAPES, build_model, images_for, relative_error
from .test_cuda_graphs import Place, Recording

GROWING = ["tokentm", "gmar", "transformer_mm", "rollout", "transformer_attribution", "attcat", "iba", "legrad"]
LAST_BLOCK_ALONE = ["raw_attention", "grad_cam", "partial_lrp", "cdam"]
AT_THE_INPUT = ["lrp", "conservative_lrp", "input_x_gradient", "integrated_gradients", "smoothgrad"]
TARGET = [[1, 4], [2, 0]]


def _beginning_at(model: nn.Module, images: Tensor, first: int) -> nn.Module:
    """The model without its first blocks: what enters the next one is its input, whatever the image."""
    entered: list[Tensor] = []
    handle = model.blocks[first].register_forward_pre_hook(lambda _, args: entered.append(args[0].detach()))
    with torch.no_grad():
        model(images)
    handle.remove()
    begun = copy.deepcopy(model)
    begun.blocks = begun.blocks[first:]
    begun._pos_embed = lambda _: entered[0]
    return begun


@pytest.mark.parametrize("shape", ["registers_layerscale", "mean_pooling"])
def test_each_entry_is_the_map_of_the_model_that_begins_at_that_block(shape: str) -> None:
    model = build_model(**MODEL_SHAPES[shape]).double()
    images = images_for(model, 2).double()
    found = vitexplain.explain(model, images, TARGET, method=GROWING, rows="by_block")
    others = [name for name in GROWING if name != "tokentm"]  # which ends with the lengths of the tokens that enter block 0
    for first in range(3):
        begun = vitexplain.explain(_beginning_at(model, images, first), images, TARGET, method=others)
        for name in others:
            assert found[name].by_block.shape == (2, 2, 3, 4, 4)
            assert relative_error(found[name].by_block[:, :, first], begun[name].maps) <= 1e-6, (name, first)


def test_each_entry_is_the_chain_from_that_block_on_of_the_dense_reference() -> None:
    model = build_model(reg_tokens=2).double()
    images = images_for(model, 2).double()
    found = vitexplain.explain(model, images, [1, 2], method=["tokentm", "gmar"], rows="by_block")
    reference = DenseReference(model, images)
    for name in ("tokentm", "gmar"):
        for first in range(3):
            chain = reference.explain(name, torch.tensor([1, 2]), start_block=first)[:, 3:].view(2, 4, 4)
            assert relative_error(found[name].by_block[:, first], chain) <= 1e-6, (name, first)


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize("shape", ["class_token_n17", "attention_pooling"])
def test_the_first_entry_is_the_map_which_stays_as_it_was(shape: str, name: str) -> None:
    model = build_model(**MODEL_SHAPES[shape])
    images = images_for(model, 2)
    found = vitexplain.explain(model, images, method=name, rows="by_block")
    plain = vitexplain.explain(model, images, method=name)
    assert plain.by_block is None
    assert found.by_block.shape == (2, 3, 4, 4)
    assert found.by_block.dtype == torch.float32
    assert torch.equal(found.by_block[:, 0], found.maps)
    assert torch.equal(found.maps, plain.maps)
    assert torch.equal(found.prefix_values, plain.prefix_values)


@pytest.mark.parametrize("name", ["iba", "legrad"])
def test_what_a_block_adds_to_a_sum_of_positive_maps_is_positive(model, images, name: str) -> None:
    by_block = vitexplain.explain(model, images, method=name, rows="by_block").by_block
    shares = torch.cat([by_block[:, :-1] - by_block[:, 1:], by_block[:, -1:]], 1)
    assert (shares >= 0).all()
    assert (shares.flatten(2).amax(-1) > 0).all()


def test_blocks_below_a_methods_first_repeat_the_last_map(model, images) -> None:
    methods = {"whole": TokenTM(), "upper": TokenTM(start_block=1)}
    for asked in (methods, {"upper": methods["upper"]}):  # beside a method that goes further down, and alone
        by_block = vitexplain.explain(model, images, method=asked, rows="by_block")["upper"].by_block
        assert torch.equal(by_block[:, 0], by_block[:, 1])
        assert relative_error(by_block[:, 2], by_block[:, 1]) > 0.01


def test_with_one_block_every_method_of_tokens_has_its_map() -> None:
    model = build_model(depth=1)
    images = images_for(model, 2)
    for name, found in vitexplain.explain(model, images, method=[*GROWING, *LAST_BLOCK_ALONE], rows="by_block").items():
        assert torch.equal(found.by_block, found.maps.unsqueeze(1)), name


@pytest.mark.parametrize("options", [{"checkpoint": True}, {"score": vitexplain.margin(1, 2)}], ids=["checkpoint", "score"])
def test_it_comes_with_every_way_to_run(model, images, options: dict[str, object]) -> None:
    found = vitexplain.Explainer(model, GROWING, rows="by_block", **options).attribute(images)
    for name in ("tokentm", "gmar", "transformer_mm", "rollout"):
        begun = vitexplain.Explainer(model, name, start_block=1, **options).attribute(images)
        assert relative_error(found[name].by_block[:, 1], begun.maps) <= 1e-5, name


def test_it_is_replayed_from_a_graph(model, images, monkeypatch) -> None:
    monkeypatch.setattr("vitexplain.cuda_graphs.CapturedCall", Recording)
    monkeypatch.setattr("vitexplain.cuda_graphs._Place", Place)
    monkeypatch.setattr(explainer, "REPLAYED_ON", "cpu")
    expected = vitexplain.explain(model, images, method="iba", rows="by_block").by_block
    found = vitexplain.Explainer(model, "iba", rows="by_block", cuda_graph=True).attribute(images)
    assert torch.equal(found.by_block, expected)


@pytest.mark.parametrize("case", [case for case in FAMILY_CASES if case.is_text], ids=lambda case: case.family)
def test_texts_have_a_map_of_tokens_for_each_block_and_nothing_for_padding(case) -> None:
    pytest.importorskip(case.package, reason=f"{case.package} is an extra, and is not installed")
    model, inputs = case.model(), case.inputs(batch=2)
    found = vitexplain.explain(model, inputs, "top2", method=["transformer_mm", "attcat"], rows="by_block")
    padding = ~inputs["attention_mask"].bool()
    for name, explanation in found.items():
        blocks = explanation.by_block.shape[2]
        assert explanation.by_block.shape == (2, 2, blocks, inputs["input_ids"].shape[1])
        assert (explanation.by_block[padding[:, None, None].expand_as(explanation.by_block)] == 0).all(), name
        single = {key: value[i : i + 1, ~padding[i]] for i in (1,) for key, value in inputs.items()}
        alone = vitexplain.explain(model, single, explanation.target[1:], method=name, rows="by_block")
        assert relative_error(explanation.by_block[1:, ..., ~padding[1]], alone.by_block) <= 1e-6, name


def test_it_is_carried_by_tensors_and_files(model, images, tmp_path) -> None:
    found = vitexplain.explain(model, images, TARGET, method="gmar", rows="by_block")
    assert torch.equal(found.tensors()["by_block"], found.by_block)
    with np.load(found.save(tmp_path / "maps.npz")) as arrays:
        assert np.array_equal(arrays["by_block"], found.by_block.numpy())
    assert torch.equal(found.select(1, 1, by_block=True), found.by_block[1, 1])


@pytest.mark.parametrize("name", [*LAST_BLOCK_ALONE, *AT_THE_INPUT])
def test_methods_that_do_not_go_from_block_to_block_are_refused(model, name: str) -> None:
    if name in ("input_x_gradient", "integrated_gradients", "smoothgrad"):
        pytest.importorskip("captum", reason="captum is an extra, and is not installed")
    with pytest.raises(InputError, match=f"rows='by_block': expected methods .* several blocks, received '{name}'"):
        vitexplain.Explainer(model, ["gmar", name], rows="by_block")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: vitexplain.Explainer(m, aggregate=False, rows="by_block"), "several blocks, received 'tokentm'"),
        (lambda m: vitexplain.Explainer(m, backend="dense", rows="by_block"), "own kernels, received 'dense'"),
        (lambda m: vitexplain.Explainer(m, rows="block"), "rows: expected None, 'all' or 'by_block', received 'block'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(model, call: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(model)


@dataclass(frozen=True, kw_only=True)
class _Counting(Method):
    """Counts blocks in its state, in place, and gives that state itself."""

    name: ClassVar[str] = "counting"
    uses_gradient: ClassVar[bool] = True

    def start(self, trace: Trace, target: Target) -> Tensor:  # noqa: ARG002
        return torch.zeros_like(trace.start_rows)

    def step(self, state: Tensor, trace: Trace, block: BlockTrace, grad_out: Tensor | None) -> Tensor:  # noqa: ARG002
        return state.add_(1)

    def finish(self, state: Tensor, trace: Trace) -> Tensor:  # noqa: ARG002
        return state


def test_a_method_may_change_its_state_in_place(model, images) -> None:
    by_block = vitexplain.explain(model, images, 0, method=_Counting(), rows="by_block").by_block
    assert by_block[0, :, 0, 0].tolist() == [3, 2, 1]


def test_an_explanation_without_it_says_so(model, images) -> None:
    with pytest.raises(InputError, match="expected an explanation with rows='by_block'"):
        vitexplain.explain(model, images).select(by_block=True)


def test_gains_by_block_are_those_of_the_model_that_begins_there() -> None:
    model = build_model().double()
    images = images_for(model, 2).double()
    by_block = vitexplain.explain(model, images, [1, 2], method="iba", relevance="gain", rows="by_block").by_block
    for first in range(3):
        begun = vitexplain.explain(_beginning_at(model, images, first), images, [1, 2], method="iba", relevance="gain")
        assert relative_error(by_block[:, first], begun.maps) <= 1e-6
