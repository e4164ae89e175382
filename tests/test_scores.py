"""Scores of one's own: margins, similarities, and whatever else is a function of the output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vitexplain
from vitexplain import InputError, UnsupportedModelError, margin, similarity

from .conftest import METHODS, MODEL_SHAPES, REFERENCED_METHODS, build_model, images_for, relative_error


@pytest.mark.parametrize("shape", ["class_token_n17", "mean_pooling"])
def test_a_margin_agrees_with_the_reference(shape: str) -> None:
    model = build_model(**MODEL_SHAPES[shape]).double()
    images = images_for(model, 2).double()
    ours = vitexplain.explain(model, images, method=REFERENCED_METHODS, score=margin(2, 5))
    dense = vitexplain.explain(model, images, method=REFERENCED_METHODS, score=margin(2, 5), backend="dense")
    for name in REFERENCED_METHODS:
        limit = 1e-5 if name in ("lrp", "partial_lrp") else 1e-6
        assert relative_error(ours[name].maps, dense[name].maps) <= limit, name
        assert ours[name].target is None


def test_a_logit_as_a_score_is_the_class_as_a_target(model, images) -> None:
    by_score = vitexplain.explain(model, images, method=METHODS, score=lambda logits: logits[:, 3])
    by_target = vitexplain.explain(model, images, 3, method=METHODS)
    for name in METHODS:
        assert relative_error(by_score[name].maps, by_target[name].maps) <= 1e-6, name


def test_a_margin_is_not_a_logit(model, images) -> None:
    by_margin = vitexplain.explain(model, images, score=margin(3, 4))
    assert relative_error(by_margin.maps, vitexplain.explain(model, images, 3).maps) > 1e-2
    turned = vitexplain.explain(model, images, method="conservative_lrp", score=margin(4, 3))
    straight = vitexplain.explain(model, images, method="conservative_lrp", score=margin(3, 4))
    assert relative_error(turned.maps, -straight.maps) <= 1e-5


def test_several_scores_share_a_forward_and_give_what_each_gives_alone(model, images) -> None:
    def scores(logits: Tensor) -> Tensor:
        return torch.stack([logits[:, 0] - logits[:, 1], logits.logsumexp(-1), logits[:, 2]], -1)

    together = vitexplain.explain(model, images, method=["tokentm", "iba", "transformer_attribution"], score=scores)
    for name, result in together.items():
        assert result.maps.shape == (2, 3, 4, 4)
        for k in range(3):
            alone = vitexplain.explain(model, images, method=name, score=lambda logits, k=k: scores(logits)[:, k])
            assert relative_error(result.maps[:, k], alone.maps) <= 1e-5, name


def test_prompts_are_explained_by_similarity() -> None:
    """A model without a classifier embeds; CLIP's prompts are embeddings beside its own."""
    model = build_model(num_classes=0)
    images = images_for(model, 2)
    prompts = torch.randn(3, model.num_features, generator=torch.Generator().manual_seed(0))
    result = vitexplain.explain(model, images, method=["tokentm", "lrp"], score=similarity(prompts))
    assert result["tokentm"].maps.shape == (2, 3, 4, 4)
    assert result["lrp"].maps.shape == (2, 3, 32, 32)
    assert result["tokentm"].logits.shape == (2, model.num_features)
    expected = torch.nn.functional.cosine_similarity(model(images).unsqueeze(1), prompts, dim=-1)
    torch.testing.assert_close(similarity(prompts)(model(images)), expected)
    one = vitexplain.explain(model, images, score=similarity(prompts[1]))
    assert relative_error(one.maps, result["tokentm"].maps[:, 1]) <= 1e-5


def test_a_string_is_still_a_method_option(model, images) -> None:
    assert vitexplain.explain(model, images, score="probability").options["score"] == "probability"


BAD_SCORES = {
    "with a target": (lambda m, x: vitexplain.explain(m, x, 3, score=margin(0, 1)), "target: expected None beside a score"),
    "not a tensor": (
        lambda m, x: vitexplain.explain(m, x, score=lambda _: 1.0),
        r"function to \(B,\) or \(B, K\).*received float",
    ),
    "one for the batch": (lambda m, x: vitexplain.explain(m, x, score=lambda y: y.sum()), r"received \(\)"),
    "three axes": (lambda m, x: vitexplain.explain(m, x, score=lambda y: y[..., None]), r"received \(2, 7, 1\)"),
    "no gradient": (lambda m, x: vitexplain.explain(m, x, score=lambda y: y.detach()[:, 0]), "differentiable"),
    "not finite": (lambda m, x: vitexplain.explain(m, x, score=lambda y: y[:, 0] / 0), "finite values"),
    "class out of range": (
        lambda m, x: vitexplain.explain(m, x, score=margin(0, 7)),
        "margin: expected classes 0 to 6, received 7",
    ),
    "probabilities": (
        lambda m, x: vitexplain.explain(m, x, method="iba", relevance="probability", score=margin(0, 1)),
        "'iba' with these options explains a class's probability",
    ),
    "wrong width": (lambda m, x: vitexplain.explain(m, x, score=similarity(torch.ones(3))), "width 7, received 3"),
    "integer embeddings": (lambda m, x: vitexplain.explain(m, x, score=similarity(torch.ones(7).int())), "received torch.int32"),
}


@pytest.mark.parametrize("case", BAD_SCORES)
def test_bad_scores_get_one_line_that_names_expected_and_received(model, images, case: str) -> None:
    call, message = BAD_SCORES[case]
    with pytest.raises(InputError, match=message):
        call(model, images)


def test_an_embedding_without_a_score_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="score= to say what of its embedding is explained"):
        vitexplain.Explainer(build_model(num_classes=0))


def test_an_embedding_s_norm_is_a_constant_to_relevance() -> None:
    """A similarity does not change with an embedding's length: gradient × output is 0, and with a constant norm it is the score."""
    model = build_model(num_classes=0).double()
    images = images_for(model, 2).double()
    prompt = torch.randn(model.num_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ways = [
        similarity(prompt),
        lambda outputs: torch.nn.functional.cosine_similarity(outputs, prompt.expand_as(outputs), dim=-1),
        lambda outputs: outputs / outputs.norm(dim=-1, keepdim=True) @ (prompt / prompt.norm()),
        lambda outputs: outputs / torch.linalg.vector_norm(outputs, dim=-1, keepdim=True) @ (prompt / prompt.norm()),
    ]
    methods = ["transformer_attribution", "lrp", "conservative_lrp"]
    first = vitexplain.explain(model, images, method=methods, score=ways[0])
    for way in ways[1:]:
        again = vitexplain.explain(model, images, method=methods, score=way)
        for name in methods:
            assert relative_error(again[name].maps, first[name].maps) <= 1e-6, name
    assert first["transformer_attribution"].maps.abs().max() > 1e-6
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    complete = vitexplain.explain(model, images, method="conservative_lrp", score=ways[0])
    total = complete.maps.sum((1, 2)) + complete.prefix_values.sum(1)
    torch.testing.assert_close(total.double(), ways[0](complete.logits), rtol=1e-5, atol=1e-6)
