"""Every tensor of a Program, each stored once: tied, strided and exotic tensors come back as they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .artefact_values import decode, encode
from .errors import ArtefactError
from .storage import SAFETENSORS_DTYPES


class TensorStore:
    """Collects tensors under names; a tensor met before is referred to, not stored again.

    `stored` holds what goes into weights.safetensors: contiguous CPU tensors.
    """

    def __init__(self) -> None:
        self.stored: dict[str, Tensor] = {}
        self._seen: dict[tuple[Any, ...], str] = {}
        self._kept: list[Tensor] = []  # addresses are compared: nothing may be freed in between

    def add(self, name: str, tensor: Tensor) -> dict[str, Any]:
        """Where the tensor is stored and how to make it again, as JSON."""
        plain = tensor.detach()
        place = (plain.data_ptr() if plain.numel() else name, tuple(plain.shape), plain.stride(), plain.dtype, str(plain.device))
        key = self._seen.setdefault(place, name)
        self._kept.append(plain)
        record: dict[str, Any] = {"key": key, "shape": list(plain.shape), "dtype": encode(plain.dtype)}
        if key not in self.stored:
            whole = plain.cpu().contiguous()
            self.stored[key] = whole if plain.dtype in SAFETENSORS_DTYPES else whole.reshape(-1).view(torch.uint8)
        if not plain.is_contiguous() and _dense(plain):
            record["stride"] = list(plain.stride())
        if isinstance(tensor, nn.Parameter):
            record["parameter"] = True
            record |= {"requires_grad": True} if tensor.requires_grad else {}
        return record


class TensorSource:
    """The tensors of a file, made again as they were; tied ones come out as one object."""

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        self._stored = stored
        self._made: dict[tuple[str, bool], Tensor] = {}

    def get(self, record: Mapping[str, Any]) -> Tensor:
        """The tensor of a record that TensorStore.add returned. Raises ArtefactError when the file does not hold it as described."""
        key, parameter = record["key"], bool(record.get("parameter"))
        if (key, parameter) not in self._made:
            tensor = self._made[key, not parameter].detach() if (key, not parameter) in self._made else self._make(record)
            self._made[key, parameter] = nn.Parameter(tensor, bool(record.get("requires_grad"))) if parameter else tensor
        return self._made[key, parameter]

    def _make(self, record: Mapping[str, Any]) -> Tensor:
        shape, dtype = record["shape"], decode(record["dtype"])
        stored = self._stored.get(record["key"])
        if stored is None or stored.numel() * stored.element_size() != _numel(shape) * dtype.itemsize:
            raise ArtefactError(
                f"does not hold {record['key']!r} as graph.json describes it", where="weights.safetensors", hint="save the model again"
            )
        tensor = stored if stored.dtype == dtype else stored.view(dtype)
        tensor = tensor.reshape(shape)
        if "stride" not in record:
            return tensor
        strided = torch.empty_strided(shape, record["stride"], dtype=dtype)
        return strided.copy_(tensor)


def _numel(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _dense(tensor: Tensor) -> bool:
    """True when the strides are a permutation of contiguous ones: a layout worth keeping, such as channels_last or a transpose."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True
