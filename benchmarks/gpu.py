"""Kernels on an NVIDIA GPU: correct, and how fast beside cuBLAS, cuSPARSELt, FlexAttention, SDPA and torch's grouped product.

    python benchmarks/gpu.py build DIR      # here: nvcc, no GPU. A folder of some megabytes with everything but Python and torch
    python DIR/gpu.py run                   # there: a GPU, Python and torch; no compiler, neither TVM's nor nvcc. Under 8 minutes
    python DIR/gpu.py check                 # anywhere: the folder is whole, and every kernel that `run` will ask for is in it
    python benchmarks/gpu.py table DIR      # registers, shared memory and warps of every kernel

`run` writes DIR/results.json and prints a table: ours over each rival in time (above 1 we are faster), and the share of the memory's bandwidth.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TARGETS = ("sm_80", "sm_90")
LIBRARIES = ("libtvm_runtime.so", "libtvm_runtime_cuda.so")
PACKAGE = ("errors.py", "target.py", "targets.json", "host_features.py", "pages.py", "formats", "ops")
STUBS = ("tvm", "tvm.tirx", "tvm.script", "tvm.script.ir_builder", "tvm.tirx.script", "tvm.tirx.script.builder")
SECONDS = 420       # of a run
ROUNDS, INNER = 9, 12
MOST = 64 << 20     # bytes of the folder


def build(folder: Path, python: str) -> None:
    """Write the folder."""
    sys.path.insert(0, str(ROOT))
    from sparsify_compiler.codegen.cuda import build as kernels
    from sparsify_compiler.target import resolve

    copy(folder, python)
    index = dict[str, str]()
    for name in TARGETS:
        target = resolve(name)
        for schedule in _asked(target):
            archive, file = kernels.load(schedule, target), _file(schedule, target.mcpu)
            assert not kernels.resources_of(archive).spills, f"{schedule} spills"
            (folder / "kernels" / file).write_bytes(archive)
            index[file] = repr(schedule)
    (folder / "kernels" / "index.json").write_text(json.dumps(index, indent=1))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{len(index)} kernels of {len(TARGETS)} generations, {size >> 20} MiB in {folder}")
    assert size < MOST, "too large to be sent"


def copy(folder: Path, python: str) -> None:
    """All of the folder but the kernels."""
    import tvm

    shutil.rmtree(folder, ignore_errors=True)
    for part in ("kernels", "lib", "package/sparsify_compiler"):
        (folder / part).mkdir(parents=True)
    for name in (Path(__file__).name, "gpu_cases.py", "gpu_triton.py"):
        shutil.copy(HERE / name, folder / name)
    _copy_package(folder / "package" / "sparsify_compiler")
    for name in LIBRARIES:
        shutil.copy(Path(tvm.__file__).parent / "lib" / name, folder / "lib" / name)
    _tvm_ffi(folder / "site", python)


def table(folder: Path) -> None:
    """What each kernel needs, as Markdown."""
    sys.path.insert(0, str(ROOT))
    from sparsify_compiler.codegen.cuda import build as kernels
    from sparsify_compiler.target import resolve

    rows: dict[str, dict[str, Any]] = {}
    for file, schedule in json.loads((folder / "kernels" / "index.json").read_text()).items():
        rows.setdefault(schedule, {})[file.split(".")[-2]] = kernels.resources_of((folder / "kernels" / file).read_bytes())
    print("| kernel | threads | shared KiB | registers sm_80 | sm_90 | warps a processor, sm_90 | spills |\n|---|--:|--:|--:|--:|--:|--:|")
    for schedule, found in sorted(rows.items()):
        label = schedule.replace("Finish(add=False, activation='', numbers=(), rough=False)", "").replace(", finish=", "")
        registers = [found[resolve(name).mcpu].registers if resolve(name).mcpu in found else "" for name in TARGETS]
        some = list(found.values())[-1]
        used = (some.threads, round(some.shared / 1024), *registers, some.warps(), sum(one.spills for one in found.values()))
        print(f"| {label} | {' | '.join(map(str, used))} |")


def _copy_package(home: Path) -> None:
    """As much of the package as the kernels' layers need; TVM's compiler is not among it."""
    (home / "__init__.py").write_text('"""A part of sparsify_compiler: kernels for GPUs."""\n')
    ignore = shutil.ignore_patterns("__pycache__")
    for name in PACKAGE:
        source = ROOT / "sparsify_compiler" / name
        if source.is_dir():
            shutil.copytree(source, home / name, ignore=ignore)
        else:
            shutil.copy(source, home / name)
    shutil.copytree(ROOT / "codegen", home / "codegen", ignore=ignore)


def _tvm_ffi(site: Path, python: str) -> None:
    """TVM's foreign function interface for the Python there: this one's, or a wheel."""
    import tvm_ffi

    if python == f"{sys.version_info.major}.{sys.version_info.minor}":
        shutil.copytree(Path(tvm_ffi.__file__).parent, site / "tvm_ffi", ignore=shutil.ignore_patterns("__pycache__"))
        return
    from importlib.metadata import version

    wheels = site.with_name("wheels")
    platforms = [f"--platform=manylinux{name}_x86_64" for name in ("_2_28", "_2_24", "2014")]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", f"--python-version={python}", *platforms,
                    f"--dest={wheels}", f"apache-tvm-ffi=={version('apache-tvm-ffi')}"], check=True)
    for wheel in wheels.iterdir():
        shutil.unpack_archive(wheel, site, "zip")
    shutil.rmtree(wheels)


def _asked(target: Any) -> list[Any]:
    """The schedules that the cases launch on such a GPU."""
    from sparsify_compiler.codegen.cuda import device

    asked: dict[Any, None] = {}

    def function(schedule: Any, _: Any) -> Callable[..., None]:
        asked[schedule] = None
        return lambda *_: None

    device.function = function
    _launch_all(target)
    return list(asked)


def _launch_all(target: Any) -> None:
    """Every case on the CPU as if it were such a GPU, where device.function's launches do nothing."""
    import gpu_cases
    import torch

    from sparsify_compiler.codegen.cuda import device

    device.processors, device.target_of = lambda _: 132, lambda _: target
    for make in (*gpu_cases.small(), *(make.shrunk() for make in gpu_cases.timed())):
        make(torch.device("cpu")).ours()


def _file(schedule: Any, architecture: str) -> str:
    import hashlib

    return f"{schedule.name}-{hashlib.sha256(repr(schedule).encode()).hexdigest()[:16]}.{architecture}.zip"


def prepare() -> Any:
    """There: imports find the folder's package, and its kernels."""
    for name in STUBS:
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))  # torch.compile asks whether there is a TVM
    sys.path[:0] = [str(HERE / "package"), str(HERE / "site"), str(HERE)]
    import torch  # first: it brings CUDA's own libraries
    import tvm_ffi  # noqa: F401

    for name in LIBRARIES:
        try:
            ctypes.CDLL(str(HERE / "lib" / name), ctypes.RTLD_GLOBAL)
        except OSError as error:
            if torch.cuda.is_available() or name == LIBRARIES[0]:
                raise
            print(f"{name} is not loaded, there is no GPU: {error}")
    return torch


def kernels_of(architecture: str, launches: bool) -> None:
    """Kernels are those of the folder."""
    from functools import cache

    from sparsify_compiler.codegen.cuda import build as kernels
    from sparsify_compiler.codegen.cuda import device

    @cache
    def function(schedule: Any, _: Any) -> Any:
        archive = (HERE / "kernels" / _file(schedule, architecture)).read_bytes()
        if launches:
            return kernels.load_function(archive)
        assert {"host.so", "device", "kernel.cu"} <= set(kernels.unpacked(archive))
        return lambda *_: None

    device.function = function


def check() -> None:
    """Every kernel that `run` asks for is in the folder."""
    prepare()
    from sparsify_compiler.target import resolve

    for name in TARGETS:
        kernels_of(resolve(name).mcpu, launches=False)
        _launch_all(resolve(name))
    print("whole")


def run(seconds: float, only: str) -> None:
    """Correctness, then speed; results.json holds both."""
    torch = prepare()
    import gpu_cases

    from sparsify_compiler.codegen.cuda import device

    gpu, begun = torch.device("cuda", torch.cuda.current_device()), time.monotonic()
    kernels_of(device.target_of(gpu).mcpu, launches=True)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(gpu), "torch": torch.__version__, "bandwidth": bandwidth(torch, gpu), "cases": []}
    print(f"{results['gpu']}, {results['bandwidth'] / 1e9:.0f} GB/s read")
    small = [] if only else gpu_cases.small()
    for stage, makes in (("small", small), ("timed", (make for make in gpu_cases.timed() if only in make.label()))):
        for make in makes:
            if time.monotonic() - begun > seconds:
                print("out of time")
                break
            results["cases"].append(one(torch, make, gpu, stage == "timed", results["bandwidth"]))
            torch.cuda.empty_cache()
            (HERE / "results.json").write_text(json.dumps(results, indent=1))
    wrong = [case["name"] for case in results["cases"] if not case["right"]]
    print(f"{len(results['cases'])} cases, {len(wrong)} wrong{': ' * bool(wrong)}{', '.join(wrong)}; {time.monotonic() - begun:.0f} s")
    sys.exit(bool(wrong))


def one(torch: Any, make: Any, gpu: Any, timed: bool, peak: float) -> dict[str, Any]:
    """A case: is it right, and how fast."""
    found: dict[str, Any] = {"name": "", "right": False}
    try:
        case = make(gpu)
        found["name"] = case.name
        y, wanted = case.ours().float(), case.wanted().float()
        scale = wanted.nan_to_num().abs().max().clamp(min=1e-6)
        found["error"] = float(((y - wanted).abs().max() / scale).nan_to_num(nan=9.0))
        found["right"] = found["error"] < 2e-2 and bool((y.isnan() == wanted.isnan()).all())
        del y, wanted
        if timed and found["right"]:
            found |= _timings(torch, case, peak)
    except Exception as error:  # noqa: BLE001  the others go on, and this one is reported
        found["failed"] = f"{type(error).__name__}: {str(error)[:400]}"
    told = [f"{name} {ratio:.2f}x" for name, ratio in found.get("ratios", {}).items()]
    share = f"{found['bandwidth']:.0%} of bandwidth, {found['tflops']:.0f} TFLOP/s, {found['microseconds']:.1f} us" if "bandwidth" in found else ""
    said = f"error {found.get('error', -1):.1e} {share} {', '.join(told)} {found.get('failed', '')}"
    print("ok   " if found["right"] else "WRONG", found["name"] or make.given, said, flush=True)
    return found


def _timings(torch: Any, case: Any, peak: float) -> dict[str, Any]:
    """All contenders in turn."""
    inner = -(-INNER // case.turns) * case.turns
    runs, failed = {"ours": prepared(torch, case.ours, inner, "ours" not in case.waits)}, {}
    for name, call in case.rivals.items():
        try:
            runs[name] = prepared(torch, call, inner, name not in case.waits)
        except Exception as error:  # noqa: BLE001  a rival that cannot run is named, and the others go on
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
            print(f"  {name}: {failed[name]}")
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            taken[name].append(run())
    medians = {name: statistics.median(times) for name, times in taken.items()}
    ours = medians.pop("ours")
    spread = [min(taken["ours"]) * 1e6, max(taken["ours"]) * 1e6]
    return {"microseconds": ours * 1e6, "spread": spread, "ratios": {n: m / ours for n, m in medians.items()},
            "rivals": {n: m * 1e6 for n, m in medians.items()}, "failed_rivals": failed,
            "bandwidth": case.bytes / ours / peak, "tflops": 2 * case.products / ours / 1e12}


def prepared(torch: Any, call: Callable[[], Any], inner: int = INNER, graph: bool = True) -> Callable[[], float]:
    """Seconds of a call: `inner` of them, as a CUDA graph unless they wait for the device, so that the host's time is not measured."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    replay: Callable[[], Any] = partial(_several, call, inner)
    if graph:
        captured, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(captured, stream=side):
            replay()
        replay = captured.replay
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> float:
        torch.cuda.synchronize()
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / inner

    run()
    return run


def _several(call: Callable[[], Any], inner: int) -> None:
    for _ in range(inner):
        call()


def bandwidth(torch: Any, gpu: Any) -> float:
    """Bytes a second that a sum over a large tensor reads."""
    large = torch.ones(1 << 30, dtype=torch.float32, device=gpu)
    return large.numel() * 4 / min(prepared(torch, lambda: large.sum())() for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    made = verbs.add_parser("build")
    made.add_argument("folder", type=Path)
    made.add_argument("--python", default="3.12", help="version of Python there")
    verbs.add_parser("check")
    verbs.add_parser("table").add_argument("folder", type=Path)
    ran = verbs.add_parser("run")
    ran.add_argument("--seconds", type=float, default=SECONDS)
    ran.add_argument("--only", default="", help="timed cases whose name or arguments hold this; none of the small ones")
    given = parser.parse_args()
    if given.verb == "build":
        build(given.folder.resolve(), given.python)
    elif given.verb == "check":
        check()
    elif given.verb == "table":
        table(given.folder.resolve())
    else:
        run(given.seconds, given.only)


if __name__ == "__main__":
    main()
