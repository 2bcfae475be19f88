"""A rival for benchmarks/gpu.py: experts in Triton as serving engines run them, rows sorted by expert, each block of them of one expert."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# rows, outputs, inputs of a tile; warps; stages: the best of these is found before anything is measured.
TILES = ((16, 128, 64, 4, 4), (64, 128, 64, 4, 4), (64, 256, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3))


@triton.jit
def _product(x, weight, other, y, rows, experts, outputs, divisor, factors, inputs: tl.constexpr,
             GATED: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr):
    """y[i] = x[rows[i] // divisor] weight[expert]^T, with the gate's activation or times a factor."""
    tile, part = tl.program_id(0), tl.program_id(1)
    expert = tl.load(experts + tile)
    if expert < 0:
        return
    at = tl.load(rows + tile * ROWS + tl.arange(0, ROWS))
    real, column, place = at >= 0, part * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, INPUTS)
    left = x + (at // divisor).to(tl.int64)[:, None] * inputs + place[None, :]
    start = expert.to(tl.int64) * outputs * inputs
    right = weight + start + column[None, :].to(tl.int64) * inputs + place[:, None]
    second = other + start + column[None, :].to(tl.int64) * inputs + place[:, None]
    sums = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    more = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for _ in range(0, inputs, INPUTS):
        numbers = tl.load(left, mask=real[:, None], other=0.0)
        sums = tl.dot(numbers, tl.load(right), sums)
        left += INPUTS
        right += INPUTS
        if GATED:
            more = tl.dot(numbers, tl.load(second), more)
            second += INPUTS
    if GATED:
        sums = sums / (1.0 + tl.exp(-sums)) * more
    else:
        sums *= tl.load(factors + at, mask=real, other=0.0)[:, None]
    tl.store(y + at.to(tl.int64)[:, None] * outputs + column[None, :], sums.to(y.dtype.element_ty), mask=real[:, None])


def sorted_rows(chosen: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Places of `chosen` [rows, each] by expert, each expert's filled up to whole tiles with -1; and the expert of each tile, -1 for none."""
    flat = chosen.reshape(-1)
    order, held = flat.argsort(stable=True), torch.zeros(count, dtype=torch.int64, device=flat.device)
    held.scatter_add_(0, flat, torch.ones_like(flat))
    ends = ((held + size - 1) // size * size).cumsum(0)
    tiles = flat.numel() // size + count
    expert = torch.searchsorted(ends, torch.arange(tiles, device=flat.device) * size, right=True)
    known = expert.clamp(max=count - 1)
    first = (held.cumsum(0) - held)[known] - torch.cat((ends.new_zeros(1), ends[:-1]))[known]
    at = torch.arange(tiles * size, device=flat.device).view(tiles, size)
    inside = at + first[:, None]
    real = (expert < count)[:, None] & (inside < held.cumsum(0)[known][:, None])
    places = torch.where(real, order[inside.clamp(0, flat.numel() - 1)], -1)
    return places.reshape(-1).int(), torch.where(expert < count, expert, -1).int()


def experts(tile: tuple[int, ...], x: Tensor, chosen: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The whole FFN."""
    size, width, depth, warps, stages = tile
    rows, which = sorted_rows(chosen, gate.shape[0], size)
    hidden, inputs = gate.shape[1:]
    middle = x.new_empty((chosen.numel(), hidden))
    parts = x.new_empty((chosen.numel(), inputs))
    shape = {"ROWS": size, "INPUTS": depth, "num_warps": warps, "num_stages": stages}
    narrow = max(64, width // 2) if size * width > 128 * 128 // 2 else width    # two sums a thread
    grid = len(which)
    _product[grid, hidden // narrow](x, gate, up, middle, rows, which, hidden, chosen.shape[1], weights, inputs, GATED=True, OUTPUTS=narrow, **shape)
    _product[grid, inputs // width](middle, down, down, parts, rows, which, inputs, 1, weights, hidden, GATED=False, OUTPUTS=width, **shape)
    return parts.view(*chosen.shape, inputs).sum(1)


def rivals(*given: Tensor) -> dict[str, Callable[..., Tensor]]:
    """The fastest tile for these tensors, or none where they do not fit."""
    if given[3].shape[1] % 128 or given[3].shape[2] % 256:
        return {}
    times: dict[tuple[int, ...], Any] = {}
    for tile in TILES:
        try:
            experts(tile, *given)
            times[tile] = triton.testing.do_bench(partial(experts, tile, *given), warmup=10, rep=40, return_mode="median")
        except Exception as error:  # noqa: BLE001  a tile that this GPU has no room for
            print(f"  Triton {tile}: {str(error).splitlines()[0]}")
    return {"Triton grouped": partial(experts, min(times, key=lambda tile: times[tile]))} if times else {}
