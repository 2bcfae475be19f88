#!/usr/bin/env python3
"""Run an exported model without PyTorch: the packages apache-tvm-ffi and numpy, and libtvm_runtime.so, are all that it takes.

    from run import Model
    model = Model("folder")                                     # checks the files, the machine and its instructions before any code runs
    outputs = model.run(input_ids=ids, attention_mask=mask)     # anything with DLPack or a buffer -> {name: numpy array}

    python run.py folder --input input_ids=ids.npy --output out/        # also --size length=64 for zeros of that size, --describe, --generate 20

libtvm_runtime.so is looked for in $TVM_LIBRARY_PATH, beside this file, in an installed apache-tvm, and where the system looks. Its threads are as
many as the processors that this process may use, at most as many as the model was compiled for; TVM_NUM_THREADS sets another number.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import itertools
import json
import math
import mmap
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FORMAT, KIND, ALIGNED, BITS = 1, "library", 64, ("bfloat16", "BF16")
ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}
# Where Linux tells features: of x86 by name in /proc/cpuinfo, of aarch64 as bits of AT_HWCAP (16) and AT_HWCAP2 (26).
X86_NAMES = {"amx-tile": "amx_tile", "amx-bf16": "amx_bf16", "amx-int8": "amx_int8", "avx512vnni": "avx512_vnni", "avx512bf16": "avx512_bf16"}
ARM_BITS = {"neon": (16, 1), "fullfp16": (16, 10), "dotprod": (16, 20), "sve": (16, 22), "sve2": (26, 1), "i8mm": (26, 13), "bf16": (26, 14)}
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "uint16", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
          "U8": "uint8", "BOOL": "bool"}


class LibraryError(RuntimeError):
    """The folder is damaged, was made for another machine, or a call does not fit; the message says what to do."""


class Model:
    """An exported model: the folder that export() wrote, run on so many threads (None: as above), its files compared with their hashes."""

    def __init__(self, folder: str | Path, threads: int | None = None, check: bool = True) -> None:
        import numpy
        import tvm_ffi
        self.folder, self._numpy, self._ffi = Path(folder), numpy, tvm_ffi
        self.manifest = read_manifest(self.folder)
        check_machine(self.manifest["target"])
        for name, digest in self.manifest["files"].items():
            check_file(self.folder / name, digest if check else None)
        load_runtime(self.manifest["target"], threads)
        slashes = f"{int(self.manifest['files']['model.so'][:8], 16):032b}".replace("0", "/").replace("1", "/.")  # dlopen keeps to names it knows
        try:
            self._vm = tvm_ffi.load_module(f"{self.folder.resolve()}{slashes}/model.so")["vm_load_executable"]()
            self._vm["vm_initialization"](1, 0, 2)      # the CPU, its only device, pooled memory
        except (RuntimeError, OSError, AttributeError) as error:
            raise LibraryError(f"{self.folder / 'model.so'} cannot be loaded: {error}") from error
        weights = read_weights(self.folder / "weights.safetensors", numpy)
        if lacking := {one for function in self.manifest["functions"].values() for one in function["parameters"]} - set(weights):
            raise LibraryError(f"{self.folder / 'weights.safetensors'} lacks {min(lacking)}: copy the whole folder again")
        self._parameters = {name: tvm_ffi.convert([self.tensor(*weights[one]) for one in function["parameters"]])
                            for name, function in self.manifest["functions"].items()}
        self._functions = {name: self._vm[name] for name in self._parameters}

    def run(self, function: str = "main", /, **inputs: Any) -> dict[str, Any]:
        """The outputs of a function by name, as numpy arrays; bfloat16 is given as bits in uint16, and becomes float32. Raises LibraryError."""
        facts = self._facts(function)
        result = self.call(function, self._checked(facts, inputs))
        return {one["name"]: self._array(value, one["dtype"]) for one, value in zip(facts["outputs"], result, strict=True)}

    def call(self, function: str, tensors: Sequence[Any]) -> list[Any]:
        """The same without any check: tensors of tvm_ffi, in the order of the function's inputs and of its outputs."""
        found = self._functions[function](*tensors, self._parameters[function])
        return [found] if isinstance(found, self._ffi.Tensor) else list(found)

    def generate(self, ids: Any, tokens: int, stop: Sequence[int] = ()) -> Any:
        """Greedy decoding with a cache: ids [batch, n] int64 -> the new ones, [batch, up to `tokens`], until all rows have come to one of `stop`."""
        facts = self._facts("prefill")
        first, ids = facts["inputs"][0], self._numpy.ascontiguousarray(ids)
        caches = self.caches(ids.shape[0], ids.shape[1] + tokens)
        self._checked(facts, {first["name"]: ids, "past": self._numpy.zeros(1, dtype="int64"), **caches})
        room, made = [self.tensor(one) for one in caches.values()], list[Any]()
        past, given, function = self._numpy.zeros(1, dtype="int64"), ids, "prefill"
        for _ in range(tokens):
            logits = self._numpy.from_dlpack(self.call(function, [self.tensor(given), self.tensor(past), *room])[0])
            past, given, function = past + given.shape[1], logits.argmax(-1).astype(first["dtype"])[:, None], "decode"
            made.append(given)
            if stop and self._numpy.isin(self._numpy.concatenate(made, 1), stop).any(1).all():
                break
        return self._numpy.concatenate(made, 1) if made else ids[:, :0]

    def caches(self, batch: int, capacity: int) -> dict[str, Any]:
        """Empty caches for so many rows of so many tokens, by name: arguments of "prefill" and "decode", which write into them."""
        sizes = {one["name"]: [{"capacity": capacity}.get(size, batch) if isinstance(size, str) else size for size in one["shape"]]
                 for one in self._facts("decode")["inputs"] if one.get("updated")}
        return {name: aligned(self._numpy.zeros(size, dtype=self._numpy.float32), self._numpy) for name, size in sizes.items()}

    def tensor(self, value: Any, dtype: str = "") -> Any:
        """An array as a tensor that functions take, aligned; the same memory where that is possible."""
        array = aligned(self._numpy.asarray(value, order="C"), self._numpy)
        return self._ffi.from_dlpack(Recoded(array, 4) if dtype in BITS else array)

    def _array(self, value: Any, dtype: str) -> Any:
        found = self._numpy.from_dlpack(Recoded(value, 1) if dtype in BITS else value)
        return (found.astype("uint32") << 16).view("float32") if dtype in BITS else found

    def _facts(self, function: str) -> dict[str, Any]:
        if function not in self.manifest["functions"]:
            raise LibraryError(f"there is no function {function!r}; there are {', '.join(self.manifest['functions'])}")
        return dict(self.manifest["functions"][function])

    def _checked(self, facts: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[Any]:
        names = [one["name"] for one in facts["inputs"]]
        if set(names) != set(inputs):
            raise LibraryError(f"inputs are {', '.join(names)}; got {', '.join(inputs) or 'none'}")
        sizes: dict[str, int] = {}
        tensors = [self._one(one, inputs[one["name"]], sizes) for one in facts["inputs"]]
        for limit in self.manifest.get("limits", ()):
            if math.prod(sizes.get(name, 1) for name in limit["symbols"]) > limit["product"]:
                raise LibraryError(f"{' times '.join(limit['symbols'])} is more than {limit['product']}: split the batch")
        room = sizes["capacity"] - tensors[0].shape[1] if names[1:2] == ["past"] and "capacity" in sizes else None
        if room is not None and not 0 <= (past := int(self._numpy.from_dlpack(tensors[1])[0])) <= room:
            raise LibraryError(f"past is {past}, but caches of {sizes['capacity']} have room for these tokens after 0 to {room}")
        return tensors

    def _one(self, wanted: Mapping[str, Any], value: Any, sizes: dict[str, int]) -> Any:
        name, array = wanted["name"], value if isinstance(value, self._numpy.ndarray) else self._numpy.from_dlpack(value)
        if str(array.dtype) != ("uint16" if wanted["dtype"] in BITS else wanted["dtype"]):
            raise LibraryError(f"{name} has dtype {array.dtype}, expected {wanted['dtype']}")
        if array.ndim != len(wanted["shape"]):
            raise LibraryError(f"{name} has shape {list(array.shape)}, expected {wanted['shape']}")
        for size, expected in zip(array.shape, wanted["shape"], strict=True):
            low, high = self.manifest["symbols"].get(expected, (0, None)) if isinstance(expected, str) else (expected, expected)
            if size < low or (high is not None and size > high) or sizes.setdefault(str(expected), size) != size:
                raise LibraryError(f"{name} has shape {list(array.shape)}, expected {wanted['shape']}"
                                   + (f" with {expected} from {low} to {high}" if isinstance(expected, str) else ""))
        if wanted.get("updated") and (array.ctypes.data % ALIGNED or not array.flags.c_contiguous or not array.flags.writeable):
            raise LibraryError(f"{name} is changed in place: it must be contiguous, at a multiple of {ALIGNED} bytes, and writeable, as of caches()")
        return self.tensor(array, wanted["dtype"])


class Recoded:
    """A tensor whose elements are of another kind of as many bits: DLPack's 1 is unsigned, 4 is bfloat16, which numpy does not have."""
    def __init__(self, tensor: Any, code: int) -> None:
        self.tensor, self.code, self.__dlpack_device__ = tensor, code, tensor.__dlpack_device__

    def __dlpack__(self, **_: Any) -> Any:
        capsule, pointer = self.tensor.__dlpack__(), ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        ctypes.c_uint8.from_address(pointer(capsule, b"dltensor") + 20).value = self.code    # behind data, device and ndim
        return capsule


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a folder that export() wrote. Raises LibraryError."""
    try:
        data = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LibraryError(f"{folder} is no exported model: {error}") from error
    if not isinstance(data, dict) or (data.get("kind"), data.get("format")) != (KIND, FORMAT):
        raise LibraryError(f"{folder} is no exported library of format {FORMAT}: use the run.py in that folder")
    return data


def check_machine(target: Mapping[str, Any]) -> None:
    """Refuse code that this machine cannot run, before it could raise an illegal instruction."""
    here = ARCHITECTURES.get(platform.machine().lower(), platform.machine().lower())
    if here != target["arch"]:
        raise LibraryError(f"made for {target['name']} ({target['arch']}), this machine is {here}: export the model for it")
    if missing := [feature for feature in target["features"] if not has_feature(here, feature)]:
        raise LibraryError(f"made for {target['name']}; this machine lacks {', '.join(missing)}: export the model for a target without")


def has_feature(arch: str, feature: str) -> bool:
    """Does this processor have an instruction set, and does the system let programs use it?"""
    if arch == "aarch64":
        kind, bit = ARM_BITS.get(feature, (0, 0))
        getauxval = ctypes.CDLL(None).getauxval
        getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
        return kind > 0 and bool(getauxval(kind) >> bit & 1)
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "").split()
    return X86_NAMES.get(feature, feature) in flags


def check_file(path: Path, digest: str | None) -> None:
    """Is it there, and undamaged? Raises LibraryError."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest() if digest else None
    except OSError as error:
        raise LibraryError(f"{path} cannot be read: {error}") from error
    if found != digest:
        raise LibraryError(f"{path} is damaged or was changed: copy the whole folder again, or export the model again")


def load_runtime(target: Mapping[str, Any], threads: int | None) -> None:
    """libtvm_runtime.so, once in a process, with its number of threads, which sleep: yielding lets others in at each kernel. Raises LibraryError."""
    import tvm_ffi  # noqa: F401 (its library must be there first)
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = {"TVM_NUM_THREADS": str(threads or min(here, int(target["cores"]))), "TVM_BIND_THREADS": "0", "TVM_THREAD_POOL_SPIN_COUNT": "0"}
    os.environ.update({name: value for name, value in wanted.items() if name not in os.environ or (threads and name == "TVM_NUM_THREADS")})
    name, spec = "libtvm_runtime.so", find_spec("tvm")
    places = [Path(one) for one in os.environ.get("TVM_LIBRARY_PATH", "").split(os.pathsep) if one] + [Path(__file__).resolve().parent]
    places += [Path(one) / "lib" for one in (spec.submodule_search_locations if spec and spec.submodule_search_locations else [])]
    for path in (*(place / name for place in places if (place / name).exists()), name):
        try:
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
            return
        except OSError as error:
            last = error
    raise LibraryError(f"{name} cannot be loaded ({last}): put it beside run.py, or its folder into TVM_LIBRARY_PATH")


def read_weights(path: Path, numpy: Any) -> dict[str, Any]:
    """Every tensor of a safetensors file, mapped, not read, and its dtype; bfloat16 as its bits. Raises LibraryError."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        start, found = 8 + int.from_bytes(mapped[:8], "little"), {}
        for name, facts in json.loads(mapped[8:start]).items():
            if name != "__metadata__":
                first, end = facts["data_offsets"]
                if not 0 <= first <= end <= len(mapped) - start:
                    raise ValueError(f"{name} lies outside of the file")
                raw = numpy.frombuffer(mapped, dtype=numpy.uint8, count=end - first, offset=start + first).view(DTYPES[facts["dtype"]])
                found[name] = raw.reshape(facts["shape"]), facts["dtype"]
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LibraryError(f"{path} is damaged: {error}") from error


def aligned(array: Any, numpy: Any) -> Any:
    """The array, or a copy of it, at a multiple of 64 bytes, which compiled code may rely on."""
    if array.ctypes.data % ALIGNED == 0 and array.flags.writeable:
        return array
    room = numpy.empty(array.nbytes + ALIGNED, dtype=numpy.uint8)
    copy = room[-room.ctypes.data % ALIGNED:][:array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=str(Path(__file__).resolve().parent))
    for name, kind, default, more in (("--function", str, "main", ""), ("--repeat", int, 1, ""), ("--threads", int, None, ""),
                                      ("--output", str, None, "a folder: write each output as NAME.npy"),
                                      ("--generate", int, 0, "decode so many tokens greedily, from --input input_ids=FILE.npy or one token 0")):
        parser.add_argument(name, default=default, help=more, type=kind)
    parser.add_argument("--input", action="append", default=[], metavar="NAME=FILE.npy")
    parser.add_argument("--size", action="append", default=[], metavar="SYMBOL=SIZE", help="sizes of inputs that are not given: these are zeros")
    parser.add_argument("--describe", action="store_true")
    options = parser.parse_args(arguments)
    try:
        if not options.describe:
            _run(options)
        else:
            manifest = read_manifest(Path(options.folder))
            print(json.dumps({name: manifest[name] for name in ("target", "symbols", "functions", "reference")}, indent=1))
    except LibraryError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    """One call or several, outputs and times."""
    import numpy
    times, model = [time.perf_counter()], Model(options.folder, options.threads)
    times.append(time.perf_counter())
    given = {name: aligned(numpy.load(file), numpy) for name, _, file in (one.partition("=") for one in options.input)}
    sizes = {name: int(size) for name, _, size in (one.partition("=") for one in options.size)}
    if options.generate:
        ids = next(iter(given.values()), numpy.zeros((1, 1), dtype="int64"))
        for tokens in (1, options.generate):
            made = model.generate(ids, tokens)
            times.append(time.perf_counter())
        print(f"prompt and {options.generate} tokens in {(times[3] - times[2]) * 1e3:.1f} ms", " ".join(map(str, made[0])), sep="\n")
        return
    given = {one["name"]: aligned(numpy.zeros([sizes.get(size, 1) if isinstance(size, str) else size for size in one["shape"]],
             "uint16" if one["dtype"] in BITS else one["dtype"]), numpy) for one in model._facts(options.function)["inputs"]} | given
    for _ in range(max(1, options.repeat)):
        outputs = model.run(options.function, **given)
        times.append(time.perf_counter())
    loaded, *took = [1e3 * (end - start) for start, end in itertools.pairwise(times)]
    print(f"loaded in {loaded:.1f} ms, first run {took[0]:.2f} ms, median {sorted(took)[len(took) // 2]:.3f} ms")
    for name, value in outputs.items():
        print(f"{name}: {value.dtype} {list(value.shape)}, mean {value.mean():.6g}")
        if options.output:
            Path(options.output).mkdir(parents=True, exist_ok=True)
            numpy.save(Path(options.output) / f"{name}.npy", value)


if __name__ == "__main__":
    sys.exit(main())
