"""Predicted times: the forms that are offered are those that run, costs grow with the work, units agree. No machine is measured here."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_help import needs_avx512

from sparsify_compiler.cost_models import predict as model
from sparsify_compiler.cost_models import shipped
from sparsify_compiler.cost_models.forms import eager, gather
from sparsify_compiler.cost_models.machine import UNITS, Level, Machine, Number, known, names
from sparsify_compiler.cost_models.symbols import TABLE, TIMES, compiled
from sparsify_compiler.errors import InputError, TargetError
from sparsify_compiler.target import FEATURES, Target, host
from sparsify_compiler.work import Work, is_dense, parts_of, predict
from sparsify_compiler.work_sample import forms_of

RATES = {"vector": 2e11, "matrix": 3e12, "gathers": 4e8, "call": 5e-7, "wake": 8e-7}
MEMORY = (Level(1 << 15, 3e11, 6e11, 0.0, "made up"), Level(1 << 20, 1e11, 2e11, 1e-6, "made up"), Level(1 << 26, 2.5e10, 5e10, 1e-5, "made up"),
          Level(1 << 28, 1.5e10, 3e10, 3e-5, "made up"))


def made_up(target: Target | None = None, **rates: float) -> Machine:
    """A machine with round numbers."""
    numbers = {name: Number(value, UNITS[name], "made up") for name, value in (RATES | rates).items()}
    arch, features = ("x86_64", FEATURES["x86_64"]) if target is None else (target.arch, target.features)
    return Machine("made-up", "a machine with round numbers", arch, tuple(features), 2, numbers, MEMORY)


# On AMX tiles: no such machine was at hand.
UNFITTED = {("conv2d", "bfloat16"), ("conv2d_csr", "bfloat16"), ("small conv2d", "bfloat16"), ("experts_ffn", "bfloat16")}
STRUCTURES: dict[str, dict[str, float]] = {
    "linear": {}, "linear_bsr": {"r": 16, "c": 1, "density": 0.2}, "linear_nm": {"n": 2, "m": 4}, "linear_condensed": {"density": 0.2},
    "linear_csr": {"density": 0.1}, "linear_bitmap": {"density": 0.3}, "select_linear": {"density": 0.5},
}  # fmt: skip
LINEAR = st.sampled_from(sorted(STRUCTURES))
BLOCKS = st.sampled_from([(16, 1), (4, 4), (8, 1), (32, 32), (2, 1), (1, 1), (12, 1)])
ROWS, WIDTHS = st.sampled_from([1, 2, 3, 7, 8, 9, 16, 17, 32, 33, 64, 128, 200]), st.sampled_from([16, 24, 32, 48, 64, 96])


@needs_avx512
@settings(max_examples=40, derandomize=True, deadline=None)
@given(LINEAR, ROWS, WIDTHS, WIDTHS, st.sampled_from(["float32", "bfloat16"]), BLOCKS)
def test_the_forms_are_those_that_run(op: str, rows: int, outputs: int, inputs: int, dtype: str, block: tuple[int, int]) -> None:
    sizes = STRUCTURES[op] | ({"r": block[0], "c": block[1]} if op == "linear_bsr" else {})
    work = Work.make(op, dtype, M=rows, N=outputs, K=-(-inputs // block[1]) * block[1], **sizes)
    assert set(predict(work, made_up(host()))) == set(forms_of(work, host())[0])


@needs_avx512
@pytest.mark.parametrize("op", ["select_ffn", "select_inputs_ffn", "predicted_ffn", "held_ffn"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 16])
def test_of_ffns_too(op: str, dtype: str, rows: int) -> None:
    work = Work.make(op, dtype, M=rows, N=64, K=64, hidden=96, density=0.5)
    assert set(predict(work, made_up(host()))) == set(forms_of(work, host())[0])


@pytest.mark.parametrize(("op", "grows"), [(op, name) for op in sorted(STRUCTURES) for name in ("M", "N", "K", "density")
                                           if name != "density" or name in STRUCTURES[op]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_more_work_takes_longer(op: str, grows: str, dtype: str) -> None:
    """Where all threads take part already: on the way there a kernel may get faster."""
    sizes = {"M": 64, "N": 1024, "K": 1024, **STRUCTURES[op]}
    less, more = (predict(Work.make(op, dtype, 1 << 26, **sizes | {grows: sizes[grows] * times}), made_up()) for times in (1, 2))
    shared = {name for name in set(less) & set(more) if grows != "density" or not (is_dense(name) or op == "select_linear")}
    assert shared or (op, grows) == ("select_linear", "density")
    for name in shared:
        assert more[name] > less[name]


def test_a_gathered_layer_takes_longer_the_more_is_selected() -> None:
    times = [predict(Work.make("select_linear", M=1, N=768, K=768, density=density), made_up())["gather by input"] for density in (0.1, 0.5, 1.0)]
    assert times == sorted(set(times))


@pytest.mark.parametrize("op", sorted(STRUCTURES))
def test_units_agree(op: str) -> None:
    """A formula is proportional to all that is measured in seconds: what is counted carries none."""
    work, machine = Work.make(op, "bfloat16", M=16, N=256, K=256, **STRUCTURES[op]), made_up()
    for form in model.forms(op, work.values, work.dtype, machine):
        given = model.numbers(form, work.values, machine, work.between) | dict(shipped.costs_of(machine.arch, machine.features)[form.fitted])
        slower = given | {name: 3.0 * given[name] for name in TIMES if name in given}
        seconds = compiled(form.formula.seconds)
        assert seconds(slower) == pytest.approx(3 * seconds(given))


@pytest.mark.parametrize(("missing", "least"), [((), 40), (("amx",), 40), (("amx", "avx512bf16"), 40), (("amx", "avx512"), 8)])
def test_every_formula_is_written_in_the_table_and_in_what_is_fitted(missing: tuple[str, ...], least: int) -> None:
    """On every kind of machine: what multiplies bfloat16 differs, and what is fitted with it."""
    features = tuple(name for name in FEATURES["x86_64"] if not name.startswith(missing)) if missing else FEATURES["x86_64"]
    machine, seen = replace(made_up(dot=4e11), features=features), set()
    costs = shipped.costs_of(machine.arch, machine.features)
    ffn = {"hidden": 96, "density": 0.5}
    more = (*eager.FORMULAS, "attend_blocks", "experts_ffn", "conv2d_csr")
    others = {op: {"taps": 9, "read": 1 << 18, "written": 1 << 18, "E": 64, "pairs": 512, "block_q": 8, "block_k": 8, "listed": 8,
                    "hidden": 96, "experts": 4, "chosen": 2, "density": 0.5} for op in more}
    for op, sizes in [*STRUCTURES.items(), *((op, ffn) for op in gather.FFNS), *others.items()]:
        for rows in (1, 4, 16, 64):
            for dtype in ("float32", "bfloat16"):
                values = {"M": rows, "N": 64, "K": 64, "value_bytes": 2, "x_bytes": 2, **sizes}
                for form in model.forms(op, values, dtype, machine):
                    if not model.is_fitted(form, machine):
                        assert (op, dtype) in UNFITTED
                        continue
                    names = {symbol.name for symbol in form.formula.seconds.free_symbols}
                    assert names <= set(TABLE) | set(costs[form.fitted]), form.fitted
                    seen.add(form.fitted)
    assert len(seen) > least
    assert any("tiles" in key for key in seen) == ("amx" not in missing)
    assert any("dots" in key for key in seen) == (missing == ("amx",))


def test_a_machine_takes_the_costs_of_its_nearest_kin() -> None:
    zen, rapids = (json.loads(shipped.file_of(name).read_text())["costs"] for name in ("znver4", "sapphirerapids"))
    tiles = tuple(FEATURES["x86_64"])
    dots = tuple(name for name in tiles if not name.startswith("amx"))
    for features, near, far in ((tiles, rapids, zen), (dots, zen, rapids)):
        found = shipped.costs_of("x86_64", features)
        assert all(found[key] == near[key] for key in near)
        assert all(found[key] == far[key] for key in set(far) - set(near))
    assert shipped.costs_of("aarch64", ("neon",))["strips float32"] == rapids["strips float32"]


def test_parts_add_up_and_say_what_bounds() -> None:
    parts = parts_of(Work.make("linear", M=1, N=4096, K=4096, between=1 << 28), made_up())["dense by output"]
    assert parts.total == parts.overhead + parts.compute + parts.memory
    assert parts.bound == "memory"
    assert parts_of(Work.make("linear", M=1, N=16, K=16), made_up())["dense by output"].bound == "overhead"
    assert parts_of(Work.make("linear", M=512, N=1024, K=1024), made_up())["dense packed by MKL"].bound == "compute"


def test_of_an_unknown_op_the_time_is_a_roofline() -> None:
    """The slower of computing and moving, and what a call costs by itself."""
    machine = made_up()
    times, vector = machine.times(machine.cores), machine.cores * machine.numbers["vector"].value
    called = model.EAGER_CALLS * times["call"] + times["wake"]
    moving, computing = model.rough(1e6, 1e9, machine), model.rough(1e12, 1e6, machine)
    assert (moving.total, moving.bound) == (pytest.approx(called + 1e9 / machine.rate(1e9, machine.cores)), "memory")
    assert (computing.total, computing.bound) == (pytest.approx(called + 1e12 / vector), "compute")
    assert model.rough(0.0, 0.0, machine).bound == "overhead"


def test_what_cannot_be_predicted_says_so() -> None:
    with pytest.raises(InputError, match="no formula says how long top_pages takes"):
        predict(Work.make("top_pages", M=1), made_up())
    with pytest.raises(InputError, match="the size K is missing"):
        predict(Work.make("linear", M=1, N=2), made_up())
    with pytest.raises(TargetError, match="did you mean"):
        predict(Work.make("linear", M=1, N=2, K=2), "cortex-a67")


def test_rates_are_interpolated_and_kept_beyond_the_ends() -> None:
    machine = made_up()
    assert machine.rate(1, 1) == pytest.approx(3e11)
    assert machine.rate(1 << 40, 2) == pytest.approx(3e10)
    assert machine.rate(1 << 20, 1) == pytest.approx(1e11)
    assert 2.5e10 < machine.rate(1 << 23, 1) < 1e11
    assert machine.cold(0) == 0
    assert replace(machine, cores=4).rate(1 << 20, 2) == pytest.approx(2e11)


@pytest.mark.parametrize(("change", "said"), [
    ({"numbers": {}}, "missing"), ({"memory": MEMORY[:1]}, "levels of memory"), ({"memory": MEMORY[::-1]}, "rise in size"),
    ({"cores": 0}, "and cores"), ({"numbers": {name: Number(1.0, "parsec", "") for name in UNITS}}, "numbers"),
])  # fmt: skip
def test_a_machine_checks_itself(change: dict[str, object], said: str) -> None:
    with pytest.raises(TargetError, match=said):
        replace(made_up(), **change)  # type: ignore[arg-type]
    assert Machine.from_json(made_up().to_json()) == made_up()
    with pytest.raises(TargetError, match="does not describe a machine"):
        Machine.from_json({"name": "x"})


@pytest.mark.parametrize("name", names())
def test_data_sheets_are_whole_and_tell_their_sources(name: str) -> None:
    machine = known(name)
    assert machine.name == name
    assert all(len(entry.source) > 10 for entry in (*machine.numbers.values(), *machine.memory))
    rates = [(level.one, level.all, -level.cold) for level in machine.memory]
    for higher, lower in itertools.pairwise(rates):
        assert all(a >= b for a, b in zip(higher, lower, strict=True)), "memory that is farther away is not faster"
    assert all(level.one <= level.all for level in machine.memory)
    assert predict(Work.make("linear", M=8, N=256, K=256), name)["dense eager"] > 0


def test_gpus_have_forms_of_torch_only() -> None:
    assert set(predict(Work.make("linear_bsr", M=8, N=256, K=256, r=16, c=1, density=0.1), "h100")) == {"dense eager"}


def test_another_machine_has_the_kernels_that_run_there() -> None:
    found = predict(Work.make("linear_bsr", M=64, N=256, K=256, r=16, c=1, density=0.1), "neoverse-n1")
    assert set(found) == {"dense eager", "bsr_r16v1"}


def test_the_code_of_a_kernel_comes_back_from_where_its_last_call_left_it() -> None:
    """Layers of one shape share a kernel: their weights are as far away as before, its code is not."""
    work = Work.of((576, 576), 1, between=1 << 28)
    far, near = parts_of(work, made_up()), parts_of(work, made_up(), 1 << 20)
    for name, parts in far.items():
        assert near[name].overhead < parts.overhead
        assert (near[name].compute, near[name].memory) == (parts.compute, parts.memory)
    assert predict(work, made_up(), work.between) == predict(work, made_up())
