"""Kernels of a loaded Program: bound again from the files of the artefact, or built again from their IR where the binary does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import fx

from .errors import ArtefactError, KernelError
from .far import FarKernel, is_far
from .operands import operands, operator_of, packed_operator, packed_weight
from .program import Region
from .target import Target, host, resolve


def bind_kernels(
    folder: Path,
    manifest: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    nodes: Sequence[tuple[Region, fx.Node, int]],
    made_for: Target | None,
    target: Target | str | None,
    rebuild: bool,
) -> Target:
    """Give every node its kernel; the target that they run on.

    The binaries are used on a machine that has all that they were made for, and with the same TVM. On one of the same architecture that lacks a
    feature the kernels are built again, and so they are where `target` says; on another architecture they are kept, and their nodes run by
    reference (far.py). Raises ArtefactError where none of it can be done.
    """
    if made_for is None:
        raise ArtefactError("names kernels but no target", where=str(folder / "manifest.json"), hint="save the model again")
    machine = host() if target is None else resolve(target)
    keeps = made_for.runs_on(machine) or (target is None and made_for.arch != machine.arch)
    final = made_for if keeps else machine
    for region, node, number in nodes:
        record = records[number]
        files = {} if rebuild else {name: _content(folder, manifest, file) for name, file in record["files"].items()}
        try:
            node.meta["kernel"] = _bind(region, node, record["options"], files, final)
        except KernelError as error:
            lacks = ", ".join(sorted(set(made_for.features) - set(machine.features)))
            made = f" (it was made for a machine with {lacks}, which this one has not)" if lacks else ""
            raise ArtefactError(
                f"a kernel cannot run here{made}: {error.what}", where=str(folder), hint="compile the model again on this machine"
            ) from error
    return final


def _bind(region: Region, node: fx.Node, options: Mapping[str, Any], files: Mapping[str, bytes], target: Target) -> Any:
    """The node's kernel. What it prepares from the stored weight is prepared again, so that weights are stored once."""
    from .codegen import runtime

    try:
        tensors, attributes, bias = operands(region, node)
    except ValueError as error:
        raise ArtefactError(str(error), where="graph.json", hint="save the model again") from error
    if is_far(target):
        if not runtime.is_portable(options):
            return FarKernel(str(options.get("family")), options, target, None, files)
        laid = runtime.lay(operator_of(node), options, tensors, attributes, bias, target)
        return FarKernel(laid.name, options, target, lambda: laid, files)
    return runtime.rebind(operator_of(node), options, tensors, attributes, bias, files, target)


def check_packed(region: Region) -> None:
    """Every packed weight is what its format demands, so that no kernel reads past an end. Raises ArtefactError."""
    for node in region.graph.nodes:
        if packed_operator(node):
            packed_weight(region, node)


def _content(folder: Path, manifest: Mapping[str, Any], name: str) -> bytes:
    if name not in manifest["files"]:
        raise ArtefactError(f"names a file that the manifest does not: {name!r}", where="graph.json", hint="save the model again")
    return (folder / name).read_bytes()
