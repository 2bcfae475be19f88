"""The eager Python around regions: its tensors are in the artefact, its code is the user's own and comes with the model given to load()."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .artefact_tensors import TensorSource, TensorStore
from .branches import parse
from .call import clone_structure
from .capture_regions import dig_holes
from .errors import ArtefactError, InputError
from .library_attention import find_library_attentions
from .program import Program, Region, set_tensor


def encode_skeleton(program: Program, store: TensorStore) -> dict[str, Any]:
    """The tensors of the skeleton."""
    skeleton = program.skeleton
    if skeleton is None:
        raise ArtefactError("a model captured whole has no skeleton")
    return {"class": type(skeleton).__name__, "tensors": {name: store.add(name, tensor) for name, tensor in _tensors(skeleton)}}


def restore_skeleton(data: Mapping[str, Any], regions: Mapping[str, Region], source: TensorSource, model: nn.Module | None) -> nn.Module:
    """A copy of the given model's module tree with the artefact's tensors and places for the regions.

    Raises InputError without a model, and ArtefactError when the model is not of the kind that was saved.
    """
    if model is None:
        raise InputError(
            f"this {data['class']} was captured in parts; the Python around them is not in the artefact",
            where="model",
            hint=f"load(path, model=...) with a {data['class']} of the same configuration (its weights do not matter)",
        )
    fresh = clone_structure(model)
    for path in regions:
        try:
            fresh.get_submodule(path)
        except AttributeError:
            raise _differs(data, f"it has no module {path!r}") from None
    dig_holes(fresh, dict(regions))
    _put_tensors(fresh, data, source)
    return fresh.eval()


def check_attentions(given: Mapping[str, str], skeleton: nn.Module | None) -> dict[str, str]:
    """The indexers of the skeleton's attentions, as saved. Raises ArtefactError where the model has no such attention."""
    known = find_library_attentions(skeleton) if skeleton is not None and given else {}
    for path, text in given.items():
        if path not in known:
            raise ArtefactError(f"the given model has no attention at {path!r} that can choose its blocks", where="model",
                                hint="give load() a model of the same class, built with the same version of its library")
        parse(text)
    return dict(given)


def attention_tensors(graph: Mapping[str, Any], source: TensorSource) -> dict[str, dict[str, Tensor]]:
    """What the indexers of the skeleton's attentions learned. Raises ArtefactError where something is missing."""
    records: Mapping[str, Any] = graph.get("learned", {})
    for path, text in graph.get("attentions", {}).items():
        if set(parse(text).learned) != set(records.get(path, ())):
            raise ArtefactError(f"what the attention at {path!r} learned is not there", where="graph.json", hint="save the model again")
    return {path: {name: source.get(record) for name, record in tensors.items()} for path, tensors in records.items()}


def _put_tensors(fresh: nn.Module, data: Mapping[str, Any], source: TensorSource) -> None:
    present = dict(_tensors(fresh))
    wanted: Mapping[str, Any] = data["tensors"]
    for name in present:
        if name not in wanted:
            raise _differs(data, f"the artefact has no tensor {name!r}")
    for name, record in wanted.items():
        tensor = source.get(record)
        if name not in present or present[name].shape != tensor.shape:
            found = "none" if name not in present else f"shape {list(present[name].shape)}"
            raise _differs(data, f"tensor {name!r} has shape {list(tensor.shape)} in the artefact and {found} in the model")
        persistent = _persistence(fresh, name)
        set_tensor(fresh, name, tensor)
        if not persistent:
            owner, _, last = name.rpartition(".")
            fresh.get_submodule(owner)._non_persistent_buffers_set.add(last)


def _persistence(module: nn.Module, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    return last not in module.get_submodule(owner)._non_persistent_buffers_set


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    with torch.no_grad():
        yield from module.named_parameters(remove_duplicate=False)
        yield from module.named_buffers(remove_duplicate=False)


def _differs(data: Mapping[str, Any], how: str) -> ArtefactError:
    return ArtefactError(
        f"the given model is not the {data['class']} that was saved: {how}",
        where="model",
        hint="build it with the configuration that it was compiled with",
    )
