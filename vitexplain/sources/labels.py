"""Labels as written become class indices of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm.data

from ..errors import InputError
from ..loading import LoadedModel
from ..messages import some
from .base import Content


def class_indices(content: Content, classes: LoadedModel | None, name: str) -> tuple[int, ...] | None:
    """Labels as class indices, each within the model's range; None where there are none.

    Raises:
        InputError: a label that is none of the model's classes, or of several.
    """
    if content.labels is None:
        return None
    table = _meanings(content, classes, name)
    for identity, label in zip(content.ids, content.labels, strict=True):
        if label not in table:
            raise InputError(f"label: expected one of {some(map(repr, table))}, received {label!r} for {identity!r} in {name!r}")
    indices = tuple(table[label] for label in content.labels)
    _check_range(indices, content.ids, classes, name)
    return indices


def _meanings(content: Content, classes: LoadedModel | None, name: str) -> Mapping[Any, int]:
    """The class index that each label stands for."""
    used = sorted(set(content.labels or ()))  # type: ignore[type-var]
    if isinstance(used[0], str):
        return _of_names(used, used if content.names is None else content.names, classes, name)  # type: ignore[arg-type]
    if content.names is None:
        return {index: index for index in used}  # type: ignore[misc]
    return _of_named_indices(content.names, classes, name)


def _check_range(indices: Sequence[int], ids: Sequence[str], classes: LoadedModel | None, name: str) -> None:
    count = None if classes is None else classes.num_classes
    for index, identity in zip(indices, ids, strict=True):
        if index < 0 or (count is not None and index >= count):
            expected = "0 or more" if count is None else f"from 0 to {count - 1}"
            raise InputError(f"label: expected a class index {expected}, received {index} for {identity!r} in {name!r}")


def _of_names(used: Sequence[str], names: Sequence[str], classes: LoadedModel | None, name: str) -> Mapping[str, int]:
    """What each name that labels an image stands for; ``names`` are all that there are, in their order."""
    if all(map(is_integer, used)):
        return {text: int(text) for text in used}
    if classes is None:
        return {text: index for index, text in enumerate(names)}
    found = _found(used, classes)
    if len(found) == len(used):
        return found
    # Where some names are the model's own, the order of all cannot be trusted: ten folders for CIFAR-10, one of them "plane".
    complete = next((texts for texts in (names, used) if len(texts) == classes.num_classes), None)
    if not found and complete is not None:
        return {text: index for index, text in enumerate(complete)}
    raise _unresolved(used, found, classes, name)


def _of_named_indices(names: Sequence[str], classes: LoadedModel | None, name: str) -> Mapping[int, int]:
    """What each index stands for that has a name beside it."""
    as_they_are = {index: index for index in range(len(names))}
    if classes is None:
        return as_they_are
    if all(map(is_integer, names)):
        return {index: int(text) for index, text in enumerate(names)}
    found = _found(names, classes)
    one_each = len(set(found.values())) == len(names)
    if one_each or (len(found) == len(set(names)) and len(names) != classes.num_classes):
        return {index: found[text] for index, text in enumerate(names)}
    # ImageNet's own names hold some of several classes ("crane"); but most of those known must be in the model's order.
    in_place = sum(found.get(text) == index for index, text in enumerate(names))
    if not found or (len(names) == classes.num_classes and 2 * in_place > len(found)):
        return as_they_are
    raise _unresolved(names, found, classes, name)


def _found(names: Sequence[str], classes: LoadedModel) -> dict[str, int]:
    """The names that mean one class of the model, by its names or, for ImageNet's classes, by WordNet id."""
    wnids = _wnids(classes)
    known = {text: meant[0] for text, meant in classes.classes_named(names).items() if len(meant) == 1}
    return known | {text: wnids[text.strip().casefold()] for text in names if text.strip().casefold() in wnids}


def _wnids(classes: LoadedModel) -> dict[str, int]:
    subset = timm.data.infer_imagenet_subset(classes.model)
    if subset is None or classes.class_names is None:
        return {}
    return {wnid: index for index, wnid in enumerate(timm.data.ImageNetInfo(subset).label_names())}


def _unresolved(names: Sequence[str], found: Mapping[str, int], classes: LoadedModel, name: str) -> InputError:
    count = classes.num_classes
    if classes.class_names is None:
        expected = f"indices from 0 to {count - 1}, or names of exactly {count} classes, as the model's own names are not known"
        return InputError(f"labels: expected {expected}; received {len(names)} names in {name!r}: {some(map(repr, names))}")
    lost = [text for text in names if text not in found]
    several = [text for text, meant in classes.classes_named(lost).items() if len(meant) > 1]
    unknown = [text for text in lost if text not in several]
    parts = [("not among them", unknown), ("names of several", several)]
    received = "; ".join(f"{what} are {some(map(repr, texts))}" for what, texts in parts if texts)
    expected = f"names (such as {classes.class_names[0]!r}) or indices of the model's {count} classes"
    return InputError(f"labels: expected {expected}; of the {len(names)} in {name!r}, {received}")


def is_integer(text: str) -> bool:
    """Whether a text is a whole number in decimal digits."""
    return re.fullmatch(r"[+-]?[0-9]+", text) is not None
