"""attend_blocks on this machine: the kernel that can run a call, or why none can. Called by the op itself (engine's ops/attend_blocks.py).

What follows from the sizes of a call is found once and remembered (a plan): a step of decoding is shorter than looking at its arguments again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

from sparsify_compiler.codegen import build, permission
from sparsify_compiler.codegen.kernels.attend_few import AttendFew
from sparsify_compiler.codegen.kernels.attend_panel import AttendPanel
from sparsify_compiler.codegen.kernels.attend_tiles import AttendTiles
from sparsify_compiler.codegen.kernels.attend_values import DEPTH
from sparsify_compiler.codegen.vectors import vectors_of
from sparsify_compiler.errors import TargetError
from sparsify_compiler.ops.attend_blocks import reference, scale_of
from sparsify_compiler.target import host

LANES = 16
WIDENED = {torch.float16: torch.float32}    # what is computed in another dtype
NEEDS: dict[torch.dtype, tuple[str, ...]] = {torch.float32: (), torch.bfloat16: ("avx512f", "avx512dq", "avx512bf16")}     # of few query rows
TILES = ("amx-tile", "amx-bf16")    # and of many, in bfloat16
FEW = 8             # query rows up to which every key is read once for all of them
TASKS = 8           # parts of the work that they are cut into, at least
SHARED = 1 << 30    # elements of values that are turned at once for all query blocks, at most
WIDE = 1 << 21      # numbers that are held in another dtype at a time: they stay in the caches
TINY = 1e-30        # for a scale of 0: infinity times this is still infinity
FAR = 1 << 31       # strides of the kernels' arguments are 32 bits wide
KEPT = 1024         # plans that are remembered
NO_BIAS = (0, 0, 0, 0, 0, 0)
NO_TILES, NO_MASK = (torch.zeros((1,) * dimensions, dtype=torch.uint8) for dimensions in (3, 2))


class Call(NamedTuple):
    """The arguments of attend_blocks."""

    query: Tensor
    key: Tensor
    value: Tensor
    indices: Tensor
    counts: Tensor
    tile_of: Tensor | None
    tiles: Tensor | None
    key_mask: Tensor | None
    bias: Tensor | None
    block_q: int
    block_k: int
    causal: bool
    scale: float | None


@dataclass(frozen=True)
class Plan:
    """How calls of one form run: the kernel, its numbers, and which tensors it takes as they lie."""

    kernel: Any
    numbers: tuple[int, ...]
    factor: float
    dtype: torch.dtype
    as_they_lie: bool
    lists_as_they_lie: bool
    out: tuple[tuple[int, ...], tuple[int, ...]]
    plain: bool     # all as they lie, and nothing but the lists says what counts

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        """out and lse."""
        query, key, value, indices, counts, *_ = call
        if self.dtype is not query.dtype and query.shape[2] > FEW:
            return self._widened(call)
        size, strides = self.out
        out = torch.empty_strided(size, strides, dtype=self.dtype)
        lse = torch.empty_strided(size[:3], (size[1] * size[2], size[2], 1), dtype=torch.float32)
        if self.plain:
            self.kernel(query, key, value, indices, counts, indices, NO_TILES, NO_MASK, out, lse, *self.numbers, *NO_BIAS, self.factor)
            return out, lse
        if not self.as_they_lie:
            query, key, value = (_strided(tensor.to(self.dtype)) for tensor in (query, key, value))
            if self.dtype is torch.bfloat16 and query.shape[2] > FEW and query.shape[3] % DEPTH:    # a tile's row is 32 of them
                query, key = (pad(tensor, (0, -query.shape[3] % DEPTH)) for tensor in (query, key))
        self._call(Call(query, key, value, *call[3:]), out, lse)
        return (out if self.dtype is call.query.dtype else out.to(call.query.dtype)), lse

    def _call(self, call: Call, out: Tensor, lse: Tensor) -> None:
        """The kernel, on queries, keys and values that it can read."""
        query, key, value, indices, counts, tile_of, tiles, key_mask, bias, *_ = call
        if not self.lists_as_they_lie:
            indices, counts, tile_of = _words(indices), _words(counts), None if tile_of is None else _words(tile_of)
        kinds, turned = (indices, NO_TILES) if tile_of is None or tiles is None else (tile_of, _turned(tiles))
        mask = NO_MASK if key_mask is None else key_mask.contiguous().view(torch.uint8)
        bias = bias if bias is None or bias.dtype in (torch.float32, torch.bfloat16) else bias.float()
        added = NO_BIAS if bias is None else _addressed(bias)
        self.kernel(query, key, value, indices, counts, kinds, turned, mask, out, lse, *self.numbers, *added, self.factor)

    def _widened(self, call: Call) -> tuple[Tensor, Tensor]:
        """Out and lse of what is computed in another dtype, some groups of heads at a time: copies of all would be fresh memory at each call."""
        query, key, value, *lists, tiles, key_mask, bias = call[:9]
        (batch, heads, queries, width), (_, groups, keys, last) = query.shape, value.shape
        out, lse = torch.empty_strided(*self.out, dtype=query.dtype), torch.empty(query.shape[:3], dtype=torch.float32)
        shared = heads // groups
        some = min(max(WIDE // ((width + last) * (keys + shared * queries)), 1), groups)
        rooms = [torch.empty(1, many, rows, size, dtype=self.dtype) for many, rows, size in (
            (some * shared, queries, width), (some, keys, width), (some, keys, last), (some * shared, queries, last))]
        for entry in range(batch):
            for first in range(0, groups, some):
                few = min(some, groups - first)
                of_groups, of_heads = slice(first, first + few), slice(first * shared, (first + few) * shared)
                held = [room[:, :few * (1 if number in (1, 2) else shared)] for number, room in enumerate(rooms)]
                for room, tensor, which in zip(held, (query, key, value), (of_heads, of_groups, of_groups), strict=False):
                    room.copy_(tensor.detach()[entry:entry + 1, which])
                own = [None if t is None else _of(t, entry, of_heads if t.shape[1] == heads else of_groups) for t in (*lists, bias)]
                part = Call(held[0], held[1], held[2], own[0], own[1], own[2], tiles,  # type: ignore[arg-type]
                            None if key_mask is None else key_mask[entry:entry + 1], own[3], *call[9:])
                self._call(part, held[3], lse[entry:entry + 1, of_heads])
                out[entry:entry + 1, of_heads].copy_(held[3])
        return out, lse


PLANS: dict[tuple[Any, ...], Plan] = {}     # by form


def form_of(call: Call) -> tuple[Any, ...]:
    """What a plan depends on."""
    query, key, value, indices, counts, tile_of, tiles, key_mask, bias, *rest = call
    more = () if tile_of is tiles is key_mask is bias is None else tuple(t if t is None else _form(t) for t in (tile_of, tiles, key_mask, bias))
    return (_form(query), _form(key), _form(value), _form(indices), _form(counts), more, *rest, torch.get_num_threads())


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def refusal(query: Tensor, key: Tensor, value: Tensor) -> str:
    """Why no kernel runs such a call, and the reference does; "" where one does."""
    if query.is_cuda and key.is_cuda and value.is_cuda:
        from sparsify_compiler.codegen.cuda import attend as on_gpu

        return on_gpu.refusal(query, key, value)
    if not query.is_cpu or query.dtype not in (*NEEDS, *WIDENED):
        return f"no kernel for {query.dtype} on {query.device}"
    if key.dtype is not query.dtype or value.dtype is not query.dtype:
        return f"query, key and value have several dtypes: {query.dtype}, {key.dtype}, {value.dtype}"
    if not min(*query.shape, *key.shape, *value.shape):
        return "nothing to compute"
    return _missing(torch.float32)


@cache
def _missing(dtype: torch.dtype, few: bool = False) -> str:
    """Why the kernel of a dtype, for few or many query rows, does not run here; "" where it does."""
    tiles = dtype is torch.bfloat16 and not few
    try:
        lacks = [feature for feature in (*NEEDS[dtype], *(TILES if tiles else ())) if not host().has(feature)]
    except TargetError as error:
        return str(error)
    if lacks:
        return f"this machine lacks {lacks[0]}"
    return "the operating system does not give AMX tiles" if tiles and not permission.tiles() else ""


class GpuPlan:
    """How calls on a GPU run: with a bias by the reference."""

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        """out and lse."""
        from sparsify_compiler.codegen.cuda import attend as on_gpu

        if call.bias is not None:
            return reference(*call[:9], block_q=call.block_q, block_k=call.block_k, causal=call.causal, scale=call.scale)
        return on_gpu.run(call)


def plan(call: Call, form: tuple[Any, ...]) -> Plan | GpuPlan:
    """How to run a call that is not refused; float16, and bfloat16 where instructions for it lack, in float32.

    Raises KernelError where the kernel cannot be built.
    """
    if call.query.is_cuda:
        return GpuPlan()
    batch, heads, queries, width = call.query.shape
    dtype, last = call.query.dtype, call.value.shape[-1]
    few, threads, indices = queries <= FEW, torch.get_num_threads(), call.indices
    if dtype in WIDENED or (dtype is torch.bfloat16 and _missing(dtype, few)):
        dtype = torch.float32
    flags = call.block_q, call.block_k, int(call.tile_of is not None), int(call.key_mask is not None), int(call.causal)
    tasks, groups = batch * heads * indices.shape[2], call.key.shape[1]
    kernel: Any
    more: tuple[int, ...]
    if few:
        together = 1 if indices.shape[1] not in (1, groups) else heads // groups
        parts = min(-(-TASKS * together // tasks), indices.shape[3])  # for any number of threads, lest results depend on it
        kernel = _few(dtype, together * min(call.block_q, queries) == 1)
        more = min(threads, tasks // together * parts), together, parts
    elif dtype is torch.float32:
        kernel, more = _panel(min(call.block_q, queries) > 2 * vectors_of(host()).lanes), (min(threads, tasks),)
    else:
        kernel, more = _tiles(), (min(threads, tasks), int(_turned_once(call.value, indices, heads, call.block_k)))
    lists = [tensor for tensor in (indices, call.counts, call.tile_of) if tensor is not None]
    factor = (scale_of(call.query, call.scale) or TINY) * math.log2(math.e)
    lies: bool = all(_lies(tensor, dtype) for tensor in call[:3]) and (few or dtype is torch.float32 or width % DEPTH == 0)
    words = all(_is_words(tensor) for tensor in lists)
    plain = lies and words and dtype is call.query.dtype and call.tile_of is None and call.key_mask is None and call.bias is None
    made = Plan(kernel, (*flags, *more), factor, dtype, lies, words,
                ((batch, heads, queries, last), (queries * heads * last, last, heads * last, 1)), plain)
    if len(PLANS) >= KEPT:
        PLANS.clear()
    PLANS[form] = made
    return made


def _turned_once(value: Tensor, indices: Tensor, heads: int, block_k: int) -> bool:
    """Is it better to turn all values into tiles once than the listed ones for every query block?"""
    batch, groups, keys, width = value.shape
    listed = batch * heads * indices.shape[2] * indices.shape[3] * block_k
    return block_k % DEPTH == 0 and listed > batch * groups * keys and batch * groups * (keys + DEPTH) * (width + DEPTH) < SHARED


_TURNED: Any = WeakIdKeyDictionary()  # tiles -> (their version, the same as kernels read them): layers and steps share them


def _turned(tiles: Tensor) -> Tensor:
    """uint8 [T, block_k, block_q and as many as make a multiple of 64]."""
    version = 0 if tiles.is_inference() else tiles._version
    found: tuple[int, Tensor] | None = _TURNED.get(tiles)
    if found is None or found[0] != version:
        found = version, pad(tiles.mT.contiguous().view(torch.uint8), (0, -tiles.shape[1] % (4 * LANES)))
        _TURNED[tiles] = found
    return found[1]


def _of(tensor: Tensor, entry: int, heads: slice) -> Tensor:
    """What is said of some heads of one entry of a batch [1, heads or 1, ...]."""
    own = tensor if tensor.shape[0] == 1 else tensor[entry:entry + 1]
    return own if own.shape[1] == 1 else own[:, heads]


def _is_words(tensor: Tensor) -> bool:
    return tensor.dtype is torch.int32 and tensor.is_contiguous()


def _words(tensor: Tensor) -> Tensor:
    return tensor if _is_words(tensor) else tensor.to(torch.int32).contiguous()


def _lies(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Can a kernel read it: without a gradient, its last dimension contiguous, its strides in 32 bits?"""
    strides = tensor.stride()
    return tensor.dtype is dtype and not tensor.requires_grad and strides[-1] == 1 and max(strides) < FAR


def _strided(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if _lies(tensor, tensor.dtype) else tensor.contiguous()


def _addressed(bias: Tensor) -> tuple[int, ...]:
    """Where it lies; the strides in bytes, 0 of a dimension that is the same everywhere; bytes of a number."""
    size = bias.element_size()
    steps = (0 if length == 1 else stride * size for length, stride in zip(bias.shape, bias.stride(), strict=True))
    return bias.data_ptr(), *steps, size


@cache
def _few(dtype: torch.dtype, one: bool) -> Any:
    return build.load(AttendFew(str(dtype).removeprefix("torch."), 1 if one else 4, vectors_of(host())), host()).function


@cache
def _panel(many: bool) -> Any:
    return build.load(AttendPanel(4 if many else 2, vectors_of(host())), host()).function


@cache
def _tiles() -> Any:
    return build.load(AttendTiles(), host()).function
