"""Export to ONNX, for runtimes that are not ours: the model in one file, every weight dense, with zeros where they were removed."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .artefact_dense import densify
from .compiled import CompiledModel
from .errors import ModelError
from .export_library import output_names, whole_region, word_of
from .pattern import op_name
from .program import InputSpec, Program, Region, TensorSpec
from .silence import silenced
from .storage import atomic_path

NEEDS = ("onnx", "onnxscript")
OWN = "sparsify"            # namespace of ops that only we have
LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir")    # which tell of packages that are not needed


def export_onnx(compiled: CompiledModel, path: str | Path) -> None:
    """Write the model as an ONNX file, whole or not at all; dimensions that may change between calls may change there too.

    Inputs and outputs have the names of the model's own. Packed weights are written dense: ONNX has no sparse kernels to run them with.
    Raises ModelError where a package is missing, the model was captured in parts, or an op has no form in ONNX (activation sparsity, attention by
    blocks, mixtures); StorageError.
    """
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise ModelError(f"{' and '.join(missing)} are needed to write ONNX", hint='pip install "sparsify_compiler[onnx]"')
    region = plain_region(compiled.program)
    tensors, dynamic = example_of(region)
    with atomic_path(Path(path)) as file, torch.no_grad(), silenced(*LOGGERS, below=logging.ERROR):
        try:
            made = torch.onnx.export(region.module.eval(), tuple(tensors), dynamo=True, dynamic_shapes=tuple(dynamic), verbose=False,
                                     input_names=input_names(region.spec), output_names=output_names(region.spec))
            assert made is not None
            made.save(str(file), external_data=_too_large(region))
        except torch.onnx.errors.OnnxExporterError as error:
            raise ModelError(f"torch cannot write it as ONNX: {str(error).strip().splitlines()[0]}", where=compiled.report().model,
                             hint="export it as a library or as dense safetensors") from error


def plain_region(program: Program) -> Region:
    """The whole graph with torch's own operators only. Raises ModelError where that cannot be."""
    region = densify(whole_region(program))
    own = sorted({op_name(node) for node in region.graph.nodes if getattr(node.target, "namespace", "") == OWN})
    if own:
        raise ModelError(f"{', '.join(own)} has no form outside of this project", where=region.path or "the model",
                         hint="masks of weights and rewrites do; or compile without the pass that made it")
    return region


def example_of(region: Region) -> tuple[list[Tensor], list[dict[int, Any]]]:
    """Tensors to trace the graph with, of the sizes that it was captured with, and for each the dimensions that may change."""
    places = {node.name: node for node in region.graph.nodes if node.op == "placeholder"}
    known = {name: torch.export.Dim(name, min=low, max=high) for name, (low, high) in region.spec.ranges.items()}
    tensors, dynamic = [], []
    for name, leaf in _leaves(region):
        sizes = [size if isinstance(size, int) else int(size.node.hint) for size in places[name].meta["val"].shape]
        tensors.append(torch.zeros(sizes, dtype=leaf.dtype))
        dynamic.append({place: known[size] for place, size in enumerate(leaf.shape) if isinstance(size, str) and size in known})
    return tensors, dynamic


def input_names(spec: InputSpec) -> list[str]:
    """What the inputs are called: as the model's own function has them; by position where they have no names there."""
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(len(spec.leaves))), spec.in_spec))
    keys = [[word_of(key) for key in path[1:]] for path, _ in paths]
    names = [".".join(path) if path and not path[0].isdigit() else name for path, name in zip(keys, spec.names, strict=True)]
    return [name for name, leaf in zip(names, spec.leaves, strict=True) if isinstance(leaf, TensorSpec)]


def _leaves(region: Region) -> list[tuple[str, TensorSpec]]:
    return [(name, leaf) for name, leaf in zip(region.spec.names, region.spec.leaves, strict=True) if isinstance(leaf, TensorSpec)]


def _too_large(region: Region) -> bool:
    """More than a protobuf file may hold."""
    size: int = sum(tensor.numel() * tensor.element_size() for tensor in nn.Module.state_dict(region.module).values())
    return size > 2_000_000_000
