"""Loading of models, weights and photos: what comes back, and what is refused in one line."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from vitexplain import ExplanationError, InputError, UnknownNameError
from vitexplain.loading import DEMO, load_model, resolve_device
from vitexplain.photos import load_photo, to_rgb
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
    thirty_two = to_rgb(Image.fromarray(values.astype(np.int32)))
    assert np.abs(np.asarray(thirty_two)[..., 0].astype(int) - values / 257).max() <= 1


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_floating_point_photos(top: float) -> None:
    values = np.linspace(0, top, 100, dtype=np.float32).reshape(10, 10)
    assert np.ptp(np.asarray(to_rgb(Image.fromarray(values))).astype(int)) == 255


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
