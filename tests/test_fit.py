"""Costs of kernels fitted to times: known costs are found again, what nothing tells of stays, a fit of this machine is kept where it helps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_help import needs_avx512
from test_predict import made_up

from sparsify_compiler import machine_costs, machines
from sparsify_compiler.cost_models import fit as fitting
from sparsify_compiler.cost_models import predict, shipped
from sparsify_compiler.cost_models.fit import Timed, fit
from sparsify_compiler.cost_models.machine import Machine
from sparsify_compiler.errors import InputError
from sparsify_compiler.target import host
from sparsify_compiler.work import Work
from sparsify_compiler.work_draw import FITTING, KINDS, draw

SHIPPED, HERE = (shipped.costs_of(machine.arch, machine.features) for machine in (made_up(), made_up(host())))
STRIPS = "strips float32"


def layers(count: int = 40) -> list[Work]:
    return [Work.make("linear_bsr", M=rows, N=n, K=k, r=4, c=1, density=density)
            for rows, n, k, density in itertools.islice(itertools.product((16, 64, 512), (192, 768, 3072), (384, 1536), (0.05, 0.2, 0.5)), count)]


def test_a_fit_of_this_machine_times_every_kind() -> None:
    ops = [work.op for work in machine_costs._layers()]
    of_kernels = [number for number, op in enumerate(ops) if op in KINDS["kernels"]]
    assert len(of_kernels) == machine_costs.LAYERS["linears"] // machine_costs.EVERY["kernels"]
    assert of_kernels[0] < 12
    assert sum(op in KINDS["others"] for op in ops) == machine_costs.LAYERS["linears"] // machine_costs.EVERY["others"]


def points(works: list[Work], machine: Machine) -> list[Timed]:
    """As if measured: what the machine's own costs say."""
    found = []
    for work in works:
        form = next(form for form in predict.forms(work.op, work.values, work.dtype, machine) if form.fitted == STRIPS)
        found.append(Timed(form, work.values, work.between, predict.seconds(form, work.values, machine, work.between).total))
    return found


def other(machine: Machine, factors: Mapping[str, float]) -> Machine:
    """A machine on which the steps of strips cost so many times as much."""
    return replace(machine, costs={STRIPS: {name: value * factors.get(name, 1.0) for name, value in SHIPPED[STRIPS].items()}})


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(["product", "packed", "calls", "late"]), st.floats(0.3, 4.0)))
def test_what_was_timed_is_found_again(factors: dict[str, float]) -> None:
    """Not each cost, which several may share, but every time: of layers that were not fitted on, too."""
    machine = other(made_up(), factors)
    every = points(layers(), machine)
    found = replace(made_up(), costs=fit(every[::2], made_up(), SHIPPED, 1e-4))
    assert machine_costs.error(every, found) < 0.02


def test_what_nothing_tells_of_stays() -> None:
    few = points(layers(1), other(made_up(), {"product": 1.0}))
    found = fit(few, made_up(), SHIPPED, 0.05)
    assert set(found) == {STRIPS}
    assert found[STRIPS] == pytest.approx(dict(SHIPPED[STRIPS]), rel=0.05)


def test_a_wild_time_does_not_move_the_others() -> None:
    machine = other(made_up(), {})
    every = points(layers(), machine)
    wild = [Timed(one.form, one.values, one.between, one.seconds * (300 if i == 3 else 1)) for i, one in enumerate(every)]
    found = replace(machine, costs=fit(wild, made_up(), SHIPPED, 0.01))
    assert machine_costs.error(every, found) < 0.05


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[dict[str, Any]]:
    """This machine is a made-up one, on which kernels take what `machine` says; timings are counted."""
    about: dict[str, Any] = {"machine": made_up(host()), "timed": 0}

    def measure(work: Work) -> dict[str, float]:
        about["timed"] += 1
        model: Machine = about["machine"]
        names = dict.fromkeys((form.name for form in predict.forms(work.op, work.values, work.dtype, model)), 1.0)
        points = machine_costs.timed(work, names, model)
        return {one.form.name: predict.seconds(one.form, one.values, model, one.between, one.again).total for one in points} | {"unknown": 1.0}

    clock = itertools.count(step=0.5)
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path))
    monkeypatch.setattr(machine_costs, "measure", measure)
    monkeypatch.setattr(machine_costs.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(machines, "_measured", lambda key: made_up(host()))
    monkeypatch.setattr(machines, "measure_host", lambda: machines._host())
    machines._fitted.cache_clear()
    yield about
    machines._fitted.cache_clear()


@needs_avx512
def test_a_fit_of_this_machine_is_kept_where_it_helps(pretended: dict[str, Any]) -> None:
    dearer = {key: {name: value * (2.5 if name in ("product", "loaded") else 1.0) for name, value in costs.items()} for key, costs in HERE.items()}
    pretended["machine"] = replace(made_up(host()), costs=dearer)
    found = machine_costs.fit_host(1.0)
    assert found.after < 0.6 * found.before
    assert found.layers == pretended["timed"] >= machine_costs.LEAST
    kept = machines._host().costs
    assert kept == found.machine.costs
    assert kept
    assert found.machine.costs["strips float32"]["product"] > 1.5 * HERE["strips float32"]["product"]
    machines._fitted.cache_clear()     # another process
    assert machines._host().costs == kept


def test_one_that_does_not_help_is_not_kept(pretended: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_costs, "_fit", lambda points, machine: {key: {name: 9 * value for name, value in costs.items()}
                                                                       for key, costs in HERE.items()})
    found = machine_costs.fit_host(1.0)
    assert found.before < 1e-9 < found.after
    assert machines._host().costs == {}


@pytest.mark.parametrize("minutes", [0, -1.0, float("nan"), float("inf")])
def test_minutes_that_are_none(minutes: float) -> None:
    with pytest.raises(InputError, match="minutes is a number above 0"):
        machine_costs.fit_host(minutes)


def test_too_few_layers_say_so(pretended: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"a fit takes 10 or more(.|\n)*more minutes"):
        machine_costs.fit_host(0.02)
    assert machines._host().costs == {}


def test_costs_of_other_formulas_are_not_taken(pretended: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    machines.keep_costs({"x": {"calls": 1.0}})
    assert machines._host().costs == {"x": {"calls": 1.0}}
    monkeypatch.setattr(fitting, "version", lambda: "other")
    assert machines._host().costs == {}


def test_what_is_fitted_on_is_never_judged() -> None:
    assert 2 not in FITTING
    assert draw(100, 5) == draw(100, 9)[:5] != draw(2, 5)


@needs_avx512
def test_forms_that_take_turns_displace_each_other() -> None:
    """Two of them read the same weight, one half a turn after the other."""
    work, weight = Work.make("linear", M=1, N=64, K=64, between=1000), 4 * 64 * 64
    names = dict.fromkeys(("dense eager", "dense packed", "dense by output", "unknown"), 1.0)
    points = {point.form.name: point for point in machine_costs.timed(work, names, made_up(host()))}
    assert {name: point.between for name, point in points.items()} == {"dense eager": 1000 + weight / 2, "dense by output": 1000 + weight / 2,
                                                                       "dense packed": 1000 + weight}
    assert {point.again for point in points.values()} == {1000}
