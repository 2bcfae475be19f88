"""DeepSparse 1.8.0, float32: the last release that runs; its licence allows evaluation only. It finds the zeros by itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

os.environ["NM_DISABLE_ANALYTICS"] = "True"


def forms(folder: Path, threads: int) -> Iterator[tuple[Any, ...]]:
    """The case's graph on one stream."""
    import deepsparse

    x = np.load(folder / "x.npy")
    engine = deepsparse.compile_model(str(folder / "model.onnx"), batch_size=x.shape[0], num_cores=threads, input_shapes=[list(x.shape)])
    yield "deepsparse fp32", "fp32", lambda: engine.run([x], val_inp=False)[0]
