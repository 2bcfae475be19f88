"""OpenVINO's CPU plugin: float32, bfloat16, and int8 with a scale per output row and per tensor of activations. Blind to zeros."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def forms(folder: Path, threads: int) -> Iterator[tuple[Any, ...]]:
    """The case's graph, compiled for latency."""
    import openvino as ov

    core, x = ov.Core(), np.load(folder / "x.npy")
    for name, dtype, precision, quantise in (("fp32", "fp32", "f32", False), ("bf16", "bf16", "bf16", False), ("int8", "int8", "bf16", True)):
        model = core.read_model(folder / "model.onnx")
        model.reshape(list(x.shape))
        if quantise:
            _quantise(model, x)
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
                                                     "PERFORMANCE_HINT": "LATENCY"})
        yield f"OpenVINO {name}", dtype, _call(compiled.create_infer_request(), x)


def _call(request: Any, x: np.ndarray) -> Any:
    """Infer without a copy of the input or the output."""
    import openvino as ov

    given = ov.Tensor(x, shared_memory=True)
    request.set_input_tensor(given)
    output = request.get_output_tensor()

    def call(_held: tuple[np.ndarray, Any] = (x, given)) -> np.ndarray:
        request.infer()
        return output.data

    return call


def _quantise(model: Any, x: np.ndarray) -> None:
    """Put 256 levels before every product with a constant weight; the plugin makes int8 kernels of that. Ranges of activations are measured on x."""
    import openvino as ov
    from openvino import opset13 as op

    kinds = ("MatMul", "Convolution", "GroupConvolution")
    products = [node for node in model.get_ordered_ops() if node.get_type_name() in kinds and _weight(node) is not None]
    taps = [node.input_value(0) for node in products]
    probe = ov.Model(list(taps), model.get_parameters(), "probe")
    seen = ov.compile_model(probe, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)
    for i, (node, tap) in enumerate(zip(products, taps, strict=True)):
        low, high = np.float32(min(seen[i].min(), 0)), np.float32(seen[i].max())
        if low < 0:
            high = max(high, -low)
            low = np.float32(-high * 128 / 127)
        node.input(0).replace_source_output(op.fake_quantize(tap, low, high, low, high, 256).output(0))
        weight = _weight(node)
        rows = _row_axis(node)
        most = np.abs(weight).max(tuple(axis for axis in range(weight.ndim) if axis not in rows), keepdims=True).astype(np.float32)
        most = np.maximum(most, 1e-8)
        levels = op.fake_quantize(node.input_value(1), -most, most, -most, most, 255)
        node.input(1).replace_source_output(levels.output(0))


def _weight(node: Any) -> np.ndarray | None:
    source = node.input_value(1).get_node()
    return source.get_data() if source.get_type_name() == "Constant" else None


def _row_axis(node: Any) -> tuple[int, ...]:
    """The axes of the weight that tell outputs apart."""
    if node.get_type_name() == "MatMul":
        return (0,) if node.get_attributes()["transpose_b"] else (1,)
    return (0,) if node.get_type_name() == "Convolution" else (0, 1)
