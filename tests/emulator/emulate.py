"""Runs a CUDA kernel without a GPU: the source that nvcc compiles, by the host's C++ compiler behind machine.h and instructions.h.

The host's part of a kernel is the real one: it checks the arguments and works out the grid, then launches a module of ours. Tensors lie between
pages that cannot be touched. Every kernel runs twice, in opposite orders, and must give the same bits.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify_compiler.codegen import build as cpu
from sparsify_compiler.codegen import cache as store
from sparsify_compiler.codegen.cuda import build

HOME = Path(__file__).parent
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="the emulator needs g++ on Linux")
SIGNATURE = re.compile(r"main_kernel\(([^()]*)\)\s*\{")
DYNAMIC = re.compile(r"extern __shared__ __align__\((\d+)\) (\w+) (\w+)\[\];")
PAGE = mmap.PAGESIZE
DEVICE = 2          # DLPack's number of CUDA
KINDS = {torch.float32: (2, 32), torch.float16: (2, 16), torch.bfloat16: (4, 16), torch.int32: (0, 32), torch.int16: (0, 16),
         torch.uint8: (1, 8), torch.int64: (0, 64)}  # fmt: skip
AXES = {"blockIdx.x": "blocks.x", "blockIdx.y": "blocks.y", "blockIdx.z": "blocks.z", "threadIdx.x": "threads",
        "tirx.use_dyn_shared_memory": "shared"}  # fmt: skip


def run(schedule: Any, *arguments: Any) -> None:
    """Launch the kernel on these tensors of the CPU, as if they were a GPU's; what it writes is written. Numbers are passed on.

    Raises RuntimeError for an access out of bounds or misaligned, threads that wait for each other, or results that depend on an order.
    """
    function, library = function_of(schedule)
    results = []
    for backwards in (False, True):
        library.run_backwards(int(backwards))
        with _lent([value for value in arguments if isinstance(value, torch.Tensor)], backwards) as lent:
            given = iter(lent)
            function(*[next(given).tensor() if isinstance(value, torch.Tensor) else value for value in arguments])
            results.append([one.bytes() for one in lent])
    differ = [i for i, (one, two) in enumerate(zip(*results, strict=True)) if one != two]
    if differ:
        raise RuntimeError(f"{schedule.name}: what it writes depends on the order of its threads (tensors {differ})")
    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    for tensor, data in zip(tensors, results[0], strict=True):
        ctypes.memmove(tensor.data_ptr(), data, len(data))


def conflicts(schedule: Any) -> tuple[int, int]:
    """How often eight rows of a matrix were read from shared memory by this kernel's runs so far, and how often a bank had to be read again."""
    _, library = function_of(schedule)
    return int(library.matrix_reads()), int(library.bank_conflicts())


@cache
def function_of(schedule: Any) -> tuple[Any, ctypes.CDLL]:
    """The function that launches, and the library of the emulated kernel."""
    import tvm  # noqa: F401  the runtime
    import tvm_ffi

    _no_device_to_set()
    source = build.source_of(schedule)
    text = _program(source, build.cluster_of(schedule))
    binary = store.read_or_build(f"emulated-{cpu.digest(text)}", lambda: _compiled(text))
    with cpu.as_file(binary, ".so") as path:
        library = ctypes.CDLL(path)
        device = tvm_ffi.get_global_func("ffi.Module.load_from_file.so")(path, "so")
    return build.linked(build.host_library(source), device), library


@cache
def _no_device_to_set() -> None:
    import tvm_ffi

    tvm_ffi.register_global_func("__tvm_set_device", lambda *_: None, override=True)


def _program(source: build.Source, cluster: int) -> str:
    """The kernel, and the function that TVM's host part calls."""
    cuda = DYNAMIC.sub(r"\2* \3 = (\2*)machine::current->of->dynamic;", source.cuda)
    found, align = SIGNATURE.search(cuda), DYNAMIC.search(source.cuda)
    assert found is not None, cuda
    types = [parameter.strip().rpartition(" ")[0].replace("__restrict__", "") for parameter in found[1].split(",")]
    fields = {kind: "pointer" if "*" in kind else "real" if kind == "float" else "whole" for kind in types}
    given = [f"({kind})arguments[{i}].{fields[kind]}" for i, kind in enumerate(types)]
    sizes = [f"{AXES[tag]} = (int)arguments[{len(types) + i}].whole;" for i, tag in enumerate(source.tags)]
    launch = f"""
struct Argument {{ int kind; int none; union {{ int64_t whole; double real; void* pointer; }}; }};
static const Argument* arguments;
extern "C" int __tvm_ffi_{build.FUNCTION}(void*, const Argument* given, int, Argument*) {{
  arguments = given;
  Place blocks{{1, 1, 1}}; int threads = 1, shared = 0;
  {' '.join(sizes)}
  machine::alignment = {align[1] if align else 128};
  machine::cluster = {cluster};
  return machine::launch(blocks, threads, shared, [] {{ {build.FUNCTION}({', '.join(given)}); }});
}}
"""
    ours = [(HOME / name).read_text() for name in ("machine.h", "instructions.h", "group.h", "cluster.h")]
    texts = [*ours, (build.HOME / "device.cuh").read_text()]
    return "\n".join([*texts, cuda, launch])


def _compiled(text: str) -> bytes:
    import tempfile

    import tvm_ffi

    library = Path(tvm_ffi.__file__).parent / "lib" / "libtvm_ffi.so"
    with tempfile.TemporaryDirectory() as folder:
        path, made = Path(folder) / "kernel.cc", Path(folder) / "kernel.so"
        path.write_text(text)
        command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off", "-U_FORTIFY_SOURCE", str(path),
                   str(library), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr[:2000]
        return made.read_bytes()


class _DLTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device", ctypes.c_int32), ("number", ctypes.c_int32), ("ndim", ctypes.c_int32),
                ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.c_void_p),
                ("strides", ctypes.c_void_p), ("offset", ctypes.c_uint64)]  # fmt: skip


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class Lent:
    """A copy of a tensor that says it lies on a GPU, in memory of its own between pages that cannot be touched."""

    def __init__(self, tensor: torch.Tensor, at_begin: bool) -> None:
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1 if tensor.numel() else 0
        self.size = reach * tensor.element_size()   # with its strides
        whole = max(1, -(-self.size // PAGE)) * PAGE
        self.memory = mmap.mmap(-1, whole + 2 * PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.base, self.length = base, whole + 2 * PAGE
        for guard in (base, base + PAGE + whole):
            assert _libc().mprotect(ctypes.c_void_p(guard), PAGE, 0) == 0
        self.start = base + PAGE + (0 if at_begin else (whole - self.size) // 16 * 16)
        ctypes.memmove(self.start, tensor.data_ptr(), self.size)
        self.shape = (ctypes.c_int64 * tensor.dim())(*tensor.shape)
        self.strides = (ctypes.c_int64 * tensor.dim())(*tensor.stride())
        code, bits = KINDS[tensor.dtype]
        self.managed = _Managed(_DLTensor(self.start, DEVICE, 0, tensor.dim(), code, bits, 1, ctypes.addressof(self.shape),
                                          ctypes.addressof(self.strides), 0), None, None)

    def bytes(self) -> bytes:
        return ctypes.string_at(self.start, self.size)

    def tensor(self) -> Any:
        """For TVM."""
        import tvm_ffi

        return tvm_ffi.from_dlpack(self)

    def __dlpack__(self, **_: Any) -> Any:
        return _capsule()(ctypes.addressof(self.managed), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return DEVICE, 0

    def give_back(self) -> None:
        assert _libc().mprotect(ctypes.c_void_p(self.base), self.length, mmap.PROT_READ | mmap.PROT_WRITE) == 0


@contextmanager
def _lent(tensors: list[torch.Tensor], at_begin: bool) -> Iterator[list[Lent]]:
    lent = [Lent(tensor, at_begin) for tensor in tensors]
    try:
        yield lent
    finally:
        for one in lent:
            one.give_back()


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@cache
def _capsule() -> Any:
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return make
