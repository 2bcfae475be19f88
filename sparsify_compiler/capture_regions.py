"""Where the whole model cannot be exported: its largest exportable submodules, each in its place, around which the model stays Python."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .call import CapturedModule, Hole, clone_structure
from .capture_calls import Record, learned_call, record
from .capture_graph import NotExportableError, export_region
from .capture_inputs import ExampleCall
from .capture_reuse import build_of, reuse
from .capture_verify import agree, allow_ones
from .errors import CaptureError, InputError
from .library_attention import take_indexers
from .normal_form import normalise
from .normal_form_edit import aten
from .program import LeftOut, Program, Region, prune_unused
from .shapes import note_sizes

_PRODUCTS = {aten.linear, aten.conv1d, aten.conv2d, aten.conv3d, aten.conv_transpose1d, aten.conv_transpose2d, aten.matmul, aten.bmm, aten.mm,
             aten.addmm, aten.baddbmm, aten.einsum, aten._grouped_mm, aten.scaled_dot_product_attention, aten.lstm, aten.gru}


@dataclass
class _Search:
    """State of one walk over the module tree."""

    model: nn.Module
    records: dict[str, Record]
    progress: Callable[[str, int, int], None]
    trains: bool
    regions: dict[str, Region] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    builds: dict[Hashable, Region] = field(default_factory=dict)  # regions by what decides their graph
    done: int = 0


def capture_regions(model: nn.Module, call: ExampleCall, reason: str, progress: Callable[[str, int, int], None], trains: bool = False) -> Program:
    """The Program of a model whose whole cannot be captured, for `reason`.

    Raises CaptureError when no submodule can be captured either, and InputError when the model fails at other sizes of its dynamic dimensions.
    """
    try:
        skeleton = clone_structure(model)
    except Exception as problem:  # deepcopy runs the user's own __deepcopy__ and __reduce__
        raise CaptureError(f"the model cannot be captured whole ({reason}), nor in parts: its module tree cannot be copied ({problem})") from problem
    search = _Search(skeleton, record(skeleton, call), progress, trains)
    search.left_out.append(LeftOut("", reason))
    for name, child in skeleton.named_children():
        _visit(search, name, child)
    if not search.regions:
        inside = "; ".join(f"{part.path}: {part.reason}" for part in search.left_out[1:4])
        raise CaptureError(f"no part of the model could be captured. The whole: {reason}. {inside}".rstrip())
    dig_holes(skeleton, search.regions)
    tied = _tied_names(model, search)
    attentions, learned = take_indexers(skeleton)
    return Program(search.regions, skeleton=skeleton, left_out=tuple(search.left_out), aliases=tied, attentions=attentions, learned=learned)


def _visit(search: _Search, path: str, module: nn.Module) -> None:
    if path in search.regions or next(module.parameters(), None) is None:
        return
    search.done += 1
    search.progress("capture", min(search.done, len(search.records)), len(search.records))
    if path not in search.records:
        if not any(name.startswith(f"{path}.") for name in search.records):
            search.left_out.append(LeftOut(path, "it is not called on the example inputs"))
            return
    else:
        reason = _nothing_to_gain(module) or _try(search, path, module)
        if reason is None:
            return
        search.left_out.append(LeftOut(path, reason))
        if _nothing_to_gain(module):
            return
    for name, child in module.named_children():
        _visit(search, f"{path}.{name}", child)


def _nothing_to_gain(module: nn.Module) -> str | None:
    """Why a module is not worth a region of its own."""
    if all(p.dim() < 2 for p in module.parameters()):
        return "it holds no matrix"
    matrices = {id(p) for p in module.parameters() if p.dim() >= 2}
    looked_up = {id(m.weight) for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    return "it looks rows up, which is no matrix product" if matrices <= looked_up else None


def _try(search: _Search, path: str, module: nn.Module) -> str | None:
    """Capture one submodule. None when it worked, else the reason."""
    found = search.records[path]
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks"
    call = learned_call(module, found)
    if isinstance(call, str):
        return call
    build = build_of(module, call)
    known = search.builds.get(build)
    if known is not None:
        region = reuse(known, module, path)
        if agree(CapturedModule(region), module, call):
            search.regions[path] = region
            return None
    try:
        region = _captured(path, module, call, search.trains)
    except (NotExportableError, InputError) as problem:
        return str(getattr(problem, "what", problem))
    search.builds[build] = search.regions[path] = region
    return None


def _captured(path: str, module: nn.Module, call: ExampleCall, trains: bool) -> Region:
    """One submodule as a region. Raises NotExportableError, and InputError where it fixes a dimension that varies."""
    region, _ = export_region(module, call, path, trains)
    normalise(region.module, trains)
    prune_unused(region)
    if not any(getattr(node.target, "overloadpacket", None) in _PRODUCTS for node in region.graph.nodes):
        raise NotExportableError("it holds no matrix product")
    if module._parameters and not list(region.module.parameters()):
        raise NotExportableError("its weights come to it as arguments: what calls it reads them from it")
    if not agree(CapturedModule(region), module, call):
        raise NotExportableError("its graph does not reproduce it: it keeps state between calls or draws random numbers")
    note_sizes(region, call)
    allow_ones(region, module, call)
    return region


def dig_holes(skeleton: nn.Module, regions: dict[str, Region]) -> None:
    """Put a Hole for each region, wherever the module tree refers to its module."""
    holes = {}
    for path in regions:
        module = skeleton.get_submodule(path)
        holes[id(module)] = Hole(_attributes(module), path, type(module).__name__)
    for module in list(skeleton.modules()):
        for name, child in module._modules.items():
            if id(child) in holes:
                module._modules[name] = holes[id(child)]


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What neighbours may read of a module: its own attributes but tensors, and plain values of its class (main_input_name)."""
    kinds = [kind for kind in reversed(type(module).__mro__) if kind not in nn.Module.__mro__]
    of_class = {name: value for kind in kinds for name, value in vars(kind).items() if isinstance(value, str | int | float | tuple)}
    own = {name: value for name, value in vars(module).items() if not isinstance(value, Tensor)}
    return {name: value for name, value in (of_class | own).items() if not name.startswith("_")}


def _tied_names(model: nn.Module, search: _Search) -> dict[str, str]:
    """Whole-model names of tied parameters: other name -> the name that a region's graph uses."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    used = {region.qualified(name) for region in search.regions.values() for name, _ in region.module.named_parameters(remove_duplicate=False)}
    aliases = {}
    for group in names.values():
        first = next((name for name in group if name in used), None)
        if first is not None:
            aliases.update({name: first for name in group if name != first})
    return aliases


