"""A compiled model as one library and its weights, for machines without PyTorch: the folder that CompiledModel.export() writes.

    manifest.json         what it is, for which machine, functions with their inputs, outputs and parameters, symbols, sha256 of every other file
    model.so              all code, for the target
    weights.safetensors   every parameter under its name
    run.py                runs it from Python, with apache-tvm-ffi and libtvm_runtime.so only; sparsify.h is the same for C and C++
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from .artefact_manifest import MANIFEST, versions
from .compiled import CompiledModel
from .errors import InputError, ModelError
from .export_library_attentions import plain_attentions
from .export_library_blocks import LONGEST
from .export_library_cached import CAPACITY, PAST, with_cache
from .export_library_limits import limits_of
from .export_library_products import ROWS, Products
from .export_library_selections import spell
from .program import InputSpec, Program, Region, TensorSpec, get_tensor
from .storage import sha256, write_safetensors, writing
from .target import Target, host, resolve

if TYPE_CHECKING:
    from .codegen.whole_graph import Library

LIBRARY, WEIGHTS, RUNNER, KIND, FORMAT = "model.so", "weights.safetensors", "run.py", "library", 1
DECODE = "decode"   # the function of one token for each text
DECODED = (1,)      # rows of x that the layers of a model with a cache are laid out for: most are those of one token
WHOLE = "compile it with example inputs of a call that exports whole; save() keeps it for PyTorch"
DECODER = ('compile it without its own cache, sc.compile(model, {"input_ids": ids, "use_cache": False}, dynamic={"input_ids": {0: "batch", '
           '1: "tokens"}}, ...), and export(..., cache=True): the library takes the cache as arguments. save() keeps what you have for PyTorch')
ALIGNED = 64        # bytes that the kernels' tensors start at multiples of


def export(compiled: CompiledModel, path: str | Path, target: str | Target | None = None, *, cache: bool = False,
           longest: int = LONGEST) -> None:
    """Write the folder `path`, whole or not at all, replacing a library that is there.

    target  the machine to run on, which need not be this one; by default the one that the model was compiled for
    cache   a language model with its key-value cache as arguments, which are changed in place: functions "prefill" and "decode" instead of "main",
            which give the logits of the last token (export_library_cached.py)
    longest tokens of a text at most, where attention reads some blocks of the keys and the model itself sets no limit

    Raises InputError (longest), ModelError (captured in parts, an input that is no tensor), KernelError (an operator without a translation,
    no C compiler), TargetError, StorageError.
    """
    if longest < 1:
        raise InputError(f"texts of at most {longest} tokens", where="export", hint="longest is at least 1, such as 8192")
    for_target = resolve(target) if target is not None else compiled.target or host()
    with torch.no_grad():
        library, ranges = _compile(compiled.program, for_target, cache, longest)
        with writing(Path(path), replaceable=is_library) as folder:
            _write(library, compiled.program, ranges, folder)


def is_library(folder: Path) -> bool:
    """True for a folder that export() wrote, whole or damaged."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("kind") == KIND  # type: ignore[no-any-return]
    except (OSError, ValueError, AttributeError):
        return False


def _compile(program: Program, target: Target, cache: bool, longest: int) -> tuple[Library, dict[str, Any]]:
    """The library, and what its symbols may be."""
    from .codegen.whole_graph import ARCHITECTURES, Input, compile_graphs, compiler_for

    whole = whole_region(program)
    if target.arch in ARCHITECTURES:
        compiler_for(target)    # before all that takes long
    ranges = dict(whole.spec.ranges)
    if not cache:
        region, most = _plain(whole, longest)
        ranges |= {name: (ranges.get(name, (1, None))[0], limit) for name, limit in most.items()}
        functions = _functions(region, target, {"main": _inputs(whole.spec)}, output_names(whole.spec), ROWS)
        return compile_graphs(functions, ranges, target), ranges
    made, ids = with_cache(whole, longest), _inputs(whole.spec)[0]
    batch, tokens = ids.shape
    low, high = ranges.get(tokens, (1, None))
    limit = min((one for one in (made.longest, high) if one is not None), default=None)
    ranges |= {tokens: (low, limit), CAPACITY: (1, limit)}      # a cache holds no more than a text: tables of places end there
    more = [Input(PAST, (1,), "int64"),
            *(Input(name, (batch, groups, CAPACITY, width), "float32", updated=True) for name, (groups, width) in made.caches.items())]
    given = {"prefill": [ids, *more], DECODE: [replace(ids, shape=(batch, 1)), *more]}
    return compile_graphs(_functions(made.region, target, given, ["logits"], DECODED), whole.spec.ranges, target), ranges


def _plain(region: Region, longest: int) -> tuple[Region, dict[str, int]]:
    """A copy whose attentions whole graphs compute; what symbols are at most for their sake."""
    region = region.clone()
    return region, plain_attentions(region, longest)


def _functions(region: Region, target: Target, inputs: Mapping[str, list[Any]], outputs: list[str], rows: tuple[int, ...]) -> list[Any]:
    """Functions of the same graph, for inputs of several shapes; they share their laid out weights."""
    from .codegen.whole_graph import Function

    region = region.clone()
    spell(region)
    products, functions = Products(region, target, rows), []
    for name, given in inputs.items():
        copy = region.clone()
        found, computed = products.within(copy)
        functions.append(Function(name, copy.graph, lambda tensor: get_tensor(region.module, tensor), given, outputs, found, computed,
                                  tuple(products.reference), one_token=name == DECODE))
    return functions


def whole_region(program: Program) -> Region:
    """The only graph of a model. Raises ModelError where it was captured in parts."""
    if program.skeleton is not None:
        parts = ", ".join(sorted(program.regions)[:3])
        raise ModelError("a model that was captured in parts has Python between them", where=parts,
                         hint=DECODER if callable(getattr(program.skeleton, "generate", None)) else WHOLE)
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
    names = [".".join(map(word_of, path)) for path, _ in paths]
    return ["output" if not name else f"output_{name}" if name[0].isdigit() else name for name in names]


def word_of(key: Any) -> str:
    """A step into nested outputs or inputs, as one writes it."""
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _write(library: Library, program: Program, ranges: Mapping[str, Any], folder: Path) -> None:
    library.write(folder / LIBRARY)
    write_safetensors(folder / WEIGHTS, library.parameters, ALIGNED)
    shutil.copyfile(Path(__file__).parent / "codegen" / "deploy" / RUNNER, folder / RUNNER)
    region = program.regions[""]
    data = {
        "format": FORMAT, "kind": KIND, "target": library.target.to_json(), "versions": versions(), "functions": library.functions,
        "symbols": {name: list(limits) for name, limits in ranges.items()}, "limits": limits_of(region),
        "reference": list(library.reference),
        "files": {name: sha256(folder / name) for name in (LIBRARY, WEIGHTS, RUNNER)},
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
