"""Numbers of several processes that train together, as torch.distributed knows them; alone, those of the one that there is."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum over all of them, in place."""
    if _several():
        torch.distributed.all_reduce(x)
    return x


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean over all of them, in place."""
    sum_over_processes(x)
    return x.div_(torch.distributed.get_world_size()) if _several() else x


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
