"""attend_blocks on this machine: the kernel that can run a call, or why none can. Called by the op itself (engine's ops/attend_blocks.py)."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen import build
from sparsify_compiler.codegen.kernels.attend_panel import AttendPanel
from sparsify_compiler.errors import TargetError
from sparsify_compiler.target import host

LANES = 16
TINY = 1e-30        # for a scale of 0: infinity times this is still infinity
FAR = 1 << 31       # strides of the kernels' arguments are 32 bits wide


def refusal(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> str:
    """Why no kernel runs such a call, and the reference does; "" where one does."""
    if not query.is_cpu or query.dtype is not torch.float32:
        return f"no kernel for {query.dtype} on {query.device}"
    if key.dtype is not query.dtype or value.dtype is not query.dtype:
        return f"query, key and value have several dtypes: {query.dtype}, {key.dtype}, {value.dtype}"
    if bias is not None:
        return "no kernel adds a bias to the scores"
    if not min(*query.shape, *key.shape, *value.shape):
        return "nothing to compute"
    return _missing()


@cache
def _missing() -> str:
    try:
        return "" if host().has("avx512f") else "this machine's vectors have no 512 bits"
    except TargetError as error:
        return str(error)


def run(query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor, tile_of: Tensor | None, tiles: Tensor | None,
        key_mask: Tensor | None, *, block_q: int, block_k: int, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """As attend_blocks, of a call that is not refused. Raises KernelError where the kernel cannot be built."""
    batch, heads, queries, width = query.shape
    out = query.new_empty((batch, queries, heads, value.shape[-1])).transpose(1, 2)
    lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
    factor = (width ** -0.5 if scale is None else scale or TINY) * math.log2(math.e)
    tasks = batch * heads * indices.shape[2]
    _panel(min(block_q, queries))(
        *(_strided(tensor) for tensor in (query, key, value)), *_places(indices, counts, tile_of, tiles, key_mask), out, lse,
        block_q, block_k, int(tile_of is not None), int(key_mask is not None), int(causal), min(torch.get_num_threads(), tasks), factor)
    return out, lse


def _places(indices: Tensor, counts: Tensor, tile_of: Tensor | None, tiles: Tensor | None, key_mask: Tensor | None) -> tuple[Tensor, ...]:
    """The index tensors as kernels read them; something of the right dtype and dimensions for what is not given."""
    indices, counts = (tensor.to(torch.int32).contiguous() for tensor in (indices, counts))
    if tile_of is None or tiles is None:
        kinds, turned = indices, torch.empty((1, 1, 1), dtype=torch.uint8)
    else:
        kinds, turned = tile_of.to(torch.int32).contiguous(), tiles.mT.contiguous().view(torch.uint8)
    mask = torch.empty((1, 1), dtype=torch.uint8) if key_mask is None else key_mask.contiguous().view(torch.uint8)
    return indices, counts, kinds, turned, mask


def _strided(tensor: Tensor) -> Tensor:
    """Without a gradient, its last dimension contiguous, its strides in 32 bits."""
    tensor = tensor.detach()
    if tensor.stride(-1) == 1 and max(tensor.stride()) < FAR and min(tensor.stride()) >= 0:
        return tensor
    return tensor.contiguous()


def _panel(rows: int) -> Any:
    return build.load(AttendPanel(4 if rows > 2 * LANES else 2), host()).function
