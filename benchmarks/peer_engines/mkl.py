"""MKL's inspector-executor sparse products, float32, through ctypes: hints, then optimize, then x as columns. BSR for square blocks, else CSR."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

NON_TRANSPOSE, ROW_MAJOR, GENERAL, MANY = 10, 101, 20, 1_000_000


class _Descr(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("mode", ctypes.c_int), ("diag", ctypes.c_int)]


DESCR = _Descr(GENERAL, 0, 0)


def forms(folder: Path, threads: int) -> Iterator[tuple[Any, ...]]:
    """The chain on activations that are transposed already; the bias goes in as the old y, the ReLU is NumPy's."""
    case = json.loads((folder / "case.json").read_text())["case"]
    weights = [np.load(folder / f"weight-{i}.npy") for i in range(len(list(folder.glob("weight-*.npy"))))]
    if not weights:
        yield "MKL fp32", "only chains of linear layers"
        return
    library = _library()
    library.MKL_Set_Num_Threads(threads)
    rows, block = int(case.split("/")[1]), 32 if case.split("/")[2] == "32x32" else 1
    layers = [Layer(library, weight, np.load(folder / f"bias-{i}.npy"), rows, block) for i, weight in enumerate(weights)]
    turned = np.ascontiguousarray(np.load(folder / "x.npy").T)

    def call() -> np.ndarray:
        x = turned
        for layer in layers:
            x = layer(x)
        return x.T

    yield f"MKL fp32 {'BSR' if block > 1 else 'CSR'}", "fp32", call


def _library() -> Any:
    """libmkl_rt of the mkl package in this environment."""
    found = sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*"))
    if not found:
        raise FileNotFoundError("there is no libmkl_rt in this environment: install the package mkl")
    return ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)


class Layer:
    """ReLU(W x + b) with W [N, K] held by MKL and x [K, rows]."""

    def __init__(self, library: Any, weight: np.ndarray, bias: np.ndarray, rows: int, block: int) -> None:
        self.library, self.rows = library, rows
        self.bias, self.y = np.ascontiguousarray(np.repeat(bias[:, None], rows, 1)), np.empty((len(bias), rows), np.float32)
        values, columns, pointers = _blocks(weight, block)
        self.held = values, columns, pointers  # MKL keeps pointers to them
        self.handle = ctypes.c_void_p()
        size, ends = ctypes.c_int, _pointer(pointers, 4)
        n, k = weight.shape[0] // block, weight.shape[1] // block
        if block > 1:
            status = library.mkl_sparse_s_create_bsr(ctypes.byref(self.handle), 0, ROW_MAJOR, size(n), size(k), size(block), _pointer(pointers), ends,
                                                     _pointer(columns), _pointer(values))
        else:
            status = library.mkl_sparse_s_create_csr(ctypes.byref(self.handle), 0, size(n), size(k), _pointer(pointers), ends, _pointer(columns),
                                                     _pointer(values))
        if status:
            raise RuntimeError(f"MKL cannot hold this weight: status {status}")
        if rows == 1:
            library.mkl_sparse_set_mv_hint(self.handle, NON_TRANSPOSE, DESCR, MANY)
        else:
            library.mkl_sparse_set_mm_hint(self.handle, NON_TRANSPOSE, DESCR, ROW_MAJOR, size(rows), MANY)
        if library.mkl_sparse_optimize(self.handle):
            raise RuntimeError("mkl_sparse_optimize failed")

    def __call__(self, x: np.ndarray) -> np.ndarray:
        one, size, y = ctypes.c_float(1), ctypes.c_int(self.rows), self.y
        np.copyto(y, self.bias)
        if self.rows == 1:
            status = self.library.mkl_sparse_s_mv(NON_TRANSPOSE, one, self.handle, DESCR, _pointer(x), one, _pointer(y))
        else:
            status = self.library.mkl_sparse_s_mm(NON_TRANSPOSE, one, self.handle, DESCR, ROW_MAJOR, _pointer(x), size, size, one, _pointer(y), size)
        if status:
            raise RuntimeError(f"MKL failed: status {status}")
        return np.maximum(y, 0, out=y)


def _blocks(weight: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, int32 block columns and int32 pointers of the blocks that are not zero."""
    n, k = weight.shape[0] // block, weight.shape[1] // block
    cut = weight.reshape(n, block, k, block).transpose(0, 2, 1, 3)
    kept = (cut != 0).any((2, 3))
    pointers = np.concatenate([[0], kept.sum(1).cumsum()]).astype(np.int32)
    return np.ascontiguousarray(cut[kept]), np.nonzero(kept)[1].astype(np.int32), pointers


def _pointer(array: np.ndarray, offset: int = 0) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data + offset)
