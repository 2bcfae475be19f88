"""The library that decodes, in an artefact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .artefact_library import decode_library, encode_library
from .artefact_tensors import TensorSource, TensorStore
from .artefact_values import decode, encode
from .program import Program
from .step import Step
from .step_graph import step_graph
from .step_library import bound, build_step
from .target import Target


def encode_step(step: Step | None, store: TensorStore, folder: Path, where: str, target: Target) -> dict[str, Any] | None:
    """Write the library into the folder `where` of an artefact; what load() needs to know, as JSON."""
    if step is None:
        return None
    facts = {"most": step.most, "caches": [list(one) for one in step.library.caches], "dtype": encode(step.library.dtype)}
    return encode_library(step.library, "step", store, folder, where, target) | facts


def decode_step(data: Mapping[str, Any] | None, folder: Path, known: Mapping[str, Any], program: Program, source: TensorSource, target: Target,
                rebuild: bool) -> tuple[Step | None, str]:
    """The Step of a loaded program, and why there is none where one was saved: arguments as decode_library() has them. Raises ArtefactError."""
    if data is None:
        return None, ""
    sizes = tuple((int(groups), int(width)) for groups, width in data["caches"])
    library, why = decode_library(data, folder, known, program, source, target, rebuild, lambda: build_step(program, step_graph(program), target),
                                  lambda binary, parameters: bound(binary, parameters, sizes, decode(data["dtype"]), target))
    return (None, f"part by part: {why}") if library is None else (Step(library, int(data["most"])), "")
