"""Shared by the tests of passes that select."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.passes_api import Context, Pass
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program

Batches = list[tuple[Tensor, ...]]


def rewritten(step: Pass, net: nn.Module, data: Batches) -> tuple[Program, Context]:
    """The Program after a pass that is calibrated on these batches, for any number of rows."""
    ctx = Context(batches=data)  # type: ignore[arg-type]
    ctx.calibrate = lambda program, needs: calibrate(program, data, needs, cache=False)
    return Pipeline((step,)).run(capture(net, data[0], _any_rows(net)), ctx, ()), ctx


def check_lowered(step: Pass, net: nn.Module, data: Batches, rows: tuple[int, ...], folder: Path, margin: float = -1000.0) -> None:
    """Packed, lowered, saved and loaded, a model computes what the rewritten one does, at each of these numbers of rows.

    A margin below any gain binds the kernels wherever there are some, on the slowest machine too; one of 1 none, and all is computed.
    """
    expected, width = instantiate(rewritten(step, net, data)[0]) if margin < 1 else net, data[0][0].shape[-1]
    compiled = sc.compile(net, (torch.randn(1, width),), recipe=Pipeline.parse(f"{step} | pack() | lower(margin={margin}, rounds=3)"),
                          calibration=data, dynamic=_any_rows(net))
    for count in rows:
        x = torch.randn(count, width)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), expected(x), rtol=1e-4, atol=1e-4)
    compiled.save(folder / "saved")
    x = torch.randn(1, width)
    assert torch.equal(sc.load(folder / "saved")(x), compiled(x))


def _any_rows(net: nn.Module) -> dict[str, dict[int, str]]:
    return {next(iter(inspect.signature(net.forward).parameters)): {0: "rows"}}
