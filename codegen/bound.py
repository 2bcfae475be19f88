"""A kernel of ours bound to its weight: one prepared weight and the few machine-code variants that different numbers of rows of x want."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen import build
from sparsify_compiler.codegen.laid import Laid, PreparedWeight
from sparsify_compiler.errors import InputError

PLANS = 4096        # shapes of x remembered
SLAB = 1 << 24      # elements of x or y in one call of a kernel: its indices are 32 bits wide, and its packed copy of x is bounded
EVEN = 64           # rows of a slab are a multiple of this, so that only the last one has a partial panel


@dataclass(frozen=True, slots=True)
class _Plan:
    """For one shape of x: the shape of y, their rows, whether both are matrices already, and the kernel."""

    shape: tuple[int, ...]
    rows: int
    flat: bool
    run: Callable[..., None]


class BoundLayer:
    """What the kernels of linear layers share, for x [..., in_features] -> y [..., out_features] of one dtype."""

    name: str
    in_features: int
    out_features: int
    _dtype: torch.dtype

    @cached_property
    def signature(self) -> str:
        """What the shape and dtype of y depend on beside x."""
        return f"{self.name} {self.in_features} to {self.out_features} {self._dtype}"

    def empty(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """A y for this x, which may be fake. Raises InputError."""
        if x.shape[-1] != self.in_features:
            raise InputError(f"expected [..., {self.in_features}], got {list(x.shape)}", where=self.name)
        return x.new_empty((*x.shape[:-1], self.out_features), dtype=self._dtype)

    def _sizes(self, x: Tensor) -> tuple[int, tuple[int, ...]]:
        """Rows of x and the shape of y, remembered by the shape of x: of a small layer working it out is a tenth of the call. Raises InputError."""
        if x.dtype is not self._dtype or not x.is_cpu:
            self._check(x)
        found = self._shapes.get(x.shape)
        if found is None:
            self._check(x)
            found = math.prod(x.shape[:-1]), (*x.shape[:-1], self.out_features)
            if len(self._shapes) < PLANS:
                self._shapes[x.shape] = found
        return found

    @cached_property
    def _shapes(self) -> dict[torch.Size, tuple[int, tuple[int, ...]]]:
        return {}

    def state(self) -> dict[str, Tensor]:
        """The tensors that it holds. None need storing: the op's own are bound again."""
        raise NotImplementedError

    @property
    def resident_bytes(self) -> int:
        """Bytes of those tensors: weight, bias, indices, what selects."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state().values())

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] != self.in_features or x.dtype is not self._dtype or not x.is_cpu:
            raise InputError(f"expected {self._dtype} [..., {self.in_features}] on the CPU, got {x.dtype} {list(x.shape)} on {x.device}",
                             where=self.name)


def as_matrix(x: Tensor, rows: int) -> Tensor:
    """x [..., K] as [rows, K] for TVM, contiguous, and without a gradient."""
    if x.requires_grad:
        x = x.detach()
    if not x.is_contiguous():
        x = x.contiguous()
    return x if x.dim() == 2 else x.view(rows, -1)


def load_variants(laid: Laid, files: Mapping[str, bytes]) -> dict[str, build.Kernel]:
    """The kernels of a laid out weight on this machine, by their names, from an artefact's files where it has some. Raises KernelError."""
    made = {}
    for variant, schedule in laid.variants.schedules.items():
        stored = {name.removeprefix(f"{variant}."): data for name, data in files.items() if name.startswith(f"{variant}.")}
        made[variant] = build.load_exported(stored, schedule, laid.target) if stored else build.load(schedule, laid.target)
    return made


def export_variants(kernels: Mapping[str, build.Kernel]) -> dict[str, bytes]:
    """The inverse: IR, binary and description of each kernel, for an artefact."""
    return {f"{variant}.{name}": data for variant, kernel in kernels.items() for name, data in build.export(kernel).items()}


def as_arguments(prepared: PreparedWeight) -> tuple[Any, ...]:
    """The fixed arguments as TVM's own tensors: converting them at each call would cost more than a small kernel."""
    import tvm_ffi

    return tuple(tvm_ffi.from_dlpack(tensor) for tensor in prepared.arguments().values())


class BoundKernel(BoundLayer):
    """A prepared weight and its variants, called like a function: x [..., K] -> y [..., N], bias included; + other [..., N] where they add.

    Results do not depend on the number of threads: no output is ever summed by two of them.
    """

    def __init__(self, laid: Laid, files: Mapping[str, bytes] | None = None) -> None:
        self.laid, prepared, variants = laid, laid.prepared, laid.variants
        self.name, self.options, self.prepared, self.target = laid.name, dict(laid.options), prepared, laid.target
        self.out_features, self.in_features = prepared.out_features, prepared.in_features
        self._dtype, self._variant, self._adds = prepared.dtype, variants.choose, variants.adds
        self._kernels = load_variants(laid, files or {})
        self._plans: dict[torch.Size, _Plan] = {}
        self._slab = max(EVEN, SLAB // max(1, self.in_features, self.out_features) // EVEN * EVEN)

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """x [..., in_features] and other [..., out_features] of the kernel's dtype, any strides -> a new y [..., out_features]. Raises InputError."""
        plan = self._plans.get(x.shape) or self._plan(x)
        y = torch.empty(plan.shape, dtype=self._dtype)
        if x.dtype is not self._dtype or not x.is_cpu:
            raise InputError(f"expected {self._dtype} on the CPU, got {x.dtype} on {x.device}", where=self.name)
        if not x.is_contiguous():
            x = x.contiguous()
        if x.requires_grad:
            x = x.detach()
        added = (self._added(other, plan),) if self._adds else ()
        if plan.flat:
            plan.run(x, *added, y)
        elif plan.rows and self.out_features:
            plan.run(x.view(plan.rows, -1), *added, y.view(plan.rows, -1))
        return y

    def by(self, variant: str, x: Tensor, other: Tensor | None = None) -> Tensor:
        """y [rows, N] of matrices x [rows, K] and other [rows, N] by one of the variants, whoever would be chosen: for tuning. They must fit."""
        y = torch.empty(x.shape[0], self.out_features, dtype=self._dtype)
        self._kernels[variant].function(x, *self._arguments, *((other,) if other is not None else ()), y)
        return y

    def _added(self, other: Tensor | None, plan: _Plan) -> Tensor:
        """What is added, as a matrix."""
        if other is None or other.shape != plan.shape or other.dtype is not self._dtype or not other.is_cpu:
            given = None if other is None else f"{list(other.shape)} {other.dtype} on {other.device}"
            raise InputError(f"expected what is added, {list(plan.shape)} {self._dtype} on the CPU, got {given}", where=self.name)
        return other.detach().reshape(plan.rows, self.out_features).contiguous()

    def _plan(self, x: Tensor) -> _Plan:
        """What to do for x of this shape, remembered: for small layers looking it up takes as long as the kernel."""
        *outer, last = x.shape or (0,)
        if last != self.in_features:
            raise InputError(f"expected [..., {self.in_features}], got {list(x.shape)}", where=self.name)
        rows = math.prod(outer)
        plan = _Plan((*outer, self.out_features), rows, len(outer) == 1 and rows > 0 and self.out_features > 0, self._choose(rows))
        if len(self._plans) < PLANS:
            self._plans[x.shape] = plan
        return plan

    def state(self) -> dict[str, Tensor]:
        return self.prepared.arguments()

    def files(self) -> dict[str, bytes]:
        """IR, binary and description of each variant, by name, for the artefact."""
        return export_variants(self._kernels)

    def _choose(self, rows: int) -> Callable[..., None]:
        """The function (x [rows, K], y [rows, N]), or (x, other, y), for this many rows."""
        if rows > self._slab:
            return self._slabs
        function, fixed = self._kernels[self._variant(rows)].function, self._arguments

        def run(x: Tensor, *rest: Tensor) -> None:
            function(x, *fixed, *rest)

        return run

    def _slabs(self, *matrices: Tensor) -> None:
        for start in range(0, matrices[0].shape[0], self._slab):
            parts = [matrix[start : start + self._slab] for matrix in matrices]
            self._choose(parts[0].shape[0])(*parts)

    @cached_property
    def _arguments(self) -> tuple[Any, ...]:
        """The fixed arguments as TVM's own tensors: converting them at each call would cost more than a small kernel."""
        return as_arguments(self.prepared)
