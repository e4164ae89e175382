"""What must not happen while a CUDA graph is captured: looking at a value on the host."""

from __future__ import annotations

import torch


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: values cannot be looked at then, so that checks of values are left out."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
