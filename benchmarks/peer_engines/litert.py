"""XNNPACK through LiteRT, float32: the case's ONNX graph written as a TFLite model, channels last. On x86 with AVX it is blind to zeros."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def forms(folder: Path, threads: int) -> Iterator[tuple[Any, ...]]:
    """Chains and convolutional networks; the input is channels last already."""
    from ai_edge_litert.interpreter import Interpreter

    try:
        content = Writer(folder / "model.onnx").content()
    except NotImplementedError as error:
        yield "LiteRT fp32 XNNPACK", str(error)
        return
    x = np.load(folder / "x.npy")
    interpreter = Interpreter(model_content=content, num_threads=threads)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], np.ascontiguousarray(x.transpose(0, 2, 3, 1) if x.ndim == 4 else x))
    output = interpreter.get_output_details()[0]["index"]

    def call() -> np.ndarray:
        interpreter.invoke()
        return interpreter.get_tensor(output)

    yield "LiteRT fp32 XNNPACK", "fp32", call


class Writer:
    """Turns Conv, Relu, GlobalAveragePool, Flatten and Gemm of ONNX into a TFLite model, a ReLU into the operator before it."""

    def __init__(self, path: Path) -> None:
        import onnx
        from ai_edge_litert import schema_py_generated as schema
        from onnx.numpy_helper import to_array

        self.schema = schema
        graph = onnx.load(path).graph
        self.constants = {tensor.name: to_array(tensor) for tensor in graph.initializer}
        self.buffers, self.tensors, self.operators = [schema.BufferT()], [], []
        self.codes: list[int] = []
        shape = [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim]
        self.shapes = {graph.input[0].name: [shape[0], *shape[2:], shape[1]] if len(shape) == 4 else shape}
        self.places = {graph.input[0].name: self._tensor(self.shapes[graph.input[0].name])}
        self.given, self.made = graph.input[0].name, graph.output[0].name
        for node in graph.node:
            translate = getattr(self, f"_{node.op_type.lower()}", None)
            if translate is None:
                raise NotImplementedError(f"only chains and convolutional networks: no {node.op_type}")
            translate(node, {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute})

    def content(self) -> bytes:
        """The model as a file's bytes."""
        import flatbuffers

        s = self.schema
        graph = s.SubGraphT()
        graph.tensors, graph.operators = self.tensors, self.operators
        graph.inputs, graph.outputs = [self.places[self.given]], [self.places[self.made]]
        model = s.ModelT()
        model.version, model.subgraphs, model.buffers = 3, [graph], self.buffers
        model.operatorCodes = [self._code(code) for code in self.codes]
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())

    def _conv(self, node: Any, attributes: dict[str, Any]) -> None:
        s, x = self.schema, self._place(node.input[0])
        weight, bias = self.constants[node.input[1]], self.constants[node.input[2]]
        before, (stride, *_), (pad, *_) = self.shapes[node.input[0]], attributes["strides"], attributes["pads"]
        padded = before
        if pad:  # TFLite's own padding is not symmetric when the stride is 2
            padded = [before[0], before[1] + 2 * pad, before[2] + 2 * pad, before[3]]
            x = self._operator(s.BuiltinOperator.PAD, [x, self._constant(np.array([[0, 0], [pad, pad], [pad, pad], [0, 0]], np.int32))], padded)
        after = [before[0], *((size - weight.shape[2]) // stride + 1 for size in padded[1:3]), weight.shape[0]]
        if attributes["group"] > 1:
            options, code, turned = s.DepthwiseConv2DOptionsT(depthMultiplier=1), s.BuiltinOperator.DEPTHWISE_CONV_2D, weight.transpose(1, 2, 3, 0)
        else:
            options, code, turned = s.Conv2DOptionsT(), s.BuiltinOperator.CONV_2D, weight.transpose(0, 2, 3, 1)
        options.padding, options.strideW, options.strideH = s.Padding.VALID, stride, stride
        self._take(node, self._operator(code, [x, self._constant(turned), self._constant(bias)], after, options), after)

    def _gemm(self, node: Any, attributes: dict[str, Any]) -> None:
        weight = self.constants[node.input[1]]
        after = [self.shapes[node.input[0]][0], weight.shape[0]]
        inputs = [self._place(node.input[0]), self._constant(weight), self._constant(self.constants[node.input[2]])]
        self._take(node, self._operator(self.schema.BuiltinOperator.FULLY_CONNECTED, inputs, after, self.schema.FullyConnectedOptionsT()), after)

    def _relu(self, node: Any, attributes: dict[str, Any]) -> None:
        self.operators[-1].builtinOptions.fusedActivationFunction = self.schema.ActivationFunctionType.RELU
        self._take(node, self._place(node.input[0]), self.shapes[node.input[0]])

    def _globalaveragepool(self, node: Any, attributes: dict[str, Any]) -> None:
        batch, _, _, channels = self.shapes[node.input[0]]
        inputs = [self._place(node.input[0]), self._constant(np.array([1, 2], np.int32))]
        made = self._operator(self.schema.BuiltinOperator.MEAN, inputs, [batch, channels], self.schema.ReducerOptionsT())
        self._take(node, made, [batch, channels])

    def _flatten(self, node: Any, attributes: dict[str, Any]) -> None:
        self._take(node, self._place(node.input[0]), self.shapes[node.input[0]])

    def _take(self, node: Any, place: int, shape: list[int]) -> None:
        self.places[node.output[0]], self.shapes[node.output[0]] = place, shape

    def _place(self, name: str) -> int:
        return self.places[name]

    def _tensor(self, shape: list[int], buffer: int = 0, kind: int = 0) -> int:
        tensor = self.schema.TensorT()
        tensor.shape, tensor.buffer, tensor.type, tensor.name = list(shape), buffer, kind, f"t{len(self.tensors)}".encode()
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _constant(self, array: np.ndarray) -> int:
        buffer = self.schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        self.buffers.append(buffer)
        kind = self.schema.TensorType.INT32 if array.dtype == np.int32 else self.schema.TensorType.FLOAT32
        return self._tensor(list(array.shape), len(self.buffers) - 1, kind)

    def _operator(self, code: int, inputs: list[int], shape: list[int], options: Any = None) -> int:
        operator, made = self.schema.OperatorT(), self._tensor(shape)
        if code not in self.codes:
            self.codes.append(code)
        operator.opcodeIndex, operator.inputs, operator.outputs = self.codes.index(code), inputs, [made]
        if options is not None:
            operator.builtinOptions = options
            operator.builtinOptionsType = getattr(self.schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
        self.operators.append(operator)
        return made

    def _code(self, code: int) -> Any:
        made = self.schema.OperatorCodeT()
        made.builtinCode, made.deprecatedBuiltinCode, made.version = code, min(code, 127), 1
        return made
