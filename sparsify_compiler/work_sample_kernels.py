"""Sparse convolutions, mixtures of experts and attention by blocks made up for a Work, as work_sample.py makes up layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from . import catalog
from .ops import attend_blocks
from .target import Target
from .work_draw import HEADS

if TYPE_CHECKING:
    from .work import Work

EAGER = "dense eager"
Forms = dict[str, Callable[[], object]]
Noise = Callable[..., Tensor]
Maker = Callable[["Work", Target, Noise], tuple[Forms, Tensor]]


def maker_of(op: str) -> Maker | None:
    """What makes up such an op; None for another."""
    if op.partition("_")[0] == "conv2d":
        return _conv2d
    return {"experts_ffn": _experts, "attend_blocks": _attend_blocks}.get(op)


def _conv2d(work: Work, target: Target, noise: Noise) -> tuple[Forms, Tensor]:
    """Over a square image, which it leaves as large as it was; dense on x in its usual layout, packed by oneDNN with channels last."""
    from .work_sample import random_mask

    sizes, dtype = dict(work.sizes), getattr(torch, work.dtype)
    side, kernel, outputs, inputs = math.isqrt(int(sizes["M"])), math.isqrt(int(sizes["taps"])), int(sizes["N"]), int(sizes["K"])
    x, weight, bias = noise(1, inputs, side, side).to(dtype), noise(outputs, inputs, kernel, kernel).to(dtype), noise(outputs).to(dtype)
    geometry: dict[str, Any] = {"stride": [1, 1], "padding": [kernel // 2] * 2, "dilation": [1, 1], "groups": 1, "kernel_size": [kernel] * 2}
    last = x.contiguous(memory_format=torch.channels_last)
    forms: Forms = {EAGER: partial(conv2d, x, weight, bias, padding=kernel // 2)}
    forms |= _bound("conv2d", {"weight": weight}, geometry, (last,), bias, target)
    if work.op == "conv2d":
        return forms, x
    name = work.op.removeprefix("conv2d_")
    stored = catalog.get("format", name).encode(weight.flatten(1), random_mask(work, outputs, weight[0].numel()),
                                                **{key: int(sizes[key]) for key in ("r", "c", "n", "m") if key in sizes})
    given = last if dtype is torch.bfloat16 else x
    return forms | _bound(work.op, stored.tensors(), {**stored.attributes(), **geometry}, (given,), bias, target), x


def _experts(work: Work, target: Target, noise: Noise) -> tuple[Forms, Tensor]:
    """Gated, with weights of their own; rows choose at random."""
    sizes, dtype = dict(work.sizes), getattr(torch, work.dtype)
    rows, inputs, outputs, hidden, experts, count = (int(sizes[name]) for name in ("M", "K", "N", "hidden", "experts", "chosen"))
    tensors = {name: (noise(experts, *shape) * shape[1] ** -0.5).to(dtype)
               for name, shape in {"gate": (hidden, inputs), "up": (hidden, inputs), "down": (outputs, hidden)}.items()}
    x, generator = noise(rows, inputs).to(dtype), torch.Generator().manual_seed(1)
    chosen = torch.rand(rows, experts, generator=generator, dtype=torch.float32).topk(count).indices
    given = x, chosen, torch.full(chosen.shape, 1 / count, dtype=torch.float32)
    return _bound(work.op, tensors, {"activation": "silu"}, given, None, target, (rows,)), x


def _attend_blocks(work: Work, target: Target, noise: Noise) -> tuple[Forms, Tensor]:
    """HEADS heads of one text, each of whose query blocks reads as many blocks of keys, anywhere."""
    sizes, dtype = dict(work.sizes), getattr(torch, work.dtype)
    queries, width, last, shared = int(sizes["M"]) // HEADS, int(sizes["K"]), int(sizes["E"]), int(sizes.get("group", 1))
    block_q, block_k = int(sizes["block_q"]), int(sizes["block_k"])
    keys = int(sizes["read"] - HEADS * queries * width) // (HEADS // shared * (width + last))
    groups, blocks, wide = HEADS // shared, -(-queries // block_q), -(-keys // block_k)
    query, key, value = noise(1, HEADS, queries, width).to(dtype), noise(1, groups, keys, width).to(dtype), noise(1, groups, keys, last).to(dtype)
    count, generator = int(sizes["pairs"]) // (HEADS * blocks), torch.Generator().manual_seed(1)
    lists = torch.rand(1, groups, blocks, wide, generator=generator, dtype=torch.float32).topk(count).indices.sort().values.int()
    counts = torch.full(lists.shape[:3], count, dtype=torch.int32)
    return {"blocks": partial(attend_blocks.op, query, key, value, lists, counts, block_q=block_q, block_k=block_k)}, query


def _bound(op: str, tensors: dict[str, Tensor], attributes: dict[str, Any], given: tuple[Tensor, ...], bias: Tensor | None, target: Target,
           rows: tuple[int, ...] | None = None) -> Forms:
    """Every kernel of an op, bound to its weight."""
    from .codegen import runtime

    found = runtime.candidates(op, tensors, attributes, given[0].dtype, tuple(given[0].shape) if rows is None else rows, target)
    return {candidate.name: partial(_call, _Later(candidate, bias), *given) for candidate in found}


def _call(kernel: _Later, *given: Tensor) -> object:
    return kernel.made(*given)


class _Later:
    """A kernel that is bound when it is called first."""

    def __init__(self, candidate: Any, bias: Tensor | None) -> None:
        self._candidate, self._bias, self._kernel = candidate, bias, None

    @property
    def made(self) -> Any:
        if self._kernel is None:
            self._kernel = self._candidate.bind(self._bias)
        return self._kernel
