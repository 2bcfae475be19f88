"""Which layers are measured together when a model is lowered."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sparsify_compiler.passes.lower._layer import CHUNK, chunks


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
