"""What makes an expert matter in a row: what routers learn to predict, and what the oracle router computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from sparsify_compiler.passes.moe._evidence import Evidence, take


def output(neurons: Tensor, down: Tensor) -> Tensor:
    """|down[e] neurons[e]|: the length of what the expert adds. neurons [..., E, S], down [E, N, S] -> [..., E]."""
    flat = neurons.flatten(0, -3).transpose(0, 1)
    lengths = ((flat @ (down.transpose(1, 2) @ down)) * flat).sum(-1).clamp_min(0).sqrt()
    return lengths.t().reshape(neurons.shape[:-1])


def norm(neurons: Tensor, down: Tensor) -> Tensor:
    """The root of the summed squares of |neuron| * |its column of down|: `output`, were the columns at right angles."""
    return (neurons.square() * down.square().sum(1)).sum(-1).sqrt()


def positive(neurons: Tensor, down: Tensor) -> Tensor:
    """The sum of the positive neurons (MoEfication, arXiv:2110.01786, section 3.3)."""
    return neurons.clamp_min(0).sum(-1)


CRITERIA: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"output": output, "norm": norm, "positive": positive}


def wanted(criterion: str, evidence: Evidence, table: Tensor) -> Tensor:
    """float32 [R, E]: how much each expert matters in each row of calibration."""
    parts = take(evidence.neurons, table, 1)
    return CRITERIA[criterion](parts, take(evidence.ffn.down, table, 1).transpose(0, 1))
