"""What an adapter is: a function `name(weight, reads, writes, *, rank, scale) -> Tensor` in a file of its own, the weight to compute with.

weight [out, in], frozen; reads [rank, in] and writes [out, rank] train. `writes` starts at 0, where the function gives the weight itself. A module
constant BESIDE is True where nothing of this is inside a mask of the weight: the layer is then linear(x, weight) plus scale times
linear(linear(x, reads), writes).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def factors(weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """reads and writes for a weight, of its dtype: uniform as of a linear layer, and zeros (LoRA, arXiv:2106.09685, section 4.1)."""
    outputs, inputs = weight.shape
    generator = torch.Generator().manual_seed(seed)
    reads = (torch.rand(rank, inputs, generator=generator, dtype=torch.float32) * 2 - 1) / math.sqrt(max(inputs, 1))
    return reads.to(weight.dtype), torch.zeros(outputs, rank, dtype=weight.dtype)
