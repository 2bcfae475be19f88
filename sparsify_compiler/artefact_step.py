"""The library that decodes, in an artefact: the machine code as a file, its parameters by the places where the loaded model holds them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .artefact_tensors import TensorSource, TensorStore
from .artefact_values import decode, encode
from .errors import ArtefactError, SparsifyError
from .far import is_far
from .program import Program
from .step import Step
from .step_graph import step_graph
from .step_library import OWN, StepLibrary, bound, build_step, held_tensors
from .target import Target


def encode_step(step: Step | None, store: TensorStore, folder: Path, where: str, target: Target) -> dict[str, Any] | None:
    """Write the library into the folder `where` of an artefact; what load() needs to know, as JSON."""
    if step is None:
        return None
    from .codegen.build import version

    library = step.library
    name = f"{where}/step-{hashlib.sha256(library.binary).hexdigest()[:16]}.so"
    (folder / where).mkdir(exist_ok=True)
    (folder / name).write_bytes(library.binary)
    parameters = [{"place": list(place), "shape": list(tensor.shape), "dtype": encode(tensor.dtype)}
                  | ({"tensor": store.add(f"step.{number}", tensor)} if place[0] == OWN else {})
                  for number, (place, tensor) in enumerate(library.parameters)]
    return {"file": name, "tvm": version(), "target": target.to_json(), "most": step.most, "caches": [list(one) for one in library.caches],
            "dtype": encode(library.dtype), "parameters": parameters}


def decode_step(data: Mapping[str, Any] | None, folder: Path, known: Mapping[str, Any], program: Program, source: TensorSource, target: Target,
                rebuild: bool) -> tuple[Step | None, str]:
    """The Step of a loaded program, and why there is none where one was saved.

    known    files that the manifest names
    target   the machine that kernels run on
    rebuild  compile it again, as is done with a library of another version of TVM or for another machine
    Raises ArtefactError where the record is no such thing.
    """
    if data is None:
        return None, ""
    from .codegen.build import version

    if data["file"] not in known:
        raise ArtefactError(f"names a file that the manifest does not: {data['file']!r}", where="graph.json", hint="save the model again")
    try:
        if is_far(target):
            return None, f"part by part: the library is for {data['target'].get('name')}, which this machine is not"
        if rebuild or (data["tvm"], data["target"]) != (version(), json.loads(json.dumps(target.to_json()))):
            library = build_step(program, step_graph(program), target)
        else:
            library = _stored(data, (folder / data["file"]).read_bytes(), program, source, target)
    except SparsifyError as error:
        if isinstance(error, ArtefactError):
            raise
        return None, f"part by part: {error.what}"
    return Step(library, int(data["most"])), ""


def _stored(data: Mapping[str, Any], binary: bytes, program: Program, source: TensorSource, target: Target) -> StepLibrary:
    held: dict[tuple[str, ...], Tensor] = {}
    for place, tensor in held_tensors(program):
        held.setdefault(place, tensor)
    parameters = []
    for one in data["parameters"]:
        place = tuple(map(str, one["place"]))
        tensor = source.get(one["tensor"]).detach() if place[0] == OWN else held.get(place, torch.empty(0, dtype=torch.float32))
        if list(tensor.shape) != one["shape"] or tensor.dtype is not decode(one["dtype"]) or not tensor.is_contiguous():
            raise ArtefactError(f"the library that decodes was made for another tensor than {' '.join(place)}", where="graph.json",
                                hint="save the model again")
        parameters.append((place, tensor))
    sizes = tuple((int(groups), int(width)) for groups, width in data["caches"])
    return bound(binary, parameters, sizes, decode(data["dtype"]), target)
