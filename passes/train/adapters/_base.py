"""What an adapter is: a function `name(weight, seed, mask, *, options) -> Adapter` in a file of its own.

weight [out, in] is the layer's, not masked; mask bool of its shape, or None where there is none. A module constant CHANGES = True says that the layer
gives something else with the adapter from the start on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsify_compiler.errors import ParseError

Place = Literal["inside", "beside", "behind"]


@dataclass(frozen=True)
class Adapter:
    """What trains in place of a layer's weight.

    place    inside: the weight to compute with is formula(weight, **tensors), within its mask; beside: formula(x, **tensors) is added to what the
             layer gives; behind: formula(y, **tensors) of what the layer gives is added to it
    formula  in plain torch
    tensors  its parameters by their names in the formula, of the weight's dtype and on its device
    rest     what the weight becomes, where the adapter takes a part of it over
    """

    place: Place
    formula: Callable[..., Tensor]
    tensors: Mapping[str, Tensor]
    rest: Tensor | None = None


def factors(weight: Tensor, rank: int, seed: int) -> dict[str, Tensor]:
    """reads [rank, in] and writes [out, rank] for a weight: uniform as of a linear layer, and zeros (LoRA, arXiv:2106.09685, section 4.1)."""
    check_rank(rank)
    outputs, inputs = weight.shape
    return {"reads": uniform((rank, inputs), seed).to(weight), "writes": weight.new_zeros(outputs, rank)}


def uniform(shape: tuple[int, int], seed: int) -> Tensor:
    """float32, as torch fills a linear layer: between plus and minus 1 / sqrt(inputs)."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator, dtype=torch.float32) * 2 - 1) / math.sqrt(max(shape[1], 1))


def check_rank(rank: int) -> None:
    """Raises ParseError."""
    if rank < 1:
        raise ParseError(f"a rank is 1 or more, got {rank}", where="adapter")
