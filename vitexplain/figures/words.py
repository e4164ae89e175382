"""Words of a text, coloured by their values."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ..errors import InputError
from ..explanation import Explanation
from ..heatmap import SCALES, check_colormap, colorize, is_signed
from .layout import INK, LEGEND_HEIGHT, MARGIN, Header, Scale, new_figure, place_legend, place_text, text_width

# Words stand on paper, not on a photo: what is low is white here, where the scale of photos is black.
UNSIGNED_COLORMAP = "Reds"
SPECIAL = frozenset(
    ("[CLS]", "[SEP]", "[PAD]", "[BOS]", "[EOS]", "<s>", "</s>", "<pad>", "<cls>", "<sep>", "<bos>", "<eos>", "<|endoftext|>")
)

_SIZE = 12  # of letters
_LINE, _BOX, _BETWEEN, _INSIDE = 0.36, 0.27, 0.07, 0.04  # in inches
_BESIDE_THE_WORD_BEFORE = frozenset(".,;:!?)]}%")


@dataclass(frozen=True)
class Piece:
    """One token as it is read.

    Attributes:
        text: without its tokenizer's marks.
        starts: whether a new word begins with it.
    """

    text: str
    starts: bool


@dataclass(frozen=True)
class _Box:
    """A piece in its place: inches from the left margin, and the number of its line."""

    left: float
    width: float
    line: int
    text: str
    color: tuple[float, float, float]


def tokens(
    words: Sequence[str],
    values: Explanation | Tensor,
    *,
    index: int = 0,
    target_index: int = 0,
    special: bool = False,
    title: str = "",
    caption: str = "",
    colormap: str | None = None,
    width: float = 9.0,
) -> Figure:
    """A text whose words have the colours of their values, wrapped like any text, with a legend.

    A word of several tokens is put together again, each part with its own colour: ``play`` ``##ing``, ``Ġplay`` ``ing`` and
    ``▁play`` ``ing`` are read as "playing". Colours are scaled over the tokens that are shown.

    Args:
        words: the n tokens of the text, as a tokenizer's ``convert_ids_to_tokens`` gives them, padding included.
        values: an explanation of texts, or the values (n,) themselves; with values below zero, on a diverging scale.
        index: which text of the explanation's batch.
        target_index: which of its K classes.
        special: show the tokens that stand for no word, too, such as ``[CLS]``, ``[SEP]`` and padding.
        title: above everything.
        caption: in small below the title.
        colormap: name of a matplotlib colour map; chosen by the values' sign where None.
        width: of the figure, in inches.

    Returns:
        A figure that belongs to no global state.

    Raises:
        InputError: tokens and values that do not fit one another, an index out of range, or an explanation of images.
        UnknownNameError: no colour map has that name.
    """
    check_colormap(colormap)
    if not 3 <= width < math.inf:
        raise InputError(f"width: expected at least 3 inches, received {width}")
    heat = _values(words, values, index, target_index)
    kept = [i for i, word in enumerate(words) if special or word not in SPECIAL]
    if not kept:
        raise InputError("words: expected at least one token that stands for a word, received none; special=True shows all")
    pieces, heat = read_tokens([words[i] for i in kept]), heat[kept]
    signed = is_signed(heat)
    scale: Scale = SCALES[True] if signed else (UNSIGNED_COLORMAP, *SCALES[False][1:])
    scale = (colormap or scale[0], *scale[1:])
    colors = colorize(heat[None], signed=signed, colormap=scale[0])[0] / 255
    return _drawn(list(_placed(pieces, colors, width - 2 * MARGIN)), scale, Header(title, caption, width - 2 * MARGIN), width)


def read_tokens(words: Sequence[str]) -> list[Piece]:
    """Tokens without the marks of their tokenizer: WordPiece's ``##``, SentencePiece's ``▁``, or bytes with ``Ġ`` for a space."""
    if any(word.startswith("Ġ") for word in words) or _hold_bytes(words):
        return list(_read_bytes(words))
    if any(word.startswith("▁") for word in words):
        return [Piece(_shown(word.removeprefix("▁")), word.startswith("▁")) for word in words]
    return [_read_wordpiece(word) for word in words]


def _read_wordpiece(word: str) -> Piece:
    """Punctuation is a token like a word there; it stands beside the word before as well."""
    if word.startswith("##") and len(word) > 2:
        return Piece(_shown(word[2:]), starts=False)
    return Piece(_shown(word), starts=word not in _BESIDE_THE_WORD_BEFORE)


def _hold_bytes(words: Sequence[str]) -> bool:
    """Whether words without a ``Ġ``, such as Chinese or one word alone, are bytes: more than ASCII, and together UTF-8."""
    written = "".join(word for word in words if word not in SPECIAL)
    if written.isascii() or any(word.startswith(("##", "▁")) for word in words):
        return False
    try:
        _bytes_of(written).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return False
    return True


def _read_bytes(words: Sequence[str]) -> Iterator[Piece]:
    """Byte-level tokens; a letter whose bytes are in several is shown in the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for word in words:
        if word in SPECIAL or not all(letter in _BYTES for letter in word):
            decoder.reset()
            yield Piece(_shown(word), True)
            continue
        encoded = _bytes_of(word)
        if not b"\x80" <= encoded[:1] < b"\xc0":  # a letter begins: one before it that was never finished is given up
            decoder.reset()
        text = decoder.decode(encoded)
        yield Piece(_shown(text.removeprefix(" ")), word.startswith("Ġ"))


def _byte_of_each_letter() -> dict[str, int]:
    """How byte-level tokenizers write bytes: printable Latin-1 as itself, the others from U+0100 on, in their order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_of_each_letter()


def _bytes_of(word: str) -> bytes:
    """What a token stands for; ``KeyError`` where one of its letters is no byte's."""
    return bytes(_BYTES[letter] for letter in word)


def _shown(text: str) -> str:
    """Something to see where a token is nothing but blank."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if text.strip() else "·"


def _values(words: Sequence[str], values: Explanation | Tensor, index: int, target_index: int) -> Tensor:
    """(n,) float32, one a word."""
    if isinstance(words, str) or not all(isinstance(word, str) for word in words):
        raise InputError("words: expected a list of the tokens as text, as a tokenizer's convert_ids_to_tokens gives them")
    if isinstance(values, Explanation):
        if not values.is_text:
            raise InputError("values: expected an explanation of texts, received one of images")
        heat = values.select(index, target_index)
    else:
        heat = values
    if not isinstance(heat, Tensor) or heat.dim() != 1 or len(heat) != len(words):
        received = f"{tuple(heat.shape)}" if isinstance(heat, Tensor) else type(heat).__name__
        raise InputError(f"values: expected one for each of the {len(words)} words, received {received}")
    if not torch.isfinite(heat).all():
        raise InputError("values: expected finite ones, received NaN or infinity")
    return heat.detach().float().cpu()


def _placed(pieces: Sequence[Piece], colors: np.ndarray, width: float) -> Iterator[_Box]:
    """Words one after the other; one that does not fit begins a new line, one wider than a line is broken between its pieces."""
    left, line = 0.0, 0
    for word in _whole_words(pieces):
        widths = {i: text_width(pieces[i].text, _SIZE) + _INSIDE for i in word}
        if left > 0 and left + sum(widths.values()) > width:
            left, line = 0.0, line + 1
        for i in word:
            if left > 0 and left + widths[i] > width:
                left, line = 0.0, line + 1
            yield _Box(left, min(widths[i], width), line, _cut(pieces[i].text, width - _INSIDE), tuple(colors[i].tolist()))
            left += widths[i]
        left += _BETWEEN


def _whole_words(pieces: Sequence[Piece]) -> Iterator[list[int]]:
    word: list[int] = []
    for i, piece in enumerate(pieces):
        if piece.starts and word:
            yield word
            word = []
        word.append(i)
    yield word


def _cut(text: str, width: float) -> str:
    """As much of a piece as a line takes."""
    if text_width(text, _SIZE) <= width:
        return text
    return _cut(text[: len(text) * 3 // 4].rstrip("…") + "…", width)


def _drawn(boxes: Sequence[_Box], scale: Scale, header: Header, width: float) -> Figure:
    height = 2 * MARGIN + header.height + (boxes[-1].line + 1) * _LINE + LEGEND_HEIGHT
    figure = new_figure(width, height)
    header.place(figure)
    for box in boxes:
        left = MARGIN + box.left
        middle = height - MARGIN - header.height - (box.line + 0.5) * _LINE
        place = (left / width, (middle - _BOX / 2) / height)
        figure.add_artist(
            Rectangle(place, box.width / width, _BOX / height, facecolor=box.color, linewidth=0, transform=figure.transFigure)
        )
        ink = INK if np.dot(box.color, (0.299, 0.587, 0.114)) > 0.5 else "white"
        place_text(figure, left + box.width / 2, middle, box.text, color=ink, size=_SIZE, ha="center", va="center_baseline")
    place_legend(figure, [scale])
    return figure
