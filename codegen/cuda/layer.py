"""What layers on a GPU share: checks, matrices as kernels take them, workspaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen.bound import BoundLayer, as_matrix
from sparsify_compiler.codegen.cuda import device as gpu
from sparsify_compiler.errors import InputError, KernelError

ALIGNED = 16    # bytes that kernels load at once
SHORT = (torch.bfloat16, torch.float16)
DTYPES = (*SHORT, torch.float32)


def name_of(dtype: torch.dtype) -> str:
    """As TVM and the schedules spell it."""
    return str(dtype).removeprefix("torch.")


def lanes_of(dtype: torch.dtype) -> int:
    """Elements in 16 bytes."""
    return ALIGNED // dtype.itemsize


def aligned(tensor: Tensor) -> Tensor:
    """The same, contiguous and without a gradient, where kernels may load 16 bytes at once."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNED else tensor


class CudaLayer(BoundLayer):
    """A layer bound to its weights on a GPU. Results do not depend on the order in which its blocks run."""

    def __init__(self, name: str, options: Mapping[str, Any], dtype: torch.dtype, device: torch.device, sizes: tuple[int, int],
                 files: Mapping[str, bytes]) -> None:
        self.name, self.options, self._dtype, self.device = name, dict(options), dtype, device
        self.in_features, self.out_features = sizes
        self.kernels = gpu.Kernels(device, files)
        self._held: dict[str, Tensor] = {}

    def files(self) -> dict[str, bytes]:
        """The kernels that were needed so far, for an artefact."""
        return self.kernels.files()

    def state(self) -> dict[str, Tensor]:
        return self._held

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != self.in_features or x.dtype is not self._dtype or x.device != self.device:
            raise InputError(f"expected {self._dtype} [..., {self.in_features}] on {self.device}, got {x.dtype} {list(x.shape)} on {x.device}",
                             where=self.name)

    def matrix(self, x: Tensor) -> Tensor:
        """x [..., K] as [rows, K]. Raises InputError."""
        self._check(x)
        rows = x.numel() // self.in_features if self.in_features else 0
        return aligned(as_matrix(x, rows))

    def floats(self, *shape: int) -> Tensor:
        """Room for float32 numbers."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)


def bias_of(bias: Tensor | None, outputs: int, device: torch.device) -> Tensor:
    """float32 [N], zeros where there is none."""
    return torch.zeros(outputs, dtype=torch.float32, device=device) if bias is None else bias.detach().float().contiguous()


def device_of(tensors: Mapping[str, Tensor]) -> torch.device:
    """Where they all lie. Raises KernelError."""
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) != 1:
        raise KernelError(f"the weights lie on several devices: {', '.join(sorted(map(str, devices)))}", where="cuda", hint="move the model to one")
    return devices.pop()
