"""Kernels whose products are those of four warps, as Hopper has them, against their references; the GPU is emulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_help import ANY, close, emulated, hopper, needs_compiler, numbers
from emulator import emulate
from test_cuda_attend import call, check
from test_cuda_layers import MORE, bound, by_mask

from sparsify_compiler.codegen.cuda import experts, groups
from sparsify_compiler.codegen.cuda.turn import CudaTurn
from sparsify_compiler.formats.bsr import Bsr
from sparsify_compiler.formats.nm import Nm
from sparsify_compiler.ops import experts_ffn

pytestmark = needs_compiler
__all__ = ["emulated", "hopper"]


@pytest.mark.parametrize(("r", "c", "rows", "dtype"), [
    (64, 1, 70, torch.bfloat16), (64, 8, 70, torch.float16), *[pytest.param(*given, marks=MORE) for given in (
        (128, 4, 140, torch.float16), (128, 64, 140, torch.bfloat16), (64, 4, 1030, torch.bfloat16), (64, 16, 1030, torch.float16))]])
def test_blocks(hopper: list[Any], r: int, c: int, rows: int, dtype: torch.dtype) -> None:
    outputs, inputs = 136, 320
    kept = torch.rand(-(-outputs // r), inputs // c) < 0.4
    kept[0] = False     # a block row without any
    mask = kept.repeat_interleave(r, 0).repeat_interleave(c, 1)[:outputs]
    weight, x, bias = numbers(outputs, inputs, dtype=dtype, scale=0.1), numbers(rows, inputs, dtype=dtype), numbers(outputs, dtype=dtype)
    x[3, 5] = torch.nan
    layer = bound("linear_bsr", Bsr.encode(weight * mask, mask, r=r, c=c), bias)
    wanted = by_mask(weight, mask, x.nan_to_num(), bias)
    found = layer(x)
    read = mask[:, 5].expand(1, -1)
    assert torch.equal(found[3:4].isnan(), read)
    close(torch.where(found.isnan(), wanted.to(dtype), found), wanted)
    assert [one.name for one in hopper] == ["cuda_strips_group"] if c % 8 == 0 else ["cuda_turn", "cuda_strips_group"]
    assert hopper[-1].straight == (c % 8 == 0)
    assert hopper[-1].rows == (256 if rows > 1000 else 128)


@pytest.mark.parametrize(("rows", "dtype"), [(70, torch.bfloat16), pytest.param(130, torch.float16, marks=MORE),
                                             pytest.param(1030, torch.bfloat16, marks=MORE)])
def test_two_of_four(hopper: list[Any], rows: int, dtype: torch.dtype) -> None:
    outputs, inputs = 136, 256
    mask = (torch.rand(outputs, inputs // 4, 4).argsort(-1) < 2).view(outputs, inputs)
    weight, x, other = numbers(outputs, inputs, dtype=dtype, scale=0.1), numbers(rows, inputs, dtype=dtype), numbers(rows, outputs, dtype=dtype)
    layer = bound("linear_nm", Nm.encode(weight * mask, mask, n=2, m=4), add=True, activation="relu", arguments={})
    close(layer(x, other), torch.relu(by_mask(weight, mask, x) + other.float()))
    assert [one.name for one in hopper] == ["cuda_sparse24_group"]


@pytest.mark.parametrize(("gated", "dtype"), [(True, torch.bfloat16), pytest.param(False, torch.float16, marks=MORE)])
def test_experts(hopper: list[Any], gated: bool, dtype: torch.dtype) -> None:
    count, inputs, hidden, outputs, rows, each = 2, 72, 136, 40, 90, 2
    x, gate, up = numbers(rows, inputs, dtype=dtype), *(numbers(count, hidden, inputs, dtype=dtype, scale=0.2) for _ in range(2))
    down, weights = numbers(count, outputs, hidden, dtype=dtype, scale=0.1), torch.rand(rows, each, dtype=torch.float32)
    chosen = torch.randint(-1, count, (rows, each))
    tensors = {"gate": gate, "down": down, "bias": numbers(count, outputs, dtype=dtype), **({"up": up} if gated else {})}
    (_, options), = experts.offer("experts_ffn", tensors, {"activation": "silu"}, dtype, (rows,), ANY)
    layer = experts.bind("experts_ffn", options, tensors, {"activation": "silu"}, None, {}, ANY, [])
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    wanted = experts_ffn.reference(x.float(), chosen, weights, wide["gate"], wide.get("up"), wide["down"], None, None, wide["bias"],
                                   activation="silu")
    close(layer(x, chosen, weights), wanted)
    assert [one.group for one in hopper if one.name == "cuda_grouped"] == [True, True]


@pytest.mark.parametrize(("width", "tiled", "padded", "dtype"), [
    (64, False, False, torch.bfloat16), pytest.param(64, True, True, torch.float16, marks=MORE),
    pytest.param(128, False, True, torch.bfloat16, marks=MORE)])
def test_attention(hopper: list[Any], width: int, tiled: bool, padded: bool, dtype: torch.dtype) -> None:
    sizes = {"B": 1, "H": 2, "G": 1, "Q": 140, "K": 150, "D": width, "E": 64, "bq": 64, "bk": 64}
    check(call(sizes, dtype, listed=2, tiled=tiled, padded=padded, causal=True))
    assert [(one.name, one.group) for one in hopper] == [("cuda_attend_many", True)]


@pytest.mark.parametrize(("rows", "inputs"), [(1, 8), (70, 136), (64, 64)])
def test_transposition(rows: int, inputs: int) -> None:
    x = torch.randint(-(1 << 15), 1 << 15, (rows, inputs), dtype=torch.int32).to(torch.int16)
    y = torch.full((inputs, -(-rows // 8) * 8), 7, dtype=torch.int16)
    emulate.run(CudaTurn(), x, y)
    assert torch.equal(y[:, :rows], x.t())
    assert not y[:, rows:].any()


def test_results_that_are_taken_before_they_are_there_are_found(hopper: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator carries products out as late as they may be."""
    monkeypatch.setattr(groups, "WAITED", "group_wait<1>")
    mask = torch.ones(64, 320, dtype=torch.bool)
    weight = numbers(64, 320, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="depends on the order"):
        bound("linear_bsr", Bsr.encode(weight, mask, r=64, c=8))(numbers(70, 320, dtype=torch.bfloat16))
