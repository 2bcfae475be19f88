"""Convolutions over images in their usual layout [B, C, H, W], sparse or dense, bound to a weight and called with torch tensors.

The part of runtime.py for kernels/planes.py and kernels/depthwise.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler import catalog
from sparsify_compiler.codegen import build
from sparsify_compiler.codegen.kernels.depthwise import Depthwise
from sparsify_compiler.codegen.kernels.finish import finish_of
from sparsify_compiler.codegen.kernels.layout import LANES, dense_groups, padded_bias
from sparsify_compiler.codegen.kernels.planes import NUMBERS, Planes
from sparsify_compiler.codegen.kernels.planes_layout import Geometry, PreparedPlanes, offsets_of, prepare_planes
from sparsify_compiler.codegen.vectors import AVX512, vectors_of
from sparsify_compiler.errors import InputError, KernelError
from sparsify_compiler.target import Target

NAME = LAYOUT = "planes"
# Registers of pixels in a tile, for r outputs that share columns: r * vectors sums must leave some of 32 registers.
TILES: Mapping[int, tuple[int, ...]] = {1: (8, 4), 2: (6,), 4: (4,), 8: (3,)}
TILES_OF = {8: {1: 8, 2: 4, 4: 2, 8: 1}, 4: {1: 8, 2: 8, 4: 4, 8: 2}}     # the same without AVX-512, by lanes of a register
DENSE_ROWS = 8       # outputs computed together where all are kept
DENSE_INPUTS = 256   # above so many inputs of a group oneDNN is out of reach
# Columns of 64 bytes: what a tile reads of x between two visits of a group stays in L1, or half of it (14x14, 512 channels, Zen 4: 131, 122 us).
CHUNKS = (512, 1024)
CHUNKED_FROM = 384   # inputs of a group from which chunks can pay, where outputs share no columns
# Of y for each processor, where they share an image by its rows, not by its planes. MobileNetV1 with 28, 14 and 7, a run each: 2.84, 2.72, 2.86 ms.
FEWEST_ROWS = 14
ALONE = 12_000       # vector FMAs below which waking other threads costs more than they bring
PLANS = 64           # shapes of x remembered
SLAB = 1 << 28       # elements in one call: indices are 32 bits wide, and the copy of x is bounded

Made = list[Any]


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Names and options of the convolutions that read and write planes: all sparse ones, and dense ones where attributes say layout="planes"."""
    if not op.startswith("conv2d_") and attributes.get("layout") != LAYOUT:
        return []
    inputs = int(attributes.get("in_features", 0)) or tensors["weight"][:1].numel()
    return [(_name_of(op, chosen, inputs), chosen) for chosen in _options(op, tensors, attributes, dtype, rows)]


def _options(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, shape: Sequence[int]) -> list[dict[str, Any]]:
    """Every way to run a convolution on x of this shape, as `bind` wants it; none where there is no kernel for it."""
    weight = tensors.get("weight", tensors.get("values"))
    if weight is None or dtype is not torch.float32 or weight.dtype not in (torch.float32, torch.bfloat16) or weight.device.type != "cpu":
        return []
    if len(shape) != 4 or min(*shape, 1) < 1 or finish_of(attributes) is None:
        return []
    geometry = _geometry(tensors, attributes)
    height, width = geometry.extent(shape[2:])
    if min(height, width) < 1:
        return []
    outputs = int(attributes.get("out_features", weight.shape[0]))
    pixels = shape[0] * height * width
    if op == "conv2d":
        if weight.shape[1] == 1 and geometry.groups > 1:
            return [{"layout": LAYOUT, "depthwise": True, "parallel": pixels * outputs * geometry.taps // 16 >= ALONE}]
        if weight.shape[1] * geometry.taps > DENSE_INPUTS:
            return []
        r, kept = _shared_rows(DENSE_ROWS, outputs, geometry.groups), weight.numel()
    else:
        r, kept = _shared_rows(int(attributes.get("r", 1)), outputs, geometry.groups), tensors["values"].numel()
    parallel = pixels * kept // 16 >= ALONE
    inputs = weight[0].numel() if op == "conv2d" else int(attributes["in_features"])
    tiles = [(vectors, inputs) for vectors in TILES[r]]
    if r == 1 and inputs >= CHUNKED_FROM:
        tiles += [(vectors, chunk // vectors) for chunk in CHUNKS for vectors in TILES[r]]
    return [{"layout": LAYOUT, "r": r, "vectors": vectors, "chunk": max(1, chunk), "parallel": parallel} for vectors, chunk in tiles]


def _name_of(op: str, chosen: Mapping[str, Any], inputs: int) -> str:
    """For reports: "planes csr_r1v4c128": outputs that share columns, registers of a tile, columns of a chunk where there are several."""
    form = op.partition("_")[2] or "dense"
    if chosen.get("depthwise"):
        return f"{LAYOUT} depthwise"
    chunk = f"c{chosen['chunk']}" if chosen["chunk"] < inputs else ""
    return f"{LAYOUT} {form}_r{chosen['r']}v{chosen['vectors']}{chunk}"


def bind(op: str, chosen: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
         files: Mapping[str, bytes], target: Target, shared: Made) -> BoundPlanes:
    """The convolution bound to its weight. Raises KernelError; KeyError, ValueError and their like for options that do not fit."""
    finish = finish_of(attributes)
    if finish is None or chosen["layout"] != LAYOUT:
        raise KernelError("there is no such kernel", where=op, hint="save the model again")
    geometry, parallel = _geometry(tensors, attributes), bool(chosen["parallel"])
    if chosen.get("depthwise"):
        schedule: build.Schedule = Depthwise(geometry.kernel, geometry.stride, geometry.dilation, geometry.padding[1], finish, parallel,
                                             vectors_of(target))
        weight = tensors["weight"].detach().float().flatten(1).contiguous()
        full = padded_bias(bias, weight.shape[0], weight.shape[0])
        return BoundPlanes(op, chosen, schedule, geometry, (weight.view(-1), full), (weight.shape[0], geometry.groups), 1, target, files)
    key = tuple(chosen[name] for name in ("r", "chunk"))
    prepared = next((made[2] for made in shared if isinstance(made, tuple) and made[0] is bias and made[1] == key), None)
    if prepared is None:
        prepared = _prepare(op, chosen, tensors, attributes, bias, geometry, target.cores)
        shared.append((bias, key, prepared))
    cut_for = vectors_of(target)
    vectors = int(chosen["vectors"]) if cut_for == AVX512 else TILES_OF[cut_for.lanes][int(chosen["r"])]
    schedule = Planes(int(chosen["r"]), vectors, prepared.chunks > 1, finish, parallel,
                      None if geometry.plain else geometry.stride, cut_for)
    return BoundPlanes(op, chosen, schedule, geometry, prepared, (prepared.out_channels, prepared.in_channels),
                       prepared.in_channels // geometry.groups * geometry.taps, target, files)


def _prepare(op: str, chosen: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
             geometry: Geometry, cores: int) -> PreparedPlanes:
    r = int(chosen["r"])
    if op == "conv2d":
        matrix = tensors["weight"].detach().flatten(1)
        outputs, inputs = matrix.shape
        groups = dense_groups(matrix, r)
    else:
        outputs, inputs = int(attributes["out_features"]), int(attributes["in_features"])
        groups = catalog.get("kernel", f"linear_{op.removeprefix('conv2d_')}").groups(tensors, attributes)
    fits = r in TILES and int(chosen["vectors"]) in TILES[r] and int(chosen["chunk"]) > 0 and groups.values.shape[1] % r == 0
    if not fits or outputs % geometry.groups or inputs % geometry.taps or (geometry.groups > 1 and outputs // geometry.groups % r):
        raise KernelError("the stored kernel does not fit its weight", where=op, hint="save the model again")
    return prepare_planes(groups, geometry, r, int(chosen["chunk"]), bias, outputs, inputs, cores)


def _geometry(tensors: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> Geometry:
    kernel = attributes.get("kernel_size")
    made = Geometry.of(attributes, tensors["weight"].shape[2:] if kernel is None else kernel)
    if min(*made.kernel, *made.stride, *made.dilation, made.groups) < 1 or min(made.padding) < 0:
        raise KernelError(f"there is no such convolution: {made}", hint="save the model again")
    return made


def _shared_rows(r: int, outputs: int, groups: int) -> int:
    """How many outputs a kernel computes together, of r that share their columns: never those of two groups of the convolution."""
    return max(size for size in TILES if r % size == 0 and (groups == 1 or outputs // groups % size == 0))


@dataclass(frozen=True, slots=True)
class _Plan:
    """For one shape of x and its strides: shape and strides of y, and what the kernel is given before x and y."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    middle: tuple[Any, ...]
    slab: int


class BoundPlanes:
    """A convolution bound to its weight: x [B, C, H, W] (, other of y's shape) -> y [B, O, H', W'], bias and epilogue included.

    The lines of a plane of y are contiguous, and planes begin at multiples of a cache line: for some sizes there is room between them.

    Results do not depend on the number of threads: no output is ever summed by two of them.
    """

    def __init__(self, op: str, chosen: Mapping[str, Any], schedule: Any, geometry: Geometry, prepared: Any, channels: tuple[int, int],
                 inputs: int, target: Target, files: Mapping[str, bytes]) -> None:
        self.name, self.options, self.target = _name_of(op, chosen, inputs), dict(chosen), target
        self._geometry, self._prepared, (self._outputs, self._inputs) = geometry, prepared, channels
        self._kernel = build.load_exported(files, schedule, target) if files else build.load(schedule, target)
        self._function, self._adds = self._kernel.function, schedule.finish.add
        self._fixed = tuple(_foreign(t) for t in self.state().values() if t is not getattr(prepared, "columns", None))
        self._plans: dict[tuple[torch.Size, tuple[int, ...]], _Plan] = {}

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """x of any strides, float32 on the CPU. Raises InputError."""
        if x.requires_grad:
            x = x.detach()
        plan = self._plans.get((x.shape, x.stride()))
        if plan is None:
            x = _in_planes(x)
            plan = self._plan(x)
        if x.dtype is not torch.float32 or not x.is_cpu or (other is not None) != self._adds:
            raise InputError(f"expected float32 on the CPU, got {x.dtype} on {x.device}", where=self.name)
        y = torch.empty_strided(plan.shape, plan.strides)
        if other is None and plan.slab:
            self._function(*plan.middle, x, y)
            return y
        given = (x,) if other is None else (x, _in_planes(other.detach()))
        if plan.slab:
            self._function(*plan.middle, *given, y)
        else:
            self._slabs(plan, given, y)
        return y

    @property
    def signature(self) -> str:
        """What the shape and strides of y depend on beside x."""
        return f"{self.name} {self._inputs} to {self._outputs} {self._geometry}"

    def empty(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """A y for this x, which may be fake. Raises InputError."""
        shape, strides = self._output(x)
        return x.new_empty_strided(shape, strides)

    def _output(self, x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides of y."""
        if x.dim() != 4 or x.shape[1] != self._inputs:
            raise InputError(f"expected [B, {self._inputs}, H, W], got {list(x.shape)}", where=self.name)
        height, width = self._geometry.extent(x.shape[2:])
        if min(height, width) < 1:
            raise InputError(f"images of {x.shape[2]}x{x.shape[3]} are smaller than the kernel", where=self.name)
        plane = height * width
        plane += -plane % LANES if plane > LANES else 0  # each plane begins at a cache line: a load that crosses one costs two
        return (x.shape[0], self._outputs, height, width), (plane * self._outputs, plane, width, 1)

    def _slabs(self, plan: _Plan, given: Sequence[Tensor], y: Tensor) -> None:
        """An image at a time; nothing where y is empty."""
        for image in range(plan.shape[0] if math.prod(plan.shape) else 0):
            part = [t[image : image + 1] for t in given]
            self._function(*plan.middle, *part, y[image : image + 1])

    def _plan(self, x: Tensor) -> _Plan:
        shape, strides = self._output(x)
        middle, copied = self._middle(x)
        whole = 0 < x.shape[0] * max(self._inputs * copied, math.prod(shape[1:])) <= SLAB
        plan = _Plan(shape, strides, middle, int(whole))
        if len(self._plans) >= PLANS:
            self._plans.clear()
        self._plans[x.shape, x.stride()] = plan
        return plan

    def _middle(self, x: Tensor) -> tuple[tuple[Any, ...], int]:
        """What the kernel is given before x and y, and the elements of a plane of x or of its copy."""
        size, made = x.shape[2:], self._prepared
        if not isinstance(made, PreparedPlanes):
            height = self._geometry.extent(size)[0]
            pieces = self.target.cores if height >= FEWEST_ROWS * self.target.cores else 1
            return (*self._fixed, _foreign(torch.tensor([self._geometry.padding[0], pieces], dtype=torch.int32))), x.stride(1)
        offsets, numbers = offsets_of(made.columns, self._geometry, size, x.stride(1))
        numbers |= {"groups": made.bias.numel() // made.r, "chunks": made.chunks}
        values, *rest = self._fixed
        phases = (torch.tensor(self._geometry.phases) - torch.tensor(self._geometry.padding)).int().reshape(-1)
        more = (_foreign(phases), _foreign(torch.tensor([numbers[name] for name in NUMBERS], dtype=torch.int32)))
        return (values, _foreign(offsets), *rest, *more), max(x.stride(1), numbers["kinds"] * numbers["rows"] * numbers["pitch"])

    @property
    def resident_bytes(self) -> int:
        """Bytes of the prepared weight, bias and indices; those of one shape of x included."""
        index = getattr(self._prepared, "columns", None)
        return sum(t.numel() * t.element_size() for t in self.state().values()) + (0 if index is None else 4 * index.numel())

    def state(self) -> dict[str, Tensor]:
        """The tensors that it holds. None need storing: `bind` lays the stored weight out again."""
        if isinstance(self._prepared, PreparedPlanes):
            return {name: getattr(self._prepared, name) for name in ("values", "columns", "pointers", "visits", "bias", "strips")}
        return dict(zip(("values", "bias"), self._prepared, strict=True))

    def files(self) -> dict[str, bytes]:
        """IR, binary and description, for the artefact."""
        return build.export(self._kernel)


def _in_planes(x: Tensor) -> Tensor:
    """x itself, where the lines of each plane follow each other and no two planes share memory, else a contiguous copy."""
    if x.dim() != 4:
        return x
    (b, c, h, w), strides = x.shape, x.stride()
    lines = (w == 1 or strides[3] == 1) and (h == 1 or strides[2] == w)
    return x if lines and (c == 1 or strides[1] >= h * w) and (b == 1 or strides[0] >= c * strides[1]) else x.contiguous()


def _foreign(tensor: Tensor) -> Any:
    """As TVM's own tensor: converting it at each call would cost more than a small kernel."""
    import tvm_ffi

    return tvm_ffi.from_dlpack(tensor)
