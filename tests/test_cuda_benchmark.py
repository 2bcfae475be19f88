"""The cases of benchmarks/gpu.py, which no GPU here runs: small ones emulated, and a folder whose parts fit together."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_help import emulated, needs_compiler

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu_cases

__all__ = ["emulated"]
SMALL, TIMED = list(gpu_cases.small()), list(gpu_cases.timed())


def is_right(make: Any) -> None:
    case = make(torch.device("cpu"))
    found, wanted = case.ours().float(), case.wanted().float()
    scale = wanted.abs().max()
    assert float((found - wanted).abs().max()) < 1.5e-2 * float(scale), case.name
    assert case.bytes > 0 < case.products


@needs_compiler
@pytest.mark.parametrize("number", [0, 1, len(SMALL) - 1])
def test_some_cases_are_right(emulated: list[Any], number: int) -> None:
    is_right(SMALL[number])
    assert emulated


@needs_compiler
@pytest.mark.cuda
@pytest.mark.parametrize("number", range(2, len(SMALL) - 1))
def test_small_cases_are_right(emulated: list[Any], number: int) -> None:
    is_right(SMALL[number])


def test_every_case_that_is_timed_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels are those of the same case with fewer outputs: the folder of benchmarks/gpu.py holds what these ask for."""
    from sparsify_compiler.codegen.cuda import device

    asked: list[Any] = []
    monkeypatch.setattr(device, "function", lambda schedule, _: asked.append(schedule) or (lambda *given: None))
    monkeypatch.setattr(device, "processors", lambda _: 132)
    for make in TIMED:
        make.shrunk()(torch.device("cpu")).ours()
    kinds = ("gather_rows", "sparse24", "strips", "grouped", "attend_many", "attend_few", "neurons", "down_rows", "sparse_rows", "strip_rows")
    assert {schedule.name for schedule in asked} >= {f"cuda_{kind}" for kind in kinds}
