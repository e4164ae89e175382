"""Loading of models, weights and photos: what comes back, and what is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from vitexplain import ExplanationError, InputError, UnknownNameError
from vitexplain.cli import app
from vitexplain.hugging_face import data_config
from vitexplain.loading import DEMO, LoadedModel, load_model, resolve_device
from vitexplain.photos import load_photo
from vitexplain.weights import read_state_dict

TIMM_MODEL = "test_vit"  # timm's smallest: 160 × 160 pixels, patches of 16


@pytest.fixture(scope="module")
def demo():
    return load_model(DEMO)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return timm.create_model(TIMM_MODEL).state_dict()


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


# -- models --------------------------------------------------------------------------------------------------------------


def test_the_demo_model_is_ready_to_be_explained(demo, pixels) -> None:
    assert not demo.model.training
    assert {p.dtype for p in demo.model.parameters()} == {torch.float32}
    assert demo.class_names[3] == "cat"
    assert demo.input_size == (32, 32)
    assert len(demo.mean) == len(demo.std) == 3
    image = demo.transform(Image.fromarray(pixels))
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert demo.model(image[None]).shape == (1, 10)


def test_the_demo_sees_the_whole_photo(demo) -> None:
    photo = Image.new("RGB", (300, 100), "blue")
    photo.paste("red", (100, 0, 200, 100))
    red, blue = (
        (torch.tensor(color) - torch.tensor(demo.mean)) / torch.tensor(demo.std) for color in ([1.0, 0.0, 0.0], [0.0, 0.0, 1.0])
    )
    torch.testing.assert_close(demo.transform(photo)[:, 16, 16], red)
    torch.testing.assert_close(demo.transform(photo)[:, 16, 2], blue)
    torch.testing.assert_close(demo.transform(photo)[:, 16, 29], blue)
    shown = np.asarray(demo.display(photo))
    middle = shown.shape[1] // 2
    assert (shown[:, middle] == (255, 0, 0)).all()
    assert (shown[:, 2] == (0, 0, 255)).all()


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(300, 200), (90, 400), (640, 640)])
def test_what_is_shown_is_what_the_model_saw(monkeypatch, state, tmp_path, crop_mode: str, size: tuple[int, int]) -> None:
    save_file(state, tmp_path / "w.safetensors")
    resolve = timm.data.resolve_model_data_config
    monkeypatch.setattr(timm.data, "resolve_model_data_config", lambda model: {**resolve(model), "crop_mode": crop_mode})
    loaded = load_model(TIMM_MODEL, tmp_path / "w.safetensors")
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    photo = Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (loaded.mean, loaded.std))
    seen = (loaded.transform(photo) * std + mean) * 255
    shown = loaded.display(photo)
    if crop_mode == "squash":
        assert shown.width / shown.height == pytest.approx(size[0] / size[1], rel=0.01)
    else:
        assert shown.size == (480, 480)
    shrunk = np.asarray(shown.resize((160, 160), Image.Resampling.BOX)).astype(float)
    difference = np.abs(seen.permute(1, 2, 0).numpy() - shrunk)
    assert np.quantile(difference, 0.97) < 6  # but for the edges of a border


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "module."])
def test_weights_of_every_kind_of_file(state, tmp_path, suffix: str, wrapper: str | None) -> None:
    path = tmp_path / f"w{suffix}"
    content = {f"module.{key}": value for key, value in state.items()} if wrapper == "module." else dict(state)
    if suffix == ".safetensors":
        save_file({key: value.half() for key, value in content.items()}, path)
    else:
        torch.save({wrapper: content, "epoch": 3} if wrapper in ("state_dict", "model") else content, path)
    read = read_state_dict(path)
    assert set(read) == set(state)
    assert all(value.dtype == torch.float32 for value in read.values())
    torch.testing.assert_close(read["cls_token"], state["cls_token"], atol=1e-3, rtol=1e-3)


def test_the_number_of_classes_comes_from_the_weights(state, tmp_path) -> None:
    small = {**state, "head.weight": state["head.weight"][:7].clone(), "head.bias": state["head.bias"][:7].clone()}
    save_file(small, tmp_path / "seven.safetensors")
    loaded = load_model(TIMM_MODEL, tmp_path / "seven.safetensors", dtype=torch.bfloat16)
    assert loaded.model.num_classes == 7
    assert loaded.class_names is None
    assert loaded.class_name(2) == "class 2"
    assert loaded.class_index("2") == 2
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    with pytest.raises(InputError, match="names are not known; received 'cat'"):
        loaded.class_index("cat")


def test_a_real_imagenet_model(shared) -> None:
    loaded = load_model("deit_tiny_patch16_224", shared("data/deit_tiny_patch16_224_fp16.safetensors"))
    data = pytest.importorskip("skimage.data", reason="the photo comes with scikit-image")
    logits = loaded.model(loaded.transform(Image.fromarray(data.chelsea()))[None])
    assert "cat" in loaded.class_name(int(logits.argmax()))
    assert len(loaded.class_names) == 1000
    assert loaded.class_index("Tabby") == loaded.class_index("tabby cat") == loaded.class_index("281") == 281
    with pytest.raises(InputError, match=r"name of 134 \(crane\), 517 \(crane\)"):
        loaded.class_index("crane")


def test_classes_by_index_and_name(demo) -> None:
    assert demo.class_index("3") == demo.class_index("cat") == demo.class_index(" CAT ") == 3
    for text in ("10", "-1"):
        with pytest.raises(InputError, match=f"from 0 to 9, received {text}"):
            demo.class_index(text)
    with pytest.raises(UnknownNameError, match="unknown class 'catt': did you mean cat"):
        demo.class_index("catt")


def _torch_save(content: object):
    return lambda path: torch.save(content, path)


class _Runs:
    def __reduce__(self):
        return os.system, ("echo this must not run > /dev/null",)


BAD_WEIGHTS = {
    "missing": ("w.pth", None, "there is no file"),
    "empty": ("w.pth", lambda p: p.write_bytes(b""), r"is empty \(0 bytes\)"),
    "directory": ("w.pth", lambda p: p.mkdir(), "received the directory"),
    "suffix": ("w.txt", lambda p: p.write_text("x"), "expected a file ending in .safetensors"),
    "noise": ("w.pth", lambda p: p.write_bytes(bytes(range(256)) * 9), "not a file of weights, or damaged"),
    "text": ("w.pt", lambda p: p.write_text("hello world"), "not a file of weights, or damaged"),
    "noise safetensors": ("w.safetensors", lambda p: p.write_bytes(bytes(range(256))), "not a file of weights, or damaged"),
    "module": ("w.pth", _torch_save(torch.nn.Linear(2, 2)), "refused .*torch.nn.modules.linear.Linear.*could run any code"),
    "code": ("w.bin", lambda p: p.write_bytes(pickle.dumps(_Runs(), protocol=2)), "refused .*could run any code"),
    "list": ("w.pth", _torch_save([1, 2]), "expected a state dict of tensors .* received list"),
    "other values": ("w.pth", _torch_save({"a": torch.zeros(1), "epoch": 3}), "other values under epoch"),
    "nothing": ("w.pth", _torch_save({}), "received an empty dict"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_refused_in_one_line(tmp_path, case: str) -> None:
    name, make, message = BAD_WEIGHTS[case]
    if make is not None:
        make(tmp_path / name)
    with pytest.raises(InputError, match=message) as caught:
        read_state_dict(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_truncated_weights_are_refused(state, tmp_path) -> None:
    for name, save in (("w.pth", torch.save), ("w.safetensors", save_file)):
        save(state, tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match="not a file of weights, or damaged"):
            read_state_dict(tmp_path / name)


def test_weights_that_do_not_fit_name_the_keys(state, tmp_path) -> None:
    wrong = {key: value for key, value in state.items() if key != "cls_token"}
    wrong |= {"extra": torch.zeros(1), "norm.weight": torch.zeros(5)}
    save_file(wrong, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"missing cls_token; unexpected extra; wrong shape norm.weight \(expected .*\(5,\)"):
        load_model(TIMM_MODEL, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"does not fit model 'demo'.*in all"):
        load_model(DEMO, tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_22", "unknown model 'vit_tiny_patch16_22': did you mean .*vit_tiny_patch16_224"),
        ("dem", "did you mean .*demo"),
        ("vit_tiny_patch16_224.nope", "unknown model .*did you mean vit_tiny_patch16_224"),
        ("no/such", "cannot be had here|unknown model"),
    ],
)
def test_unknown_models_list_near_ones(name: str, message: str) -> None:
    with pytest.raises(ExplanationError, match=message):
        load_model(name)


def test_weights_that_cannot_be_downloaded(monkeypatch) -> None:
    def unreachable(*_args: object, **_options: object) -> None:
        raise OSError("no route to the hub\nsecond line")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(InputError, match=r"cannot be had here; pass a file with --weights FILE \(no route to the hub\)$"):
        load_model(TIMM_MODEL)


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(InputError, match=f"received '{name}'"):
            load_model(DEMO, device=name)


# -- models of transformers ---------------------------------------------------------------------------------------------

PROCESSORS = {  # class: its settings
    "ViTImageProcessor": {"size": {"height": 32, "width": 32}},
    "DeiTImageProcessor": {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}},
    "BitImageProcessor": {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}},
}


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory) -> Path:
    """A tiny ViT as ``save_pretrained`` writes it, without a processor."""
    transformers = pytest.importorskip("transformers", reason="transformers is an extra, and is not installed")
    torch.manual_seed(0)
    names = dict(enumerate(("ant", "bee", "cat")))
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**shape, image_size=32, patch_size=8, id2label=names)
    folder = tmp_path_factory.mktemp("vit")
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return folder


def _with_processor(vit_folder: Path, folder: Path, kind: str = "ViTImageProcessor") -> Any:
    """A copy of the model beside a processor, which is returned."""
    import transformers

    shutil.copytree(vit_folder, folder, dirs_exist_ok=True)
    processor = getattr(transformers, kind)(**PROCESSORS[kind])
    processor.save_pretrained(folder)
    return processor


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_model_of_transformers_sees_what_its_processor_makes_of_a_photo(vit_folder, tmp_path, kind: str) -> None:
    processor = _with_processor(vit_folder, tmp_path, kind)
    loaded = load_model(f"transformers:{tmp_path}")
    assert loaded.class_names == ("ant", "bee", "cat")
    assert (loaded.num_classes, loaded.input_size, loaded.model.training) == (3, (32, 32), False)
    rng = np.random.default_rng(0)
    for size in ((60, 40), (40, 60), (300, 200)):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
        photo = coarse.resize(size, Image.Resampling.BICUBIC)
        expected = torch.as_tensor(np.asarray(processor(photo, return_tensors="pt")["pixel_values"][0]))
        assert (loaded.transform(photo) - expected).abs().max() < 0.03, size


def test_a_model_of_transformers_on_the_command_line(vit_folder, tmp_path, pixels) -> None:
    _with_processor(vit_folder, tmp_path)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    name, picture = f"transformers:{tmp_path}", tmp_path / "out.png"
    arguments = ["explain", str(tmp_path / "photo.png"), "--model", name, "--target", "bee", "--output", str(picture), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[0]["target"] == [{"class": 1, "name": "bee"}]
    with Image.open(picture) as drawn:
        assert drawn.width > drawn.height
    about = json.loads(CliRunner().invoke(app, ["models", name, "--json"]).stdout)
    assert (about["class"], about["blocks"], about["explained"]) == ("ViTForImageClassification", 2, True)


@pytest.mark.parametrize(
    ("change", "received"),
    [
        ({"resample": None}, {"interpolation": "bilinear"}),
        ({"resample": 4}, {"interpolation": "box"}),
        ({"size": 48}, {"input_size": (3, 48, 48), "crop_mode": "squash"}),
        ({"size": 48, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}, {"input_size": (3, 32, 32)}),
        ({"do_normalize": False}, {"mean": (0.0, 0.0, 0.0)}),
    ],
)
def test_settings_of_processors(change: dict[str, Any], received: dict[str, Any]) -> None:
    settings = {"size": {"height": 32, "width": 32}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert received.items() <= data_config({**settings, **change}, "a").items()
    del settings["resample"]
    assert data_config(settings, "a")["interpolation"] == "bilinear"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"shortest_edge": 32}}, "resizes to a height and width, received size"),
        ({"do_resize": False}, "resizes to a height and width"),
        ({"rescale_factor": 1 / 127.5}, "rescales by 1/255, received 0.00784314"),
        ({"image_mean": None}, "with image_mean and image_std"),
        ({"resample": 9}, "resamples as Pillow does, received 9"),
    ],
)
def test_a_processor_that_does_something_else_is_refused(change: dict[str, Any], message: str) -> None:
    settings = {"size": {"height": 32, "width": 32}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    with pytest.raises(InputError, match=message):
        data_config({**settings, **change}, "a")


def test_models_of_transformers_that_cannot_be_had(vit_folder, tmp_path, monkeypatch) -> None:
    started = time.perf_counter()
    with pytest.raises(InputError, match="cannot be had here: expected the name of an image classifier on the hub or its folder"):
        load_model(f"transformers:{vit_folder}")  # no processor
    with pytest.raises(InputError, match=r"model: there is no folder '.*absent'"):
        load_model(f"transformers:{tmp_path / 'absent'}")
    with pytest.raises(InputError, match=r"weights: expected none beside 'transformers:.*', .* received 'w.pth'"):
        load_model(f"transformers:{vit_folder}", "w.pth")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"needs Hugging Face transformers: pip install 'vitexplain\[transformers\]'"):
        load_model(f"transformers:{vit_folder}")
    assert time.perf_counter() - started < 30


# -- models that one has ---------------------------------------------------------------------------------------------------


def test_a_model_of_timms_that_one_has(state) -> None:
    model = timm.create_model(TIMM_MODEL)
    model.load_state_dict(state)
    loaded = LoadedModel.of(model)
    assert loaded.model is model
    assert not model.training
    assert (loaded.name, loaded.input_size, loaded.num_classes, loaded.class_names) == (
        "VisionTransformer",
        (160, 160),
        1000,
        None,
    )
    named = LoadedModel.of(model, class_names=map(str, range(1000)), name="mine")
    assert (named.name, named.class_name(7)) == ("mine", "7")


def test_a_model_that_one_has_needs_a_configuration(demo) -> None:
    model = torch.nn.Linear(2, 3)
    with pytest.raises(InputError, match=r"config: expected input_size, .* for Linear, which has no pretrained_cfg"):
        LoadedModel.of(model)
    with pytest.raises(InputError, match=r"config: expected input_size, .* received one without crop_mode"):
        LoadedModel.of(model, config={key: value for key, value in demo.config.items() if key != "crop_mode"})
    with pytest.raises(InputError, match=r"model: expected a torch\.nn\.Module, received str"):
        LoadedModel.of("demo")
    with pytest.raises(InputError, match="class_names: expected one for each of 10 classes, received 2"):
        LoadedModel.of(demo.model, config=demo.config, class_names=("a", "b"))


def test_another_way_to_the_inputs_shape_is_refused(demo) -> None:
    with pytest.raises(InputError, match="resize: expected one of model, squash, received 'crop'"):
        demo.preprocess("crop")


# -- photos --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "1", "YCbCr"])
def test_photos_of_every_mode_become_rgb(tmp_path, pixels, mode: str) -> None:
    path = tmp_path / ("photo.jpg" if mode in ("CMYK", "YCbCr") else "photo.png")
    smooth = Image.fromarray(np.full_like(pixels, 255) if mode == "1" else np.full_like(pixels, 100))
    smooth.convert(mode, dither=Image.Dither.NONE, palette=Image.Palette.ADAPTIVE).save(path)
    photo = load_photo(path)
    assert photo.mode == "RGB"
    assert photo.size == (60, 40)
    assert np.abs(np.asarray(photo).astype(int) - (255 if mode == "1" else 100)).max() <= 4


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path) -> None:
    values = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(32, 32)
    for name in ("photo.png", "photo.tif"):
        Image.fromarray(values).save(tmp_path / name)
        photo = np.asarray(load_photo(tmp_path / name)).astype(int)
        assert np.abs(photo - (values / 257)[..., None]).max() <= 1
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "photo.tif")
    thirty_two = load_photo(tmp_path / "photo.tif")
    assert np.abs(np.asarray(thirty_two)[..., 0].astype(int) - values / 257).max() <= 1


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_floating_point_photos(tmp_path, top: float) -> None:
    values = np.linspace(0, top, 100, dtype=np.float32).reshape(10, 10)
    Image.fromarray(values).save(tmp_path / "photo.tif")
    assert np.ptp(np.asarray(load_photo(tmp_path / "photo.tif")).astype(int)) == 255


def test_what_is_transparent_becomes_white(tmp_path) -> None:
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    clear.paste((0, 128, 0, 255), (0, 0, 10, 20))
    palette = clear.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    palette.info["transparency"] = palette.getpixel((15, 5))
    clear.save(tmp_path / "rgba.png")
    palette.save(tmp_path / "palette.png", transparency=palette.info["transparency"])
    clear.convert("LA").save(tmp_path / "la.png")
    for name in ("rgba.png", "palette.png", "la.png"):
        photo = load_photo(tmp_path / name)
        assert photo.getpixel((15, 5)) == (255, 255, 255), name
        assert photo.getpixel((5, 5)) != (255, 255, 255), name


def test_photos_are_turned_upright(tmp_path) -> None:
    photo = Image.new("RGB", (40, 20), "black")
    photo.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    photo.save(tmp_path / "turned.jpg", exif=exif)
    upright = load_photo(tmp_path / "turned.jpg")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5))[0] > 200 > 50 > upright.getpixel((10, 35))[0]


def test_the_first_frame_of_an_animation(tmp_path) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert load_photo(tmp_path / "moving.gif").getpixel((8, 8)) == (255, 0, 0)


def test_bad_photos_are_refused_in_one_line(tmp_path, pixels) -> None:
    Image.fromarray(pixels).resize((600, 400)).save(tmp_path / "cut.jpg")
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    Image.fromarray(pixels).resize((600, 400)).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "zero.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not a picture")
    Image.new("RGB", (2000, 2)).save(tmp_path / "thread.png")
    cases = {
        "cut.jpg": "truncated",
        "cut.png": "cannot read",
        "zero.jpg": r"is empty \(0 bytes\)",
        "text.jpg": "not an image in a known format",
        "missing.jpg": "there is no file",
        "": "received the directory",
        "thread.png": "sides within a ratio of 100, received 2000 × 2",
        "a\0b.jpg": "cannot read|there is no file",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            load_photo(tmp_path / name if "\0" not in name else name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_a_mask_goes_the_way_of_its_photo(demo, crop_mode: str) -> None:
    photo = np.zeros((48, 96, 3), np.uint8)
    photo[16:32, 24:72] = 255
    config = {**demo.config, "crop_mode": crop_mode, "crop_pct": 0.9 if crop_mode == "center" else 1.0}
    preprocess = replace(demo, config=config).preprocess("model")
    seen, mask = preprocess.seen(Image.fromarray(photo)), preprocess.mask(photo[..., 0] > 0)
    assert mask.shape == (32, 32)
    assert 0.05 < mask.float().mean() < 0.9
    assert ((seen.float().mean(0) > 140) == mask).float().mean() > 0.9


def test_a_photo_that_was_opened_elsewhere_is_read_as_one_from_a_file(tmp_path: Path) -> None:
    transparent = Image.new("RGBA", (40, 40), (200, 10, 10, 0))
    transparent.save(tmp_path / "photo.png")
    loaded, photo = load_model(DEMO), load_photo(tmp_path / "photo.png")
    assert photo.getpixel((0, 0)) == (255, 255, 255)
    assert torch.equal(loaded.transform(transparent), loaded.transform(photo))
    assert np.array_equal(loaded.display(transparent), loaded.display(photo))
