"""attend_blocks on this machine: the kernel that can run a call, or why none can. Called by the op itself (engine's ops/attend_blocks.py)."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.codegen import build, permission
from sparsify_compiler.codegen.kernels.attend_few import AttendFew
from sparsify_compiler.codegen.kernels.attend_panel import AttendPanel
from sparsify_compiler.codegen.kernels.attend_tiles import AttendTiles
from sparsify_compiler.codegen.kernels.attend_values import DEPTH
from sparsify_compiler.errors import TargetError
from sparsify_compiler.ops.attend_blocks import scale_of
from sparsify_compiler.target import host

LANES = 16
WIDENED = {torch.float16: torch.float32}    # what is computed in another dtype
NEEDS = {torch.float32: ("avx512f",), torch.bfloat16: ("avx512f", "avx512dq", "avx512bf16", "amx-tile", "amx-bf16")}
FEW = 8             # query rows up to which every key is read once for all of them
TASKS = 8           # parts of the work that they are cut into, at least
SHARED = 1 << 30    # elements of values that are turned at once for all query blocks, at most
TINY = 1e-30        # for a scale of 0: infinity times this is still infinity
FAR = 1 << 31       # strides of the kernels' arguments are 32 bits wide


def refusal(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> str:
    """Why no kernel runs such a call, and the reference does; "" where one does."""
    if not query.is_cpu or query.dtype not in (*NEEDS, *WIDENED):
        return f"no kernel for {query.dtype} on {query.device}"
    if key.dtype is not query.dtype or value.dtype is not query.dtype:
        return f"query, key and value have several dtypes: {query.dtype}, {key.dtype}, {value.dtype}"
    if bias is not None:
        return "no kernel adds a bias to the scores"
    if not min(*query.shape, *key.shape, *value.shape):
        return "nothing to compute"
    return _missing(torch.float32)


@cache
def _missing(dtype: torch.dtype) -> str:
    try:
        lacks = [feature for feature in NEEDS[dtype] if not host().has(feature)]
    except TargetError as error:
        return str(error)
    if lacks:
        return f"this machine lacks {lacks[0]}"
    return "" if dtype is torch.float32 or permission.tiles() else "the operating system does not give AMX tiles"


def run(query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor, tile_of: Tensor | None, tiles: Tensor | None,
        key_mask: Tensor | None, *, block_q: int, block_k: int, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """As attend_blocks, of a call that is not refused; float16, and bfloat16 without tiles, in float32.

    Raises KernelError where the kernel cannot be built.
    """
    batch, heads, queries, width = query.shape
    dtype = query.dtype
    if dtype in WIDENED or (dtype is torch.bfloat16 and _missing(dtype)):
        query, key, value = query.float(), key.float(), value.float()
    out = torch.empty((batch, queries, heads, value.shape[-1]), dtype=query.dtype).transpose(1, 2)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32)
    few, factor = queries <= FEW, (scale_of(query, scale) or TINY) * math.log2(math.e)
    if not few and query.dtype is torch.bfloat16 and width % DEPTH:     # a tile's row is 32 of them
        query, key = (pad(tensor, (0, -width % DEPTH)) for tensor in (query, key))
    tensors = _strided(query), _strided(key), _strided(value), *_places(indices, counts, tile_of, tiles, key_mask), out, lse
    flags = block_q, block_k, int(tile_of is not None), int(key_mask is not None), int(causal)
    tasks, threads = batch * heads * indices.shape[2], torch.get_num_threads()
    if few:
        together = 1 if indices.shape[1] not in (1, key.shape[1]) else heads // key.shape[1]
        parts = min(-(-TASKS * together // tasks), indices.shape[3])  # for any number of threads, lest results depend on it
        kernel = _few(query.dtype, together * min(block_q, queries) == 1)
        kernel(*tensors, *flags, min(threads, tasks // together * parts), together, parts, factor)
    elif query.dtype is torch.float32:
        _panel(min(block_q, queries) > 2 * LANES)(*tensors, *flags, min(threads, tasks), factor)
    else:
        _tiles()(*tensors, *flags, min(threads, tasks), int(_turned_once(value, indices, heads, block_k)), factor)
    return (out if out.dtype is dtype else out.to(dtype)), lse


def _turned_once(value: Tensor, indices: Tensor, heads: int, block_k: int) -> bool:
    """Is it better to turn all values into tiles once than the listed ones for every query block?"""
    batch, groups, keys, width = value.shape
    listed = batch * heads * indices.shape[2] * indices.shape[3] * block_k
    return block_k % DEPTH == 0 and listed > batch * groups * keys and batch * groups * (keys + DEPTH) * (width + DEPTH) < SHARED


def _places(indices: Tensor, counts: Tensor, tile_of: Tensor | None, tiles: Tensor | None, key_mask: Tensor | None) -> tuple[Tensor, ...]:
    """The index tensors as kernels read them; something of the right dtype and dimensions for what is not given."""
    indices, counts = _words(indices), _words(counts)
    if tile_of is None or tiles is None:
        kinds, turned = indices, _nothing(3)
    else:
        kinds, turned = _words(tile_of), pad(tiles.mT.contiguous().view(torch.uint8), (0, -tiles.shape[1] % (4 * LANES)))
    mask = _nothing(2) if key_mask is None else key_mask.contiguous().view(torch.uint8)
    return indices, counts, kinds, turned, mask


def _words(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.int32 and tensor.is_contiguous() else tensor.to(torch.int32).contiguous()


def _strided(tensor: Tensor) -> Tensor:
    """Without a gradient, its last dimension contiguous, its strides in 32 bits."""
    strides = tensor.stride()
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor if strides[-1] == 1 and max(strides) < FAR else tensor.contiguous()


@cache
def _nothing(dimensions: int) -> Tensor:
    return torch.zeros((1,) * dimensions, dtype=torch.uint8)


@cache
def _few(dtype: torch.dtype, one: bool) -> Any:
    return build.load(AttendFew(str(dtype).removeprefix("torch."), 1 if one else 4), host()).function


@cache
def _panel(many: bool) -> Any:
    return build.load(AttendPanel(4 if many else 2), host()).function


@cache
def _tiles() -> Any:
    return build.load(AttendTiles(), host()).function
