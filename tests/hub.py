"""A model hub without a network: the cache of Hugging Face's client, filled with random weights under true names."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import timm
import torch

_REVISION = "0" * 40


def fill_hub(folder: Path, *names: str) -> dict[str, str]:
    """Put pretrained weights of timm's models, random ones, where the hub's client looks for what it has downloaded.

    Returns:
        The environment variables that make a process use this cache alone.
    """
    for name in names:
        place = folder / "hub" / f"models--timm--{name}.{timm.get_pretrained_cfg(name).tag}"
        snapshot = place / "snapshots" / _REVISION
        snapshot.mkdir(parents=True)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(_REVISION)
        torch.manual_seed(0)
        safetensors.torch.save_file(timm.create_model(name).state_dict(), snapshot / "model.safetensors")
    return {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
