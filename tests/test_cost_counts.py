"""Counts in the formulas of forms against what the kernels do: multiply-adds walked in their TensorIR, and bytes of the weights that they hold.

Masks are regular, every step-th input, so that nothing depends on chance; then formula and walk agree to the last operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from kernel_help import needs_avx512
from tir_count import Counts, count
from torch import Tensor

from sparsify_compiler import catalog
from sparsify_compiler.codegen.kernels import slice_layout
from sparsify_compiler.codegen.kernels.ffn_rows import FfnRows
from sparsify_compiler.codegen.kernels.gather_rows import GatherRows
from sparsify_compiler.codegen.kernels.gemv import Gemv
from sparsify_compiler.codegen.kernels.inputs_ffn_rows import InputsFfnRows, Selection
from sparsify_compiler.codegen.kernels.layout import dense_groups, groups_of, prepare
from sparsify_compiler.codegen.kernels.panel import Panel
from sparsify_compiler.codegen.kernels.predicted_ffn_rows import PredictedFfnRows
from sparsify_compiler.codegen.kernels.rows import Rows
from sparsify_compiler.codegen.kernels.slice_panel import SlicePanel
from sparsify_compiler.codegen.kernels.stream_rows import StreamRows
from sparsify_compiler.codegen.kernels.strip_layout import pairs_of, prepare_strips
from sparsify_compiler.codegen.kernels.strip_panel import StripPanel
from sparsify_compiler.codegen.kernels.tile_layout import prepare_tiles
from sparsify_compiler.codegen.kernels.tiles import Tiles
from sparsify_compiler.cost_models.forms import eager, gather, lanes, slices, streams, strips, tiles
from sparsify_compiler.cost_models.symbols import compiled
from sparsify_compiler.work import Work, predict

pytestmark = needs_avx512
INTEGERS = (torch.int16, torch.int32, torch.uint8)
SIZES = [(3, 32, 160, 8), (34, 48, 96, 4)]     # rows, outputs, inputs, step
sizes = pytest.mark.parametrize(("rows", "outputs", "inputs", "step"), SIZES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def encoded(outputs: int, inputs: int, step: int, r: int, dtype: torch.dtype) -> tuple[str, Any]:
    """A weight that keeps every step-th input, in blocks of r outputs."""
    mask = (torch.arange(inputs) % step == 0).expand(outputs, inputs)
    return "linear_bsr", catalog.get("format", "bsr").encode(torch.ones(outputs, inputs, dtype=torch.float32).to(dtype), mask, r=r, c=1)


def walked(schedule: Any, x: tuple[int, int], prepared: Any, outputs: int) -> Counts:
    """The counts of a kernel on a prepared weight."""
    held = list(prepared.arguments().values())
    return count(schedule.compute(), [(x, None), *((tuple(t.shape), t if t.dtype in INTEGERS else None) for t in held), ((x[0], outputs), None)])


def values(rows: int, outputs: int, inputs: int, step: int, dtype: torch.dtype, **given: float) -> dict[str, float]:
    size = dtype.itemsize
    return {"M": rows, "N": outputs, "K": inputs, "density": 1 / step, "value_bytes": size, "x_bytes": size, "threads": 1, **given}


def is_count(formula: Any, numbers: Mapping[str, float], counted: float) -> None:
    assert compiled(formula)(numbers) == pytest.approx(counted, rel=1e-9)


def size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@sizes
@pytest.mark.parametrize(("dtype", "r"), [(torch.float32, 1), (torch.bfloat16, 4), (torch.float32, 16)])
def test_rows_and_panels(rows: int, outputs: int, inputs: int, step: int, dtype: torch.dtype, r: int) -> None:
    op, form = encoded(outputs, inputs, step, r, dtype)
    groups, _, _ = groups_of(op, form.tensors(), form.attributes())
    prepared = prepare(groups, dtype, None, outputs, inputs)
    numbers = values(rows, outputs, inputs, step, dtype, group=r)
    is_count(lanes.WEIGHT, numbers, size(prepared.values, prepared.columns))
    is_count(rows * lanes.COLUMNS * r, numbers, walked(Rows(prepared.layout, False), (rows, inputs), prepared, outputs).lanes)
    for vectors in (1, 2) if r < 16 else (1,):
        counts = walked(Panel(prepared.layout, vectors, False), (rows, inputs), prepared, outputs)
        is_count(lanes.FMAS * 16, numbers | {"vectors": vectors}, counts.lanes)
    if dtype is torch.bfloat16 and r >= 4:
        counts = walked(Panel(prepared.layout, 1, False, dot=True), (rows, inputs), prepared, outputs)
        is_count(lanes.FMAS / 2, numbers | {"vectors": 1}, counts.calls["dot_bf16"])


@sizes
@pytest.mark.parametrize("r", [1, 2, 4])
def test_strips(rows: int, outputs: int, inputs: int, step: int, r: int) -> None:
    op, form = encoded(outputs, inputs, step, r, torch.float32)
    groups, _, _ = groups_of(op, form.tensors(), form.attributes())
    prepared = prepare_strips(groups, torch.float32, None, outputs, inputs, 1)
    numbers = values(rows, outputs, inputs, step, torch.float32, group=r, span=strips.BLOCK[r])
    is_count(strips.WEIGHT, numbers, size(prepared.values, prepared.columns))
    is_count(strips.VISITS / strips.TILES, numbers, prepared.pointers.numel() - 1)
    is_count(strips.STRIPS, numbers, prepared.strips.numel() - 1)
    is_count(strips.FMAS * 16, numbers, walked(StripPanel(prepared.layout, 1), (rows, inputs), prepared, outputs).lanes)


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(32, 48, 128), (64, 64, 320)])
def test_strips_of_pairs(rows: int, outputs: int, inputs: int) -> None:
    mask = (torch.arange(inputs) % 4 < 2).expand(outputs, inputs)
    form = catalog.get("format", "nm").encode(torch.ones(outputs, inputs, dtype=torch.bfloat16), mask, n=2, m=4)
    groups, _, _ = groups_of("linear_nm", form.tensors(), form.attributes())
    prepared = prepare_strips(pairs_of(groups), torch.bfloat16, None, outputs, inputs, 1)
    numbers = values(rows, outputs, inputs, 1, torch.bfloat16, n=2, m=4, group=1, span=strips.SPAN_OF_PAIRS) | {"density": 0.5}
    is_count(strips.PAIRS_WEIGHT, numbers, size(prepared.values, prepared.columns))
    is_count(strips.VISITS / strips.TILES, numbers, prepared.pointers.numel() - 1)
    is_count(strips.PAIRS * strips.REGISTERS, numbers, walked(StripPanel(prepared.layout, 1), (rows, inputs), prepared, outputs).calls["dot_bf16"])


@sizes
@dtypes
def test_slices_of_any_mask(rows: int, outputs: int, inputs: int, step: int, dtype: torch.dtype) -> None:
    op, form = encoded(outputs, inputs, step, 1, dtype)
    groups, _, _ = groups_of(op, form.tensors(), form.attributes())
    for direct, formulas in ((False, slices.GAPS), (True, slices.COLUMNS)):
        prepared = slice_layout.prepare_gaps(groups, dtype, None, outputs, inputs, direct)
        numbers = values(rows, outputs, inputs, step, dtype, spread=0)
        is_count(slices.GAPS_STEPS, numbers, prepared.steps)
        is_count(formulas["row"].weight, numbers, prepared.resident_bytes)
        is_count(rows * slices.GAPS_STEPS * 16, numbers, walked(Gemv(prepared.layout, False), (rows, inputs), prepared, outputs).lanes)
        counts = walked(SlicePanel(prepared.layout, 2), (rows, inputs), prepared, outputs)
        is_count(-(-rows // 32) * slices.GAPS_STEPS * 16 * 2 * 16, numbers, counts.lanes)


@pytest.mark.parametrize(("n", "m", "dtype"), [(2, 4, torch.float32), (1, 4, torch.bfloat16), (4, 8, torch.float32)])
def test_slices_of_n_in_m(n: int, m: int, dtype: torch.dtype) -> None:
    rows, outputs, inputs = 3, 48, 128
    mask = (torch.arange(inputs) % m < n).expand(outputs, inputs)
    form = catalog.get("format", "nm").encode(torch.ones(outputs, inputs, dtype=torch.float32).to(dtype), mask, n=n, m=m)
    prepared = slice_layout.prepare_places(form.values, form.offsets, n, m, dtype, None, inputs)
    numbers = values(rows, outputs, inputs, 1, dtype, n=n, m=m, block=slices._block({"n": n, "m": m}))
    is_count(slices.PLACES["row"].weight, numbers, prepared.resident_bytes)
    is_count(rows * slices.slices.PLACES_STEPS * 16, numbers, walked(Gemv(prepared.layout, False), (rows, inputs), prepared, outputs).lanes)


@sizes
@pytest.mark.parametrize("across", [1, 2])
def test_tiles(rows: int, outputs: int, inputs: int, step: int, across: int) -> None:
    def products(prepared: Any) -> int:
        return walked(Tiles(prepared.layout, across, 1), (rows, inputs), prepared, outputs).calls["x86.tdpbf16ps"]

    dense = prepare_tiles(dense_groups(torch.ones(outputs, inputs, dtype=torch.bfloat16), 32), None, outputs, inputs)
    numbers = values(rows, outputs, inputs, step, torch.bfloat16, vectors=across, c=1)
    is_count(tiles.DENSE.weight, numbers | {"group": 32}, size(dense.values, dense.columns))
    is_count(tiles.DENSE_CHUNKS * tiles.TILES * across * tiles.PANELS, numbers | {"group": 32}, products(dense))
    op, form = encoded(outputs, inputs, step, 16, torch.bfloat16)
    groups, _, _ = groups_of(op, form.tensors(), form.attributes())
    prepared = prepare_tiles(groups, None, outputs, inputs)
    chunks = prepared.values.numel() // (16 * 32)
    expected = compiled(tiles.SPARSE_CHUNKS)(numbers | {"group": 16})
    assert abs(chunks - expected) <= outputs / 16  # a chunk a group: whether the last is full or begun is chance, and the formula takes half of it
    assert products(prepared) == chunks * across * -(-rows // (16 * across))


@sizes
@dtypes
def test_streams(rows: int, outputs: int, inputs: int, step: int, dtype: torch.dtype) -> None:
    words = inputs // (1 if dtype is torch.float32 else 2)
    schedule = StreamRows(str(dtype).removeprefix("torch."), False)
    counts = count(schedule.compute(), [((rows, inputs), None), ((outputs, words), None), ((outputs,), None), ((rows, outputs), None)])
    is_count(streams.FMAS * 16, values(rows, outputs, inputs, step, dtype), counts.lanes)


ALL_16 = {"compress_places": lambda *_: 16, "selected": lambda *_: (1 << 16) - 1}


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 128), (3, 96, 64), (2, 48, 100)])
@dtypes
def test_gathered_rows(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """Where every input is selected."""
    width = -(-outputs // 64) * 64
    schedule = GatherRows(str(dtype).removeprefix("torch."), 64, False, False, False)
    words = width // (1 if dtype is torch.float32 else 2)
    arguments = [((rows, inputs), None), ((1,), None), ((1,), None), ((1,), None), ((inputs, words), None), ((width,), None), ((rows, outputs), None)]
    counts = count(schedule.compute(), arguments, ALL_16)
    numbers = values(rows, outputs, inputs, 1, dtype)
    is_count(gather.GATHERED * 16, numbers, counts.lanes)
    is_count(gather.ROWS.weight, numbers, inputs * width * dtype.itemsize)


@dtypes
def test_gathered_ffns(dtype: torch.dtype) -> None:
    """Where every neuron, or every input, is selected."""
    inputs, hidden, outputs, name = 64, 128, 64, str(dtype).removeprefix("torch.")
    half = 1 if dtype is torch.float32 else 2
    numbers = values(1, outputs, inputs, 1, dtype, hidden=hidden)
    by_neuron = [((1, inputs), None), ((1,), None), ((1,), None), ((hidden, inputs // half), None), ((hidden, inputs // half), None),
                 ((hidden,), None), ((hidden,), None), ((hidden, outputs // half), None), ((outputs,), None), ((1, outputs), None)]
    counts = count(FfnRows(name, "relu", 64, False, False).compute(), by_neuron, ALL_16)
    is_count(gather.NEURONS_READ, numbers, counts.lanes)
    is_count(gather.BY_NEURON.weight, numbers, counts.lanes * dtype.itemsize)
    by_scores = [by_neuron[0], ((1, hidden), None), by_neuron[1], *by_neuron[3:]]
    counts = count(PredictedFfnRows(name, "relu", 64, True, False).compute(), by_scores, ALL_16)
    is_count(gather.CHOSEN_READ, numbers, counts.lanes)
    is_count(gather.BY_PREDICTION.weight, numbers, counts.lanes * dtype.itemsize)

    def linear(rows: int, columns: int) -> list[Any]:
        return [((1,), None), ((1,), None), ((1,), None), ((rows, columns // half), None), ((columns,), None)]

    plain = Selection(False, False)
    schedule = InputsFfnRows(name, "relu", 64, 64, plain, plain, plain, False, False)
    arguments = [((1, inputs), None), *linear(inputs, hidden), *linear(inputs, hidden), *linear(hidden, outputs), ((1, outputs), None)]
    counts = count(schedule.compute(), arguments, ALL_16)
    is_count(gather.INPUTS_READ, numbers, counts.lanes)


def test_torchs_own_operators() -> None:
    """What the forms count is half of the operations that the ops' formulas count, 16 at a time."""
    conv = {"M": 49, "N": 24, "K": 8, "taps": 9, "read": 392, "written": 1176, "value_bytes": 4, "x_bytes": 4}
    is_count(eager.FMAS * 16 * 2, conv, compiled(catalog.get("cost", "conv2d").FLOPS)(conv))
    attention = {"M": 64, "K": 32, "E": 48, "pairs": 64 * 16, "block_q": 1, "block_k": 1, "listed": 0, "read": 1, "written": 1, "x_bytes": 4}
    is_count(eager.PRODUCTS * 16 * 2, attention, compiled(catalog.get("cost", "attend").FLOPS)(attention))
    moved = {"read": 200, "written": 100, "taps": 1, "x_bytes": 2, "moved": 1, "near": 1, "threads": 1}
    is_count(eager.PASSES, moved, compiled(catalog.get("cost", "elementwise").BYTES)(moved))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "sizes"), [("elementwise", {"read": 1e6, "written": 1e6, "taps": taps}) for taps in (1, 8, 20)]
                         + [("conv2d", {"M": 784, "N": 64, "K": 32, "taps": taps, "read": 25088, "written": 50176}) for taps in (1, 9)]
                         + [("conv2d", {"M": 49, "N": 64, "K": 32, "taps": taps, "read": 1568, "written": 3136}) for taps in (1, 9)]
                         + [("attend", {"M": 1024, "K": 64, "E": 64, "pairs": 131072, "block_q": 1, "block_k": 1, "listed": 0, "read": 196608,
                                        "written": 65536})])
def test_torchs_own_operators_have_a_time_on_every_machine(op: str, sizes: Mapping[str, float], dtype: str) -> None:
    work = Work.make(op, dtype, **sizes)
    for machine in ("cortex-a76", "neoverse-v2", "h100"):
        times = predict(work, machine)
        assert set(times) == {"dense eager"}
        assert 1e-7 < times["dense eager"] < 1
    twice = {name: 2 * value if name in ("M", "pairs", "read", "written") else value for name, value in sizes.items()}
    assert predict(Work.make(op, dtype, **twice), "cortex-a76")["dense eager"] > predict(work, "cortex-a76")["dense eager"]
