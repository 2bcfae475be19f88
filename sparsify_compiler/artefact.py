"""Saving and loading: a folder of plain files, never a pickle, written whole or not at all.

    manifest.json         versions, target, inputs, sha256 and size of every other file
    graph.json            the graphs, in our own JSON; only aten and sparsify ops can be named in it
    weights.safetensors   every tensor once
    kernels/              source IR and binaries, named by their content
    report.json

The hashes find damage, and changes by someone who does not know of them. Kernels are machine code: like any program, load them from people
you trust, or with `rebuild=True`, which compiles them again from their IR.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from .artefact_dense import export_dense
from .artefact_graph import decode_region, encode_region
from .artefact_kernels import bind_kernels, check_packed
from .artefact_manifest import MANIFEST, is_artefact, peek, read_manifest, write_manifest
from .artefact_skeleton import attention_tensors, check_attentions, encode_skeleton, restore_skeleton
from .artefact_step import decode_step, encode_step
from .artefact_tensors import TensorSource, TensorStore
from .artefact_whole import decode_whole, encode_whole
from .compiled import CompiledModel
from .decision import Decision
from .errors import ArtefactError, InputError
from .library_attention import LEARNED
from .memory import give_back
from .packed_storage import leave_in_artefact
from .program import LeftOut, Program, Region, Stage, TensorSpec
from .report import Report
from .resident_experts import bound_experts
from .storage import read_safetensors, settled, write_safetensors, writing
from .target import Target, host

GRAPH, WEIGHTS, REPORT, KERNELS = "graph.json", "weights.safetensors", "report.json", "kernels"
ATTEMPTS = 3
PART_BY_PART = "part by part: a library would read all experts, of which only some stay in memory"

__all__ = ["MANIFEST", "export_dense", "load", "read_report", "save"]


def save(compiled: CompiledModel, path: str | Path) -> None:
    """Write the model into the folder `path`, replacing an artefact that is there.

    Killed at any point, what was there before or the new artefact is there. Raises StorageError (read-only, full, locked, or something that
    is no artefact is there already), and ArtefactError for a graph that has no plain form.
    """
    with torch.no_grad(), writing(Path(path), replaceable=is_artefact) as folder:
        _write(compiled, folder)


def load(path: str | Path, model: nn.Module | None = None, target: Target | str | None = None, *, rebuild: bool = False,
         mapped: bool = False, experts_bytes: int | None = None) -> CompiledModel:
    """The model that was saved in the folder.

    model    the original model, or a fresh one of the same class: needed where the model was captured in regions. It is not modified
    target   the machine to run on; this one by default
    rebuild  compile the kernels again from their IR instead of using the binaries
    mapped   leave the weights in the file: they come from disk when they are first read, and the system drops those that were not read for the
             longest when memory is short. For mixtures with more experts than memory, whose kernel reads the chosen ones where they lie
    experts_bytes  with mapped: bytes of experts that are in memory at a time at most, all mixtures together; those used last stay. Nobody may write
             to their weights then. `compiled.resident_experts` says how many came from disk

    A packed weight is in memory once, as its kernel laid it out: what was stored stays in the file, mapped, until something reads it (state_dict,
    save, torch.compile). The folder may be removed or replaced meanwhile, but its files must not be written into.

    Raises ArtefactError: missing, damaged, changed, written by a newer version, or made for a machine whose code cannot run here.
    """
    if experts_bytes is not None and not mapped:
        raise InputError("a bound on the experts in memory is for weights that stay on disk", where="experts_bytes",
                         hint="load(..., mapped=True, experts_bytes=...)")
    for attempt in range(ATTEMPTS):
        folder = settled(Path(path))
        before = _identity(folder)
        try:
            with torch.no_grad():
                return _read(folder, model, target, rebuild, mapped, experts_bytes)
        except (ArtefactError, OSError):
            # Another process may have replaced the folder under our hands: then look again.
            if attempt + 1 == ATTEMPTS or _identity(settled(Path(path))) == before:
                raise
    raise AssertionError("unreachable")


def read_report(path: str | Path) -> Report:
    """The report inside an artefact, or of a JSON file that Report.to_json wrote. Raises ArtefactError."""
    place = settled(Path(path))
    file = place / REPORT if place.is_dir() else place
    if place.is_dir():
        peek(place)
    try:
        return Report.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"cannot be read: {error}", where=str(file), hint="give the folder that save() wrote, or a report's JSON file") from error
    except ArtefactError as error:
        raise ArtefactError(error.what, where=str(file), hint=error.hint) from error


def _write(compiled: CompiledModel, folder: Path) -> None:
    program, store = compiled.program, TensorStore()
    kernels = _KernelWriter(folder)
    regions = [_encode_region(region, store, kernels) for region in program.regions.values()]
    skeleton = None if program.skeleton is None else encode_skeleton(program, store)
    graph = {
        "stage": str(program.stage),
        "regions": regions,
        "skeleton": skeleton,
        "aliases": dict(program.aliases),
        "kernels": kernels.records,
        "left_out": [asdict(part) for part in program.left_out],
        "decisions": [asdict(d) for d in program.decisions.values()],
        "attentions": dict(program.attentions),
        "learned": {path: {name: store.add(f"{path}.{LEARNED}{name}", tensor) for name, tensor in tensors.items()}
                    for path, tensors in program.learned.items() if path in program.attentions},
        "step": encode_step(compiled.step, store, folder, KERNELS, compiled.target or host()),
        "whole": encode_whole(compiled.whole, store, folder, KERNELS, compiled.target or host()),
    }
    write_safetensors(folder / WEIGHTS, store.stored)
    (folder / GRAPH).write_text(json.dumps(graph, ensure_ascii=False, separators=(",", ":"), allow_nan=False), encoding="utf-8")
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    (folder / REPORT).write_text(replace(compiled.report(), compiled_disk_bytes=written).to_json(), encoding="utf-8")
    write_manifest(folder, {
        "target": compiled.target.to_json() if compiled.target else None, "model": compiled.report().model, "stage": str(program.stage),
        "regions": list(program.regions), "inputs": {path: _describe(region) for path, region in program.regions.items()},
        "aliases": dict(program.aliases), "kernels": len(kernels.records),
    })  # fmt: skip


def _encode_region(region: Region, store: TensorStore, kernels: _KernelWriter) -> dict[str, Any]:
    from .program import get_tensor

    def tensor_key(name: str) -> dict[str, Any]:
        return store.add(region.qualified(name), get_tensor(region.module, name))

    return encode_region(region, tensor_key, kernels.add)


def _describe(region: Region) -> list[str]:
    """The inputs as a reader of the manifest wants to see them."""
    return [
        f"{name}: {str(leaf.dtype).removeprefix('torch.')}[{', '.join(map(str, leaf.shape))}]"
        if isinstance(leaf, TensorSpec)
        else f"{name}: {leaf!r}"
        for name, leaf in zip(region.spec.names, region.spec.leaves, strict=True)
    ]


class _KernelWriter:
    """Writes the files of every kernel, equal ones once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / KERNELS
        self.records: list[dict[str, Any]] = []

    def add(self, node: fx.Node) -> int | None:
        """The number of the node's kernel; None when it has none."""
        kernel = node.meta.get("kernel")
        if kernel is None:
            return None
        files = {}
        for name, content in kernel.files().items():
            self.folder.mkdir(exist_ok=True)
            stem, _, suffix = name.partition(".")
            file = self.folder / f"{stem}-{hashlib.sha256(content).hexdigest()[:16]}.{suffix}"
            if not file.exists():
                file.write_bytes(content)
            files[name] = f"{KERNELS}/{file.name}"
        self.records.append({"options": dict(kernel.options), "files": files})
        return len(self.records) - 1


def _read(folder: Path, model: nn.Module | None, target: Target | str | None, rebuild: bool, mapped: bool,
          experts_bytes: int | None) -> CompiledModel:
    manifest = read_manifest(folder)
    made_for = Target.from_json(manifest["target"]) if manifest.get("target") else None
    try:
        graph = json.loads((folder / GRAPH).read_text(encoding="utf-8"))
        stored = read_safetensors(folder / WEIGHTS, mapped)
        source = TensorSource(stored)
        program, nodes = _decode(graph, source, model)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, AssertionError) as error:
        if isinstance(error, (ArtefactError, InputError)):
            raise
        raise ArtefactError(
            f"does not describe a model: {type(error).__name__} {error}", where=str(folder / GRAPH), hint="save the model again"
        ) from error
    runs_on = made_for
    if nodes:
        runs_on = bind_kernels(folder, manifest, graph["kernels"], nodes, made_for, target, rebuild)
    saved = graph.get("step")
    step, lost = (None, PART_BY_PART if saved else "") if experts_bytes is not None else decode_step(
        saved, folder, manifest["files"], program, source, runs_on or host(), rebuild)
    whole, missing = decode_whole(None if experts_bytes is not None else graph.get("whole"), folder, manifest["files"], program, source,
                                  runs_on or host(), rebuild)
    left = [*leave_in_artefact(folder / WEIGHTS, graph, program), *(stored.values() if mapped else ())]
    resident = None if experts_bytes is None else bound_experts(program, experts_bytes, (folder / WEIGHTS).stat().st_size)
    del source, stored
    give_back()
    report = read_report(folder)
    report.decoding, report.calls = lost or report.decoding, missing or report.calls
    compiled = CompiledModel(program, runs_on, report, left, step, whole)
    compiled.resident_experts = resident
    return compiled


def _decode(graph: Mapping[str, Any], source: TensorSource, model: nn.Module | None) -> tuple[Program, list[tuple[Region, fx.Node, int]]]:
    regions: dict[str, Region] = {}
    kernels: list[tuple[Region, fx.Node, int]] = []
    for data in graph["regions"]:
        region, numbers = decode_region(data, {name: source.get(record) for name, record in data["tensors"].items()})
        check_packed(region)
        regions[region.path] = region
        kernels += [(region, region.node(name), number) for name, number in numbers.items()]
    skeleton = None if graph["skeleton"] is None else restore_skeleton(graph["skeleton"], regions, source, model)
    decisions = [Decision(**{**d, "shape": tuple(d["shape"])}) for d in graph["decisions"]]
    program = Program(
        regions,
        Stage(graph["stage"]),
        skeleton,
        tuple(LeftOut(**part) for part in graph["left_out"]),
        graph["aliases"],
        {d.site: d for d in decisions},
        check_attentions(graph.get("attentions", {}), skeleton),
        attention_tensors(graph, source),
    )
    return program, kernels


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        facts = folder.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino
