"""``vitexplain serve``: the work without a page, and the page in a real browser."""

from __future__ import annotations

import base64
import io
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import ResPostBlock, VisionTransformer

from vitexplain import Explainer, InputError, UnknownNameError, UnsupportedModelError
from vitexplain.hugging_face import within_reach
from vitexplain.loading import LoadedModel, load_model, untrained_model
from vitexplain.methods import REGISTRY
from vitexplain.serve import markup, service
from vitexplain.serve.address import check_address, in_url, is_loopback
from vitexplain.serve.service import (
    COLORMAPS,
    PREDICTED,
    STARTING_METHODS,
    SUGGESTED_MODELS,
    Picture,
    Request,
    Service,
    Session,
    View,
    grouped_methods,
)

from .browser import Opened, watched
from .conftest import build_model

TITLES = {name: kind.title for name, kind in REGISTRY.items()}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A photo with a bright square on dark noise."""
    return _photo(tmp_path / "photo.png")


def _photo(path: Path, size: tuple[int, int] = (60, 90), seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 90, (*size, 3), dtype=np.uint8)
    pixels[10:40, 20:60] += 150
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def session() -> Session:
    return Session()


def _images(view: View) -> list[Image.Image]:
    return [picture.image for picture in view.pictures if picture.image is not None]


def _work(served: Service) -> tuple[int, int, int]:
    return served.loads, served.classifications, served.explanations


# -- views -----------------------------------------------------------------------------------------------------------------


def test_a_view_has_the_photo_a_map_of_each_method_and_the_likeliest_classes(photo, session) -> None:
    view = Service().view(Request(photo, methods=("gmar", "rollout")), session)
    assert view.message == ""
    assert [picture.title for picture in view.pictures] == ["Photo", TITLES["gmar"], TITLES["rollout"]]
    assert all(image.width > image.height >= 448 for image in _images(view))  # in the photo's own proportions
    assert len({image.tobytes() for image in _images(view)}) == 3
    probabilities = [p for *_, p in view.top]
    assert probabilities == sorted(probabilities, reverse=True)
    loaded = load_model("demo")
    assert [name for _, name, _ in view.top] == [loaded.class_name(index) for index, *_ in view.top]
    assert view.top[0][1] in view.heading


def test_the_maps_are_those_of_the_explainer(photo, session) -> None:
    from vitexplain.photos import load_photo

    view = Service().view(Request(photo, methods=("legrad",), target="dog", alpha=0.3), session)
    again = Service().view(Request(photo, methods=("legrad",), target="5", alpha=0.3), session)  # the first look starts anew
    assert again.target == "5"
    loaded = load_model("demo")
    image = loaded.transform(load_photo(photo)).unsqueeze(0)
    target = int(loaded.model(image).argmax())
    explanation = Explainer(loaded.model, "legrad").attribute(image, [target])
    expected = explanation.overlay(loaded.display(load_photo(photo)), alpha=0.3)
    assert _images(view)[1].tobytes() == expected.tobytes()
    dog = Explainer(loaded.model, "legrad").attribute(image, [5]).overlay(loaded.display(load_photo(photo)), alpha=0.3)
    assert _images(again)[1].tobytes() == dog.tobytes()


def test_another_look_runs_nothing(photo, session) -> None:
    served, request = Service(), Request(photo, methods=("gmar", "legrad"))
    first = served.view(request, session)
    work = _work(served)
    for look in (replace(request, alpha=0.9), replace(request, colormap="viridis"), replace(request, methods=("legrad",))):
        view = served.view(look, session)
        assert _images(view)[-1].tobytes() != _images(first)[1].tobytes()
    assert _work(served) == work


def test_another_class_or_method_runs_its_explanation_alone_and_once(photo, session) -> None:
    served, request = Service(), Request(photo, methods=("gmar",))
    predicted = served.view(request, session)
    assert _work(served) == (1, 1, 1)
    frog = served.view(replace(request, target="frog"), session)
    assert "frog" in frog.heading
    assert _images(frog)[1].tobytes() != _images(predicted)[1].tobytes()
    served.view(replace(request, methods=("gmar", "legrad")), session)
    assert _work(served) == (1, 1, 3)
    for known in (request, replace(request, target="frog"), replace(request, methods=("legrad",))):
        served.view(known, session)
    assert _work(served) == (1, 1, 3)


def test_another_photo_is_explained_for_its_own_predicted_class(photo, session, tmp_path) -> None:
    served = Service()
    served.view(Request(photo, methods=("gmar",)), session)
    assert served.view(Request(photo, methods=("gmar",), target="ship"), session).target == "ship"
    other = served.view(Request(_photo(tmp_path / "b.png", seed=1), methods=("gmar",), target="ship"), session)
    assert other.target == PREDICTED
    assert other.top[0][1] in other.heading


def test_without_a_photo_there_is_nothing_to_show(photo, session) -> None:
    served = Service()
    served.view(Request(photo, methods=("gmar",)), session)
    assert served.view(Request(None), session) == View()
    assert session.seen is None


def test_a_class_is_compared_with_the_likeliest_other_one(photo, session) -> None:
    served, request = Service(), Request(photo, methods=("gmar", "rollout"), compare=True)
    view = served.view(request, session)
    (_, first, _), (_, second, _), *_ = view.top
    assert first in view.heading
    assert second in view.heading
    assert [(picture.title, picture.wide) for picture in view.pictures] == [(TITLES["gmar"], True), (TITLES["rollout"], False)]
    wide, alone = _images(view)
    assert wide.width > 2 * alone.width
    other = served.view(replace(request, target=second), session)
    assert other.heading.index(second) < other.heading.index(first)
    work = _work(served)
    assert _images(served.view(replace(request, target=second, alpha=0.1), session))[0].tobytes() != wide.tobytes()
    assert _work(served) == work


def test_a_method_that_a_model_does_not_allow_says_so_beside_the_others(photo, session, monkeypatch) -> None:
    def refuse(self, anatomy) -> None:  # noqa: ARG001
        raise UnsupportedModelError("not this one")

    served = Service()
    monkeypatch.setattr(REGISTRY["cdam"], "check", refuse)
    view = served.view(Request(photo, methods=("gmar", "cdam")), session)
    assert view.message == ""
    assert view.pictures[2] == Picture(TITLES["cdam"], "not this one", None)
    assert view.pictures[1].image is not None


def test_a_method_with_a_defect_leaves_the_others_on_the_page(photo, session, monkeypatch, caplog) -> None:
    def break_down(*_: object) -> None:
        raise RuntimeError("a defect\nwith details")

    served = Service()
    monkeypatch.setattr(REGISTRY["input_x_gradient"], "values", break_down)
    view = served.view(Request(photo, methods=("gmar", "rollout", "input_x_gradient")), session)
    assert view.message == ""
    assert [picture.image is not None for picture in view.pictures] == [True, True, True, False]
    assert view.pictures[3] == Picture(TITLES["input_x_gradient"], "a defect", None)
    assert caplog.text.count("Traceback") == 1
    assert "with details" in caplog.text


def test_a_model_that_one_method_cannot_explain_is_explained_by_others(photo, session, monkeypatch) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=7, block_fn=ResPostBlock, init_values=0.1
    )
    monkeypatch.setattr(service, "load_model", lambda name, *_, **__: LoadedModel(name, model.eval(), CONFIG, None))
    view = Service("post_norm").view(Request(photo, model="post_norm", methods=("tokentm", "rollout")), session)
    assert view.message == ""
    _, tokentm, rollout = view.pictures
    assert rollout.image is not None
    assert tokentm.image is None
    assert re.search("'tokentm' cannot explain .*ResPostBlock", tokentm.note)


def test_a_session_keeps_so_much_in_the_hosts_memory(photo, session, monkeypatch) -> None:
    monkeypatch.setattr(service, "_KEPT_RESULTS", 3)
    served, request = Service(), Request(photo, methods=("gmar", "rollout"))
    for target in (PREDICTED, "1", "2", "3"):
        assert len(served.view(replace(request, target=target), session).pictures) == 3
    assert list(session.classes) == ["1", "2", "3"]
    assert [name for name, _ in session.maps] == ["rollout", "gmar", "rollout"]
    work = _work(served)
    served.view(replace(request, target="3"), session)
    assert _work(served) == work
    many = served.view(Request(photo, methods=("gmar", "rollout", "legrad", "cdam", "grad_cam"), target="3"), session)
    assert len(many.pictures) == 6  # more than are kept


def test_sessions_keep_apart(photo, tmp_path) -> None:
    served, one, two = Service(), Session(), Session()
    other = _photo(tmp_path / "b.png", seed=1)
    first = served.view(Request(photo, methods=("gmar",)), one)
    served.view(Request(other, methods=("gmar",)), two)
    again = served.view(Request(photo, methods=("gmar",)), one)
    assert [image.tobytes() for image in _images(again)] == [image.tobytes() for image in _images(first)]
    assert served.classifications == 2


def test_two_at_once_get_what_each_asked_for(photo, tmp_path) -> None:
    served, photos = Service(), [photo, _photo(tmp_path / "b.png", seed=1)]
    alone = [served.view(Request(path, methods=("gmar",)), Session()) for path in photos]
    with ThreadPoolExecutor(4) as pool:
        views = list(pool.map(lambda path: served.view(Request(path, methods=("gmar",)), Session()), photos * 2))
    for view, expected in zip(views, alone * 2, strict=True):
        assert view.top == expected.top
        assert [image.tobytes() for image in _images(view)] == [image.tobytes() for image in _images(expected)]


# -- what goes wrong -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.png", b"no picture at all", r"'text\.png' is not an image"),
        ("empty.png", b"", r"is empty"),
        ("cut.png", None, r"cannot read 'cut\.png'"),
    ],
)
def test_a_file_that_is_no_photo_is_named(session, tmp_path, photo, name: str, content: bytes | None, message: str) -> None:
    served, path = Service(), tmp_path / name
    path.write_bytes(photo.read_bytes()[:900] if content is None else content)
    view = served.view(Request(path, name), session)
    assert re.search(message, view.message)
    assert "\n" not in view.message
    assert view.pictures == view.top == ()
    assert served.view(Request(photo, methods=("gmar",)), session).message == ""


def test_an_enormous_photo_is_refused_by_its_size(session, monkeypatch, photo) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    view = Service().view(Request(photo, "huge.png"), session)
    assert re.search(r"huge\.png.*5400 pixels", view.message)


def test_a_long_photo_is_shown_small(session, tmp_path) -> None:
    Image.new("RGB", (2000, 40), "red").save(tmp_path / "long.png")
    view = Service().view(Request(tmp_path / "long.png", methods=("gmar",)), session)
    assert max(_images(view)[1].size) <= 1200


def test_an_unknown_model_is_answered_with_near_names_and_forgets_nothing(photo, session) -> None:
    served, request = Service(), Request(photo, methods=("gmar",))
    served.view(request, session)
    view = served.view(replace(request, model="deit_tinny_patch16_224"), session)
    assert re.search("did you mean .*deit_tiny_patch16_224", view.message)
    assert view.pictures == view.top == ()
    assert len(served.view(request, session).pictures) == 2
    assert served.loads == 1


def test_an_unknown_class_leaves_the_likeliest_ones_on_the_page(photo, session) -> None:
    served, request = Service(), Request(photo, methods=("gmar",))
    served.view(request, session)
    view = served.view(replace(request, target="dogg"), session)
    assert "did you mean" in view.message
    assert view.pictures == ()
    assert len(view.top) == 5
    assert "0 to 9" in served.view(replace(request, target="10"), session).message


def test_too_little_memory_is_said(photo, session, monkeypatch) -> None:
    served = Service()
    monkeypatch.setattr(served, "_loaded", lambda name: (_ for _ in ()).throw(torch.OutOfMemoryError(name)))
    assert "too little memory" in served.view(Request(photo), session).message


def test_a_defect_is_said_and_logged(photo, session, monkeypatch, caplog) -> None:
    served = Service()
    request = Request(photo, methods=("gmar",))
    with monkeypatch.context() as patched:
        patched.setattr(VisionTransformer, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("broken\nfor a reason")))
        assert served.view(request, session) == View("'demo' cannot be run on this photo: broken")
    assert "for a reason" in caplog.text
    assert "Traceback" in caplog.text
    assert len(served.view(request, session).pictures) == 2


@pytest.mark.parametrize("name", ["local-dir:models/vit", "transformers:/models/vit", "transformers:~/vit", "transformers:."])
def test_a_visitor_from_elsewhere_cannot_name_a_folder(photo, session, monkeypatch, name: str) -> None:
    monkeypatch.setattr(service, "load_model", lambda name, *_, **__: LoadedModel(name, _small(0), CONFIG, None))
    request = Request(photo, model=name, methods=("gmar",), local=False)
    served = Service()
    assert served.view(replace(request, model="demo"), session).message == ""
    reason = f"model: expected a name, as folders are read for visitors at this machine alone, received {name!r}"
    assert served.view(request, session) == View(reason)
    for allowed in (replace(request, model="transformers:google/vit"), replace(request, local=True)):
        assert Service().view(allowed, session).message == ""
    assert Service(name).view(request, session).message == ""


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "demos"}, UnknownNameError, "did you mean demo"),
        ({"weights": Path("none.pth")}, InputError, "no file 'none.pth'"),
        ({"device": "tpu"}, InputError, "^device: "),
        ({"backend": "tritn"}, InputError, "^backend: "),
    ],
)
def test_a_service_is_refused_before_it_starts(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Service(**arguments)


# -- models ----------------------------------------------------------------------------------------------------------------


CONFIG = dict(input_size=(3, 32, 32), interpolation="bicubic", crop_pct=1.0, mean=(0.5,) * 3, std=(0.5,) * 3)


def _small(seed: int) -> VisionTransformer:
    return build_model(seed, num_classes=7)


@pytest.fixture
def made_models(monkeypatch) -> list[tuple[str, object]]:
    """Models ``a``, ``b``, ``c`` beside the demo, and a list of what was asked to be loaded: name and weights."""
    asked = []

    def load(name, weights, device, **options) -> LoadedModel:
        asked.append((name, weights))
        return load_model(name, None, device, **options) if name == "demo" else LoadedModel(name, _small(ord(name)), CONFIG, None)

    monkeypatch.setattr(service, "load_model", load)
    return asked


def test_two_models_stay_loaded(photo, session, made_models) -> None:
    served = Service()
    for name in ("a", "demo", "b", "demo", "b", "a"):
        assert served.view(Request(photo, model=name, methods=("gmar",)), session).message == ""
    assert [name for name, _ in made_models] == ["demo", "a", "b", "a"]


@pytest.mark.usefixtures("made_models")
def test_room_is_made_before_a_model_is_loaded(photo, session, monkeypatch) -> None:
    served, load, beside = Service("a"), service.load_model, []

    def noting(name: str, *arguments: object, **options: object) -> LoadedModel:
        beside.append(list(served._models))
        return load(name, *arguments, **options)

    monkeypatch.setattr(service, "load_model", noting)
    for name in ("b", "c"):
        served.view(Request(photo, model=name, methods=("gmar",)), session)
    assert beside == [["a"], ["b"]]


@pytest.mark.parametrize("fits_alone", [True, False])
@pytest.mark.usefixtures("made_models")
def test_a_model_that_does_not_fit_beside_others_is_loaded_alone(photo, session, monkeypatch, fits_alone: bool) -> None:
    served, load = Service("a"), service.load_model

    def fill_up(name: str, *arguments: object, **options: object) -> LoadedModel:
        if served._models or not fits_alone:
            raise InputError("device: not enough free memory") from torch.OutOfMemoryError("CUDA out of memory")
        return load(name, *arguments, **options)

    monkeypatch.setattr(service, "load_model", fill_up)
    view = served.view(Request(photo, model="b", methods=("gmar",)), session)
    assert view.message == ("" if fits_alone else "device: not enough free memory")
    assert list(served._models) == (["b"] if fits_alone else [])


def test_the_suggested_models_can_be_explained() -> None:
    for name in SUGGESTED_MODELS:
        Explainer(untrained_model(name), STARTING_METHODS)


def test_a_model_that_made_room_is_not_needed_for_another_look(photo, made_models) -> None:
    served, first, second = Service("a"), Session(), Session()
    request = Request(photo, model="a", methods=("gmar",))
    served.view(replace(request, target="3"), first)
    for name in ("b", "c"):
        served.view(replace(request, model=name), second)
    view = served.view(replace(request, alpha=0.9), first)
    assert [name for name, _ in made_models] == ["a", "b", "c"]
    assert "class" in view.heading  # names are not known


def test_weights_are_those_of_the_model_they_came_with(photo, session, made_models) -> None:
    weights = Path("weights.pth")
    served = Service("a", weights)
    served.view(Request(photo, model="demo", methods=("gmar",)), session)
    assert made_models == [("a", weights), ("demo", None)]


@pytest.mark.parametrize("reached", [True, False])
def test_a_hub_out_of_reach_is_not_waited_for(monkeypatch, reached: bool) -> None:
    def resolve(*_: object) -> list[object]:
        if not reached:
            raise OSError("no such host")
        return []

    def create(*_: object, **__: object) -> None:
        offline.append(huggingface_hub.constants.HF_HUB_OFFLINE)
        raise OSError("not in the cache")

    offline: list[bool] = []
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr("timm.create_model", create)
    with pytest.raises(InputError, match="cannot be had here"):
        load_model("vit_tiny_patch16_224")
    assert offline == [not reached]
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_uses_of_the_hub_that_overlap_leave_it_as_it_was(monkeypatch) -> None:
    def resolve(*_: object) -> None:
        raise OSError("no such host")

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    offline = []

    def first() -> None:
        with within_reach():
            first_in.set()
            assert second_in.wait(10)
        first_out.set()

    def second() -> None:
        assert first_in.wait(10)
        with within_reach():
            second_in.set()
            assert first_out.wait(10)
            offline.append(huggingface_hub.constants.HF_HUB_OFFLINE)

    with ThreadPoolExecutor(2) as pool:
        for done in (pool.submit(first), pool.submit(second)):
            done.result()
    assert offline == [True]
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


# -- markup and addresses --------------------------------------------------------------------------------------------------


def test_what_is_shown_is_escaped_and_asks_for_nothing_from_elsewhere() -> None:
    hostile = "<script>alert(1)</script>"
    picture = Picture(hostile, hostile, Image.new("RGB", (4, 4)))
    view = View(heading=hostile, pictures=(picture, replace(picture, image=None)), scales=(("inferno", hostile, hostile),))
    for text in (markup.results(view), markup.message(hostile)):
        assert "<script" not in text
        assert "&lt;script" in text
    assert "http" not in markup.results(view) + markup.methods()


def test_a_photo_without_a_method_stands_alone(photo, session) -> None:
    for compare in (False, True):
        view = Service().view(Request(photo, methods=(), compare=compare), session)
        assert [picture.title for picture in view.pictures] == ["Photo"]
        assert "Drop a photo" not in markup.results(view)
    assert markup.results(replace(view, pictures=())) != markup.EMPTY
    assert markup.results(View()) == markup.EMPTY
    assert markup.results(View("wrong")) == ""


def test_every_method_is_offered_once_and_explained_in_a_line() -> None:
    offered = [name for group in grouped_methods().values() for _, name in group]
    assert sorted(offered) == sorted(REGISTRY)
    table = markup.methods()
    assert table.count("<td>") == 3 * len(REGISTRY)


def test_an_address_is_checked_before_anything_is_loaded() -> None:
    assert check_address("127.0.0.1", 0) > 0
    with pytest.raises(InputError, match=r"^port: expected 0 to 65535, received 99999"):
        check_address("127.0.0.1", 99999)
    with pytest.raises(InputError, match=r"^host: .*'not a host'"):
        check_address("not a host", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match=r"^port: cannot listen at .*in use"):
            check_address("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("not a host", False)],
)
def test_who_reaches_an_address_is_known(host: str, alone: bool) -> None:
    if host == "::1" and not socket.has_ipv6:
        pytest.skip("needs IPv6, which this Python has not")
    assert is_loopback(host) is alone
    assert in_url(host) == {"::1": "[::1]", "::": "[::]"}.get(host, host)


# -- in a browser ----------------------------------------------------------------------------------------------------------

on_a_page = pytest.mark.xdist_group("serve")  # one process, with one server and one browser


@pytest.fixture(scope="module")
def server(browser) -> Iterator[tuple[Service, str]]:  # noqa: ARG001 (without one there is nothing to serve)
    from vitexplain.serve.page import running

    served = Service()
    with running(served) as address:
        yield served, address


@pytest.fixture
def page(browser, server) -> Iterator[object]:
    """The page, opened anew; afterwards nothing may have been asked for but from the server, and no error have occurred."""
    _, address = server
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened: Opened = watched(context)
    opened.page.set_default_timeout(10_000)
    opened.page.goto(address)
    opened.page.get_by_text("Drop a photo on the left").wait_for()
    yield opened.page
    context.close()
    assert len(opened.requests) > 5
    assert [url for url in opened.requests if not url.startswith((address, "data:", "blob:"))] == []
    assert opened.errors == []


def _upload(page, path: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(path)


def _wait(page, condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until, page.locator("body").inner_text()
        page.wait_for_timeout(30)


def _titles(page) -> list[str]:
    return page.locator(".maps h3").all_inner_texts()


def _pictures(page) -> list[np.ndarray]:
    sources = page.locator(".maps img").evaluate_all("all => all.map(one => one.src)")
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))) for source in sources]


def _type(page, box: str, text: str) -> None:
    page.locator(f"#{box} input").fill(text)
    page.locator(f"#{box} input").press("Enter")


@on_a_page
def test_a_photo_is_uploaded_and_looked_at(page, server, photo) -> None:
    served, _ = server
    _upload(page, photo)
    _wait(page, lambda: len(_titles(page)) == 5)
    assert _titles(page) == ["Photo", *(TITLES[name] for name in service.STARTING_METHODS)]
    assert all(picture.std() > 5 for picture in _pictures(page))
    top = page.locator("#top").inner_text()
    expected = served.view(Request(photo), Session())
    assert all(name in top for _, name, _ in expected.top)
    assert f"{100 * expected.top[0][2]:.0f}%" in top

    page.get_by_label(TITLES["grad_cam"]).check()
    _wait(page, lambda: TITLES["grad_cam"] in _titles(page))
    assert len(_pictures(page)) == 6

    before = _pictures(page)
    _type(page, "class", "frog")
    _wait(page, lambda: "frog" in page.locator("#results h2").inner_text())
    after = _pictures(page)
    assert (before[1] != after[1]).any()
    assert (before[4] == after[4]).all()  # rollout

    work = _work(served)
    page.get_by_role("button", name="Colours").click()
    slider = page.locator("#alpha input[type=range]")
    slider.focus()
    slider.press("Home")
    _wait(page, lambda: all((one == _pictures(page)[0]).all() for one in _pictures(page)[1:]))  # nothing of the maps is left
    field = page.locator("#alpha input[type=number]")
    field.fill("")  # for a moment there is no number, or one that is too large
    field.fill("7")
    _wait(page, lambda: not any((one == _pictures(page)[0]).all() for one in _pictures(page)[1:]))
    assert page.locator(".toast-body").count() == 0
    _type(page, "colormap", "viridis")
    _wait(page, lambda: page.locator(".scales img").count() == 1)
    assert _work(served) == work

    page.get_by_label("Compare with the runner-up").check()
    _wait(page, lambda: page.locator(".maps .wide").count() == 4)  # rollout is the same for every class


@on_a_page
def test_a_wrong_model_and_a_broken_file_are_answered_and_the_page_stays_usable(page, photo, tmp_path) -> None:
    alert = page.locator("#message [role=alert]")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    _upload(page, broken)
    alert.wait_for()
    assert re.search(r"'broken\.png'", alert.inner_text())
    page.get_by_label("Clear").or_(page.get_by_label("Remove")).first.click()
    page.get_by_text("Drop a photo on the left").wait_for()

    _upload(page, photo)
    _wait(page, lambda: len(_titles(page)) == 5)
    assert alert.count() == 0
    _type(page, "model", "vit_tinny_patch16_224")
    alert.wait_for()
    assert "did you mean" in alert.inner_text()
    assert _titles(page) == []
    _type(page, "model", "demo")
    _wait(page, lambda: len(_titles(page)) == 5)


@on_a_page
def test_the_example_photo_and_a_narrow_screen(page) -> None:
    page.set_viewport_size({"width": 390, "height": 800})
    page.get_by_role("button", name="example photo").click()
    _wait(page, lambda: len(_titles(page)) == 5)
    assert "cat" in page.locator("#results h2").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator("#results").bounding_box()["y"] < page.get_by_label(TITLES["cdam"]).bounding_box()["y"]
    assert page.locator("footer a").count() == 0


@on_a_page
def test_what_was_uploaded_is_gone_with_the_server(browser, photo, tmp_path, monkeypatch) -> None:
    from vitexplain.serve.page import running

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    context = browser.new_context()
    with running(Service()) as address:
        page = watched(context).page
        page.goto(address)
        _upload(page, photo)
        _wait(page, lambda: len(_titles(page)) == 5)
        kept = [path for path in tmp_path.glob("vitexplain_serve_*/**/*") if path.is_file()]
        assert photo.read_bytes() in [path.read_bytes() for path in kept]
        context.close()
    assert list(tmp_path.glob("vitexplain_serve_*")) == []


def test_every_offered_colour_map_is_one_of_matplotlibs() -> None:
    import matplotlib

    assert set(COLORMAPS[1:]) <= set(matplotlib.colormaps)
