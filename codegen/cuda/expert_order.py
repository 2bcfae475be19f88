"""Which rows each expert computes, worked out on the device without waiting for it: places sorted by expert, ends of the experts' tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Order:
    """rows [P] int32: the row of x at each place; firsts [E + 1], ends [E] int32, as grouped.py has them; places [M, k]: where each choice of a row
    went, -1 for none; sorted [P]: the flat choice at each place; tiles: more than there can be."""

    rows: Tensor
    firsts: Tensor
    ends: Tensor
    places: Tensor
    sorted: Tensor
    tiles: int


def order_of(chosen: Tensor, experts: int, tall: int) -> Order:
    """Of chosen [M, k], an integer each; what is no expert is none."""
    flat = chosen.reshape(-1).long()
    flat = torch.where((flat >= 0) & (flat < experts), flat, experts)
    by_expert, order = flat.sort(stable=True)
    firsts = torch.searchsorted(by_expert, torch.arange(experts + 1, device=chosen.device))
    ends = torch.div(firsts.diff() + (tall - 1), tall, rounding_mode="floor").cumsum(0)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=chosen.device))
    places = torch.where(flat < experts, places, -1)
    width = chosen.shape[-1]
    most = -(-flat.shape[0] // tall) + min(experts, flat.shape[0])
    return Order(torch.div(order, width, rounding_mode="floor").int(), firsts.int(), ends.int(), places.int().view(-1, width), order, most)
