"""attend_blocks on a GPU: which kernel runs a call, or why none can. Called by codegen/attend.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen.cuda import device as gpu
from sparsify_compiler.codegen.cuda import groups as g
from sparsify_compiler.codegen.cuda.attend_few import WARPS, CudaAttendFew
from sparsify_compiler.codegen.cuda.attend_many import CudaAttendMany
from sparsify_compiler.codegen.cuda.attend_rows import ROWS
from sparsify_compiler.codegen.cuda.layer import ALIGNED, SHORT, name_of
from sparsify_compiler.errors import KernelError
from sparsify_compiler.ops.attend_blocks import scale_of

GROUP_WIDTHS = (64, 128)
WIDEST = 128        # of queries and values: wider sums would not fit into registers
FEW_KEYS = 16       # of a run, of the kernel for few rows
BLOCKS = 2          # of threads for each processor, of that kernel
_counters = gpu.Counters()


def refusal(query: Tensor, key: Tensor, value: Tensor) -> str:
    """Why no kernel runs such a call, and the reference does; "" where one does."""
    if query.dtype not in SHORT or key.dtype is not query.dtype or value.dtype is not query.dtype:
        return f"no kernel for {query.dtype}, {key.dtype} and {value.dtype} on a GPU"
    if not min(*query.shape, *key.shape, *value.shape):
        return "nothing to compute"
    widths = query.shape[-1], value.shape[-1]
    if any(width % 16 or width > WIDEST for width in widths):
        return f"widths {widths[0]} and {widths[1]}: kernels on a GPU need multiples of 16, up to {WIDEST}"
    if query.is_cuda:
        try:
            gpu.target_of(query.device)
        except KernelError as error:
            return str(error)
    return ""


def run(call: Any) -> tuple[Tensor, Tensor]:
    """out and lse of a call (codegen/attend.py's) that is not refused and has no bias."""
    query, key, value = (_rows_aligned(tensor) for tensor in call[:3])
    lists = [None if tensor is None else tensor.int().contiguous() for tensor in (call.indices, call.counts, call.tile_of)]
    (batch, heads, queries, width), last = query.shape, value.shape[-1]
    out = query.new_empty((batch, queries, heads, last)).transpose(1, 2)
    lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
    nothing = query.new_empty((1, 1, 1), dtype=torch.uint8)     # never read
    tiled = call.tile_of is not None and call.tiles is not None
    tiles = call.tiles.contiguous().view(torch.uint8) if tiled else nothing
    mask = nothing[0] if call.key_mask is None else call.key_mask.contiguous().view(torch.uint8)
    given = (query, key, value, lists[0], lists[1], lists[2] if tiled else lists[0], tiles, mask, out, lse)
    numbers = (call.block_q, call.block_k, int(tiled), int(call.key_mask is not None), int(call.causal),
               scale_of(query, call.scale) * math.log2(math.e))
    together = heads // key.shape[1] if call.indices.shape[1] in (1, key.shape[1]) else 1
    if queries <= call.block_q and queries <= ROWS:
        _few(given, numbers, together if together * queries <= ROWS else 1, call)
    else:
        warps = max(1, min(4, call.block_q // ROWS))
        keys = 64 if call.block_k >= 64 and warps > 1 else 32 if call.block_k >= 32 else 16     # a lone warp copies them all: registers
        group = keys == g.HIGH and warps == g.WARPS and {width, last} <= set(GROUP_WIDTHS) and gpu.multiplies_by_groups(query.device)
        gpu.function(CudaAttendMany(name_of(query.dtype), width, last, warps, keys, group), query.device)(*given, *numbers)
    return out, lse


def _few(given: tuple[Any, ...], numbers: tuple[Any, ...], together: int, call: Any) -> None:
    query, last, device = given[0], given[2].shape[-1], given[0].device
    blocks = query.shape[0] * query.shape[1] // together
    runs = call.indices.shape[3] * -(-call.block_k // FEW_KEYS)
    parts = max(1, min(-(-BLOCKS * gpu.processors(device) // blocks), runs // (2 * WARPS)))
    work = [torch.empty((parts, blocks, ROWS, size), dtype=torch.float32, device=device) for size in (last, 2)]
    launch = gpu.function(CudaAttendFew(name_of(query.dtype), query.shape[-1], last, FEW_KEYS), device)
    launch(*given, *work, _counters(device, blocks), together, parts, *numbers)


def _rows_aligned(tensor: Tensor) -> Tensor:
    """The same, where its last dimension is contiguous and each row begins where 16 bytes do; a copy elsewhere."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    size = tensor.element_size()
    lies = tensor.stride(-1) == 1 and all(step * size % ALIGNED == 0 for step in tensor.stride()[:-1]) and tensor.data_ptr() % ALIGNED == 0
    return tensor if lies else tensor.contiguous()
