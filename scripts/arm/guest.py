"""Runs in the emulated machine, under Python alone: loads kernels with TVM's own loader and calls them on tensors that lie in a shared file.

    python3.11 guest.py FILE BYTES LIBRARIES       reads commands from its input, one JSON a line, and answers each in one line

    {"load": path}                                 -> {"kernel": number}
    {"call": number, "arguments": [...]}           -> {}; an argument is a number, or {"at", "code", "bits", "shape", "strides"} for a tensor
What went wrong is {"error": text}. First comes {"base": address of the file in memory}. Importing TVM's Python package would take seconds here.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
from pathlib import Path

INT, FLOAT, TENSOR, RAW_STRING, FUNCTION, ERROR = 1, 3, 7, 8, 68, 67


class Any(ctypes.Structure):
    """TVMFFIAny."""

    _fields_ = (("type_index", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", ctypes.c_int64))


class Bytes(ctypes.Structure):
    """TVMFFIByteArray."""

    _fields_ = (("data", ctypes.c_char_p), ("size", ctypes.c_size_t))


class Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (("data", ctypes.c_void_p), ("device", ctypes.c_int32), ("number", ctypes.c_int32), ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8),
                ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
                ("strides", ctypes.POINTER(ctypes.c_int64)), ("offset", ctypes.c_uint64))


class Runtime:
    """TVM's C interface, and the file."""

    def __init__(self, file: str, size: int, libraries: str) -> None:
        self.ffi = ctypes.CDLL(f"{libraries}/tvm_ffi/lib/libtvm_ffi.so", ctypes.RTLD_GLOBAL)
        ctypes.CDLL(f"{libraries}/tvm/lib/libtvm_runtime.so", ctypes.RTLD_GLOBAL)   # what parallel loops call
        with open(file, "r+b") as handle:
            self.memory = mmap.mmap(handle.fileno(), size)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.kernels: list[int] = []
        self.load_library, self.get_function = (self.named(name) for name in (b"ffi.Module.load_from_file.so", b"ffi.ModuleGetFunction"))

    def named(self, name: bytes) -> int:
        found = ctypes.c_void_p()
        self.check(self.ffi.TVMFFIFunctionGetGlobal(ctypes.byref(Bytes(name, len(name))), ctypes.byref(found)))
        return int(found.value or 0)

    def check(self, code: int) -> None:
        if code == 0:
            return
        error = ctypes.c_void_p()
        self.ffi.TVMFFIErrorMoveFromRaised(ctypes.byref(error))
        kind, message = (Bytes.from_address(int(error.value or 0) + 24 + 16 * i) for i in range(2))   # TVMFFIErrorCell, behind the object's header
        raise RuntimeError(f"{kind.data.decode()}: {message.data.decode()}")

    def call(self, function: int, *arguments: Any) -> Any:
        packed, result = (Any * len(arguments))(*arguments), Any()
        self.check(self.ffi.TVMFFIFunctionCall(ctypes.c_void_p(function), packed, len(arguments), ctypes.byref(result)))
        return result

    def load(self, path: str) -> int:
        texts = [ctypes.create_string_buffer(text.encode()) for text in (path, "so", "main")]
        strings = [Any(RAW_STRING, 0, ctypes.addressof(text)) for text in texts]
        module = self.call(self.load_library, *strings[:2])
        self.kernels.append(self.call(self.get_function, module, strings[2], Any(2, 0, 0)).value)
        return len(self.kernels) - 1

    def run(self, kernel: int, arguments: list[object]) -> None:
        kept: list[object] = []
        self.call(self.kernels[kernel], *(self.argument(one, kept) for one in arguments))

    def argument(self, one: object, kept: list[object]) -> Any:
        if isinstance(one, int):
            return Any(INT, 0, one)
        if isinstance(one, float):
            return Any(FLOAT, 0, ctypes.c_int64.from_buffer(ctypes.c_double(one)).value)
        assert isinstance(one, dict)
        shape, strides = ((ctypes.c_int64 * len(one[name]))(*one[name]) for name in ("shape", "strides"))
        tensor = Tensor(self.base + one["at"], 1, 0, len(shape), one["code"], one["bits"], 1, shape, strides, 0)
        kept += [shape, strides, tensor]
        return Any(TENSOR, 0, ctypes.addressof(tensor))


def main() -> None:
    runtime = Runtime(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    print(json.dumps({"base": runtime.base}), flush=True)
    for line in sys.stdin:
        command, answer = json.loads(line), {}
        try:
            if "load" in command:
                answer = {"kernel": runtime.load(str(Path(command["load"])))}
            else:
                runtime.run(command["call"], command["arguments"])
        except RuntimeError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)
    os._exit(0)     # threads of kernels that wait would be waited for


if __name__ == "__main__":
    main()
