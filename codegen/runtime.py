"""What the engine calls: candidates for a sparse linear, or for the packed dense form of a layer, bound to its weight, called with torch tensors.

    for candidate in candidates("linear_bsr", tensors, attributes, torch.float32, rows=(1, 128), target=host()):
        kernel = candidate.bind(bias)
        y = kernel(x)                                        # x [..., K] -> y [..., N]

A family of kernels is a module with NAME and offer(), which says what it can run, and lay(), which lays a weight out for any machine (laid.py); it
is called as BOUND, a BoundKernel unless the family has a class of its own. Forms of torch, and kernels that are made for the sizes of a call, have
bind() instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsify_compiler.codegen import pixels, planes, tuned
from sparsify_compiler.codegen.bound import BoundKernel
from sparsify_compiler.codegen.half import HalfKernel, widened
from sparsify_compiler.codegen.kernels import (
    amx,
    conv2d,
    dense,
    experts_ffn,
    experts_torch,
    gather,
    gather_ffn,
    gather_inputs_ffn,
    gather_predicted_ffn,
    lanes,
    linear,
    mkl,
    repeated,
    slices,
    streams,
    strips,
)
from sparsify_compiler.codegen.laid import Laid, chosen_by, workers
from sparsify_compiler.errors import KernelError, UnknownNameError, nearest
from sparsify_compiler.target import Target

# Most promising first.
FAMILIES = {family.NAME: family for family in (linear, mkl, conv2d, repeated, planes, pixels, amx, dense, streams, slices, strips, lanes, gather,
                                               gather_ffn, gather_inputs_ffn, gather_predicted_ffn, experts_ffn, experts_torch)}

ARCHITECTURES = ("x86_64", "aarch64")    # that layers are lowered for

VARIANTS = "variants"                     # the option that says which variant runs on how many rows

Layouts = dict[str, list[Any]]  # one weight laid out, by family


class Bound(Protocol):
    """A kernel bound to its weight."""

    name: str
    options: dict[str, Any]
    resident_bytes: int

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """x [..., K] -> y [..., N]; of a convolution [N, C, ...] -> [N, O, ...]; + other where the kernel adds."""

    def state(self) -> dict[str, Tensor]:
        """The tensors that it holds."""

    def files(self) -> dict[str, bytes]:
        """What an artefact keeps of it, by name."""


@dataclass(frozen=True)
class Candidate:
    """One way to run an op on this machine: `name` for reports, `options` all that `rebind` needs to know."""

    name: str
    options: Mapping[str, Any]
    op: str
    tensors: Mapping[str, Tensor]
    attributes: Mapping[str, Any]
    target: Target
    siblings: Layouts = field(default_factory=dict, compare=False, repr=False)  # layouts of this weight

    @property
    def portable(self) -> bool:
        """Can the weight be laid out for a machine that is not this one?"""
        return is_portable(self.options)

    def bind(self, bias: Tensor | None = None) -> Any:
        """Lay the weight out, build or load the variants: a Bound. Raises KernelError."""
        return rebind(self.op, self.options, self.tensors, self.attributes, bias, {}, self.target, self.siblings)

    def lay(self, bias: Tensor | None = None) -> Laid:
        """Lay the weight out for a machine that need not be this one. Raises KernelError."""
        return lay(self.op, self.options, self.tensors, self.attributes, bias, self.target, self.siblings)


def candidates(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
               target: Target, shared: Layouts | None = None) -> list[Candidate]:
    """Every kernel that can run this op on x of `dtype`, most promising first; none where the dtypes or the target have no kernel.

    tensors, attributes   of the stored weight (formats/<name>.py). Of a dense op ("linear", "conv2d") the weight, for its packed form, its stride,
                          padding, dilation and groups, and what to compute with it: add, activation, arguments (engine's epilogue.py);
                          any_rows where other numbers of rows than these will come; layout="planes" for dense convolutions over planes
    rows                  numbers of rows of x to expect, e.g. (1, 128); of a convolution the shape of x
    shared                layouts of this very weight, made before; new ones are added
    """
    layouts: Layouts = {} if shared is None else shared
    where = {tensor.device.type for tensor in tensors.values()}
    if where == {"cuda"}:
        return _on_gpu(op, tensors, attributes, dtype, rows, layouts)
    if where - {"cpu"}:
        return []
    tensors, half = widened(tensors), {"half": True} if dtype is torch.float16 and "values" in tensors else {}
    return [Candidate(name, {"family": family.NAME, **options, **half}, op, tensors, attributes, target, layouts) for family in FAMILIES.values()
            for name, options in family.offer(op, tensors, attributes, torch.float32 if half else dtype, rows, target)]


def _on_gpu(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
            layouts: Layouts) -> list[Candidate]:
    """The same for weights on a GPU, whatever the target is; none where there are no kernels for it, or no compiler of kernels."""
    from sparsify_compiler.codegen.cuda import build, device, families

    devices = {tensor.device for tensor in tensors.values()}
    try:
        target = device.target_of(devices.pop())
    except KernelError:
        return []
    if devices or build.nvcc() is None:
        return []
    return [Candidate(name, {"family": family.NAME, **options}, op, tensors, attributes, target, layouts) for family in families.FAMILIES.values()
            for name, options in family.offer(op, tensors, attributes, dtype, rows, target)]


def known(op: str, shape: tuple[int, int], rows: int, density: float, attributes: Mapping[str, Any], chain: str, dtype: str,
          target: Target) -> tuple[tuned.Key, tuned.Record | None]:
    """The key of a linear layer in the database of tuned results, and what is known of such layers. The target is a processor."""
    key = tuned.Key.of(op, shape, rows, density, attributes, chain, dtype.removeprefix("torch."), target, workers(target))
    return key, tuned.find(key)


def as_tuned(found: Sequence[tuple[Any, Candidate]], record: tuned.Record) -> list[tuple[Any, Candidate]]:
    """The candidates that are worth trying, each with the label of what it computes besides, cut as was found to be the best."""
    families = {(one.op, one.options["family"], label): one for label, one in reversed(found)}
    names = {(one.name, label) for label, one in found}
    made = [(label, replace(one, options={**one.options, **record.options.get(one.name, {})})) for label, one in found]
    made += [(label, replace(one, name=name, options={**one.options, **options})) for name, options in record.options.items()
             for (_, family, label), one in families.items() if family == options.get("family") and (name, label) not in names]
    return [(label, one) for label, one in made if record.worth(one.name + label.label)]


def space(found: Sequence[Candidate]) -> list[Candidate]:
    """The same kernels cut in other ways that their families know, for tuning to try; none that is among them already."""
    names, made = {candidate.name for candidate in found}, dict[str, Candidate]()
    for candidate in found:
        others = getattr(FAMILIES.get(str(candidate.options["family"])), "space", None)
        for name, options in () if others is None else others(candidate.op, candidate.options):
            if name not in names:
                made.setdefault(name, replace(candidate, name=name, options=options))
    return list(made.values())


def rebind(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
           files: Mapping[str, bytes], target: Target, shared: Layouts | None = None) -> Any:
    """The kernel (a Bound) that a candidate with these options binds to this weight; `files` of an artefact spare building it.

    shared  layouts of this weight made before, of a sparse op each with the very bias that is in it; a new one is added
    Raises KernelError when this machine cannot run it.
    """
    with _fitting(op):
        family, layouts = _family(op, options, shared)
        given = (op, options, widened(tensors) if options.get("half") or family.NAME in FAMILIES else tensors, attributes, bias)
        kernel = (getattr(family, "BOUND", BoundKernel)(_laid(family, *given, target, layouts), files) if hasattr(family, "lay")
                  else family.bind(*given, files, target, layouts))
        return HalfKernel(kernel, options) if options.get("half") else kernel


def is_portable(options: Mapping[str, Any]) -> bool:
    """Has the family of a candidate with these options kernels for machines that are not this one?"""
    return hasattr(FAMILIES.get(str(options.get("family"))), "lay")


def lay(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None, target: Target,
        shared: Layouts | None = None) -> Laid:
    """What a candidate with these options lays out of this weight, for a machine that need not be this one; float16 as float32.

    Raises KernelError, also where its family has kernels for this machine only.
    """
    with _fitting(op):
        family, layouts = _family(op, options, shared)
        if not hasattr(family, "lay"):
            raise KernelError(f"kernels of the family {family.NAME!r} are made where they run", where=op, hint="compile the model there")
        return _laid(family, op, options, widened(tensors), attributes, bias, target, layouts)


def _laid(family: Any, op: str, options: Mapping[str, Any], *rest: Any) -> Laid:
    """By the family, and with its kernels chosen as the options say, where tuning has found out."""
    made: Laid = family.lay(op, options, *rest)
    return chosen_by(made, options[VARIANTS]) if VARIANTS in options else made


def _family(op: str, options: Mapping[str, Any], shared: Layouts | None) -> tuple[Any, list[Any]]:
    """The family of a candidate with these options, and the layouts that it may share."""
    name, known = str(options.get("family")), dict(FAMILIES)
    if name.startswith("cuda_"):
        from sparsify_compiler.codegen.cuda.families import FAMILIES as ON_GPU

        known |= ON_GPU
    if name not in known:
        raise KernelError(f"there is no family of kernels called {name!r}", where=op, hint=nearest(name, known))
    return known[name], [] if shared is None else shared.setdefault(name, [])


@contextmanager
def _fitting(op: str) -> Iterator[None]:
    """What a family raises where options do not fit their weight, as a KernelError."""
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError, UnknownNameError) as error:
        raise KernelError(f"the stored kernel does not fit: {error!r}", where=op, hint="save the model again") from error
