"""What the engine calls: candidates for a sparse linear, or for the packed dense form of a layer, bound to its weight, called with torch tensors.

    for candidate in candidates("linear_bsr", tensors, attributes, torch.float32, rows=(1, 128), target=host()):
        kernel = candidate.bind(bias)
        y = kernel(x)                                        # x [..., K] -> y [..., N]

A BoundKernel holds one prepared weight and the few machine-code variants that different numbers of rows of x want.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler import catalog
from sparsify_compiler.codegen import build, planes
from sparsify_compiler.codegen.kernels import conv2d, linear, mkl, repeated
from sparsify_compiler.codegen.kernels.layout import LANES, Prepared, prepare
from sparsify_compiler.codegen.kernels.panel import Panel
from sparsify_compiler.codegen.kernels.rows import Rows
from sparsify_compiler.errors import InputError, KernelError, UnknownNameError
from sparsify_compiler.target import Target

DTYPES = (torch.float32, torch.bfloat16)
STATE = ("values", "columns", "pointers", "bias")
FEW_ROWS = {1: 1, 2: 2, 4: 4, 8: 6, 16: 8}  # up to so many rows of x the row-wise kernel wins, by r (measured, Zen 4)
DOT_FROM = 4        # bfloat16 dot products pay from this r on: below, pairing the columns of x costs more than it saves
ALONE = 12_000      # vector FMAs below which waking other threads costs more than they bring (about 3 µs)
PLANS = 4096        # shapes of x remembered
SLAB = 1 << 24      # elements of x or y in one call of a kernel: its indices are 32 bits wide, and its packed copy of x is bounded

# Kernels of torch itself, for weights as they are.
DENSE: Mapping[str, tuple[Any, ...]] = {"linear": (linear, mkl), **dict.fromkeys(conv2d.OPS, (conv2d, repeated))}

Dense = linear.PackedLinear | mkl.MklLinear | conv2d.PackedConv
Layouts = list[Any]  # one weight laid out: for a sparse op (bias that is in it, Prepared), for a dense one what oneDNN packed


@dataclass(frozen=True)
class Candidate:
    """One way to run an op on this machine: `name` for reports, `options` all that `rebind` needs to know."""

    name: str
    options: Mapping[str, Any]
    op: str
    tensors: Mapping[str, Tensor]
    attributes: Mapping[str, Any]
    target: Target
    siblings: Layouts = field(default_factory=list, compare=False, repr=False)  # layouts of this weight

    def bind(self, bias: Tensor | None = None) -> BoundKernel | Dense | planes.BoundPlanes:
        """Lay the weight out, build or load the variants. Raises KernelError."""
        return rebind(self.op, self.options, self.tensors, self.attributes, bias, {}, self.target, self.siblings)


def candidates(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
               target: Target, shared: Layouts | None = None) -> list[Candidate]:
    """Every kernel that can run this op on x of `dtype`, most promising first; none where the dtypes or the target have no kernel.

    tensors, attributes   of the stored weight (formats/<name>.py). Of a dense op ("linear", "conv2d") the weight, for its packed form, its stride,
                          padding, dilation and groups, and what to compute with it: add, activation, arguments (engine's epilogue.py);
                          any_rows where other numbers of rows than these will come; layout="planes" for dense convolutions over planes
    rows                  numbers of rows of x to expect, e.g. (1, 128); of a convolution the shape of x
    shared                packed weights of this very layer, made before; a new one is added
    """
    if op.startswith("conv2d_") or attributes.get("layout") == planes.LAYOUT:
        return _on_planes(op, tensors, attributes, dtype, rows, target, [] if shared is None else shared)
    if op in DENSE:
        made = [] if shared is None else shared
        offered = [(module.NAME, module.options(tensors, attributes, dtype, rows, target)) for module in DENSE[op]]
        return [Candidate(name, options, op, tensors, attributes, target, made) for name, options in offered if options is not None]
    values = tensors["values"]
    if dtype not in DTYPES or values.dtype not in (dtype, torch.bfloat16) or values.device.type != "cpu":
        return []
    if op not in catalog.names("kernel"):
        return []
    schedules = catalog.get("kernel", op).SCHEDULES["cpu"]
    r = _vector_rows(attributes.get("r", 1))
    index = "int16" if attributes["in_features"] < 32767 else "int32"
    wide = max(rows, default=LANES) > LANES
    chosen: dict[str, int | str] = {"r": r, "dtype": str(dtype).removeprefix("torch."), "index": index}
    layouts: Layouts = [] if shared is None else shared
    return [Candidate(f"{op.removeprefix('linear_')}_r{r}v{vectors}", {**chosen, "vectors": vectors}, op, tensors, attributes, target, layouts)
            for vectors in (schedules[r] if wide else schedules[r][:1])]


def _on_planes(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int], target: Target,
               made: Layouts) -> list[Candidate]:
    """Convolutions that read and write planes: all sparse ones, and dense ones where that is asked for."""
    inputs = int(attributes.get("in_features", 0)) or tensors["weight"][:1].numel()
    return [Candidate(planes.name_of(op, chosen, inputs), chosen, op, tensors, attributes, target, made)
            for chosen in planes.options(op, tensors, attributes, dtype, rows, target)]


def rebind(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
           files: Mapping[str, bytes], target: Target, shared: Layouts | None = None) -> BoundKernel | Dense | planes.BoundPlanes:
    """The kernel that a candidate with these options binds to this weight; `files` of an artefact spare building it.

    shared  layouts of this weight made before, of a sparse op each with the very bias that is in it; a new one is added
    Raises KernelError when this machine cannot run it.
    """
    try:
        if options.get("layout") == planes.LAYOUT:
            return planes.bind(op, options, tensors, attributes, bias, files, target, [] if shared is None else shared)
        if op in DENSE:
            first, *others = DENSE[op]
            module = next((other for other in others if options.get("form") == other.NAME), first)
            dense: Dense = module.bind(op, options, tensors, attributes, bias, target, [] if shared is None else shared)
            return dense
        prepared = next((made for held, made in shared or () if held is bias), None)
        if prepared is None:
            groups = catalog.get("kernel", op).groups(tensors, attributes)
            prepared = prepare(groups, getattr(torch, str(options["dtype"])), bias, attributes["out_features"], attributes["in_features"])
            if shared is not None:
                shared.append((bias, prepared))
        name = f"{op.removeprefix('linear_')}_r{int(options['r'])}v{int(options['vectors'])}"
    except (KeyError, ValueError, TypeError, AttributeError, UnknownNameError) as error:
        raise KernelError(f"the stored kernel does not fit: {error!r}", where=op, hint="save the model again") from error
    return BoundKernel(name, dict(options), prepared, target, files)


@dataclass(frozen=True, slots=True)
class _Plan:
    """For one shape of x: the shape of y, their rows, whether both are matrices already, and the kernel."""

    shape: tuple[int, ...]
    rows: int
    flat: bool
    run: Callable[[Tensor, Tensor], None]


class BoundKernel:
    """A prepared weight and its variants, called like a function: x [..., K] -> y [..., N], bias included.

    Results do not depend on the number of threads: no output is ever summed by two of them.
    """

    def __init__(self, name: str, options: dict[str, Any], prepared: Prepared, target: Target, files: Mapping[str, bytes] | None = None) -> None:
        self.name, self.options, self.prepared, self.target = name, options, prepared, target
        self.out_features, self.in_features = prepared.out_features, prepared.in_features
        self._dtype = getattr(torch, prepared.layout.dtype)
        self._kernels = {variant: self._load(variant, schedule, files or {}) for variant, schedule in self._schedules().items()}
        self._plans: dict[torch.Size, _Plan] = {}
        self._slab = max(LANES, SLAB // max(1, self.in_features, self.out_features) // LANES * LANES)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in_features] of the kernel's dtype, any strides -> a new y [..., out_features]. Raises InputError."""
        plan = self._plans.get(x.shape) or self._plan(x)
        y = torch.empty(plan.shape, dtype=self._dtype)
        if x.dtype is not self._dtype or not x.is_cpu:
            raise InputError(f"expected {self._dtype} on the CPU, got {x.dtype} on {x.device}", where=self.name)
        if not x.is_contiguous():
            x = x.contiguous()
        if x.requires_grad:
            x = x.detach()
        if plan.flat:
            plan.run(x, y)
        elif plan.rows and self.out_features:
            plan.run(x.view(plan.rows, -1), y.view(plan.rows, -1))
        return y

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

    @property
    def resident_bytes(self) -> int:
        """Bytes of the prepared weight, bias and indices."""
        return self.prepared.resident_bytes

    def state(self) -> dict[str, Tensor]:
        """The tensors that it holds. None need storing: rebind lays the stored weight out again."""
        return {name: getattr(self.prepared, name) for name in STATE}

    def files(self) -> dict[str, bytes]:
        """IR, binary and description of each variant, by name, for the artefact."""
        return {f"{variant}.{name}": data for variant, kernel in self._kernels.items() for name, data in build.export(kernel).items()}

    def _schedules(self) -> dict[str, build.Schedule]:
        layout, vectors = self.prepared.layout, int(self.options["vectors"])
        dot = layout.dtype == "bfloat16" and layout.r >= DOT_FROM and self.target.has("avx512bf16")
        found: dict[str, build.Schedule] = {}
        for word, parallel in (("alone", False), ("together", True)):
            found[f"rows-{word}"] = Rows(layout, parallel)
            found[f"panel1-{word}"] = Panel(layout, 1, parallel, dot)
        if vectors > 1:
            found[f"panel{vectors}-together"] = Panel(layout, vectors, True, dot)
        return found

    def _load(self, variant: str, schedule: build.Schedule, files: Mapping[str, bytes]) -> build.Kernel:
        stored = {name.removeprefix(f"{variant}."): data for name, data in files.items() if name.startswith(f"{variant}.")}
        return build.load_exported(stored, schedule, self.target) if stored else build.load(schedule, self.target)

    def _choose(self, rows: int) -> Callable[[Tensor, Tensor], None]:
        """The function (x [rows, K], y [rows, N]) for this many rows."""
        if rows > self._slab:
            return self._slabs
        function, (values, columns, pointers, bias) = self._kernels[self._variant(rows)].function, self._arguments

        def run(x: Tensor, y: Tensor) -> None:
            function(x, values, columns, pointers, bias, y)

        return run

    def _variant(self, rows: int) -> str:
        layout, vectors = self.prepared.layout, int(self.options["vectors"])
        columns = self.prepared.columns.numel()
        if rows <= FEW_ROWS[layout.r]:
            return "rows-alone" if rows * columns < ALONE else "rows-together"
        tiles = -(-rows // LANES)
        if vectors > 1 and (tiles % vectors == 0 or tiles >= 4 * vectors):
            return f"panel{vectors}-together"
        return "panel1-alone" if tiles * layout.r * columns < ALONE else "panel1-together"

    def _slabs(self, x: Tensor, y: Tensor) -> None:
        for start in range(0, x.shape[0], self._slab):
            part = x[start : start + self._slab]
            self._choose(part.shape[0])(part, y[start : start + self._slab])

    @cached_property
    def _arguments(self) -> tuple[Any, ...]:
        """The fixed arguments as TVM's own tensors: converting them at each call would cost more than a small kernel."""
        import tvm_ffi

        return tuple(tvm_ffi.from_dlpack(getattr(self.prepared, name)) for name in STATE)


def _vector_rows(r: int) -> int:
    return max(size for size in (1, 2, 4, 8, 16) if r % size == 0)
