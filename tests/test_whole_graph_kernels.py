"""Kernels that only whole graphs use, each against torch: norms, softmax, means, activations, dense attention, caches."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsify_compiler.codegen import build
from sparsify_compiler.codegen.kernels.attend_dense import AttendDense
from sparsify_compiler.codegen.kernels.attend_step import AttendStep
from sparsify_compiler.codegen.kernels.cache_write import CacheWrite
from sparsify_compiler.codegen.kernels.dense_panel import DensePanel
from sparsify_compiler.codegen.kernels.finish import Finish
from sparsify_compiler.codegen.kernels.mask_dense import Mask
from sparsify_compiler.codegen.kernels.mean_rows import MeanRows
from sparsify_compiler.codegen.kernels.norm_rows import NormRows
from sparsify_compiler.codegen.kernels.pointwise_flat import PointwiseFlat
from sparsify_compiler.codegen.kernels.softmax_rows import SoftmaxRows
from sparsify_compiler.codegen.targets import tvm_target
from sparsify_compiler.codegen.vectors import AVX512, Vectors, multiplies_pairs, vectors_of
from sparsify_compiler.codegen.whole_graph_attention import registers
from sparsify_compiler.target import host, resolve


def run(schedule: Any, *given: Tensor, like: Tensor) -> Tensor:
    made = torch.full_like(like, math.nan)
    build.load(schedule, host()).function(*given, made)
    return made


@pytest.mark.parametrize("size", [7, 193])
@pytest.mark.parametrize("rows", [1, 200])
def test_norms(size: int, rows: int) -> None:
    x, weight, bias = torch.randn(rows, size) * 3 + 5, torch.randn(size), torch.randn(size)
    layer = run(NormRows(size, 1e-5, True, True, True, 2), x, weight, bias, like=x)
    torch.testing.assert_close(layer, F.layer_norm(x, (size,), weight, bias, 1e-5), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(run(NormRows(size, 1e-6, False, True, False, 2), x, weight, like=x), F.rms_norm(x, (size,), weight, 1e-6))
    torch.testing.assert_close(run(MeanRows(size, 2), x, like=x[:, 0].contiguous()), x.mean(1))


def test_norms_and_activations_in_bfloat16() -> None:
    """Sums are those of float32, and the result is rounded once."""
    x, weight = torch.randn(5, 77).bfloat16(), torch.randn(77).bfloat16()
    norm = run(NormRows(77, 1e-6, False, True, False, 2, ("bfloat16", "bfloat16")), x, weight, like=x)
    torch.testing.assert_close(norm, F.rms_norm(x.float(), (77,), weight.float(), 1e-6).bfloat16(), rtol=1e-2, atol=1e-3)
    flat = x.flatten()
    torch.testing.assert_close(run(PointwiseFlat(Finish(False, "silu"), 2, "bfloat16"), flat, like=flat), F.silu(flat.float()).bfloat16(), rtol=1e-2,
                               atol=1e-3)


def test_a_norm_of_large_numbers_keeps_its_digits() -> None:
    """A single pass over squares would lose them all."""
    x = torch.randn(3, 64) + 4096
    found = run(NormRows(64, 1e-5, True, False, False, 1), x, like=x)
    torch.testing.assert_close(found, F.layer_norm(x.double(), (64,)).float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("layout", "dtype", "cut_for"), [
    ("panels", torch.float32, AVX512), ("panels", torch.float32, Vectors(8, 16, False)), ("panels", torch.float32, Vectors(4, 32, False, True)),
    ("inputs", torch.float32, AVX512), ("inputs", torch.bfloat16, AVX512), ("outputs", torch.float32, AVX512), ("outputs", torch.bfloat16, AVX512)])
def test_dense_products(layout: str, dtype: torch.dtype, cut_for: Vectors) -> None:
    """Rows and outputs that fill no tile, several blocks of inputs, two threads."""
    schedule = DensePanel(layout, 2, Finish(True, "relu"), *[str(dtype).removeprefix("torch.")] * 3, cut_for)
    run = build.load(schedule, host()).function
    for rows, inputs, outputs in ((1, 1, 1), (5, 30, 70), (13, 150, 64), (200, 257, 5)):
        inputs = inputs if dtype is torch.float32 else -(-inputs // 32) * 32
        x, weight, bias = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype), torch.randn(outputs)
        other, found = torch.randn(rows, outputs).to(dtype), torch.full((rows, outputs), math.nan, dtype=dtype)
        stored = F.pad(weight, (0, 0, 0, -outputs % schedule.width if layout != "outputs" else 0))
        if layout == "panels":
            stored = stored.view(-1, schedule.width, inputs).mT.contiguous()
        elif layout == "inputs":
            stored = F.pad(weight, (0, 0, 0, -outputs % 64)).t().contiguous()
        run(x, stored if dtype is torch.float32 else stored.view(torch.int32), F.pad(bias, (0, -outputs % 64)), other, found)
        expected = (F.linear(x.double(), weight.double(), bias.double()) + other.double()).relu().to(dtype)
        torch.testing.assert_close(found, expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [16, 77])
def test_softmax(size: int) -> None:
    x = torch.randn(5, size) * 20
    x[1, 0], x[2], x[3] = -math.inf, 1e30, -1e30
    found = run(SoftmaxRows(size, 2), x, like=x)
    torch.testing.assert_close(found, x.softmax(-1), rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("count", [0, 1, 17, 40_000])
def test_activations(count: int) -> None:
    x, other = torch.randn(count), torch.randn(count)
    torch.testing.assert_close(run(PointwiseFlat(Finish(True, "relu"), 2), x, other, like=x), (x + other).relu())


ATTENTIONS = [  # (query heads, groups, width, value width, queries, keys, causal, mask, lies, (lanes, vectors, together))
    (2, 2, 16, 16, 21, 21, False, "keys", "bshd", (16, 2, 8)), (4, 2, 20, 24, 9, 70, False, "all", "bhsd", (4, 4, 4)),
    (3, 1, 8, 8, 40, 40, True, "", "bshd", (4, 4, 4)), (2, 1, 8, 12, 1, 130, False, "numbers", "bhsd", (8, 1, 2)),
    (2, 2, 16, 16, 128, 70, False, "keys", "bshd", (16, 4, 4)),
    (2, 2, 16, 16, 3, 70, False, "", "bhsd", (16, 2, 12)),
]  # fmt: skip


@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention(case: tuple[Any, ...]) -> None:
    heads, groups, width, value_width, queries, keys, causal, kind, lies, registers = case
    query, key, value = torch.randn(2, heads, queries, width), torch.randn(2, groups, keys, width), torch.randn(2, groups, keys, value_width)
    mask, facts = None, Mask()
    if kind == "keys":
        mask, facts = torch.rand(2, 1, 1, keys) > 0.3, Mask("bool", (True, False, False))
    if kind == "all":
        mask, facts = torch.rand(1, heads, queries, keys) > 0.3, Mask("bool", (False, True, True))
        mask[0, 0, 3] = False   # this row reads nothing, and is 0
    if kind == "numbers":
        mask, facts = torch.randn(1, 1, queries, keys), Mask("float32", (False, False, True))
        mask[..., 5:9], mask[..., 9:11] = -math.inf, torch.finfo(torch.float32).min
    repeated = [one.repeat_interleave(heads // groups, 1) for one in (key, value)]
    expected = F.scaled_dot_product_attention(query, *repeated, attn_mask=mask, is_causal=causal)
    turn = (lambda x: x.transpose(1, 2).contiguous()) if lies == "bshd" else (lambda x: x)
    schedule = AttendDense(width, value_width, heads, groups, width**-0.5, causal, facts, (lies,) * 4, False, *registers, workers=2)
    given = [turn(one) for one in (query, key, value)] + ([] if mask is None else [mask])
    torch.testing.assert_close(run(schedule, *given, like=turn(expected)), turn(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cpu", ["x86-avx512", "x86-avx2"])
def test_attention_multiplies_and_takes_powers_in_vectors(cpu: str) -> None:
    """No conversion of single numbers for the powers of two, and the places of several keys are not put into a vector and taken out of it."""
    import tvm

    target = resolve(cpu)
    lanes = target.vector_bytes // 4
    schedule = AttendDense(64, 64, 2, 2, 0.125, False, Mask(), ("bshd",) * 4, False, lanes, 2, target.vector_registers // 4, 2)
    made = tvm.compile(tvm.IRModule({"main": schedule.compute()}), target=tvm_target(target), tir_pipeline="tirx").mod.inspect_source("asm")
    assert "vfmadd" in made
    assert "cvttss2si" not in made
    for loop in _innermost(made):
        assert not ("vfmadd" in loop and "vpextr" in loop), loop


def test_more_rows_at_a_time_where_none_of_them_go_empty() -> None:
    wide = resolve("x86-avx512")
    assert [registers(wide, rows)[1] for rows in (0, 1, 16, 40, 64, 96, 128)] == [2, 2, 2, 4, 4, 2, 4]
    assert {registers(resolve("x86-avx2"), rows) for rows in (0, 128)} == {(8, 2, 4)}


def _innermost(assembly: str) -> list[str]:
    """The bodies of loops that begin at a label and end at the first jump, which goes back to it."""
    blocks = re.split(r"^(\.LBB\w+):", assembly, flags=re.MULTILINE)[1:]
    return [body[:jump.end()] for label, body in zip(blocks[::2], blocks[1::2], strict=True)
            if (jump := re.search(r"\sj\w+\s+(\.LBB\w+)", body)) and jump[1] == label]


@pytest.mark.skipif(not multiplies_pairs(host()), reason="this machine has no instruction for pairs of bfloat16")
@pytest.mark.parametrize("keys", [1, 21, 64, 130])
@pytest.mark.parametrize(("causal", "masked", "lies"), [(False, True, "bshd"), (True, False, "bhsd"), (False, False, "bhsd")])
def test_attention_in_pairs_of_bfloat16(keys: int, causal: bool, masked: bool, lies: str) -> None:
    """Numbers of keys that are odd; what lies behind the last key is not read, and shares are rounded as torch rounds them."""
    queries = keys if causal else 9
    query, key, value = torch.randn(2, 4, queries, 32) * 2, torch.randn(2, 2, keys, 32), torch.randn(2, 2, keys, 48)
    query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
    mask, facts = (torch.rand(2, 1, 1, keys) > 0.3, Mask("bool", (True, False, False))) if masked else (None, Mask())
    repeated = [one.double().repeat_interleave(2, 1) for one in (key, value)]
    expected = F.scaled_dot_product_attention(query.double(), *repeated, attn_mask=mask, is_causal=causal).nan_to_num().bfloat16()
    if not masked and not causal:   # of an odd last pair only one key counts, whatever the other place holds
        value[:, :, -1, 5] = math.inf
        expected[..., 5] = math.inf
    turn = (lambda x: x.transpose(1, 2).contiguous()) if lies == "bshd" else (lambda x: x)
    schedule = AttendDense(32, 48, 4, 2, 32**-0.5, causal, facts, (lies,) * 4, False, vectors_of(host()).lanes, 2, 8, 2, dtype="bfloat16")
    given = [turn(one) for one in (query, key, value)] + ([] if mask is None else [mask])
    torch.testing.assert_close(run(schedule, *given, like=turn(expected)), turn(expected), rtol=2e-2, atol=1e-2)


def test_scores_of_whole_groups_of_keys_have_room() -> None:
    """Twelve at a time write 72 of the 64 rows of a block."""
    schedule = AttendDense(16, 16, 2, 2, 0.25, False, Mask(), ("bhsd",) * 4, False, 16, 2, 12, 2)
    assert f"({72 * schedule.rows},)" in str(schedule.compute())


def test_attention_over_a_cache() -> None:
    """In pieces it is what it is of the whole; behind the last token anything may be in the cache."""
    query, key, value = torch.randn(1, 2, 9, 8), torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8)
    whole = F.scaled_dot_product_attention(query, key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1), is_causal=True)
    caches, past = [torch.full((1, 1, 12, 8), math.nan) for _ in range(2)], 0
    schedule = AttendDense(8, 8, 2, 1, 8**-0.5, True, Mask(), ("bhsd",) * 4, True, 4, 1, 2, 1)
    write = build.load(CacheWrite(8, 1, "bhsd", 1), host()).function
    for size in (4, 1, 3, 1):
        part = [one[:, :, past:past + size].contiguous() for one in (query, key, value)]
        for cache, new in zip(caches, part[1:], strict=True):
            write(cache, new, torch.tensor([past]))
        found = run(schedule, part[0], *caches, torch.tensor([past]), like=part[0])
        torch.testing.assert_close(found, whole[:, :, past:past + size], rtol=1e-4, atol=1e-5)
        past += size
    write(caches[0], torch.ones(1, 1, 4, 8), torch.tensor([10]))    # rows without room are left out
    assert caches[0][0, 0, 10:].eq(1).all()
    assert not caches[0][0, 0, :9].eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_of_texts_that_start_later(dtype: torch.dtype) -> None:
    """Keys before the start are not read, whatever they are; caches are written and read in their own dtype."""
    query, new = torch.randn(3, 4, 1, 16), [torch.randn(3, 2, 1, 16).to(dtype) for _ in range(2)]
    step = AttendStep(16, 16, 4, 2, 0.25, 16, 8, 2, None, str(dtype).removeprefix("torch."), True)
    write = build.load(CacheWrite(16, 2, "bhsd", 1, *[str(dtype).removeprefix("torch.")] * 2), host()).function
    for keys, starts in ((5, [0, 4, 2]), (700, [699, 0, 300])):
        caches = [torch.randn(3, 2, keys + 3, 16).to(dtype) for _ in range(2)]
        for cache, one in zip(caches, new, strict=True):
            for text, start in enumerate(starts):
                cache[text, :, :start] = math.nan
            write(cache, one, torch.tensor([keys - 1]))
            assert torch.equal(cache[:, :, keys - 1:keys], one)
        found = run(step, query.view(-1, 16), *caches, torch.tensor([keys - 1]), torch.tensor(starts), like=query.reshape(-1, 16)).view(3, 4, 1, 16)
        for text, start in enumerate(starts):
            key, value = (cache[text:text + 1, :, start:keys].float() for cache in caches)
            expected = F.scaled_dot_product_attention(query[text:text + 1], key, value, scale=0.25, enable_gqa=True)
            torch.testing.assert_close(found[text:text + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(6, 2, 32, 16, 16, 16), (4, 1, 8, 24, 8, 2), (2, 2, 4, 4, 4, 8)])
def test_attention_of_one_token(sizes: tuple[int, ...]) -> None:
    """Caches in one part and in several, of whole vectors and not; behind the last token anything may be in them."""
    heads, groups, width, value_width, lanes, registers = sizes
    step = AttendStep(width, value_width, heads, groups, width**-0.5, lanes, registers, 2)
    for keys in (1, 17, 128, 300, 2100):
        query, key, value = torch.randn(2, heads, 1, width) * 3, torch.randn(2, groups, keys, width), torch.randn(2, groups, keys, value_width)
        key[1, 0, keys // 2] = 20 * query[1, 0, 0]      # one score that is far above all others
        expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        caches = [torch.cat([one, torch.full_like(one[:, :, :1], math.nan)], 2) for one in (key, value)]
        found = run(step, query.view(-1, width), *caches, torch.tensor([keys - 1]), like=expected.reshape(-1, value_width))
        torch.testing.assert_close(found.view_as(expected), expected, rtol=1e-4, atol=1e-5)


def test_operators_read_tensors_that_start_anywhere() -> None:
    """A vector that is promised to start at a multiple of its own size is loaded by an instruction that ends the process where it does not."""
    import tvm
    from tvm import te, tirx

    from sparsify_compiler.codegen.whole_graph_schedule import _scheduled

    table, rows, size = te.placeholder((64, 32), "float32"), te.placeholder((tirx.Var("n", "int64"),), "int64"), te.reduce_axis((0, 32))
    taken = te.create_prim_func([table, rows, te.compute((rows.shape[0], 32), lambda i, j: table[rows[i], j])])
    summed = te.create_prim_func([table, te.compute((64,), lambda i: te.sum(table[i, size], axis=size))])
    reference: list[str] = []
    module = _scheduled(tvm.IRModule({"taken": taken, "summed": summed}), host(), reference)
    assert reference == ["summed"]
    assert [[one.ty.data_alignment for one in module[name].params] for name in ("taken", "summed")] == [[4, 8, 4], [4, 4]]
