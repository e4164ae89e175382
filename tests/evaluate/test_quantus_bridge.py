"""The bridge to Quantus: every metric it lists works or is refused with a reason, and nothing is left behind."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vitexplain import Explainer
from vitexplain.errors import InputError, UnknownNameError
from vitexplain.evaluate.quantus_bridge import build_metric, metric_names, quantus_explainer, quantus_scores

from ..conftest import build_model, images_for

quantus = pytest.importorskip("quantus", reason="the bridge needs Quantus")

_STEPS = {"features_in_step": 256}
_DRAWS = {"nr_samples": 2}

# Few samples: what is tested is that the metric runs and what comes back.
CHEAP: dict[str, dict[str, Any]] = {
    "Faithfulness Correlation": {"nr_runs": 3},
    "Faithfulness Estimate": _STEPS,
    "Pixel-Flipping": _STEPS,
    "Monotonicity-Nguyen": _STEPS | _DRAWS,
    "ROAD": {"percentages": [20, 60]},
    "Infidelity": {"n_perturb_samples": 1, "perturb_patch_sizes": [16]},
    "Continuity Test": {"nr_steps": 3},
    "Local Lipschitz Estimate": _DRAWS,
    "Max-Sensitivity": _DRAWS,
    "Avg-Sensitivity": _DRAWS,
    "Relative Input Stability": _DRAWS | {"return_nan_when_prediction_changes": False},
    "Relative Output Stability": _DRAWS | {"return_nan_when_prediction_changes": False},
    "Relative Representation Stability": _DRAWS | {"return_nan_when_prediction_changes": False, "layer_names": ["blocks.0"]},
    "Smooth MPRT": _DRAWS,
}

REFUSED = {
    "SensitivityN": "correlated over the images of a batch",
    "Focus": "mosaics of four images",
    "Monotonicity-Arya": "every map scores 1",
}
SLOW = ("NonSensitivity",)  # a forward for every value of an image: has its test below, on smaller images
NEEDS_MASKS = (
    "Pointing Game",
    "Top-K Intersection",
    "Relevance Mass Accuracy",
    "Relevance Rank Accuracy",
    "Attribution Localisation",
    "AUC",
)
EXPLAINS_AGAIN = (
    "Continuity Test",
    "Local Lipschitz Estimate",
    "Max-Sensitivity",
    "Avg-Sensitivity",
    "Relative Input Stability",
    "Relative Output Stability",
    "Relative Representation Stability",
    "MPRT",
    "Smooth MPRT",
    "Efficient MPRT",
    "Random Logit",
    "InputInvariance",
)
COMPARES_IMAGES = ("Sufficiency", "Consistency")


def metric(name: str, **params: Any) -> Any:
    return build_metric(name, **CHEAP.get(name, {}) | params)


class Case:
    """Three images with their maps and masks."""

    def __init__(self, **options: Any) -> None:
        self.model = build_model(**{"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5} | options)
        self.images = images_for(self.model, 3)
        with torch.no_grad():
            self.targets = self.model(self.images).argmax(1)
        self.explain = quantus_explainer("tokentm")
        self.maps = torch.from_numpy(self.explain(self.model, self.images.numpy(), self.targets.numpy())).squeeze(1)
        self.masks = torch.zeros(self.maps.shape, dtype=torch.bool)
        self.masks[:, 8:20, 4:18] = True

    def scores(self, metric: Any, count: int = 3, **changes: Any) -> np.ndarray:
        given = dict(images=self.images, targets=self.targets, maps=self.maps, masks=self.masks)
        given = {key: value[:count] for key, value in given.items()} | {"explain_func": self.explain, "model": self.model}
        return quantus_scores(metric, **given | changes)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


# -- every metric --------------------------------------------------------------------------------------------------------


def test_the_tables_above_name_metrics_that_exist():
    for names in (CHEAP, REFUSED, SLOW, NEEDS_MASKS, EXPLAINS_AGAIN, COMPARES_IMAGES):
        assert set(names) <= set(metric_names())


@pytest.mark.parametrize("name", [name for name in metric_names() if name not in (*REFUSED, *SLOW)])
def test_a_metric_gives_one_number_an_image(case: Case, name: str):
    scores = case.scores(metric(name))
    assert scores.shape == (3,)
    assert scores.dtype == np.float64
    assert np.isfinite(scores).all()
    np.testing.assert_array_equal(case.scores(metric(name)), scores, err_msg="the same seed gives the same numbers")


@pytest.mark.parametrize("name", REFUSED)
def test_a_metric_without_a_number_for_each_map_is_refused(case: Case, name: str):
    with pytest.raises(InputError, match=REFUSED[name]):
        case.scores(name)


def test_non_sensitivity_runs_the_model_once_a_value():
    small = Case(img_size=16)
    small.masks = torch.zeros(3, 16, 16, dtype=torch.bool)
    assert (small.scores("NonSensitivity", count=1) >= 0).all()


def test_monotonicity_of_quantus_does_not_see_the_map(case: Case):
    """Why it is refused; once it sees the map, it can be let in."""
    kind = quantus.Monotonicity(features_in_step=256, disable_warnings=True)
    arrays = dict(x_batch=case.images.numpy(), y_batch=case.targets.numpy())
    for maps in (case.maps, -case.maps + case.maps.max(), torch.rand(case.maps.shape)):
        assert all(kind(case.model, a_batch=maps.unsqueeze(1).numpy(), channel_first=True, **arrays))


@pytest.mark.parametrize("name", NEEDS_MASKS)
def test_localisation_needs_masks(case: Case, name: str):
    with pytest.raises(InputError, match=r"expected masks of shape \(3, 32, 32\), received None"):
        case.scores(metric(name), masks=None)


@pytest.mark.parametrize("name", EXPLAINS_AGAIN)
def test_metrics_that_explain_again_need_an_explain_func(case: Case, name: str):
    with pytest.raises(InputError, match="expected an explain_func"):
        case.scores(metric(name), explain_func=None)


@pytest.mark.parametrize("name", COMPARES_IMAGES)
def test_metrics_that_compare_images_need_two_and_see_all(case: Case, name: str):
    with pytest.raises(InputError, match="at least two images"):
        case.scores(name, count=1)
    np.testing.assert_array_equal(case.scores(name, batch_size=1), case.scores(name))


# -- what the numbers are ------------------------------------------------------------------------------------------------

DETERMINISTIC = [
    name
    for name in metric_names()
    if name not in (*REFUSED, *SLOW, *COMPARES_IMAGES, "Faithfulness Correlation", "Monotonicity-Nguyen", "Smooth MPRT", "ROAD")
    and not CHEAP.get(name, {}).keys() & _DRAWS.keys()
]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_score_of_an_image_does_not_depend_on_the_others(case: Case, name: str):
    larger = torch.tensor([1.0, 50.0, 0.01])[:, None, None] * case.maps  # as if the others had other units
    if name in EXPLAINS_AGAIN or name in ("Infidelity", "Completeness"):
        larger = case.maps
    np.testing.assert_allclose(
        case.scores(metric(name), count=1), case.scores(metric(name), maps=larger)[:1], rtol=1e-3, err_msg=name
    )


def test_pixel_flipping_is_the_area_under_its_curve(case: Case):
    arrays = dict(x_batch=case.images.numpy(), y_batch=case.targets.numpy(), a_batch=case.maps.unsqueeze(1).numpy())
    curves = np.array(metric("Pixel-Flipping")(case.model, **arrays, channel_first=True))
    expected = np.trapezoid(curves, dx=1, axis=1)
    np.testing.assert_allclose(case.scores(metric("Pixel-Flipping")), expected, rtol=1e-6)
    np.testing.assert_allclose(case.scores(metric("Pixel-Flipping", return_auc_per_sample=True)), expected, rtol=1e-6)


def test_mprt_is_the_mean_over_layers_or_the_last(case: Case):
    layers = metric("MPRT")(
        case.model,
        x_batch=case.images.numpy(),
        y_batch=case.targets.numpy(),
        a_batch=case.maps.unsqueeze(1).numpy(),
        explain_func=case.explain,
    )
    by_layer = np.array(list(layers.values()))
    np.testing.assert_allclose(by_layer[0], 1)  # the untouched model's: our maps are what explain_func makes
    np.testing.assert_allclose(case.scores(metric("MPRT")), by_layer.mean(0), rtol=1e-5)
    np.testing.assert_allclose(case.scores(metric("MPRT", return_average_correlation=True)), by_layer.mean(0), rtol=1e-5)
    np.testing.assert_allclose(case.scores(metric("MPRT", skip_layers=True)), by_layer[-1], rtol=1e-5)
    assert (by_layer[-1] < 0.9).all(), "the copies that Quantus randomises are what explain_func explains"


@pytest.mark.parametrize("name", ["Continuity Test", "Efficient MPRT"])
def test_two_metrics_score_what_they_explain_themselves(case: Case, name: str):
    other = 1 - case.maps / case.maps.amax((1, 2), keepdim=True)
    np.testing.assert_array_equal(case.scores(metric(name), maps=other), case.scores(metric(name)))


def test_an_aggregate_over_images_is_not_asked_for(case: Case):
    for aggregate in (True, False):
        assert case.scores(quantus.Complexity(return_aggregate=aggregate, disable_warnings=True)).shape == (3,)


def test_road_removes_the_percentage_of_pixels_in_all_channels(case: Case):
    shares = []

    def spy(arr: np.ndarray, indices: np.ndarray, **_: Any) -> np.ndarray:
        shares.append(len(indices) / arr[0].size)
        top = case.maps[0].flatten().argsort(descending=True)[: len(indices)]
        assert set(indices.tolist()) == set(top.tolist())
        changed = arr.copy()
        changed.reshape(len(arr), -1)[:, indices] = 0
        return changed

    case.scores(metric("ROAD", perturb_func=spy, percentages=[25, 50, 75]), count=1)
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.75], atol=1 / 1024)


def test_smooth_mprt_explains_by_the_function_given(case: Case):
    seen = []

    def explain(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, **_: Any) -> np.ndarray:
        seen.append(inputs)
        return case.explain(model, inputs, targets)

    before = quantus.explain
    case.scores(metric("Smooth MPRT", skip_layers=True), explain_func=explain)
    assert len(seen) == 4, "two noisy images under the model and two under the randomised one"
    assert quantus.explain is before


def test_input_invariance_holds_for_a_map_of_the_tokens(case: Case):
    """Shifting every value and the projection's bias with it leaves the tokens, and so every map that is made of them."""
    np.testing.assert_array_equal(case.scores("InputInvariance"), 1)
    pixels = quantus_explainer("input_x_gradient")
    maps = torch.from_numpy(pixels(case.model, case.images.numpy(), case.targets.numpy())).squeeze(1)
    np.testing.assert_array_equal(case.scores("InputInvariance", maps=maps, explain_func=pixels), 0)


def test_completeness_is_of_the_whole_map():
    class Bright(nn.Module):
        """Logit 1 is the sum of all values."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, images: Tensor) -> Tensor:
            total = (self.weight * images).flatten(1).sum(1)
            return torch.stack([-total, total], 1)

    images = torch.randint(0, 8, (2, 3, 16, 16)).float()
    images[:, 0, 0, 0] = 0  # the darkest value, by which Quantus replaces
    call = dict(model=Bright(), images=images, targets=torch.ones(2, dtype=torch.int64), masks=None)
    exact = build_metric("Completeness", abs=False, normalise=False)
    # Divided among three channels the thirds have to add up to the bit: maps of multiples of three do.
    maps = torch.zeros(2, 16, 16)
    maps[:, 0, 0] = images.flatten(1).sum(1)
    images[:, 1, 0, 1] += (-maps[:, 0, 0]) % 3
    maps[:, 0, 0] = images.flatten(1).sum(1)
    np.testing.assert_array_equal(quantus_scores(exact, maps=maps, **call), 1)
    maps[0, 1, 1] = 3
    np.testing.assert_array_equal(quantus_scores(exact, maps=maps, **call), [0, 1])


@pytest.mark.filterwarnings("ignore:No positive samples")
@pytest.mark.parametrize("name", NEEDS_MASKS)
def test_an_empty_mask_has_no_score(case: Case, name: str):
    masks = case.masks.clone()
    masks[1] = False
    np.testing.assert_array_equal(np.isnan(case.scores(metric(name), masks=masks)), [False, True, False])


def test_localisation_by_hand(case: Case):
    maps = torch.zeros(3, 32, 32)
    maps[0, 10, 10], maps[1, 0, 0], maps[2, 8, 4], maps[2, 0, 0] = 1, 1, 3, 1  # inside, outside, three quarters
    np.testing.assert_allclose(case.scores("Relevance Mass Accuracy", maps=maps), [1, 0, 0.75])
    np.testing.assert_allclose(case.scores("Pointing Game", maps=maps), [1, 0, 1])
    np.testing.assert_allclose(case.scores("AttributionLocalisation", maps=maps), [1, 0, 0.75])


def test_random_logit_stays_within_the_model_s_classes(case: Case):
    seen: list[int] = []

    def explain(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, **_: Any) -> np.ndarray:
        seen.extend(targets.tolist())
        return case.explain(model, inputs, targets)

    case.scores("Random Logit", explain_func=explain)
    assert len(seen) == 3
    assert all(other != target and 0 <= other < 5 for other, target in zip(seen, case.targets.tolist(), strict=True))


def test_the_seed_draws(case: Case):
    first, other = (case.scores(metric("Max-Sensitivity"), seed=seed) for seed in (0, 1))
    assert (first != other).all()


# -- nothing is left behind ----------------------------------------------------------------------------------------------


def _state(model: nn.Module) -> list[Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    modules = [(name, m.training, [len(getattr(m, hook)) for hook in hooks]) for name, m in model.named_modules()]
    return [modules, [(name, p.requires_grad, p.grad is None, id(p)) for name, p in model.named_parameters()]]


def _failing(*_: Any, **__: Any) -> np.ndarray:
    raise RuntimeError("by the test")


@pytest.mark.parametrize(
    "name", ["MPRT", "Relative Representation Stability", "InputInvariance", "Smooth MPRT", "Pixel-Flipping"]
)
@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
def test_model_metric_and_random_states_are_as_before(case: Case, name: str, fails: bool):
    model = build_model(embed_dim=32, depth=2, num_heads=2, num_classes=5)
    model.train()
    model.blocks[0].eval()
    weights, state = {key: value.clone() for key, value in model.state_dict().items()}, _state(model)
    made = metric(name, **({"perturb_func": _failing} if fails and name == "Pixel-Flipping" else {}))
    params = {key: str(value) for key, value in made.get_params.items()}
    images, maps = case.images.clone(), case.maps.clone()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    if fails:
        with pytest.raises(InputError, match="RuntimeError: by the test"):
            case.scores(made, model=model, explain_func=_failing, images=images, maps=maps)
    else:
        case.scores(made, model=model, images=images, maps=maps)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert _state(model) == state
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert {key: str(value) for key, value in made.get_params.items()} == params
    torch.testing.assert_close(images, case.images, rtol=0, atol=0)
    torch.testing.assert_close(maps, case.maps, rtol=0, atol=0)


def test_what_quantus_lends_its_models_is_the_model_itself(case: Case):
    """Same names and the same parameters, in the copies too: layers are found, and what is randomised is what runs."""
    found = []

    def explain(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, **_: Any) -> np.ndarray:
        assert isinstance(model, VisionTransformer)
        assert not model.training
        found.append({key: value.clone() for key, value in model.state_dict().items()})
        return case.explain(model, inputs, targets)

    case.scores(metric("MPRT", skip_layers=True), explain_func=explain)
    same = [key for key, value in found[0].items() if torch.equal(value, found[1][key])]
    assert found[0].keys() == case.model.state_dict().keys()
    assert set(same) == {"cls_token", "pos_embed"}, "Quantus randomises what has reset_parameters"


# -- models and dtypes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_dtypes(case: Case, dtype: torch.dtype):
    model = build_model(embed_dim=32, depth=2, num_heads=2, num_classes=5).to(dtype)
    given = dict(model=model, images=case.images.to(dtype), maps=case.maps.to(dtype))
    for name in ("Pixel-Flipping", "Max-Sensitivity", "MPRT", "Random Logit"):
        single, other = case.scores(metric(name)), case.scores(metric(name), **given)
        assert np.isfinite(other).all()
        if dtype == torch.float64 and name != "MPRT":  # whose random weights are others in another precision
            np.testing.assert_allclose(other, single, rtol=1e-2, atol=1e-3)


def test_a_model_of_transformers_is_not_taken_for_one_of_text(case: Case):
    transformers = pytest.importorskip("transformers", reason="an optional family")
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=5,
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    for name in ("Pixel-Flipping", "MPRT", "InputInvariance", "Max-Sensitivity"):
        assert case.scores(metric(name), model=model).shape == (3,)


# -- the explain function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tokentm", "gmar", "input_x_gradient"])
def test_the_explain_func_gives_the_explainer_s_maps_at_pixels(case: Case, method: str):
    explained = quantus_explainer(method)(
        model=case.model, inputs=case.images.numpy(), targets=case.targets.numpy(), device="cpu"
    )
    expected = Explainer(case.model, method).attribute(case.images, case.targets).to_image(32)
    assert explained.shape == (3, 1, 32, 32)
    assert explained.dtype == np.float32
    np.testing.assert_array_equal(explained[:, 0], expected.numpy())


def test_the_explain_func_takes_options_backend_and_no_target(case: Case):
    explain = quantus_explainer("gmar", backend="dense", norm="l2")
    expected = Explainer(case.model, "gmar", "dense", norm="l2").attribute(case.images).to_image(32)
    np.testing.assert_array_equal(explain(case.model, case.images.numpy(), None)[:, 0], expected.numpy())


def test_the_explain_func_serves_quantus_directly(case: Case):
    scores = metric("Max-Sensitivity")(
        case.model,
        x_batch=case.images.numpy(),
        y_batch=case.targets.numpy(),
        a_batch=None,
        explain_func=quantus_explainer("tokentm"),
        device="cpu",
    )
    assert len(scores) == 3


# -- refusals ------------------------------------------------------------------------------------------------------------


def test_metrics_are_found_by_either_name():
    assert type(build_metric("Pixel-Flipping")) is type(build_metric("PixelFlipping")) is quantus.PixelFlipping
    assert type(build_metric("Region Segmentation")) is type(build_metric("RegionPerturbation"))
    assert type(build_metric("pointing game")) is quantus.PointingGame
    assert not any(name != name.strip() for name in metric_names())


BAD_METRICS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("Pixel Flippin", {}, UnknownNameError, "unknown Quantus metric 'Pixel Flippin': did you mean Pixel-Flipping"),
    ("xyz", {}, UnknownNameError, "unknown Quantus metric 'xyz'"),
    ("Pixel-Flipping", {"features": 3}, InputError, "expected parameters among features_in_step, .*; received features"),
    ("MPRT", {"layer_order": "sideways"}, InputError, "expected parameters that it takes, received .*sideways"),
]


@pytest.mark.parametrize(("name", "params", "error", "message"), BAD_METRICS)
def test_build_metric_refuses(name: str, params: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        build_metric(name, **params)


BAD_CALLS: dict[str, tuple[str, Callable[[Case], dict[str, Any]], str]] = {
    "metric": ("MPRT", lambda _: {"metric": 3}, "metric: expected a name or a metric of Quantus's, received int"),
    "array": ("Complexity", lambda c: {"maps": c.maps.numpy()}, "maps: expected a tensor, received ndarray"),
    "images": (
        "Complexity",
        lambda c: {"images": c.images[0]},
        r"images: expected shape \(B, c, H, W\) .* received \(3, 32, 32\)",
    ),
    "count": ("Complexity", lambda c: {"targets": c.targets[:2]}, r"targets: expected integers of shape \(3,\), .*\(2,\)"),
    "target type": ("Complexity", lambda c: {"targets": c.targets.float()}, "targets: expected integers .*float32"),
    "map shape": ("Complexity", lambda c: {"maps": c.maps[..., ::2]}, r"maps: expected shape \(3, 32, 32\), .*\(3, 1, 32, 16\)"),
    "NaN": ("Complexity", lambda c: {"maps": c.maps / 0}, "maps: expected finite values"),
    "mask type": ("AUC", lambda c: {"masks": c.masks.float()}, "masks: expected bool of shape .*float32"),
    "mask shape": ("AUC", lambda c: {"masks": c.masks[..., 1:]}, r"masks: expected bool of shape \(3, 32, 32\)"),
    "constant": ("Complexity", lambda _: {"maps": torch.zeros(3, 32, 32)}, "Complexity: .*AssertionError: .*equal to zero"),
    "class": ("Pixel-Flipping", lambda c: {"targets": c.targets + 5}, "PixelFlipping: .*IndexError"),
    "explain_func": (
        "Max-Sensitivity",
        lambda c: {"explain_func": lambda **_: c.maps[:, :3].numpy()},
        "MaxSensitivity: .*ValueError",
    ),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_quantus_scores_refuses(case: Case, what: str):
    name, changes, message = BAD_CALLS[what]
    changed = changes(case)
    with pytest.raises(InputError, match=message):
        case.scores(changed.pop("metric", name), **changed)


@pytest.mark.parametrize("name", ["Pointing Game", "Attribution Localisation"])
def test_weights_that_quantus_gets_wrong_are_refused(case: Case, name: str):
    with pytest.raises(InputError, match="expected weighted=False"):
        case.scores(build_metric(name, weighted=True))


def test_input_invariance_needs_a_first_convolution_with_a_bias(case: Case):
    model = build_model(embed_dim=32, depth=1, num_heads=2, num_classes=5)
    model.patch_embed.proj.bias = None
    with pytest.raises(InputError, match="expected a model that begins with a convolution with a bias"):
        case.scores("InputInvariance", model=model)


def test_errors_of_ours_pass_as_they_are(case: Case):
    with pytest.raises(InputError, match=r"^images: expected finite values"):
        case.scores(metric("MPRT"), images=case.images / 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "fast"}, "backend: expected one of"),
        ({"method": "nothing"}, "unknown method 'nothing'"),
        ({"method": "gmar", "nor": "l2"}, "unknown option of gmar 'nor'"),
        ({"method": ["gmar", "tokentm"]}, "method: expected one, received gmar, tokentm"),
    ],
)
def test_quantus_explainer_refuses_before_anything_runs(arguments: dict[str, Any], message: str):
    with pytest.raises((InputError, UnknownNameError), match=message):
        quantus_explainer(**arguments)


def test_without_quantus_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "quantus", None)
    for call in (metric_names, lambda: build_metric("MPRT")):
        with pytest.raises(InputError, match=r"pip install 'vitexplain\[quantus\]'"):
            call()


def test_a_quantus_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch):
    def fails(name: str) -> None:  # noqa: ARG001
        raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.setattr("vitexplain.evaluate.quantus_bridge.importlib.import_module", fails)
    with pytest.raises(InputError, match=r"cannot be imported: .*libGL.so.1: cannot open shared object file"):
        metric_names()
