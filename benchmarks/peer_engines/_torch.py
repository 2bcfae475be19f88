"""What the engines that run in our own environment share: a case's module and input in a dtype, and its result as NumPy reads it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_cases import DTYPES as ASKED
from peer_cases import Case, restore
from torch import Tensor, nn

DTYPES = {word: dtype for word, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)) if word in os.environ.get(ASKED, "fp32 bf16").split()}


def case_of(folder: Path) -> Case:
    """The case that a folder was written for."""
    return Case.parse(json.loads((folder / "case.json").read_text())["case"])


def module(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """The case's plain model and its input."""
    model, x = restore(case_of(folder), folder)
    return model.to(dtype), x.to(dtype)


class Call:
    """A call of a module or function on one input, under inference mode; np.asarray() of its result works for any dtype."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.function, self.x = function, x

    def __call__(self) -> Any:
        with torch.inference_mode():
            return Result(self.function(self.x))


class Result:
    """A tensor that becomes a float32 array only when it is asked for."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.tensor.float().numpy()
