"""onnxruntime's CPU provider, float32. Blind to zeros."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def forms(folder: Path, threads: int) -> Iterator[tuple[Any, ...]]:
    """The case's graph with every optimisation on."""
    import onnxruntime as ort

    x, options = np.load(folder / "x.npy"), ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x}
    yield "onnxruntime fp32", "fp32", lambda: session.run(None, given)[0]
