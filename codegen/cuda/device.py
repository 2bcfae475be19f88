"""The GPU at hand: what it is called as a target, how many processors it has, and kernels loaded for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen import build as cpu
from sparsify_compiler.codegen.cuda import build
from sparsify_compiler.errors import KernelError
from sparsify_compiler.target import Target, resolve

BY_GENERATION = {8: "sm_80", 9: "sm_90"}    # of compute capability: code of one runs on all that follow it in the same generation


@cache
def target_of(device: torch.device) -> Target:
    """The target whose code this GPU runs. Raises KernelError."""
    capability = torch.cuda.get_device_capability(device)
    if capability[0] not in BY_GENERATION:
        raise KernelError(f"no kernels for compute capability {'.'.join(map(str, capability))}", where=str(device),
                          hint=f"there are kernels for {', '.join(f'{generation}.x' for generation in BY_GENERATION)}")
    return resolve(BY_GENERATION[capability[0]])


def multiplies_by_groups(device: torch.device) -> bool:
    """Has it the products of four warps (groups.py)?"""
    return build.HEADERS["group.cuh"] in target_of(device).features


def has_clusters(device: torch.device) -> bool:
    """Can its blocks write to each other's shared memory (cluster.cuh)?"""
    return build.HEADERS["cluster.cuh"] in target_of(device).features


@cache
def processors(device: torch.device) -> int:
    """How many there are."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def stream(device: torch.device) -> tuple[int, bool]:
    """The one that work is given to now, and whether that is only noted, for a graph."""
    if device.type != "cuda":
        return 0, False
    return int(torch.cuda.current_stream(device).cuda_stream), bool(torch.cuda.is_current_stream_capturing())


class Counters:
    """int32 zeros that kernels leave so: those of a stream; new ones, set in it, each time in a graph, which may run first, or beside others."""

    def __init__(self) -> None:
        self._held: dict[tuple[torch.device, int, int], Tensor] = {}

    def __call__(self, device: torch.device, count: int) -> Tensor:
        """So many."""
        number, captured = stream(device)
        key = device, number, count
        if captured or key not in self._held:
            made = torch.zeros(count, dtype=torch.int32, device=device)
            if captured:
                return made
            self._held[key] = made
        return self._held[key]


@cache
def function(schedule: cpu.Schedule, device: torch.device) -> Any:
    """The kernel, called with tensors of that device, on torch's current stream. Raises KernelError."""
    return build.load_function(build.load(schedule, target_of(device)))


class Kernels:
    """Those of one layer, each loaded when it is first needed: out of an artefact's files where they fit, without TVM's compiler and nvcc."""

    def __init__(self, device: torch.device, files: Mapping[str, bytes]) -> None:
        self.device, self._files, self._loaded = device, dict(files), dict[cpu.Schedule, Any]()

    def __call__(self, schedule: cpu.Schedule, *arguments: Any) -> None:
        """Launch it."""
        found = self._loaded.get(schedule)
        if found is None:
            found = self._loaded[schedule] = self._load(schedule)
        found(*arguments)

    def _load(self, schedule: cpu.Schedule) -> Any:
        stored = self._stored(schedule)
        return function(schedule, self.device) if stored is None else build.load_function(stored)

    def _stored(self, schedule: cpu.Schedule) -> bytes | None:
        """The artefact's archive, where it fits."""
        stored = self._files.get(f"{_label(schedule)}.archive")
        fits = stored is not None and json.loads(self._files[f"{_label(schedule)}.json"]) == _made(schedule, target_of(self.device))
        return stored if fits else None

    def files(self) -> dict[str, bytes]:
        """Of those that were needed so far."""
        kept = {}
        for schedule in self._loaded:
            target = target_of(self.device)
            kept[f"{_label(schedule)}.archive"] = self._stored(schedule) or build.load(schedule, target)
            kept[f"{_label(schedule)}.json"] = json.dumps(_made(schedule, target)).encode()
        return kept


def _label(schedule: cpu.Schedule) -> str:
    return f"{schedule.name}-{cpu.digest(repr(schedule))[:12]}"


def _made(schedule: cpu.Schedule, target: Target) -> dict[str, str]:
    return {"schedule": repr(schedule), "architecture": target.mcpu, "tvm": cpu.version()}
