"""Every method on a small model of every family, held to the committed table; and what the families do with their inputs."""

from __future__ import annotations

import pytest
import timm
import torch

import vitexplain
from bench.coverage import COVERAGE, REFUSED, TIMM_MODELS, Pair, TimmModel, explain_timm_model, outcomes, read
from vitexplain import InputError, UnsupportedModelError
from vitexplain.models import read_anatomy
from vitexplain.testing.families import FAMILY_CASES, FamilyCase

from .conftest import METHODS, all_tokens, relative_error

CASES = {f"{case.package} {case.family}": case for case in FAMILY_CASES}
TRANSFORMERS = [name for name in CASES if name.startswith("transformers")]
TEXTS = [name for name, case in CASES.items() if case.is_text]


def taken(case: FamilyCase, methods: list[str]) -> list[str]:
    """Those of the methods that the committed table does not refuse."""
    pairs = [pair for pair in read(COVERAGE, Pair) if (pair.package, pair.family) == (case.package, case.family)]
    refused = {pair.method for pair in pairs if pair.outcome == REFUSED}
    return [method for method in methods if method not in refused]


def _skip_without_the_package(case: FamilyCase) -> None:
    pytest.importorskip(case.package, reason=f"{case.package} is an extra, and is not installed")


@pytest.mark.parametrize("name", CASES)
def test_every_method_agrees_with_the_reference_or_is_refused_as_the_table_says(name: str) -> None:
    case = CASES[name]
    _skip_without_the_package(case)
    committed = [pair for pair in read(COVERAGE, Pair) if (pair.package, pair.family) == (case.package, case.family)]
    assert list(outcomes(case)) == committed, "python -m bench.coverage writes the table anew"


@pytest.mark.parametrize("name", CASES)
def test_a_batch_gives_what_its_parts_give_alone(name: str) -> None:
    case = CASES[name]
    _skip_without_the_package(case)
    model, inputs, score = case.model(), case.inputs(batch=3), case.score()
    methods = taken(case, METHODS)
    batch = vitexplain.explain(model, inputs, method=methods, score=score)
    for i in range(3):
        if case.is_text:  # without its padding
            kept = inputs["attention_mask"][i].bool()
            single = {key: value[i : i + 1, kept] for key, value in inputs.items()}
        else:
            single, kept = inputs[i : i + 1], slice(None)
        alone = vitexplain.explain(model, single, method=methods, score=score)
        for method in methods:
            together = all_tokens(batch[method])[i]
            assert relative_error(together[kept], all_tokens(alone[method])[0]) <= 1e-6, method
            if case.is_text:
                assert together[~kept].abs().max() == 0 if (~kept).any() else True, f"{method}: padding has a value"


@pytest.mark.parametrize("name", CASES)
def test_a_model_of_every_family_is_left_as_it_was(name: str) -> None:
    case = CASES[name]
    _skip_without_the_package(case)
    model = case.model(torch.float32).train()
    attributes = {key: sorted(vars(module)) for key, module in model.named_modules()}
    before = _state(model)
    vitexplain.explain(model, case.inputs(torch.float32), method=taken(case, METHODS), score=case.score())
    assert _state(model) == before
    assert {key: sorted(vars(module)) for key, module in model.named_modules()} == attributes


def _state(model: torch.nn.Module) -> dict[str, object]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    return {
        "hooks": [len(getattr(module, name)) for module in model.modules() for name in hooks],
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "children": [name for name, _ in model.named_modules()],
        "implementation": [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")],
        "sdpa": torch.nn.functional.scaled_dot_product_attention,
    }


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformers_model_set_to_eager_attention_is_explained_all_the_same(name: str) -> None:
    case = CASES[name]
    _skip_without_the_package(case)
    model, inputs = case.model(), case.inputs()
    expected = vitexplain.explain(model, inputs, score=case.score())
    model.set_attn_implementation("eager")
    ours = vitexplain.explain(model, inputs, score=case.score())
    assert relative_error(ours.maps, expected.maps) <= 1e-6
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["transformers ViT", "transformers DINOv2 with registers", "transformers BEiT"])
def test_other_image_sizes_where_the_model_interpolates(name: str) -> None:
    case = CASES[name]
    _skip_without_the_package(case)
    model = case.model()
    images = torch.randn(1, 3, 48, 40, dtype=torch.float64)
    ours = vitexplain.explain(model, images, method=["tokentm", "iba"])
    assert ours["tokentm"].maps.shape == (1, 6, 5)
    assert torch.isfinite(ours["iba"].maps).all()
    with pytest.raises(InputError, match="multiples of the patch size 8×8, received 30×32"):
        vitexplain.explain(model, torch.randn(1, 3, 30, 32, dtype=torch.float64))
    with pytest.raises(InputError, match="expected 3 channels"):
        vitexplain.explain(model, torch.randn(1, 1, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in CASES if "EVA-02" in name or "BEiT" in name or "padded" in name])
def test_masks_biases_and_rotations_in_low_precision(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    _skip_without_the_package(case)
    methods = taken(case, ["tokentm", "gmar", "transformer_mm", "rollout", "transformer_attribution", "conservative_lrp"])
    low = vitexplain.explain(case.model(dtype), case.inputs(dtype), 1, method=methods)
    exact = vitexplain.explain(case.model(torch.float64), case.inputs(torch.float64), 1, method=methods)
    for method in methods:
        assert torch.isfinite(low[method].maps).all(), method
        difference = all_tokens(low[method]).double() - all_tokens(exact[method]).double()
        assert difference.norm() <= 0.15 * all_tokens(exact[method]).double().norm(), method


# -- texts -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=TEXTS)
def text_case(request) -> FamilyCase:
    case = CASES[request.param]
    _skip_without_the_package(case)
    return case


def test_a_map_of_a_text_has_one_value_a_token(text_case: FamilyCase) -> None:
    model, inputs = text_case.model(torch.float32), text_case.inputs(batch=2)
    result = vitexplain.explain(model, inputs, [[0, 1], [1, 2]])
    assert result.maps.shape == (2, 2, 11)
    assert result.prefix_values.shape == (2, 2, 0)
    assert result.maps[1, :, 8:].abs().max() == 0
    for picture in (lambda: result.to_image(32), lambda: result.overlay(None), lambda: result.save("map.png")):
        with pytest.raises(InputError, match="expected an explanation of images, received one of texts"):
            picture()
    whole = vitexplain.explain(model, inputs, method="rollout", rows="all")
    assert whole.contribution.shape == (2, 11, 11)


def test_bad_texts_get_one_line_that_names_expected_and_received(text_case: FamilyCase) -> None:
    model, inputs = text_case.model(torch.float32), text_case.inputs()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    left_padded = {"input_ids": ids, "attention_mask": mask.flip(1)}
    cases = [
        (ids, "a mapping with input_ids.*received Tensor"),
        ({"attention_mask": mask}, "a mapping with input_ids"),
        ({"input_ids": ids.float()}, r"expected integers \(B, n\).*torch.float32"),
        ({"input_ids": ids[0]}, r"received torch.int64 \(11,\)"),
        ({"input_ids": ids, "attention_mask": mask[:, :5]}, r"attention_mask: expected a tensor of shape \(2, 11\)"),
        ({"input_ids": ids, "attention_mask": None}, "received NoneType"),
        ({"input_ids": ids.to("meta")}, "expected device cpu.*received meta"),
        (left_padded, "first token"),
    ]
    for bad, message in cases:
        with pytest.raises(InputError, match=message):
            vitexplain.explain(model, bad)


def test_a_decoder_is_refused() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is an extra, and is not installed")
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, is_decoder=True
    )
    with pytest.raises(UnsupportedModelError, match="decoder"):
        vitexplain.Explainer(transformers.BertForSequenceClassification(config))


# -- models that are refused, and timm's names -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cait_xxs24_224", "talking heads mix scores"),
        ("swin_tiny_patch4_window7_224", "shifted windows"),
        ("pvt_v2_b0", "merged or pooled between stages"),
        ("pit_ti_224", "merged or pooled between stages"),
        ("xcit_nano_12_p16_224", "across channels"),
        ("crossvit_tiny_240", "two scales"),
        ("resnet18", "convolutional"),
        ("mixer_s32_224", r"describe them in an Anatomy and pass it as anatomy="),
    ],
)
def test_other_architectures_are_refused_with_the_reason(name: str, reason: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedModelError, match=reason):
        vitexplain.Explainer(model)


def test_hierarchical_transformers_models_are_refused_with_the_reason() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is an extra, and is not installed")
    swin = transformers.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1], image_size=32, window_size=4)
    with pytest.raises(UnsupportedModelError, match="SwinForImageClassification: its attention is confined to shifted windows"):
        vitexplain.Explainer(transformers.SwinForImageClassification(swin))


TIMM_SAMPLES = [
    "vit_tiny_patch16_224",
    "vit_tiny_r_s16_p8_224",
    "deit_tiny_distilled_patch16_224",
    "beit_base_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_relpos_small_patch16_224",
    "vit_relpos_small_patch16_rpn_224",
    "vit_small_patch16_18x2_224",
]


@pytest.mark.parametrize("name", TIMM_SAMPLES)
def test_timm_models_are_explained_or_refused_as_the_sweep_says(name: str) -> None:
    assert explain_timm_model(name) in read(TIMM_MODELS, TimmModel)


def test_no_timm_model_of_a_supported_class_fails() -> None:
    models = read(TIMM_MODELS, TimmModel)
    assert {model.outcome for model in models} == {"explained", "refused"}
    assert all(model.reason for model in models if model.outcome == "refused")
    assert {model.kind for model in models} >= {"VisionTransformer", "VisionTransformerDistilled", "Beit", "Eva"}


def test_every_family_has_a_case() -> None:
    families = {read_anatomy(case.model()).family for case in FAMILY_CASES}
    assert families == {module.FAMILY for module in vitexplain.models.FAMILIES}
