"""Back to dense: the weights under the model's own names, with zeros where the masks say so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import catalog
from .artefact_tensors import TensorStore
from .branches import Branches, parse
from .call import Hole
from .compiled import CompiledModel
from .epilogue import META as EPILOGUE
from .normal_form_edit import insert, replace
from .operands import operands, packed_operator, packed_weight, with_dense_weight
from .ops import attend
from .program import Program, Region, Stage, get_tensor, prune_unused, set_tensor
from .storage import atomic_path, write_safetensors

aten = torch.ops.aten


def export_dense(compiled: CompiledModel, path: str | Path) -> None:
    """Write one safetensors file with every weight dense, masks applied, under the names of the model's state_dict; masks are left out.

    What capture found unused (a head whose output is not returned) is not in it: load it with strict=False. Raises StorageError.
    """
    store = TensorStore()
    names = {name: store.add(name, tensor)["key"] for name, tensor in dense_tensors(compiled.program)}
    names |= {other: names[name] for other, name in compiled.program.aliases.items() if name in names}
    with atomic_path(Path(path)) as file:
        write_safetensors(file, {name: store.stored[key] for name, key in names.items()})


def dense_tensors(program: Program) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the Program, dense, under its name in the model."""
    for region in program.regions.values():
        dense = densify(region)
        for name in dict.fromkeys(str(node.target) for node in dense.graph.nodes if node.op == "get_attr"):
            yield region.qualified(name.removesuffix("_masked")), get_tensor(dense.module, name)
    if program.skeleton is not None:
        for path, module in program.skeleton.named_modules():
            if not isinstance(module, Hole):
                yield from ((f"{path}.{name}" if path else name, tensor) for name, tensor in _own(module))


def dense_program(program: Program) -> Program:
    """The same model with every packed or masked weight dense again: what the sparse one is compared with when the original is not at hand."""
    clone = program.clone()
    clone.regions = {path: densify(region) for path, region in clone.regions.items()}
    clone.stage = Stage.TRACED
    return clone


def densify(region: Region) -> Region:
    """A copy of the region whose linear and conv nodes read plain dense weights, and whose attentions over all keys are torch's."""
    dense = region.clone()
    for node in list(dense.graph.nodes):
        if packed_operator(node):
            _unpack(dense, node)
        elif node.target is aten.mul.Tensor:
            _apply_mask(dense, node)
        elif node.target is attend.op:
            _attend_plainly(node)
    prune_unused(dense)
    return dense


def _unpack(region: Region, node: fx.Node) -> None:
    tensors, _, _ = operands(region, node)
    first = next(str(value.target) for key, value in node.kwargs.items() if key in tensors and isinstance(value, fx.Node))
    name = first.rpartition("_packed.")[0] or f"{node.name}_weight"
    with region.graph.inserting_before(node):
        dense = with_dense_weight(node, _store(region, name, packed_weight(region, node)))
    dense.meta = {key: value for key, value in node.meta.items() if key not in ("kernel", EPILOGUE)}
    node.replace_all_uses_with(dense)
    region.graph.erase_node(node)


def _attend_plainly(node: fx.Node) -> None:
    """attend(query, key, value, ...) with an indexer that reads every key -> scaled_dot_product_attention; any other stays as it is."""
    everything, indexer = catalog.get("attention pattern", "everything"), parse(str(node.kwargs["indexer"]))
    if isinstance(indexer, Branches) or indexer.choices or not any(isinstance(pattern, everything) for pattern in indexer.always):
        return
    given: dict[str, Any] = {name: value for name, value in node.kwargs.items() if name not in ("indexer", "learned")}
    if given["query"].meta["val"].shape[1] != given["key"].meta["val"].shape[1]:
        given["enable_gqa"] = True
    replace(node, insert(node, aten.scaled_dot_product_attention.default, node.meta["val"], **given))


def _apply_mask(region: Region, product: fx.Node) -> None:
    sources = [product.kwargs.get("self"), product.kwargs.get("other")]
    if not all(isinstance(source, fx.Node) and source.op == "get_attr" for source in sources):
        return
    names = [str(source.target) for source in sources if isinstance(source, fx.Node)]
    weight, mask = (get_tensor(region.module, name) for name in names)
    if mask.dtype == torch.bool and mask.shape == weight.shape:
        with region.graph.inserting_before(product):
            product.replace_all_uses_with(_store(region, names[0], weight.detach().masked_fill(~mask, 0)))
        region.graph.erase_node(product)


def _store(region: Region, name: str, weight: Tensor) -> fx.Node:
    set_tensor(region.module, name, nn.Parameter(weight, requires_grad=False))
    node = region.graph.get_attr(name)
    node.meta = {"val": weight.to("meta"), "by": "dense"}
    return node


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield name, tensor
