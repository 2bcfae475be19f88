"""float16: stored as it is, half the bytes; computed in float32 by the kernels of float32, which hold every float16 exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.errors import InputError


def widened(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A stored sparse weight whose values kernels can read: float16 values as float32."""
    values = tensors.get("values")
    return tensors if values is None or values.dtype is not torch.float16 else {**tensors, "values": values.detach().float()}


class HalfKernel:
    """A kernel of float32 for x of float16 (, other of float16) -> y of float16: sums are taken in float32 and rounded once."""

    def __init__(self, kernel: Any, options: Mapping[str, Any]) -> None:
        self._kernel, self.name, self.options = kernel, kernel.name, dict(options)

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """As the kernel. Raises InputError."""
        if x.dtype is not torch.float16 or (other is not None and other.dtype is not torch.float16):
            raise InputError(f"expected float16 on the CPU, got {x.dtype} on {x.device}", where=self.name)
        y: Tensor = self._kernel(x.float()) if other is None else self._kernel(x.float(), other.float())
        return y.half()

    @property
    def signature(self) -> str:
        """What the shape and strides of y depend on beside x."""
        return f"{self._kernel.signature}, float16"

    def empty(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """A y for this x, which may be fake. Raises InputError."""
        return torch.empty_like(self._kernel.empty(x.float()), dtype=torch.float16)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the prepared weight, in float32."""
        return int(self._kernel.resident_bytes)

    def state(self) -> dict[str, Tensor]:
        """The kernel's."""
        return self._kernel.state()  # type: ignore[no-any-return]

    def files(self) -> dict[str, bytes]:
        """The kernel's."""
        return self._kernel.files()  # type: ignore[no-any-return]
