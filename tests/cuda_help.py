"""Shared by the tests of kernels for GPUs: layers of codegen/cuda on CPU tensors, their launches by the emulator."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulator import emulate
from torch import Tensor

from sparsify_compiler.codegen.cuda import device as gpu
from sparsify_compiler.target import resolve

PROCESSORS = 2
ANY = resolve("sm_80")
needs_compiler = emulate.needs_compiler
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc to compile kernels for a GPU")
launched: list[Any] = []    # schedules, in order


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Kernels launched on tensors of the CPU are emulated; the schedules that were."""
    def function(schedule: Any, device: torch.device) -> Any:
        def launch(*arguments: Any) -> None:
            launched.append(schedule)
            emulate.run(schedule, *arguments)

        return launch

    launched.clear()
    monkeypatch.setattr(gpu, "function", function)
    monkeypatch.setattr(gpu, "processors", lambda device: PROCESSORS)
    monkeypatch.setattr(gpu, "target_of", lambda device: ANY)
    torch.manual_seed(0)
    return launched


@pytest.fixture
def hopper(emulated: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The same, and the GPU has what Hopper has."""
    monkeypatch.setattr(gpu, "target_of", lambda device: resolve("sm_90"))
    return emulated


def numbers(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Random ones, rounded to the dtype."""
    return (torch.randn(*shape, dtype=torch.float32) * scale).to(dtype)


def close(found: Tensor, wanted: Tensor) -> None:
    """Found in its dtype, wanted in float32: the same up to one rounding of the result, and of what is summed in 16 bits."""
    assert found.shape == wanted.shape
    bound = {torch.bfloat16: 1.2e-2, torch.float16: 2e-3, torch.float32: 2e-5}[found.dtype]
    largest = float(wanted.float().nan_to_num().abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(found.float(), wanted.float(), rtol=bound, atol=bound * max(1.0, largest / 4), equal_nan=True)
