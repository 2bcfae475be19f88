"""Statistics of values that no site reads: calibration runs a copy of the Program with one more reader of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.normal_form_edit import aten, insert
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region

_NEEDS = frozenset({"input_mean", "input_norm", "samples"})


@dataclass(frozen=True)
class Moments:
    """Mean and mean square of each channel, over all rows of the calibration: float64 [channels]."""

    mean: Tensor
    square: Tensor

    @property
    def variance(self) -> Tensor:
        return (self.square - self.mean.square()).clamp_min(0)


@dataclass(frozen=True)
class Probe:
    """A value by its node's name, or the sum of two, and the name of a weight node that a linear could take it with."""

    region: str
    values: tuple[str, ...]
    weight: str


def moments(program: Program, ctx: Context, probes: Mapping[str, Probe]) -> dict[str, Moments]:
    """The moments of each value [..., channels]. Raises CalibrationError where there is no calibration."""
    if ctx.calibrate is None:
        raise CalibrationError("needs the statistics of a calibration, and there is none", hint="give calibration=batches")
    watched = program.clone()
    for name, probe in probes.items():
        _read(watched.regions[probe.region], name, probe)
    found = ctx.calibrate(watched, dict.fromkeys(probes, _NEEDS))
    result = {}
    for name in probes:
        rows = found.get(name, "samples").double()
        with torch.no_grad():
            result[name] = Moments(found.get(name, "input_mean").double(), found.get(name, "input_norm").double().square() / rows)
    return result


def _read(region: Region, name: str, probe: Probe) -> None:
    """Add a linear that reads the value and that nobody reads: a site like any other to calibration."""
    output = next(node for node in reversed(region.graph.nodes) if node.op == "output")
    value: fx.Node = region.node(probe.values[0])
    for other in probe.values[1:]:
        value = insert(output, aten.add.Tensor, self=value, other=region.node(other))
    reader = insert(output, aten.linear.default, input=value, weight=region.node(probe.weight))
    reader.meta |= {"path": name, "module": ""}
