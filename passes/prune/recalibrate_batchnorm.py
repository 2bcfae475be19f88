"""Estimate the running statistics of BatchNorms anew: pruning moves them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.fakes import fake_like, mode_of
from sparsify_compiler.normal_form_edit import argument, aten, is_call, same_shape, shape
from sparsify_compiler.passes_api import Context, Miss, Pass, Preserves
from sparsify_compiler.program import Program, Region, get_tensor, set_tensor
from sparsify_compiler.sweep import Sweep


@dataclass(frozen=True)
class RecalibrateBatchnorm(Pass):
    """Set mean and variance of every batch_norm anew by the calibration batches, front to back, each seeing those before it set anew.

    relative  take over by how much the model as the pipeline got it differs from its own running statistics on these batches: mean and deviation of
              what a norm gives become what they were there. Few batches, or others than it was trained on, then do no harm, and a model that
              nothing was done to stays as it is. A norm that has other channels by now is set as without it

    Matches    batch_norm(x, gamma, beta, mean, var), mean and var buffers of its own
    Rewrites   batch_norm(x, gamma, beta, mean of x, variance of x) over batch and places; relative, with m and s the mean and deviation of x, and
               m0 and s0 those before: deviation s * sqrt(var) / s0, and mean m - (m0 - mean) * s / s0
    Preserves  signature; quality is measured
    Paper      Li et al., EagleEye (adaptive batch normalisation), arXiv:2007.02491, section 3.3; relative is ours

    Every batch counts by its rows. Needs the calibration batches and a model that was captured whole; run it after masks or removal and before
    fold_batchnorm, behind which there are no statistics left. Nothing is trained.
    """

    relative: bool = False

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    idempotent: ClassVar[bool] = False  # the same numbers are found once more

    def run(self, program: Program, ctx: Context) -> Program:
        norms = [(region, node) for region, node in program.nodes() if is_call(node, aten.batch_norm.default)]
        found = []
        for region, node in norms:
            why = _unfit(region, node)
            if why is not None:
                ctx.miss(why.why, region.qualified(node.name))
            else:
                found.append((region, node))
        if not norms:
            ctx.miss("there is no batch_norm in the graph: it may have been folded already")
        if not found:
            return program
        if ctx.batches is None:
            raise CalibrationError("needs the calibration batches, and there are none", where=self.name(), hint="give calibration=batches")
        sweep = Sweep(program, ctx.batches)
        before = _Before(ctx.given, ctx.batches) if self.relative and ctx.given is not None else None
        for done, (region, node) in enumerate(sorted(found, key=lambda pair: sweep.order(pair[1])), 1):
            if not ctx.spend():
                break
            moments = _moments(sweep, node)
            if moments is None:
                ctx.miss("fewer than two rows reached it: they have no variance", region.qualified(node.name))
                continue
            known = before.moments(region, node) if before is not None else None
            if before is not None and known is None:
                ctx.miss("it has other channels than before: set without regard to what they gave", region.qualified(node.name))
            for name, value in zip(("running_mean", "running_var"), moments if known is None else _moved(region, node, moments, known), strict=True):
                self._set(region, node, name, value, sweep)
            ctx.progress("recalibrate batch norms", done, len(found))
        return program

    def _set(self, region: Region, node: Any, name: str, value: Tensor, sweep: Sweep) -> None:
        source: fx.Node = node.kwargs[name]
        old = get_tensor(region.module, str(source.target))
        new = value.to(old)
        set_tensor(region.module, str(source.target), nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new)
        source.meta |= {"by": self.name(), "val": fake_like(new, mode_of(region))}
        sweep.replace(source, new)


Moments = tuple[Tensor, Tensor]  # mean and variance of each channel, float64


def _moments(sweep: Sweep, node: fx.Node) -> Moments | None:
    """Of what reaches a norm; None for fewer than two rows."""
    known = sweep.gather({node: ("input_mean", "input_variance", "samples")})[node]
    rows = int(known.get("samples", torch.tensor(0)))
    return (known["input_mean"].double(), known["input_variance"].double() * (rows / (rows - 1))) if rows > 1 else None


class _Before:
    """What reached each norm of the model that the pipeline was given, on the same batches."""

    def __init__(self, given: Program, batches: Any) -> None:
        self._sweep = Sweep(given, batches)
        self._norms = {(region.path, node.name): node for region, node in given.nodes() if is_call(node, aten.batch_norm.default)}

    def moments(self, region: Region, node: fx.Node) -> Moments | None:
        """None where there was no such norm of this size."""
        then = self._norms.get((region.path, node.name))
        if then is None or not same_shape(shape(then.kwargs["running_mean"]), shape(node.kwargs["running_mean"])):
            return None
        return _moments(self._sweep, then)


def _moved(region: Region, node: Any, now: Moments, before: Moments) -> Moments:
    """Running statistics by which the norm's outputs have the mean and deviation that they had before."""
    mean, var = (get_tensor(region.module, str(node.kwargs[name].target)).double() for name in ("running_mean", "running_var"))
    ratio = torch.where(before[1] > 0, now[1] / before[1], 1.0)  # a channel that never moved says nothing
    return now[0] - (before[0] - mean) * ratio.sqrt(), var * ratio


def _unfit(region: Region, node: Any) -> Miss | None:
    """Why the statistics of a batch_norm cannot be set."""
    if argument(node, "training"):
        return Miss("it runs on the statistics of each batch")
    for name in ("running_mean", "running_var"):
        source = node.kwargs.get(name)
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            return Miss(f"its {name} is no buffer")
        readers = [user for one in region.graph.nodes if one.op == "get_attr" and one.target == source.target for user in one.users]
        if readers != [node]:
            return Miss(f"its {name} is read {len(readers)} times")
    return None


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two convolutions with norms whose statistics are not those of the data."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)]
    return nn.Sequential(*layers).eval(), (torch.randn(4, 3, 6, 6),)
