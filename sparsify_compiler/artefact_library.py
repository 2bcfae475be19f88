"""A library that runs beside torch, in an artefact: the machine code as a file, its parameters by the places where the loaded model holds them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .artefact_tensors import TensorSource, TensorStore
from .artefact_values import decode, encode
from .errors import ArtefactError, SparsifyError
from .far import is_far
from .held import OWN, held_tensors
from .library_here import LibraryHere, Placed
from .program import Program
from .target import Target

Made = TypeVar("Made")


def encode_library(library: LibraryHere, what: str, store: TensorStore, folder: Path, where: str, target: Target) -> dict[str, Any]:
    """Write the library into the folder `where` of an artefact, named after what it is; what load() needs to know, as JSON."""
    from .codegen.build import version

    name = f"{where}/{what}-{hashlib.sha256(library.binary).hexdigest()[:16]}.so"
    (folder / where).mkdir(exist_ok=True)
    (folder / name).write_bytes(library.binary)
    parameters = [{"place": list(place), "shape": list(tensor.shape), "dtype": encode(tensor.dtype)}
                  | ({"tensor": store.add(f"{what}.{number}", tensor)} if place[0] == OWN else {})
                  for number, (place, tensor) in enumerate(library.parameters)]
    return {"file": name, "tvm": version(), "target": target.to_json(), "parameters": parameters}


def decode_library(data: Mapping[str, Any], folder: Path, known: Mapping[str, Any], program: Program, source: TensorSource, target: Target,
                   rebuild: bool, build: Callable[[], Made], load: Callable[[bytes, list[Placed]], Made]) -> tuple[Made | None, str]:
    """The library of a loaded program, and why there is none.

    known    files that the manifest names
    target   the machine that kernels run on
    rebuild  compile it again, as is done with a library of another version of TVM or for another machine
    build    compiles it
    load     makes it of what was stored
    Raises ArtefactError where the record is no such thing.
    """
    from .codegen.build import version

    if data["file"] not in known:
        raise ArtefactError(f"names a file that the manifest does not: {data['file']!r}", where="graph.json", hint="save the model again")
    try:
        if is_far(target):
            return None, f"the library is for {data['target'].get('name')}, which this machine is not"
        if rebuild or (data["tvm"], data["target"]) != (version(), json.loads(json.dumps(target.to_json()))):
            return build(), ""
        return load((folder / data["file"]).read_bytes(), _parameters(data, program, source)), ""
    except SparsifyError as error:
        if isinstance(error, ArtefactError):
            raise
        return None, error.what


def _parameters(data: Mapping[str, Any], program: Program, source: TensorSource) -> list[Placed]:
    held: dict[tuple[str, ...], Tensor] = {}
    for place, tensor in held_tensors(program):
        held.setdefault(place, tensor)
    parameters = []
    for one in data["parameters"]:
        place = tuple(map(str, one["place"]))
        tensor = source.get(one["tensor"]).detach() if place[0] == OWN else held.get(place, torch.empty(0, dtype=torch.float32))
        if list(tensor.shape) != one["shape"] or tensor.dtype is not decode(one["dtype"]) or not tensor.is_contiguous():
            raise ArtefactError(f"a library was made for another tensor than {' '.join(place)}", where="graph.json", hint="save the model again")
        parameters.append((place, tensor))
    return parameters
