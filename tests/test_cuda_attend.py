"""attend_blocks on a GPU against its reference: lists, masks, groups of heads, strides; the GPU is emulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_help import close, emulated, needs_compiler, numbers
from emulator.emulate import conflicts
from torch import Tensor

from sparsify_compiler.codegen.attend import Call
from sparsify_compiler.codegen.cuda import attend
from sparsify_compiler.ops import attend_blocks

pytestmark = needs_compiler
__all__ = ["emulated"]


def lists(heads: int, blocks_q: int, blocks_k: int) -> tuple[Tensor, Tensor]:
    """Random ones, ascending; the first is empty."""
    indices = torch.zeros(1, heads, blocks_q, blocks_k, dtype=torch.int32)
    counts = torch.zeros(1, heads, blocks_q, dtype=torch.int32)
    for head in range(heads):
        for block in range(blocks_q):
            found = (torch.rand(blocks_k) < (0.7 if head + block else 0.0)).nonzero()[:, 0].int()
            indices[0, head, block, : len(found)], counts[0, head, block] = found, len(found)
    return indices, counts


def call(sizes: dict[str, int], dtype: torch.dtype, *, listed: int, tiled: bool, padded: bool, causal: bool) -> Call:
    B, H, G, Q, K, D, E, bq, bk = (sizes[name] for name in ("B", "H", "G", "Q", "K", "D", "E", "bq", "bk"))
    query, key, value = numbers(B, Q, H, D, dtype=dtype).transpose(1, 2), numbers(B, G, K, D, dtype=dtype), numbers(B, G, K, E, dtype=dtype)
    indices, counts = lists(listed, -(-Q // bq), -(-K // bk))
    tile_of = torch.randint(-1, 3, indices.shape, dtype=torch.int32) if tiled else None
    mask = torch.rand(B, K) < 0.8 if padded else None
    if mask is not None:    # what does not count at all may hold anything
        key[~mask[:, None].expand(B, G, K)] = torch.nan
        value[~mask[:, None].expand(B, G, K)] = torch.nan
    return Call(query, key, value, indices, counts, tile_of, torch.rand(3, bq, bk) < 0.5 if tiled else None, mask, None, bq, bk, causal, None)


def check(given: Call) -> None:
    out, lse = attend.run(given)
    wide = [tensor.float() for tensor in given[:3]]
    wanted, total = attend_blocks.reference(*wide, *given[3:9], block_q=given.block_q, block_k=given.block_k, causal=given.causal, scale=given.scale)
    close(out, wanted)
    torch.testing.assert_close(lse, total, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("causal", "tiled", "padded", "dtype"), [
    (True, False, False, torch.bfloat16), (False, True, True, torch.bfloat16),
    pytest.param(True, True, False, torch.float16, marks=pytest.mark.cuda)])
def test_many_rows(emulated: list[Any], causal: bool, tiled: bool, padded: bool, dtype: torch.dtype) -> None:
    sizes = {"B": 1, "H": 2, "G": 1, "Q": 75, "K": 90, "D": 32, "E": 48, "bq": 32, "bk": 32}
    check(call(sizes, dtype, listed=2, tiled=tiled, padded=padded, causal=causal))
    assert [one.name for one in emulated] == ["cuda_attend_many"]
    assert conflicts(emulated[0])[0] > 0


@pytest.mark.parametrize(("Q", "K", "listed", "tiled", "padded"), [(1, 150, 2, False, True), (3, 40, 4, True, False), (1, 600, 1, False, False)])
def test_few_rows(emulated: list[Any], Q: int, K: int, listed: int, tiled: bool, padded: bool) -> None:
    sizes = {"B": 2, "H": 4, "G": 2, "Q": Q, "K": K, "D": 32, "E": 48, "bq": 4, "bk": 32}
    check(call(sizes, torch.float16, listed=listed, tiled=tiled, padded=padded, causal=True))
    assert [one.name for one in emulated] == ["cuda_attend_few"]


@pytest.mark.cuda
@pytest.mark.parametrize("width", [64, 128])
def test_banks_are_read_once(emulated: list[Any], width: int) -> None:
    both = {"indices": torch.tensor([[[[0, 1]]]], dtype=torch.int32), "counts": torch.tensor([[[2]]], dtype=torch.int32)}
    for queries, block_q in ((64, 64), (1, 4)):
        sizes = {"B": 1, "H": 1, "G": 1, "Q": queries, "K": 128, "D": width, "E": width, "bq": block_q, "bk": 64}
        check(call(sizes, torch.bfloat16, listed=1, tiled=False, padded=False, causal=True)._replace(**both))
    assert [conflicts(schedule)[1] for schedule in emulated] == [0, 0]


def test_refusals() -> None:
    short = numbers(1, 2, 8, 32, dtype=torch.bfloat16)
    assert attend.refusal(short, short, short) == ""
    assert "no kernel for torch.float32" in attend.refusal(*[short.float()] * 3)
    assert "multiples of 16" in attend.refusal(short[..., :8], short[..., :8], short)
    assert "nothing" in attend.refusal(short[:, :, :0], short, short)
