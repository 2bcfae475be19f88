"""From a PrimFunc to a function that can be called: compile, link without a linker, cache, load, export.

Nothing here needs a C compiler. On x86-64 Linux a kernel is a shared library made by `elf.py`, which loads in 0.3 ms; elsewhere it is LLVM
bitcode, which TVM's JIT turns into code at load. Both go through memory, so that the bytes that were checked are the bytes that run.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from sparsify_compiler.codegen import cache as store
from sparsify_compiler.codegen import elf
from sparsify_compiler.codegen.targets import options, tvm_target
from sparsify_compiler.errors import KernelError
from sparsify_compiler.target import Target, host

LAUNCH = "__TVMBackendParallelLaunch"
_loading = threading.RLock()


class Schedule(Hashable, Protocol):
    """How a kernel is computed: a frozen dataclass of plain values, of which `repr` tells all."""

    @property
    def name(self) -> str: ...

    def compute(self) -> Any:
        """The PrimFunc."""


@dataclass(frozen=True)
class Kernel:
    """A kernel that runs here: `function` is called with torch tensors."""

    schedule: Schedule
    target: Target
    binary: bytes
    function: Any


@cache
def version() -> str:
    """TVM's version, without importing it."""
    from importlib.metadata import version as installed

    return installed("apache-tvm")


def load(schedule: Schedule, target: Target) -> Kernel:
    """The kernel of this schedule, from the cache when some process has built it before.

    Its key is the schedule, the target's instruction set, TVM's version and the text of this package.
    Raises KernelError when it cannot be compiled, or when this machine lacks a feature of the target.
    """
    require(target, host())
    return _loaded(schedule, target)


def require(target: Target, machine: Target) -> None:
    """Refuse code that the machine cannot run, before it could raise an illegal instruction."""
    if target.arch != machine.arch:
        raise KernelError(f"made for {target.arch}, this machine is {machine.arch}", where=target.name, hint="compile for this machine")
    missing = sorted(set(target.features) - set(machine.features))
    if missing:
        raise KernelError(f"this machine lacks {', '.join(missing)}", where=target.name, hint="compile for target='cpu' on this machine")


def compile_binary(function: Any, name: str, target: Target) -> bytes:
    """Machine code (an ELF shared library) or LLVM bitcode. Raises KernelError."""
    import tvm

    try:
        library = tvm.compile(tvm.IRModule({"main": function}), target=tvm_target(target), tir_pipeline="tirx").mod
        return _linked(library)
    except (RuntimeError, ValueError, TypeError) as error:
        raise KernelError(f"TVM could not compile it: {str(error).strip().splitlines()[-1]}", where=name, hint="report this as a bug") from error


def binary(schedule: Schedule, target: Target) -> bytes:
    """The schedule's machine code for a machine that need not be this one, from the cache when it was built before. Raises KernelError."""
    return store.read_or_build(key(schedule, target), lambda: compile_binary(schedule.compute(), schedule.name, target))


def export(kernel: Kernel) -> dict[str, bytes]:
    """Files of a kernel for an artefact."""
    return exported(kernel.schedule, kernel.target, kernel.binary)


def exported(schedule: Schedule, target: Target, code: bytes) -> dict[str, bytes]:
    """Files for an artefact: the IR to read, the binary, and what the binary was made of, for and by."""
    made = {"schedule": repr(schedule), "tvm": version(), "target": target.to_json(), "binary": hashlib.sha256(code).hexdigest()}
    return {"ir.txt": schedule.compute().script().encode(), "binary": code, "made.json": json.dumps(made, indent=1).encode()}


def load_exported(files: Mapping[str, bytes], schedule: Schedule, target: Target) -> Kernel:
    """The inverse of export: the stored binary where it fits, else `schedule` built anew.

    It fits when it is undamaged, was made for `target` and the same schedule, by this version of TVM. Raises KernelError.
    """
    require(target, host())
    try:
        made = json.loads(files["made.json"])
        fits = (made["tvm"], made["schedule"], made["target"]) == (version(), repr(schedule), json.loads(json.dumps(target.to_json())))
        whole = hashlib.sha256(files["binary"]).hexdigest() == made["binary"]
    except (KeyError, ValueError, TypeError) as error:
        raise KernelError(f"the stored kernel is damaged: {error!r}", where=schedule.name, hint="save the model again") from error
    if fits and whole:
        return Kernel(schedule, target, files["binary"], _function(files["binary"], on_torch_threads=True))
    return load(schedule, target)


def load_llvm(name: str, text: str) -> Any:
    """The function `__tvm_ffi_main` of LLVM IR written by hand, for this machine, cached like a kernel. It has no parallel loops."""
    machine = host()
    binary = store.read_or_build(f"{name}-{digest(text + version() + str(machine))}", lambda: _compile_llvm(name, text, machine))
    return _function(binary, on_torch_threads=False)


def _compile_llvm(name: str, text: str, target: Target) -> bytes:
    import tvm
    import tvm_ffi

    from sparsify_compiler.codegen import emit

    # LLVM wants to be told the data layout and target: those of an empty kernel.
    empty = tvm.compile(tvm.IRModule({"main": emit.function("main", lambda: None)}), target=tvm_target(target)).mod.inspect_source("ll")
    lines = [line for line in empty.splitlines() if line.startswith(("target datalayout", "target triple")) or '!"tvm_target"' in line]
    header = [lines[0], lines[1], "!llvm.module.flags = !{!0}", "!0 = " + lines[2].partition(" = ")[2]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.ll"
        path.write_text("\n".join(header) + "\n" + text)
        return _linked(tvm_ffi.load_module(str(path)))


def key(schedule: Schedule, target: Target) -> str:
    """The name in the cache of this schedule's code for this target."""
    return f"{schedule.name}-{digest(json.dumps([repr(schedule), options(target), version(), sources()]))}"


@cache
def _loaded(schedule: Schedule, target: Target) -> Kernel:
    code = binary(schedule, target)
    return Kernel(schedule, target, code, _function(code, on_torch_threads=True))


def _function(binary: bytes, *, on_torch_threads: bool) -> Any:
    """Load a binary and take its function "main"."""
    import tvm  # noqa: F401 (loads the runtime that kernels call)
    import tvm_ffi

    from sparsify_compiler.codegen.omp import launch_address

    address = launch_address() if on_torch_threads else None
    is_library = binary[:4] == b"\x7fELF"
    with _loading, as_file(binary, ".so" if is_library else ".ll") as path:
        if is_library:
            module = tvm_ffi.get_global_func("ffi.Module.load_from_file.so")(path, "so")
            if address is not None:
                with suppress(ValueError):  # a kernel without parallel loops has no such variable
                    ctypes.c_void_p.in_dll(ctypes.CDLL(path), LAUNCH).value = address
            return module["main"]
        with _launch_symbol(address):
            return tvm_ffi.load_module(path)["main"]


@contextmanager
def _launch_symbol(address: int | None) -> Iterator[None]:
    """While the JIT resolves a kernel's symbols, "parallel launch" means ours."""
    import tvm_ffi

    if address is None:
        yield
        return
    register = ctypes.CDLL(str(Path(tvm_ffi.__file__).parent / "lib" / "libtvm_ffi.so")).TVMFFIEnvModRegisterContextSymbol
    usual = ctypes.cast(ctypes.CDLL(None).TVMBackendParallelLaunch, ctypes.c_void_p)
    register(LAUNCH.lstrip("_").encode(), ctypes.c_void_p(address))
    try:
        yield
    finally:
        register(LAUNCH.lstrip("_").encode(), usual)


@contextmanager
def as_file(data: bytes, suffix: str) -> Iterator[str]:
    """A path under which these bytes can be opened: in memory where the system can, else a temporary file.

    The descriptor stays open: the loader knows a library by its path, and would take a reused number for this one.
    """
    if sys.platform == "linux" and suffix == ".so":
        handle = os.memfd_create("kernel")
        with os.fdopen(handle, "wb", closefd=False) as file:
            file.write(data)
        yield f"/proc/self/fd/{handle}"
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"kernel{suffix}"
        path.write_bytes(data)
        yield str(path)


def _linked(library: Any) -> bytes:
    """An ELF shared library where ours can be made, else LLVM bitcode."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return elf.shared_library(_written(library, Path(folder), "o"))
        except elf.UnsupportedError:
            return _written(library, Path(folder), "bc")


def _written(library: Any, folder: Path, kind: str) -> bytes:
    path = folder / f"kernel.{kind}"
    library.write_to_file(str(path), kind)
    return path.read_bytes()


@cache
def sources() -> str:
    """Digest of this package's text: any change of a kernel makes new keys."""
    home = Path(__file__).parent
    return digest("".join(path.read_text() for path in sorted(home.rglob("*.py")) + sorted(home.rglob("*.ll"))))


def digest(text: str) -> str:
    """Of text, for the name of a file."""
    return hashlib.sha256(text.encode()).hexdigest()[:40]
