"""A model whose weights start anywhere in memory, as those of a mapped safetensors file do: wherever its header ends."""

from __future__ import annotations

import torch
from torch import nn

LINE = 64   # bytes


def misalign(model: nn.Module) -> nn.Module:
    """The model itself, float32, each of its parameters now 24 bytes behind the beginning of a line."""
    for parameter in model.parameters():
        room = torch.empty(parameter.numel() + 2 * LINE // 4, dtype=torch.float32)
        start = -room.data_ptr() % LINE // 4 + 6
        parameter.data = room[start : start + parameter.numel()].view_as(parameter).copy_(parameter.data)
        assert parameter.data_ptr() % LINE == 24
    return model
