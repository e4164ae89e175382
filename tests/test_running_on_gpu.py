"""The ways to run an explanation fast, on a real GPU: CUDA graphs, compiled blocks, checkpointing, nothing that waits."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import vitexplain
from vitexplain import InputError, UnsupportedModelError
from vitexplain.cuda_graphs import no_synchronisation
from vitexplain.methods import own_methods
from vitexplain.testing import DenseReference

from .conftest import MODEL_SHAPES, build_model, images_for, rms_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = ("class_token_n17", "mean_pooling", "attention_pooling")
PLAIN = [name for name in own_methods() if name not in ("lrp", "partial_lrp", "conservative_lrp", "transformer_attribution")]


def _model_and_images(shape: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    model = build_model(**MODEL_SHAPES[shape])
    images = images_for(model, 2).to("cuda", dtype)
    return model.to("cuda", dtype), images


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"cuda_graph": True}, {"compile": True}, {"compile": True, "cuda_graph": True}, {"checkpoint": True},
     {"checkpoint": True, "compile": True, "cuda_graph": True}],
    ids=lambda options: "+".join(options),
)  # fmt: skip
def test_every_way_gives_the_same_maps(shape: str, dtype: torch.dtype, options: dict[str, bool]) -> None:
    model, images = _model_and_images(shape, dtype)
    explainer = vitexplain.Explainer(model, PLAIN, **options)
    for factor, target in ((1.0, None), (0.5, None), (1.0, torch.tensor([1, 2]))):
        found = explainer.attribute(factor * images, target)
        taken = (factor * images).cpu()
        reference, plain = (DenseReference(model.cpu(), taken, kind) for kind in (torch.float64, dtype))
        model.cuda()
        for name in PLAIN:
            exact, rounded = (run.explain(name, found[name].target.cpu()).flatten(1) for run in (reference, plain))
            ours = torch.cat([found[name].prefix_values, found[name].maps.flatten(1)], -1).cpu()
            assert rms_error(ours, exact) <= 2 * rms_error(rounded, exact) + 4 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("options", [{}, {"compile": True}, {"checkpoint": True}], ids=["plain", "compile", "checkpoint"])
def test_without_checks_nothing_waits_for_the_gpu(options: dict[str, bool]) -> None:
    model, images = _model_and_images("class_token_n17", torch.bfloat16)
    explainer = vitexplain.Explainer(model, PLAIN, **options)
    target = torch.tensor([1, 2], device="cuda")
    explainer.attribute(images, target)
    with no_synchronisation():
        explainer.attribute(images, target, check_values=False)


def test_replayed_calls_wait_for_nothing_and_check_at_the_end() -> None:
    model, images = _model_and_images("class_token_n17")
    explainer = vitexplain.Explainer(model, "tokentm", cuda_graph=True)
    explainer.attribute(images)
    with no_synchronisation():
        explainer.attribute(images, check_values=False)
    for wrong in (images * float("nan"), images.sign() * 3e38):
        with pytest.raises(InputError, match="expected finite"):
            explainer.attribute(wrong)
    with pytest.raises(InputError, match="expected classes 0 to"):
        explainer.attribute(images, torch.tensor([0, 99], device="cuda"))
    assert torch.isfinite(explainer.attribute(images).maps).all(), "the device is still there"


def test_a_model_that_waits_is_refused_a_graph() -> None:
    model, images = _model_and_images("class_token_n17")
    model.blocks[0].register_forward_hook(lambda _m, _i, out: out * float(out.sum() < 0))
    with pytest.raises(UnsupportedModelError, match="cannot be captured"):
        vitexplain.explain(model, images, cuda_graph=True)
    assert torch.isfinite(vitexplain.explain(model, images).maps).all()


def test_checkpointing_takes_a_fraction_of_the_memory() -> None:
    model = timm.create_model("vit_small_patch16_224", img_size=512).eval().to("cuda", torch.bfloat16)
    images = torch.randn(4, 3, 512, 512, device="cuda", dtype=torch.bfloat16)
    peaks = []
    for checkpoint in (False, True):
        explainer = vitexplain.Explainer(model, "tokentm", checkpoint=checkpoint)
        explainer.attribute(images)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        explainer.attribute(images)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0] / 2


@pytest.mark.parametrize(
    "options", [{"checkpoint": True}, {"cuda_graph": True}, {"checkpoint": True, "cuda_graph": True}], ids=str
)
def test_relevance_is_the_same_however_it_is_run(options: dict[str, bool]) -> None:
    model, images = _model_and_images("class_token_n17")
    methods = ["transformer_attribution", "partial_lrp", "conservative_lrp"]
    plain = vitexplain.Explainer(model, methods).attribute(images)
    explainer = vitexplain.Explainer(model, methods, **options)
    for _ in range(2):
        found = explainer.attribute(images)
    for name in methods:
        assert rms_error(found[name].maps, plain[name].maps) < 1e-3, name
    with no_synchronisation():
        explainer.attribute(images, check_values=False)


def test_streams_that_replay_one_graph_wait_for_each_other() -> None:
    model, images = _model_and_images("class_token_n17")
    explainer = vitexplain.Explainer(model, "tokentm", cuda_graph=True)
    batches = [images * factor for factor in torch.linspace(0.2, 2, 24).tolist()]
    expected = [vitexplain.explain(model, batch).maps for batch in batches]
    explainer.attribute(images)
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in range(4)], []
    for number, batch in enumerate(batches):
        with torch.cuda.stream(streams[number % 4]):
            found.append(explainer.attribute(batch, check_values=False).maps)
    torch.cuda.synchronize()
    for ours, exact in zip(found, expected, strict=True):
        assert rms_error(ours, exact) < 1e-4


def test_graphs_of_several_shapes_share_their_memory() -> None:
    model = timm.create_model("vit_small_patch16_224").eval().to("cuda", torch.bfloat16)
    explainer = vitexplain.Explainer(model, "tokentm", cuda_graph=True)
    reserved = []
    for count in (64, 63, 62, 61):
        explainer.attribute(torch.randn(count, 3, 224, 224, device="cuda", dtype=torch.bfloat16))
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] < 1.6 * reserved[0]
