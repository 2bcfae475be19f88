"""A compiled model as one library and its weights, for machines without PyTorch: the folder that CompiledModel.export() writes.

    manifest.json         what it is, for which machine, functions with their inputs, outputs and parameters, symbols, sha256 of every other file
    model.so              all code, for the target
    weights.safetensors   every parameter under its name
    run.py                runs it from Python, with apache-tvm-ffi and libtvm_runtime.so only; sparsify.h is the same for C and C++
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from .artefact_manifest import MANIFEST, versions
from .compiled import CompiledModel
from .errors import ModelError
from .library_products import Products
from .program import InputSpec, Program, Region, TensorSpec, get_tensor
from .storage import sha256, write_safetensors, writing
from .target import Target, host, resolve

if TYPE_CHECKING:
    from .codegen.whole_graph import Library

LIBRARY, WEIGHTS, RUNNER, KIND, FORMAT = "model.so", "weights.safetensors", "run.py", "library", 1
ALIGNED = 64        # bytes that the kernels' tensors start at multiples of


def export(compiled: CompiledModel, path: str | Path, target: str | Target | None = None) -> None:
    """Write the folder `path`, whole or not at all, replacing a library that is there.

    target  the machine to run on, which need not be this one; by default the one that the model was compiled for

    Raises ModelError (captured in parts, an input that is no tensor), KernelError (an operator without a translation, no C compiler), TargetError,
    StorageError.
    """
    for_target = resolve(target) if target is not None else compiled.target or host()
    with torch.no_grad():
        library = _compile(compiled.program, for_target)
        with writing(Path(path), replaceable=is_library) as folder:
            _write(library, compiled.program, folder)


def is_library(folder: Path) -> bool:
    """True for a folder that export() wrote, whole or damaged."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("kind") == KIND  # type: ignore[no-any-return]
    except (OSError, ValueError, AttributeError):
        return False


def _compile(program: Program, target: Target) -> Library:
    from .codegen.whole_graph import Function, compile_graphs

    region = _whole(program).clone()
    products = Products(region, target)
    spec = region.spec
    function = Function("main", region.graph, lambda name: get_tensor(region.module, name), _inputs(spec), output_names(spec), products.found,
                        frozenset(products.computed))
    return compile_graphs([function], spec.ranges, target)


def _whole(program: Program) -> Region:
    if program.skeleton is not None:
        parts = ", ".join(sorted(program.regions)[:3])
        raise ModelError("a model that was captured in parts has Python between them", where=parts,
                         hint="compile it with example inputs of a call that exports whole, such as use_cache=False; save() keeps it for PyTorch")
    return program.regions[""]


def _inputs(spec: InputSpec) -> list[Any]:
    from .codegen.whole_graph import Input

    found = []
    for name, leaf in zip(spec.names, spec.leaves, strict=True):
        if isinstance(leaf, TensorSpec):
            found.append(Input(name, leaf.shape, str(leaf.dtype).removeprefix("torch.")))
    return found


def output_names(spec: InputSpec) -> list[str]:
    """What the outputs are called: the keys under which the model returns them, or output, or output_0, output_1, ..."""
    count = spec.out_spec.num_leaves
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(count)), spec.out_spec))
    names = [".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path) for path, _ in paths]
    return ["output" if not name else f"output_{name}" if name[0].isdigit() else name for name in names]


def _write(library: Library, program: Program, folder: Path) -> None:
    library.write(folder / LIBRARY)
    write_safetensors(folder / WEIGHTS, library.parameters, ALIGNED)
    shutil.copyfile(Path(__file__).parent / "codegen" / "deploy" / RUNNER, folder / RUNNER)
    ranges = program.regions[""].spec.ranges
    data = {
        "format": FORMAT, "kind": KIND, "target": library.target.to_json(), "versions": versions(), "functions": library.functions,
        "symbols": {name: list(limits) for name, limits in ranges.items()}, "reference": list(library.reference),
        "files": {name: sha256(folder / name) for name in (LIBRARY, WEIGHTS, RUNNER)},
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
