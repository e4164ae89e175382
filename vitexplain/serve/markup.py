"""What is shown, as HTML without a link, a script or anything from elsewhere: pictures stand in the text itself."""

from __future__ import annotations

import base64
from html import escape
from io import BytesIO

import matplotlib
import numpy as np
from PIL import Image

from ..methods import REGISTRY
from .service import Picture, View, grouped_methods, method_note

_QUALITY = 90
_BAR_WIDTH = 128

EMPTY = '<div class="empty">Drop a photo on the left to begin.</div>'


def message(text: str) -> str:
    """What went wrong, nothing where the text is empty."""
    return f'<div class="message" role="alert">{escape(text)}</div>' if text else ""


def results(view: View) -> str:
    """The heading, the pictures side by side, and what their colours mean."""
    if not view.heading:
        return "" if view.message else EMPTY
    pictures = "".join(_figure(picture) for picture in view.pictures)
    scales = "".join(_scale(*scale) for scale in view.scales)
    return f'<h2>{escape(view.heading)}</h2><div class="maps">{pictures}</div><div class="scales">{scales}</div>'


def methods() -> str:
    """A table of the methods: title, a line on each, and its paper."""
    rows = "".join(
        f'<tr><th colspan="3" scope="rowgroup">{escape(group)}</th></tr>' + "".join(_row(name) for _, name in named)
        for group, named in grouped_methods().items()
    )
    return f'<table class="methods"><tbody>{rows}</tbody></table>'


def _row(name: str) -> str:
    kind = REGISTRY[name]
    return f"<tr><td>{escape(kind.title)}</td><td>{escape(method_note(name))}</td><td>{escape(kind.paper)}</td></tr>"


def _figure(picture: Picture) -> str:
    title, note = escape(picture.title), escape(picture.note)
    if picture.image is None:
        return f'<figure class="failed"><h3>{title}</h3><p>{note}</p></figure>'
    image = f'<img src="{_source(picture.image, "jpeg", quality=_QUALITY)}" alt="{title}">'
    opening, image = ('<figure class="wide">', f"<div>{image}</div>") if picture.wide else ("<figure>", image)
    return f"{opening}<h3>{title}</h3>{image}<figcaption>{note}</figcaption></figure>"


def _scale(colormap: str, low: str, high: str) -> str:
    """The colours of a map from its lowest value to its highest."""
    colors = matplotlib.colormaps[colormap](np.linspace(0, 1, _BAR_WIDTH), bytes=True)[None, :, :3]
    bar = f'<img src="{_source(Image.fromarray(np.ascontiguousarray(colors)), "png")}" alt="">'
    return f"<span>{escape(low)} {bar} {escape(high)}</span>"


def _source(image: Image.Image, kind: str, **options: int) -> str:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
