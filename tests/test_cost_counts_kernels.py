"""The counts of test_cost_counts.py for sparse convolutions, mixtures of experts and attention by blocks; forms run where they are offered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_help import needs_avx512
from sympy import Integer
from test_cost_counts import ALL_16, count, is_count, size
from test_predict import made_up
from tir_count import Counts

from sparsify_compiler import catalog
from sparsify_compiler.codegen.kernels.expert_rows import ExpertRows
from sparsify_compiler.codegen.kernels.experts_layout import prepare_experts
from sparsify_compiler.codegen.kernels.finish import Finish
from sparsify_compiler.codegen.kernels.layout import groups_of
from sparsify_compiler.codegen.kernels.planes import NUMBERS, Planes
from sparsify_compiler.codegen.kernels.planes_layout import Geometry, PreparedPlanes, offsets_of, prepare_planes
from sparsify_compiler.cost_models import predict
from sparsify_compiler.cost_models.fit import Timed, fit
from sparsify_compiler.cost_models.forms import attention, experts, planes
from sparsify_compiler.cost_models.symbols import compiled
from sparsify_compiler.errors import InputError
from sparsify_compiler.target import FEATURES, host
from sparsify_compiler.work import Work
from sparsify_compiler.work import predict as times
from sparsify_compiler.work_draw import KINDS, draw
from sparsify_compiler.work_sample import forms_of

pytestmark = needs_avx512
OFFSETS, VISITS, ELSEWHERE = 1, 3, -1     # numbers of parameters, as tir_count has them
OUTPUTS, INPUTS, STEP, SIDE = 32, 160, 4, 23
PLAIN = Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1)


@pytest.mark.parametrize(("r", "vectors"), [(1, 4), (1, 8), (4, 4), (8, 3)])
@pytest.mark.parametrize("chunk", [160, 32])
def test_planes(r: int, vectors: int, chunk: int) -> None:
    """Every fourth input of a 1×1 convolution over an image of 23×23, which no register and no tile divides."""
    if r > 1 and chunk < INPUTS:
        return
    made, counts = _walked(r, vectors, chunk)
    numbers = {"M": SIDE**2, "N": OUTPUTS, "K": INPUTS, "taps": 1, "density": 1 / STEP, "group": r, "vectors": vectors, "span": chunk}
    is_count(planes.WEIGHT, numbers, size(made.values, made.columns))
    is_count(planes.CHUNKS * planes.GROUPS, numbers, made.visits.numel())
    is_count(planes.FMAS * 16, numbers, counts.lanes)
    is_count(planes.LOADS * 16 * r, numbers, counts.lanes)      # a register of pixels is loaded once for all outputs of a group
    is_count(planes.COLUMNS * planes.TILES, numbers, counts.loaded[OFFSETS])
    is_count(planes.VISITS, numbers, counts.loaded[VISITS])
    whole = counts if made.chunks == 1 else _walked(r, vectors, INPUTS)[1]
    between = 16 * planes.GROUPS * planes.group * planes.REGISTERS if made.chunks > 1 else Integer(0)    # sums that begin in memory with the bias
    is_count(2 * 16 * planes.SUMS + between, numbers, counts.loaded[ELSEWHERE] - whole.loaded[ELSEWHERE])


def _walked(r: int, vectors: int, chunk: int) -> tuple[PreparedPlanes, Counts]:
    mask = (torch.arange(INPUTS) % STEP == 0).expand(OUTPUTS, INPUTS)
    form = catalog.get("format", "bsr").encode(torch.ones(OUTPUTS, INPUTS, dtype=torch.float32), mask, r=r, c=1)
    groups, _, _ = groups_of("linear_bsr", form.tensors(), form.attributes())
    made = prepare_planes(groups, PLAIN, r, chunk, None, OUTPUTS, INPUTS, 1)
    given = {"groups": OUTPUTS // r, "chunks": made.chunks, "pixels": SIDE**2, "pitch": SIDE, "rows": SIDE, "kinds": 1}
    numbered = torch.tensor([given[name] for name in NUMBERS]).int()
    integers = [made.columns * SIDE**2, made.pointers, made.visits]
    held: list[tuple[torch.Tensor, bool]] = [(made.values, False), *((one.int(), True) for one in integers), (made.bias, False),
                                             (made.strips, True), (torch.zeros(2, dtype=torch.int32), True), (numbered, True)]
    images = [((1, channels, SIDE, SIDE), None) for channels in (INPUTS, OUTPUTS)]
    arguments = [*((tuple(one.shape), one if known else None) for one, known in held), *images]
    return made, count(Planes(r, vectors, made.chunks > 1, Finish(), False).compute(), arguments)


def test_inputs_of_a_tile_that_exceed_the_first_cache_come_from_the_second() -> None:
    numbers = {"M": 784, "N": 64, "K": 256, "taps": 1, "density": 0.25, "group": 1, "vectors": 4}
    is_count(planes.FETCHED, numbers | {"span": planes.HELD // 4}, 0)
    is_count(planes.FETCHED, numbers | {"span": planes.HELD // 4 + 1}, 64 * 256 * 64 / 4 * 49)


@pytest.mark.parametrize(("side", "kernel"), [(7, 3), (14, 3), (56, 1), (28, 5)])
def test_pixels_between_the_rows_of_y_are_computed_too(side: int, kernel: int) -> None:
    geometry = Geometry((kernel, kernel), (1, 1), (kernel // 2, kernel // 2), (1, 1), 1)
    numbers = offsets_of(torch.zeros(1, dtype=torch.int32), geometry, (side, side), side**2)[1]
    is_count(planes.COMPUTED, {"M": side**2, "taps": kernel**2}, numbers["pixels"])


def test_a_register_that_does_not_begin_at_a_line_of_the_cache_lies_in_two() -> None:
    numbers = {"N": 64, "K": 64, "density": 0.25, "group": 1}
    for side, taps, astride in ((28, 1, 0.0), (14, 1, 1.0), (28, 9, 1.0)):
        given = numbers | {"M": side**2, "taps": taps}
        is_count(planes.ASTRIDE, given, astride * compiled(planes.LOADS)(given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_row_of_a_mixture(dtype: torch.dtype) -> None:
    inputs, hidden, outputs, chosen, number = 32, 64, 64, 2, 4
    tensors = {"gate": torch.ones(number, hidden, inputs, dtype=dtype), "up": torch.ones(number, hidden, inputs, dtype=dtype),
               "down": torch.ones(number, outputs, hidden, dtype=dtype)}
    made = prepare_experts(tensors, "relu")
    held = list(made.arguments().values())
    places = torch.tensor([[0, 3]], dtype=torch.int32)
    arguments = [((1, inputs), None), ((1, chosen), places), ((1, chosen), None),
                 *((tuple(one.shape), one if one.dtype is torch.int32 else None) for one in held), ((1, outputs), None)]
    counts = count(ExpertRows(made.layout, False, dots=dtype is torch.bfloat16).compute(), arguments, ALL_16)
    numbers = {"M": 1, "K": inputs, "N": outputs, "hidden": hidden, "experts": number, "chosen": chosen, "value_bytes": dtype.itemsize}
    if dtype is torch.bfloat16:
        assert counts.calls["dot_bf16"] == compiled(experts.ROW_FMAS)(numbers) / experts.CORES["dots"].each
    else:
        assert counts.lanes == pytest.approx(compiled(experts.ROW_FMAS)(numbers) * 16, rel=0.02)     # the factors of experts beside
    is_count(experts.WEIGHT, numbers, size(*(one[:chosen] for one in tensors.values())))


@pytest.mark.parametrize("core", sorted(experts.CORES))
@pytest.mark.parametrize(("rows", "number", "chosen"), [(256, 8, 2), (8, 16, 2), (40, 8, 1), (2, 8, 2), (1, 4, 1), (3, 2, 2)])
def test_units_of_a_mixture(core: str, rows: int, number: int, chosen: int) -> None:
    """Expectations, against many random choices: of rows that go one by one, and of units of all others."""
    generator, few, found = torch.Generator().manual_seed(0), experts.CORES[core].few, []
    for _ in range(400):
        counts = torch.rand(rows, number, generator=generator, dtype=torch.float32).topk(chosen).indices.flatten().bincount(minlength=number)
        alone, many = counts[counts <= few], counts[counts > few]
        found.append([float(alone.sum()), float(len(many)), float((-(-many // 16)).sum())])
    expected = torch.tensor(found, dtype=torch.float32).mean(0)
    numbers = {"M": rows, "experts": number, "chosen": chosen}
    for formula, value in zip((experts.few_of(few)[1], *experts.units_of_many(few)), expected.tolist(), strict=True):
        assert compiled(experts.Integer(0) + formula)(numbers) == pytest.approx(value, rel=0.12, abs=0.06)


@pytest.mark.parametrize(("dtype", "core"), [("float32", "fma"), ("bfloat16", "dots")])
def test_a_mixture_is_timed_by_its_core(dtype: str, core: str) -> None:
    machine = replace(made_up(host(), dot=4e11), features=tuple(name for name in FEATURES["x86_64"] if not name.startswith("amx")))
    sizes = {"K": 64, "N": 64, "hidden": 64, "chosen": 2, "experts": 8}
    for rows, expected in ((1, "row"), (8, "rows")):
        work = Work.make("experts_ffn", dtype, M=rows, **sizes)
        assert [form.fitted for form in predict.forms(work.op, work.values, dtype, machine)][1:] == [f"experts {dtype} {core} {expected}"]
    assert [form.name for form in predict.forms("experts_ffn", work.values | {"K": 65}, "float32", made_up(host()))] == [experts.GROUPED]


def test_what_was_timed_on_no_processor_is_not_predicted() -> None:
    work = Work.make("experts_ffn", "bfloat16", M=16, K=64, N=64, hidden=64, experts=8, chosen=2)
    tiles = replace(made_up(), features=tuple(FEATURES["x86_64"]))
    with pytest.raises(InputError, match="no formula says how long experts_ffn takes in bfloat16"):
        times(work, tiles)


def test_attention_by_blocks() -> None:
    """What the forms count is half of the operations that the op's formula counts, 16 at a time."""
    numbers = {"M": 1024, "K": 64, "E": 32, "pairs": 48, "block_q": 128, "block_k": 32, "vectors": 4}
    flops = compiled(catalog.get("cost", "attend_blocks").FLOPS)(numbers)
    is_count(attention.FMAS * 16 * 2, numbers, flops)
    is_count(attention.FMAS * 16 * 2, numbers | {"block_q": 16, "vectors": 2}, flops / 128 * 32)     # half of the registers are empty
    is_count(attention.READ, numbers, 4 * 48 * 32 * (64 + 32) * 2)      # twice: 64 query rows run at a time
    is_count(attention.CACHED, numbers | {"x_bytes": 4, "group": 4}, 48 * 32 * (64 + 32))
    for block, expected in ((8, "attend_few float32"), (32, "attend_panel float32 v2"), (64, "attend_panel float32 v4")):
        assert [form.fitted for form in attention.offer("attend_blocks", {"block_q": block}, "float32", made_up())] == [expected]
    dots = replace(made_up(), features=tuple(name for name in FEATURES["x86_64"] if not name.startswith("amx")))
    for block, machine, forms in ((8, made_up(), ["attend_few bfloat16"]), (64, dots, ["attend_panel bfloat16 v4"]), (64, made_up(), [])):
        assert [form.fitted for form in attention.offer("attend_blocks", {"block_q": block}, "bfloat16", machine)] == forms
    sizes = {"read": 3 << 20, "written": 1 << 20, "x_bytes": 2}
    is_count(attention.COPIED, sizes, 6 * (4 << 20))


@pytest.mark.parametrize("kind", sorted(set(KINDS["kernels"])))
def test_the_forms_are_those_that_run(kind: str) -> None:
    machine = made_up(host())
    for work in draw(7, 4, (kind,)):
        offered = {form.name for form in predict.forms(work.op, work.values, work.dtype, machine)}
        assert offered <= set(forms_of(small(work), host())[0])
        assert offered or (work.op, work.dtype) == ("attend_blocks", "bfloat16")     # of many rows, on tiles


def small(work: Work) -> Work:
    """The same with less to make up, where that changes no kernel."""
    sizes: dict[str, Any] = dict(work.sizes)
    return Work.make(work.op, work.dtype, work.between, **sizes | ({"experts": 4, "M": min(sizes["M"], 16)} if work.op == "experts_ffn" else {}))


@pytest.mark.parametrize("kind", sorted(set(KINDS["kernels"])))
def test_more_work_takes_longer(kind: str) -> None:
    machine = made_up(host())
    for work in draw(8, 6, (kind,)):
        more = Work.make(work.op, work.dtype, work.between, **{**dict(work.sizes), **{name: value * 2 for name, value in work.sizes
                                                                                     if name in ("M", "pairs", "read", "written", "listed")}})
        for one, other in zip(*([predict.seconds(form, each.values, machine, each.between).total
                                 for form in predict.forms(each.op, each.values, each.dtype, machine)] for each in (work, more)), strict=True):
            assert other > one > 0


def test_what_runs_as_a_linear_layer_has_its_costs_and_tells_nothing_of_them() -> None:
    work = Work.make("conv2d_csr", "bfloat16", M=196, N=64, K=64, taps=1, read=12544, written=12544, density=0.1)
    offered = predict.forms(work.op, work.values, work.dtype, made_up(host()))
    assert [form.borrowed for form in offered] == [form.name.startswith("pixels ") for form in offered]
    assert any(form.borrowed for form in offered)
    fitted = fit([Timed(form, work.values, work.between, 1e-4) for form in offered], made_up(host()))
    assert set(fitted) == {form.fitted for form in offered if not form.borrowed}
