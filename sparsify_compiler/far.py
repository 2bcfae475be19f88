"""Kernels for a machine that is not this one: laid out and built for it, while this one computes their nodes by the graph's own operators.

A node whose kernel is a FarKernel runs as if it had none: the op's torch reference is its meaning anywhere. Whoever builds for the machine reads
`node.meta["kernel"].laid`; an artefact keeps the binaries, which run where it is loaded on a machine that has what they need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from .errors import KernelError, TargetError
from .target import Target, host

if TYPE_CHECKING:
    from .codegen.laid import Laid
    from .program import Program

ELSEWHERE = "name a board with --rpc, or run it there, and bring the results with --export and --import"    # how it is tuned, from here


def is_far(target: Target | None) -> bool:
    """Does code for this target not run on this machine?"""
    return target is not None and not target.runs_on(host())


def require_here(target: Target, hint: str) -> Target:
    """The target, if code for it runs here. Raises TargetError with the hint."""
    if is_far(target):
        raise TargetError(f"{target.name} is not this machine, nothing can be measured for it from here", where="target", hint=hint)
    return target


class FarKernel:
    """A kernel for a machine that is not here, its weight laid out when that is asked for first.

    name, options  as a candidate of the kernel room has them
    target         the machine
    lay            lays the weight out; raises KernelError. float16 is laid out as float32, which its kernels compute in. None for a kernel that
                   only its machine can make
    files          of an artefact: its binaries, which spare building them again
    """

    def __init__(self, name: str, options: Mapping[str, Any], target: Target, lay: Callable[[], Laid] | None,
                 files: Mapping[str, bytes] | None = None) -> None:
        self.name, self.options, self.target = name, dict(options), target
        self._lay, self._files = lay, dict(files or {})

    @cached_property
    def laid(self) -> Laid:
        """The weight as the machine's kernels read it, and the kernels. Raises KernelError."""
        if self._lay is None:
            raise KernelError("such kernels are made where they run", where=self.name, hint=f"load the model on {self.target.name}")
        made, self._lay = self._lay(), None  # and let go of what it was laid out from
        return made

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Raises KernelError: code for that machine never runs here, the nodes of a graph run by reference."""
        raise KernelError(f"runs on {self.target.name} only", where=self.name, hint="call the compiled model: its nodes run by reference here")

    @property
    def _is_portable(self) -> bool:
        return self._lay is not None or "laid" in self.__dict__

    def state(self) -> dict[str, Tensor]:
        """The tensors that its kernels read."""
        return self.laid.prepared.arguments() if self._is_portable else {}

    @property
    def resident_bytes(self) -> int:
        """Bytes of those tensors."""
        return self.laid.prepared.resident_bytes if self._is_portable else 0

    def files(self) -> dict[str, bytes]:
        """IR, binary and description of each variant, by name, built for the machine. Raises KernelError."""
        from .codegen import build

        if self._files or not self._is_portable:
            return dict(self._files)
        return {f"{variant}.{name}": data for variant, schedule in self.laid.variants.schedules.items()
                for name, data in build.exported(schedule, self.target, build.binary(schedule, self.target)).items()}


def runs_here(node: fx.Node) -> bool:
    """Has the node a kernel that this machine calls?"""
    kernel = node.meta.get("kernel")
    return kernel is not None and not isinstance(kernel, FarKernel)


def far_kernels(program: Program) -> list[FarKernel]:
    """Those of a Program."""
    return [kernel for _, node in program.nodes() if isinstance(kernel := node.meta.get("kernel"), FarKernel)]
