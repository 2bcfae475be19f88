"""What every storage format is: plain tensors, lossless to and from (dense, mask), checked when they come from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sparsify_compiler.errors import ArtefactError, StructureError


@dataclass(frozen=True, eq=False, kw_only=True)
class Format:
    """A weight [out_features, in_features] of which only the places that a mask keeps are stored.

    `decode()` gives the kept values bit for bit and +0.0 elsewhere; `mask()` gives the mask, so a kept value may itself be 0.0.
    The constructor trusts its arguments; `encode` and `from_tensors` check theirs.
    """

    TENSORS: ClassVar[tuple[str, ...]] = ()  # names of the fields that are tensors, in the order of the op's schema
    ATTRIBUTES: ClassVar[tuple[str, ...]] = ("out_features", "in_features")  # names of the fields that are integers

    values: Tensor
    out_features: int
    in_features: int

    @classmethod
    def name(cls) -> str:
        """The format's name: that of its file. Its op is `sparsify.linear_<name>`."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def fits(cls, weight: Tensor, mask: Tensor, **attributes: int) -> str | None:
        """None when this mask can be stored, else the reason why not."""
        raise NotImplementedError

    @classmethod
    def widened(cls, mask: Tensor, most: int, **attributes: int) -> Tensor | None:
        """The smallest mask that fits and keeps all that this one does; None where there is none of at most so many, or the format knows of none."""
        return None

    @classmethod
    def _encode(cls, weight: Tensor, mask: Tensor, **attributes: int) -> Self:
        raise NotImplementedError

    @classmethod
    def encode(cls, weight: Tensor, mask: Tensor, **attributes: int) -> Self:
        """Store `weight` (any float dtype, [N, K], any strides) where `mask` (bool, [N, K]) is True.

        Raises StructureError when the mask does not fit the format.
        """
        if weight.dim() != 2 or mask.shape != weight.shape or mask.dtype != torch.bool or not weight.dtype.is_floating_point:
            raise StructureError(f"needs a float weight [N, K] and a bool mask of its shape, got {weight.dtype} {tuple(weight.shape)} "
                                 f"and {mask.dtype} {tuple(mask.shape)}", where=cls.name())
        reason = cls.fits(weight, mask, **attributes)
        if reason is not None:
            raise StructureError(reason, where=cls.name(), hint="csr stores any mask")
        return cls._encode(weight.detach(), mask.to(weight.device), **attributes)

    def places(self) -> Tensor:
        """int64, shaped as `values`: where each value lies in the row-major [padded_rows, in_features] weight."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise ArtefactError unless the tensors agree with each other and every index is in range and in order."""
        raise NotImplementedError

    @property
    def padded_rows(self) -> int:
        """Rows of the weight that `places` counts in; more than out_features only where blocks hang over the last row."""
        return self.out_features

    def scatter(self, source: Tensor, fill: Tensor) -> Tensor:
        """[out_features, in_features] filled with `fill` (0-d), and `source` (shaped as `values`) at the kept places."""
        flat = fill.to(source.dtype).expand(self.padded_rows * self.in_features).clone()
        flat = flat.scatter(0, self.places().reshape(-1), source.reshape(-1))
        return flat.view(self.padded_rows, self.in_features)[: self.out_features]

    def gather(self, dense: Tensor) -> Tensor:
        """The entries of `dense` [out_features, in_features] at the kept places, shaped as `values`; zeros where a block is padded."""
        missing = self.padded_rows - self.out_features
        if missing:
            dense = torch.cat([dense, dense.new_zeros(missing, self.in_features)])
        return dense.reshape(-1)[self.places()]

    def decode(self) -> Tensor:
        """The dense weight [out_features, in_features], dtype of `values`."""
        return self.scatter(self.values, self.values.new_zeros(()))

    def mask(self) -> Tensor:
        """bool [out_features, in_features]: the kept places."""
        yes = torch.ones_like(self.values, dtype=torch.bool)
        return self.scatter(yes, yes.new_zeros(()))

    def tensors(self) -> dict[str, Tensor]:
        """Name -> plain contiguous tensor: what safetensors stores and what the op takes."""
        return {name: getattr(self, name) for name in self.TENSORS}

    def attributes(self) -> dict[str, int]:
        """The integers that the tensors' shapes do not say; keyword arguments of the op."""
        return {name: getattr(self, name) for name in self.ATTRIBUTES}

    def bytes(self) -> int:
        """Bytes of all tensors, indices included."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], attributes: Mapping[str, int]) -> Self:
        """The inverse of tensors() and attributes(), for tensors that may have been damaged. Raises ArtefactError."""
        cls._require(set(tensors) == set(cls.TENSORS), f"needs tensors {', '.join(cls.TENSORS)}; got {', '.join(sorted(tensors))}")
        cls._require(set(attributes) == set(cls.ATTRIBUTES), f"needs {', '.join(cls.ATTRIBUTES)}; got {', '.join(sorted(attributes))}")
        for name, value in attributes.items():
            whole = isinstance(value, int) and not isinstance(value, bool)
            cls._require(whole and value >= (0 if name.endswith("features") else 1), f"{name} cannot be {value!r}")
        for name, tensor in tensors.items():
            cls._require(isinstance(tensor, Tensor), f"{name} is no tensor")
        fields: dict[str, Any] = {name: t.contiguous() for name, t in tensors.items()} | dict(attributes)
        made = cls(**fields)
        cls._require(made.values.dtype.is_floating_point, f"values must be floats, got {made.values.dtype}")
        made.check()
        return made

    @classmethod
    def _require(cls, holds: bool, what: str) -> None:
        if not holds:
            raise ArtefactError(what, where=f"format {cls.name()}", hint="the stored weight is damaged or was made by another version")

    def _require_index(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, limit: int) -> None:
        """The index tensor `name` has this shape and dtype, and every entry lies in [0, limit)."""
        index: Tensor = getattr(self, name)
        self._require(tuple(index.shape) == shape, f"{name} must have shape {list(shape)}, got {list(index.shape)}")
        self._require(index.dtype == dtype, f"{name} must be {dtype}, got {index.dtype}")
        if index.numel():
            low, high = index.aminmax()
            self._require(int(low) >= 0 and int(high) < limit, f"{name} must lie in [0, {limit}), got {int(low)} to {int(high)}")

    def _require_ascending(self, name: str, within: str, keys: Tensor) -> None:
        """`keys` (flat) ascend strictly: entries of `name` are in order, none twice, within each `within`."""
        flat = keys.reshape(-1)
        self._require(bool((flat[1:] > flat[:-1]).all()), f"{name} must ascend within each {within}")

    def _require_pointers(self, name: str, rows: int, total: int) -> None:
        """`name` is int32 [rows + 1], from 0 to `total`, never falling."""
        pointers: Tensor = getattr(self, name)
        self._require(pointers.dtype == torch.int32 and tuple(pointers.shape) == (rows + 1,),
                      f"{name} must be int32 [{rows + 1}], got {pointers.dtype} {list(pointers.shape)}")
        ends = int(pointers[0]) == 0 and int(pointers[-1]) == total
        self._require(ends and bool((pointers.diff() >= 0).all()), f"{name} must rise from 0 to {total}")


def index_dtype(in_features: int) -> torch.dtype:
    """The narrowest dtype that column indices of this many columns are stored in."""
    return torch.int16 if in_features <= 32767 else torch.int32


def kept_entries(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The kept values in row-major order, [nnz], and their columns, [nnz] int32."""
    flat = mask.reshape(-1).nonzero().squeeze(1)  # twice as fast as mask.nonzero() and weight[mask]
    columns = max(mask.shape[1], 1)
    return weight.reshape(-1).index_select(0, flat), (flat.int() if mask.numel() < 2**31 else flat).remainder(columns).int()


def pointers_from_counts(counts: Tensor) -> Tensor:
    """int32 [len + 1]: running sums, starting with 0."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)


def rows_from_pointers(pointers: Tensor, total: int) -> Tensor:
    """int64 [total]: the row of each entry."""
    rows = torch.arange(pointers.shape[0] - 1, device=pointers.device)
    return torch.repeat_interleave(rows, pointers.diff().long(), output_size=total)
