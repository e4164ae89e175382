"""The page, in gradio: it asks ``Service`` for views and shows them; nothing of it comes from elsewhere.

Needs the extra ``serve``.
"""

from __future__ import annotations

import importlib.util
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gradio as gr
from PIL import Image

from ..errors import InputError
from ..files import write_whole
from ..heatmap import ALPHA
from ..loading import DEMO
from ..messages import brief
from ..methods import REGISTRY
from . import markup
from .address import check_address, in_url, is_loopback
from .service import (
    BY_SIGN,
    COLORMAPS,
    PREDICTED,
    STARTING_METHODS,
    SUGGESTED_MODELS,
    TOP,
    Request,
    Service,
    Session,
    View,
    grouped_methods,
)

_LARGEST_FILE = "200mb"
_STYLE = Path(__file__).with_name("page.css")
_ABOUT = (
    "Heat maps are computed on this machine by vitexplain, from the model's own attention and gradients: they say what the model "
    "used, not what is true. Photos stay here, in memory and in a temporary folder that is deleted when the server ends."
)
_PRIVATE = {  # read by gradio: nothing is reported, nothing kept in the browser
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


@contextmanager
def running(service: Service, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """A server of the page, and its address; when it ends, what was uploaded is gone.

    Args:
        service: what does the work.
        host, port: where it listens; port 0 is any free one. Where others than this machine reach it, they cannot name its
            folders as models.

    Raises:
        InputError: it cannot listen there.
    """
    port = check_address(host, port)
    with (
        tempfile.TemporaryDirectory(prefix="vitexplain_serve_", ignore_cleanup_errors=True) as folder,
        patch.dict(os.environ, _PRIVATE | {"GRADIO_TEMP_DIR": folder}),
    ):
        page = build_page(service, Path(folder), local=is_loopback(host))
        try:
            yield _launched(page, host, port)
        finally:
            page.close(verbose=False)


def _launched(page: gr.Blocks, host: str, port: int) -> str:
    """The page's address."""
    try:
        _, address, _ = page.launch(
            server_name=in_url(host),
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=_LARGEST_FILE,
            theme=gr.themes.Base(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
            css_paths=_STYLE,
        )
    except OSError as error:  # gradio wants the port at 127.0.0.1 too
        raise InputError(f"port: cannot listen at {in_url(host)}:{port}: {brief(error)}; try another --port") from error
    return str(address)


def build_page(service: Service, folder: Path, *, local: bool = True) -> gr.Blocks:
    """The page over a service; ``folder`` takes the example's photo, ``local`` is as a ``Request`` has it."""
    with gr.Blocks(title="vitexplain", analytics_enabled=False) as page:
        session = gr.State(Session())
        gr.Markdown("# vitexplain\nDrop a photo and see where a Vision Transformer looked, by several methods.", elem_id="title")
        with gr.Row(elem_classes="studio"):
            with gr.Column(scale=1, elem_classes="side"):
                photo = gr.Image(
                    type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Photo", height=260, buttons=[]
                )
                _take_any_file(photo)
                example = gr.Button("Use the example photo, a cat", size="sm", visible=_has_example())
                model = gr.Dropdown(
                    list(dict.fromkeys((DEMO, service.model, *SUGGESTED_MODELS))),
                    value=service.model,
                    allow_custom_value=True,
                    label="Model",
                    info="The shipped demo, any name of timm's, or transformers:NAME.",
                    elem_id="model",
                )
                target = gr.Dropdown(
                    [("predicted class", PREDICTED)],
                    value=PREDICTED,
                    allow_custom_value=True,
                    label="Class",
                    info="One of the likeliest, or any name or number.",
                    elem_id="class",
                )
                compare = gr.Checkbox(label="Compare with the runner-up", elem_id="compare")
                with gr.Accordion("Methods", elem_classes="later"):
                    groups = [
                        gr.CheckboxGroup(
                            named, value=[m for _, m in named if m in STARTING_METHODS], label=group, elem_classes="group"
                        )
                        for group, named in grouped_methods().items()
                    ]
                with gr.Accordion("Colours", open=False, elem_classes="later"):
                    alpha = gr.Slider(0, 1, value=ALPHA, step=0.05, label="Strength of the map", elem_id="alpha")
                    _take_any_number(alpha)
                    colormap = gr.Dropdown(list(COLORMAPS), value=BY_SIGN, label="Colour map", elem_id="colormap")
            with gr.Column(scale=3, elem_classes="shown"):
                message = gr.HTML(visible=False, elem_id="message")
                top = gr.Label(num_top_classes=TOP, label="Top classes", show_heading=False, visible=False, elem_id="top")
                results = gr.HTML(markup.EMPTY, elem_id="results")
        with gr.Accordion("What the methods are", open=False):
            gr.HTML(markup.methods())
        gr.Markdown(_ABOUT, elem_id="foot")

        def show(
            session: Session,
            photo: str | None,
            model: str,
            target: str,
            compare: bool,
            alpha: float,
            colormap: str,
            *groups: list[str],
        ) -> tuple[Any, ...]:
            methods = tuple(name for name in REGISTRY if any(name in group for group in groups))
            path = Path(photo) if photo else None
            request = Request(
                path, path.name if path else "", model or "", methods, str(target or ""), alpha, colormap, compare, local=local
            )
            return _updates(service.view(request, session))

        looks = [alpha.change, colormap.input, compare.input]
        gr.on(
            [photo.change, model.input, target.input, *looks, *(group.input for group in groups)],
            show,
            [session, photo, model, target, compare, alpha, colormap, *groups],
            [message, top, target, results],
            show_progress_on=results,
            show_progress="minimal",
            trigger_mode="always_last",
            api_visibility="private",
        )
        example.click(lambda: _write_example(folder), None, photo, api_visibility="private")
    return page


def _updates(view: View) -> tuple[Any, ...]:
    """Of the message, the top classes, the class and the results."""
    classes = [("predicted class", PREDICTED), *((f"{name} ({100 * p:.1f} %)", str(index)) for index, name, p in view.top)]
    return (
        gr.HTML(markup.message(view.message), visible=bool(view.message)),
        gr.Label(_confidences(view), visible=bool(view.top)),
        gr.Dropdown(classes) if view.message else gr.Dropdown(classes, value=view.target),
        markup.results(view),
    )


def _confidences(view: View) -> dict[str, float]:
    """Probabilities by name; two classes of one name keep apart by their numbers."""
    names = [name for _, name, _ in view.top]
    return {name if names.count(name) == 1 else f"{name} ({index})": p for index, name, p in view.top}


def _take_any_file(photo: gr.Image) -> None:
    """Hand on the path of what was uploaded: a file that is no image is for ``Service`` to refuse, with its own words."""
    setattr(photo, "preprocess", lambda payload: payload and payload.path)  # noqa: B010


def _take_any_number(slider: gr.Slider) -> None:
    """While a number is typed beside a slider, its field is empty or out of range for a moment, which is no error."""
    setattr(slider, "preprocess", lambda payload: min(max(payload or 0, slider.minimum), slider.maximum))  # noqa: B010


def _has_example() -> bool:
    return importlib.util.find_spec("skimage") is not None


def _write_example(folder: Path) -> str:
    from skimage import data

    path = folder / "cat.png"
    if not path.exists():
        buffer = io.BytesIO()
        Image.fromarray(data.chelsea()).save(buffer, "png")
        write_whole(path, buffer.getvalue())
    return str(path)
