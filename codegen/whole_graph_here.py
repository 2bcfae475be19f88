"""A whole graph in the process that has torch: linked without a C compiler, kept in the cache, on torch's threads and torch's tensors."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.dlpack import from_dlpack

from sparsify_compiler.codegen import build, cache, elf
from sparsify_compiler.codegen.targets import options
from sparsify_compiler.codegen.whole_graph import Function, Library, compile_graphs
from sparsify_compiler.errors import KernelError
from sparsify_compiler.target import Target, host

SIZE = 8        # bytes of the length of what stands before the library


def library(function: Function, told: str, target: Target) -> tuple[bytes, list[str]]:
    """A library of one function for a target, and the names of the parameters that the function takes behind its inputs.

    told    all that the function is, as text: what is in the cache under it is not compiled again
    Raises KernelError where it cannot be translated, compiled or linked.
    """
    def made() -> bytes:
        found = compile_graphs([function], {}, target)
        names = json.dumps(found.functions[function.name]["parameters"]).encode()
        return len(names).to_bytes(SIZE, "little") + names + _linked(found)

    key = build.digest(json.dumps([told, options(target), target.cores, build.version(), build.sources()]))
    payload = cache.read_or_build(f"whole_graph-{key}", made)
    end = SIZE + int.from_bytes(payload[:SIZE], "little")
    return payload[end:], list(json.loads(payload[SIZE:end]))


def _linked(found: Library) -> bytes:
    """Code and the virtual machine's program as one shared library."""
    result: list[bytes] = []

    def link(_: str, files: Sequence[str], **__: Any) -> None:
        result.append(elf.shared_library(*(Path(file).read_bytes() for file in files)))

    try:
        found.executable.export_library("library.so", fcompile=link)
    except elf.UnsupportedError as error:
        raise KernelError(f"our linker does not take the code of this system: {error}", where="whole graph") from error
    return result[0]


class Here:
    """A library that runs in this process, with its parameters. Not for two threads at once."""

    def __init__(self, binary: bytes, name: str, parameters: Sequence[Tensor], target: Target) -> None:
        """Raises KernelError where this machine cannot run it."""
        import tvm  # noqa: F401 (loads the runtime that the library calls)
        import tvm_ffi

        from sparsify_compiler.codegen.omp import launch_address

        build.require(target, host())
        address = launch_address()
        try:
            with build.as_file(binary, ".so") as path:
                module = tvm_ffi.get_global_func("ffi.Module.load_from_file.so")(path, "so")
                if address is not None:
                    with suppress(ValueError):
                        ctypes.c_void_p.in_dll(ctypes.CDLL(path), build.LAUNCH).value = address
            self._machine = module["vm_load_executable"]()
            self._machine["vm_initialization"](1, 0, 2)     # the CPU, its only device, pooled memory
            self._function: Callable[..., Any] = self._machine[name]
        except (RuntimeError, OSError, AttributeError) as error:
            raise KernelError(f"the library cannot be loaded: {error}", where="whole graph") from error
        self._parameters = tvm_ffi.convert([tvm_ffi.from_dlpack(one.detach()) for one in parameters])

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Its outputs. Tensors are read where they lie, contiguous; some may be written into."""
        made = self._function(*inputs, self._parameters)
        return (from_dlpack(made),) if hasattr(made, "__dlpack__") else tuple(map(from_dlpack, made))
