"""One thread pool: kernels' parallel loops run on the OpenMP threads that torch loaded, and obey torch.set_num_threads.

TVM's own pool would fight the spinning threads of torch's (a kernel ran 20 times slower for it), and takes half of a virtual machine's
processors. The bridge is omp.ll, compiled by TVM's LLVM like any kernel; a loaded kernel library has a pointer variable
`__TVMBackendParallelLaunch`, which is set to the bridge's launch function.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

NEEDED = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "omp_get_max_threads")
RUNTIMES = ("libgomp", "libiomp5", "libomp")  # the last two offer GNU's entry points too


@cache
def runtime() -> tuple[ctypes.CDLL | None, str]:
    """The OpenMP runtime that torch brought into this process, and "" or the reason why it cannot be used."""
    import torch

    if not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        return None, "this build of torch does not use OpenMP"
    loaded = _loaded_libraries()
    home = Path(torch.__file__).parent
    ours = sorted((p for p in loaded if p.name.startswith(RUNTIMES)), key=lambda p: not (p.is_relative_to(home) or "torch" in p.parent.name))
    if not ours:
        return None, "torch's OpenMP runtime was not found among the loaded libraries"
    library = ctypes.CDLL(str(ours[0]))
    missing = [name for name in NEEDED if not hasattr(library, name)]
    return (None, f"{ours[0].name} does not export {missing[0]}") if missing else (library, "")


def status() -> str:
    """Where kernels run, in words for the report."""
    _, reason = runtime()
    return f"TVM's own thread pool ({reason})" if reason else "torch's OpenMP threads"


def launch_address() -> int | None:
    """The address of the launch function over torch's runtime; None where TVM's pool is used."""
    return _bridge()[1]


@cache
def _bridge() -> tuple[Any, int | None]:
    """The bridge, built at first use, and the address of its launch function. Kept: were it dropped, its code would be unmapped."""
    from sparsify_compiler.codegen.build import load_llvm

    library, _ = runtime()
    if library is None:
        return None, None
    connect = load_llvm("omp_bridge", Path(__file__).with_name("omp.ll").read_text())
    return connect, int(connect(*(ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in NEEDED)))


def _loaded_libraries() -> list[Path]:
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    return sorted({Path(line[line.index("/"):]) for line in lines if "/" in line and ".so" in line})
