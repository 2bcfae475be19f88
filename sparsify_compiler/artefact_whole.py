"""The library that takes the calls of a model that was captured whole, in an artefact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .artefact_library import decode_library, encode_library
from .artefact_tensors import TensorSource, TensorStore
from .errors import ArtefactError
from .library_here import load_here
from .program import Program
from .target import Target
from .whole_call import NAME, PARTS, WholeCall, build_call, sizes_of


def encode_whole(whole: WholeCall | None, store: TensorStore, folder: Path, where: str, target: Target) -> dict[str, Any] | None:
    """Write the library into the folder `where` of an artefact; what load() needs to know, as JSON."""
    if whole is None:
        return None
    facts = {"sizes": {name: list(limits) for name, limits in whole.sizes.items()}, "rows": [list(one) for one in whole.rows.items()]}
    return encode_library(whole.library, NAME, store, folder, where, target) | facts


def decode_whole(data: Mapping[str, Any] | None, folder: Path, known: Mapping[str, Any], program: Program, source: TensorSource, target: Target,
                 rebuild: bool) -> tuple[WholeCall | None, str]:
    """The WholeCall of a loaded program, and why there is none where one was saved: arguments as decode_library() has them. Raises ArtefactError."""
    if data is None:
        return None, ""
    spec = program.regions[""].spec
    sizes = {str(name): (int(least), int(most)) for name, (least, most) in data["sizes"].items()}
    rows = {int(number): int(count) for number, count in data["rows"]}
    if set(sizes) != sizes_of(spec) or not all(0 <= number < len(spec.leaves) for number in rows):
        raise ArtefactError("the library that takes calls was made for other inputs", where="graph.json", hint="save the model again")
    library, why = decode_library(data, folder, known, program, source, target, rebuild,
                                  lambda: build_call(program, target, {name: most for name, (_, most) in sizes.items()})[0],
                                  lambda binary, parameters: load_here(binary, NAME, parameters, target))
    return (None, f"{PARTS}: {why}") if library is None else (WholeCall(library, spec, sizes, rows), "")
