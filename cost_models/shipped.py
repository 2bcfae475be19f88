"""What one step of each kernel costs, in multiples of a machine's own times, as fitted on processors that were at hand: costs/<processor>.json.

A machine takes the costs of the processor of its architecture that has most nearly its features, and of what was fitted elsewhere only, from there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

Costs = Mapping[str, Mapping[str, float]]
FOLDER = Path(__file__).with_name("costs")
# Not fitted, for there was no such machine: two thirds of the peak, all of the bandwidth, a launch of 7 calls.
ASSUMED: Costs = {"gpu": {"calls": 7.0, "displaced": 1.0, "late": 1.0, "product": 1.5, "packing": 0.0, "taken": 1.0, "put": 1.0,
                          "operation": 1.5, "exponential": 10.0, "moved": 1.0, "reordered": 0.0}}


def file_of(processor: str) -> Path:
    """Where the costs of a processor lie, by LLVM's name of it."""
    return FOLDER / f"{processor}.json"


@cache
def costs_of(arch: str, features: tuple[str, ...]) -> Costs:
    """By kernel (Form.fitted) and name, of all that were ever fitted."""
    sets = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.json"))]
    sets.sort(key=lambda one: (one["arch"] == arch, -len(set(one["features"]) ^ set(features)) if one["arch"] == arch else 0), reverse=True)
    found: dict[str, Mapping[str, float]] = dict(ASSUMED)
    for one in sets:
        found = one["costs"] | found
    return found
