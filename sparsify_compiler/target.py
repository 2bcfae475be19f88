"""A target: the machine to compile for, as data that checks itself. Those that have a name are in targets.json.

Only `codegen` turns a Target into a compiler's own target object; the rest of the engine asks it questions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .errors import TargetError, nearest
from .host_features import aarch64_features

_DATA: dict[str, Any] = json.loads(Path(__file__).with_name("targets.json").read_text(encoding="utf-8"))
# By architecture: what changes which kernels are worth generating, by LLVM's names (of CUDA by ours), and LLVM's names of processors.
FEATURES: dict[str, tuple[str, ...]] = {arch: tuple(names) for arch, names in _DATA["features"].items()}
PROCESSORS: dict[str, tuple[str, ...]] = {arch: tuple(names) for arch, names in _DATA["processors"].items()}
HERE = ("cpu", "native")
NAMES = (*HERE, *_DATA["targets"])


@dataclass(frozen=True)
class Target:
    """A machine. Raises TargetError where it cannot be one.

    name      what the user calls it
    arch      "x86_64", "aarch64" or "cuda"
    mcpu      LLVM's name of the processor (of CUDA the architecture, such as "sm_90a"). On x86 the features alone decide what code there is
    features  the subset of FEATURES that the machine has, sorted
    cores     processors that kernels may use; a GPU counts as one
    """

    name: str
    arch: str
    mcpu: str
    features: tuple[str, ...]
    cores: int

    def __post_init__(self) -> None:
        if self.arch not in FEATURES:
            raise TargetError(f"unknown architecture {self.arch!r}", where=self.name, hint=nearest(str(self.arch), FEATURES))
        if self.mcpu not in PROCESSORS[self.arch]:  # LLVM would only print a warning, and compile for a generic processor
            raise TargetError(f"unknown processor {self.mcpu!r} of {self.arch}", where=self.name, hint=nearest(str(self.mcpu), PROCESSORS[self.arch]))
        needs = _DATA["needs"][self.arch]
        for feature in self.features:
            if feature not in FEATURES[self.arch]:
                raise TargetError(f"unknown feature {feature!r} of {self.arch}", where=self.name,
                                  hint=nearest(feature, FEATURES[self.arch]))
            if needs.get(feature, feature) not in self.features:
                raise TargetError(f"no machine has {feature} without {needs[feature]}", where=self.name, hint=f"add {needs[feature]!r}")
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

    @property
    def vector_registers(self) -> int:
        """How many of those there are."""
        return 16 if self.arch == "x86_64" and not self.has("avx512f") else 32

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

    arch = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    if arch not in FEATURES:
        raise TargetError(f"no kernels for this processor architecture: {arch}", hint=nearest(arch, FEATURES))
    flags = aarch64_features() if arch == "aarch64" else None
    if flags is None:
        import tvm

        flags = tvm.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")()
    features = _consistent(arch, [f for f in FEATURES[arch] if f in flags and bool(flags[f])])
    return Target("native", arch, _mcpu(arch, features), features, _cores())


def _consistent(arch: str, found: list[str]) -> tuple[str, ...]:
    """Those whose needs are met: a virtual machine may hide some. FEATURES has what is needed before what needs it."""
    kept: list[str] = []
    for feature in found:
        if _DATA["needs"][arch].get(feature, feature) in (*kept, feature):
            kept.append(feature)
    return tuple(sorted(kept))


@cache
def fingerprint() -> str:
    """What numbers measured on this machine hold for: processor, its caches, its features, how many cores."""
    machine = host()
    caches = [os.sysconf(name) for name in ("SC_LEVEL1_DCACHE_SIZE", "SC_LEVEL2_CACHE_SIZE", "SC_LEVEL3_CACHE_SIZE") if name in os.sysconf_names]
    return " ".join(map(str, (_processor(), *caches, *machine.features, machine.cores)))


def _processor() -> str:
    """Its name and stepping as the system tells them."""
    import platform

    wanted = ("model name", "cpu family", "model", "stepping", "CPU part", "CPU implementer")
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()]
        return " ".join(value.strip() for name, _, value in lines if name.strip() in wanted)
    except OSError:
        return platform.processor()


@cache
def second_cache(target: Target) -> int:
    """Bytes of a core's second cache: of this machine as the system tells them, else (and where it does not) 2 MiB, which layouts are cut for."""
    told = os.sysconf("SC_LEVEL2_CACHE_SIZE") if target == host() and "SC_LEVEL2_CACHE_SIZE" in os.sysconf_names else 0
    return told if told > 0 else 2 << 20


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


def gathers_slowly(features: Sequence[str]) -> bool:
    """Is a gather of 16 numbers slower than loading them one by one? It is microcode on Zen 4 (21 cycles, against 11).

    These features tell it from a Sapphire Rapids, unless that hides its AMX; then codes take a byte more than they need to.
    """
    return "avx512bf16" in features and "amx-tile" not in features


def _known(name: str) -> str:
    known = f"known: {', '.join(NAMES)}"
    hint = nearest(name, NAMES)
    return hint if hint.startswith("known") else f"{hint} {known}"


def title(target: Target) -> str:
    """What the machine is, in words."""
    return str(_DATA["targets"].get(target.name, {}).get("title", f"{target.arch} {target.mcpu}"))


def resolve(target: str | Target) -> Target:
    """A Target from its name ("cpu" and "native" are this machine), or the Target itself. Raises TargetError."""
    if isinstance(target, Target):
        return target
    if not isinstance(target, str):
        raise TargetError(f"a target is a name or a Target, not {type(target).__name__}", where="target", hint=f"known: {', '.join(NAMES)}")
    if target in HERE:
        return host()
    if target not in NAMES:
        raise TargetError(f"unknown target {target!r}", where="target", hint=_known(target))
    data = _DATA["targets"][target]
    return Target(target, data["arch"], data["mcpu"], tuple(sorted(data["features"])), data["cores"] or os.cpu_count() or 1)
