"""Models without weights, and the datasets package kept off the network."""

from __future__ import annotations

import socket

import pytest
import timm.data

from vitexplain.loading import DEMO, LoadedModel, load_model

from .made import with_classes


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model(DEMO)


@pytest.fixture(scope="module")
def imagenet(demo: LoadedModel) -> LoadedModel:
    """The classes of ImageNet without the weights."""
    info = timm.data.ImageNetInfo()
    return with_classes(demo, 1000, [info.index_to_description(index) for index in range(1000)])


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The ``datasets`` package with a cache of its own, bars on as users have them, and no way out."""
    datasets = pytest.importorskip("datasets", reason="needs the extra huggingface")

    def refuse(*_: object) -> None:
        raise AssertionError("reading a local dataset must not reach for the network")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return datasets
