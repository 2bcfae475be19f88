"""Which layers are measured together when a model is lowered, how often each form is, and which of those that take as long is taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify_compiler.measure import Timing
from sparsify_compiler.passes.lower import _layer, _linear, _numbers, lower
from sparsify_compiler.passes.lower._layer import CHUNK, TIE, chunks, fastest


@given(st.lists(st.integers(0, 3 * CHUNK) | st.integers(0, CHUNK // 8), max_size=40))
def test_groups_hold_every_layer_once_and_none_is_small_beside_others(sizes: list[int]) -> None:
    layers: list[Any] = [(number, size) for number, size in enumerate(sizes)]
    groups = list(chunks(layers, lambda region, node: node))  # type: ignore[arg-type, return-value]
    assert [layer for group, _ in groups for layer in group] == layers
    assert [done for _, done in groups] == [sum(len(group) for group, _ in groups[: number + 1]) for number in range(len(groups))]
    weighs = [sum(layer[1] for layer in group) for group, _ in groups]
    assert all(weight >= CHUNK for weight in weighs[:-1])
    assert len(weighs) < 2 or weighs[-1] >= CHUNK // 2
    largest = max(sizes, default=0)
    assert all(weight < CHUNK + CHUNK // 2 + largest for weight in weighs)


@given(st.dictionaries(st.tuples(st.sampled_from("kq"), st.integers(0, 2)), st.floats(0.5, 2.0), min_size=1))
def test_a_kernel_takes_what_follows_the_layer_where_that_costs_nothing_that_can_be_told(drawn: dict[tuple[str, int], float]) -> None:
    chains = {length: SimpleNamespace(label=" + gelu" * length, nodes=(None,) * length) for length in range(3)}
    forms: Any = {kernel + chains[length].label: SimpleNamespace(epilogue=chains[length]) for kernel, length in drawn}
    times = dict(zip(forms, drawn.values(), strict=True))
    best, chosen = min(times, key=lambda name: times[name]), fastest(times, forms)
    assert chosen[0] == best[0], "another kernel has to be faster"
    assert times[chosen] <= times[best] * TIE
    assert not any(time <= times[best] * TIE and name[0] == best[0] and len(name) > len(chosen) for name, time in times.items())


@pytest.mark.parametrize(("rounds", "record", "again"), [
    (15, None, {"a": ["close", "best"], "b": []}),   # b: one form is far ahead
    (5, None, {}),
    (15, "tuned", {}),
])
def test_forms_that_a_few_rounds_have_ruled_out_are_not_timed_again(monkeypatch: pytest.MonkeyPatch, rounds: int, record: Any,
                                                                     again: dict[str, list[str]]) -> None:
    milliseconds = {"close": 1.4, "slow": 1.6, "best": 1.0}
    calls: list[tuple[int, dict[str, list[str]]]] = []

    def timed(groups: Any, *, rounds: int, warmup: int) -> dict[str, dict[str, Timing]]:
        calls.append((rounds, {key: list(forms) for key, forms in groups.items()}))
        return {key: {name: Timing(milliseconds[name] + 0.01 * (len(calls) > 1), 0.0, 0.0) for name in forms} for key, forms in groups.items()}

    monkeypatch.setattr(lower, "round_robin", timed)
    monkeypatch.setattr(_numbers, "check", lambda layer: None)
    layers: Any = [SimpleNamespace(key="a", runs=dict.fromkeys(milliseconds), record=record),
                   SimpleNamespace(key="b", runs=dict.fromkeys(("slow", "best")), record=record)]
    found = lower.Lower(rounds=rounds)._measured(layers)
    assert calls[0] == (5, {"a": ["close", "slow", "best"], "b": ["slow", "best"]})
    assert calls[1] == (rounds - 5, again)
    assert {name: timing.median for name, timing in found["b"].items()} == {"slow": 1.6, "best": 1.0}
    assert found["a"]["slow"].median == 1.6
    assert found["a"]["best"].median == pytest.approx(1.01 if again else 1.0)


@pytest.mark.parametrize(("sparse", "kept"), [(0.99, "dense packed + gelu"), (0.97, "sparse")])
def test_a_sparse_form_has_to_beat_the_fastest_dense_one_not_the_one_that_would_be_taken(sparse: float, kept: str) -> None:
    plain, fused = SimpleNamespace(label="", nodes=()), SimpleNamespace(label=" + gelu", nodes=(None,))
    kernel, bound = SimpleNamespace(resident_bytes=1), list[str]()
    dense = SimpleNamespace(dense=True, epilogue=plain)
    forms = {_layer.EAGER: dense, "dense packed": dense, "dense packed + gelu": SimpleNamespace(dense=True, epilogue=fused),
             "sparse": SimpleNamespace(dense=False, epilogue=plain, kernel=kernel)}
    layer: Any = SimpleNamespace(forms=forms, decision=SimpleNamespace(reason=""), rows=1, packed=False, bind=bound.append, weight=torch.ones(1))
    times = dict(zip(forms, (2.0, 1.0, 1.05, sparse), strict=True))
    _linear.choose(layer, {name: Timing(time, time, time) for name, time in times.items()}, 0.02, "speed")
    assert bound == [kept]
