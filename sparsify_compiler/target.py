"""A target: the machine to compile for, as data that checks itself.

Only `codegen` turns a Target into a compiler's own target object; the rest of the engine asks it questions.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from .errors import TargetError, nearest

# LLVM feature names that change which kernels are worth generating, by architecture.
FEATURES: dict[str, tuple[str, ...]] = {
    "x86_64": ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avx512bf16",
               "amx-tile", "amx-bf16", "amx-int8"),
    "aarch64": ("neon", "dotprod", "fullfp16", "i8mm", "bf16", "sve", "sve2"),
}
NAMES = ("cpu", "native", "x86-avx2", "x86-avx512", "x86-amx")


@dataclass(frozen=True)
class Target:
    """A machine.

    name      what the user calls it
    arch      "x86_64" or "aarch64"
    mcpu      LLVM processor name, used for tuning only; instruction sets come from `features`
    features  LLVM feature names, the subset of FEATURES that the machine has, sorted
    cores     processors that kernels may use
    """

    name: str
    arch: str
    mcpu: str
    features: tuple[str, ...]
    cores: int

    def __post_init__(self) -> None:
        if self.arch not in FEATURES:
            raise TargetError(f"unknown architecture {self.arch!r}", where=self.name, hint=nearest(self.arch, FEATURES))
        for feature in self.features:
            if feature not in FEATURES[self.arch]:
                raise TargetError(f"unknown feature {feature!r} of {self.arch}", where=self.name,
                                  hint=nearest(feature, FEATURES[self.arch]))
        if self.cores < 1:
            raise TargetError(f"a target needs at least one core, got {self.cores}", where=self.name)

    def has(self, feature: str) -> bool:
        """True when the machine has this LLVM feature."""
        return feature in self.features

    @property
    def vector_bytes(self) -> int:
        """Width of one vector register in bytes (SVE counts as its 16-byte minimum)."""
        if self.arch == "x86_64":
            return 64 if self.has("avx512f") else 32 if self.has("avx2") else 16
        return 16

    def runs_on(self, host: Target) -> bool:
        """True when code for this target runs on `host` (same architecture, no feature that it lacks)."""
        return self.arch == host.arch and set(self.features) <= set(host.features)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Target:
        return Target(data["name"], data["arch"], data["mcpu"], tuple(data["features"]), int(data["cores"]))


@cache
def host() -> Target:
    """The machine we run on, by feature flags: LLVM's processor name is wrong in some virtual machines."""
    import platform

    import tvm

    arch = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    if arch not in FEATURES:
        raise TargetError(f"no kernels for this processor architecture: {arch}", hint=nearest(arch, FEATURES))
    flags = tvm.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")()
    features = tuple(sorted(f for f in FEATURES[arch] if f in flags and bool(flags[f])))
    return Target("native", arch, _mcpu(arch, features), features, _cores())


@cache
def fingerprint() -> str:
    """What numbers measured on this machine hold for: processor, its caches, its features, how many cores."""
    machine = host()
    caches = [os.sysconf(name) for name in ("SC_LEVEL1_DCACHE_SIZE", "SC_LEVEL2_CACHE_SIZE", "SC_LEVEL3_CACHE_SIZE") if name in os.sysconf_names]
    return " ".join(map(str, (_processor(), *caches, *machine.features, machine.cores)))


def _processor() -> str:
    """Its name and stepping as the system tells them."""
    import platform
    from pathlib import Path

    wanted = ("model name", "cpu family", "model", "stepping", "CPU part", "CPU implementer")
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()]
        return " ".join(value.strip() for name, _, value in lines if name.strip() in wanted)
    except OSError:
        return platform.processor()


def _cores() -> int:
    """Processors that this process may use; macOS and Windows only tell how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _mcpu(arch: str, features: tuple[str, ...]) -> str:
    """A tuning name that fits the features, whatever the virtual machine says the processor is called."""
    if arch == "aarch64":
        return "generic"
    if "amx-tile" in features:
        return "sapphirerapids"
    if "avx512bf16" in features:
        return "znver4"
    return "skylake-avx512" if "avx512f" in features else "haswell" if "avx2" in features else "x86-64"


def _known(name: str) -> str:
    known = f"known: {', '.join(NAMES)}"
    hint = nearest(name, NAMES)
    return hint if hint.startswith("known") else f"{hint} {known}"


def resolve(target: str | Target) -> Target:
    """A Target from its name ("cpu" and "native" are this machine), or the Target itself. Raises TargetError."""
    if isinstance(target, Target):
        return target
    if target in ("cpu", "native"):
        return host()
    if not isinstance(target, str):
        raise TargetError(f"a target is a name or a Target, not {type(target).__name__}", where="target", hint=f"known: {', '.join(NAMES)}")
    if target not in NAMES:
        raise TargetError(f"unknown target {target!r}", where="target", hint=_known(target))
    level = {"x86-avx2": 3, "x86-avx512": 9, "x86-amx": 12}[target]
    features = tuple(sorted(FEATURES["x86_64"][:level]))
    return Target(target, "x86_64", _mcpu("x86_64", features), features, os.cpu_count() or 1)
