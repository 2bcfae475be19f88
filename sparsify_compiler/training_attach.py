"""attach(): a recipe's rewrites on a copy of the model that trains in the user's own loop, and the hook that the loop calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .anew import Foreign
from .calibrate import calibrate
from .call import instantiate, own_tensors
from .capture_batch import captured_for_any_batch
from .compile import as_pipeline, read_batches
from .errors import InputError
from .masked import Masked, mask_product
from .normal_form_edit import argument
from .operands import packed_operator
from .packed import put_packed
from .passes_api import Context, Pass
from .pipeline import Pipeline
from .program import Program, Region, Stage, get_tensor
from .site_block import find_blocks
from .site_ffn import neurons_of
from .sites import find_sites
from .training import KNOWN, META, Hook, Layer, Marked, Part, TrainingPass, Watch, WatchedAttention, watch
from .training_attention import put_attentions

Inputs = tuple[Any, ...] | Mapping[str, Any]


def attach(model: nn.Module, example_inputs: Inputs, recipe: str | Path | Pipeline | Pass, *, calibration: Iterable[Inputs] | None = None,
           density: float | None = None, dynamic: Any = None, seed: int = 0) -> tuple[nn.Module, Hook]:
    """Rewrite a model for training with a recipe: (a module with the model's signature that trains, the hook for the loop).

    model           in evaluation mode. It is not modified and shares no tensor with the result
    example_inputs  a tuple of positional or a dict of named arguments
    recipe          as in compile(); it may not lower. With pack() at its end linear layers train packed: their kept values are the parameters,
                    gradients and the optimizer hold nothing else, and forward and backward run over the kept places alone
    calibration     batches like example_inputs, for recipes that need statistics
    density         for recipes that leave it to the budget
    dynamic         as in compile(): dimensions that may change between calls. By default the first of every tensor (the batch), where the model
                    allows it

    The module is plain PyTorch: parameters under the model's own names, what a rewrite added beside them, and it saves, moves, and goes through
    compile() when it is trained. Dropout is not in it: the graph is that of the model in evaluation. A learned activation's parameters are among
    its parameters(), so make the optimizer after.

    Raises InputError, CaptureError and their like, as compile() does.
    """
    pipeline, batches = as_pipeline(recipe), read_batches(calibration)
    ctx = Context(example_inputs=example_inputs, density=density, seed=seed, trains=True)
    if batches is not None:
        ctx.batches = batches
        ctx.calibrate = lambda program, needs: calibrate(program, batches, needs)
    with torch.no_grad():
        captured = captured_for_any_batch(model, example_inputs, dynamic)
        program = pipeline.run(captured, ctx)
    made = [node for _, node in program.nodes() if node.meta.get("by") == "pack" and node.op == "call_function"]
    foreign = [str(node.target) for node in made if not packed_operator(node)]
    if program.stage not in (Stage.TRACED, Stage.SPARSE, Stage.PACKED) or foreign:
        raise InputError(f"this recipe lowers, or packs what does not train packed{f': {foreign[0]}' if foreign else ''}", where="recipe",
                         hint="attach with the rewrites alone; compile() packs and lowers what was trained")
    trained = {(region.path, name): tensor.requires_grad for region in captured.regions.values() for name, tensor in region.module.named_parameters()}
    module, hook = hooked(program, own=True, trained=trained)
    hook.foreign = Foreign(model.parameters())
    return module, hook


def hooked(program: Program, own: bool, trained: Mapping[tuple[str, str], bool] | None = None) -> tuple[nn.Module, Hook]:
    """A rewritten Program as a module to train, and its hook.

    own      with tensors of its own, else with those of the Program
    trained  (path of the region, name of a weight) -> was it trained in the model? Of those that are packed; all are where nothing is said
    """
    watched = program.clone()
    blocks = [(block.path, region := watched.regions[block.region], region.node(block.output)) for block in find_blocks(watched)]
    packed = put_packed(watched, trained or {})
    taps: dict[Any, Watch | Masked] = {}  # (node, what makes the tap), of which passes of one kind share one

    def watch_of(region: Region, node: fx.Node) -> Watch:
        made = taps.get((node, TrainingPass.tap)) or watch(region, f"sparsify_watch_{len(taps)}", node)
        assert isinstance(made, Watch)
        taps[node, TrainingPass.tap] = made
        return made

    ffns = [(site.path, watched.regions[site.region], neurons_of(watched.regions[site.region], site)) for site in find_sites(watched, ("ffn",))]
    scored = [(site.path, watched.regions[site.region], watched.regions[site.region].node(site.roles["attention"]))
              for site in find_sites(watched, ("attention",)) if "eager" not in site.facts]
    values = {path: Marked(path, watch_of(region, node)) for path, region, node in ffns}
    states = {path: watch_of(region, node) for path, region, node in blocks}
    attentions = {path: _watched_attention(region, node, watch_of) for path, region, node in scored}
    marks = [(by, path, region, node) for region, node in watched.nodes() for by, path in node.meta.get(META, ())]
    reads = [(_stored(node), node.meta.get(KNOWN, {})) for _, _, _, node in marks]
    movers: dict[Any, TrainingPass] = {}
    for by, path, region, node in sorted(marks, key=lambda mark: mark[0].stands):
        tap = taps.get((node, type(by).tap))
        stands = node in packed or (isinstance(tap, Masked) and any(tap is part for part in region.module.children()))
        if stands and movers.get((node, type(by).tap), by) != by:
            raise InputError(f"another pass moves this mask: {by.name()}() is there twice", where=path, hint="one of them, or other targets=")
        movers[node, type(by).tap] = by
        if node not in packed and (node, type(by).tap) not in taps:
            taps[node, type(by).tap] = by.tap(region, f"sparsify_watch_{len(taps)}", node)
    put_attentions(watched)
    for region in watched.regions.values():
        region.module.recompile()
    module = own_tensors(instantiate(watched)) if own else instantiate(watched)
    acting(module)
    marked: dict[TrainingPass, list[Marked]] = {}
    for (by, path, region, node), (names, known) in zip(marks, reads, strict=True):
        tensors = {key: get_tensor(module, region.qualified(name)) for key, name in names.items()}
        marked.setdefault(by, []).append(Marked(path, packed.get(node) or taps[node, type(by).tap], tensors, watched.decisions.get(path), known))
    parts: list[Part] = [by.part(places) for by, places in marked.items()]
    layers = _masked(module, program) | {_path_of(node): layer for node, layer in packed.items()}
    return module, Hook(parts, values, states, attentions, layers, _block_parameters(module, watched, blocks))


def acting(module: nn.Module) -> None:
    """Let act what does in training alone, until the user says eval(). The rest stays the model in evaluation, without dropout."""
    for one in module.modules():
        if isinstance(one, Watch):
            one.acts = True


def _watched_attention(region: Region, node: fx.Node, watch_of: Callable[[Region, fx.Node], Watch]) -> WatchedAttention:
    query, key, mask, causal, scale = (argument(node, name) for name in ("query", "key", "attn_mask", "is_causal", "scale"))
    seen = watch_of(region, mask) if isinstance(mask, fx.Node) else None
    return WatchedAttention(watch_of(region, query), watch_of(region, key), seen, bool(causal), scale)


def _stored(node: fx.Node) -> dict[str, str]:
    """Argument of a node, or one of a list of them as "name[0]" -> the name of the parameter or buffer that it is."""
    given = dict(node.kwargs)
    for key, value in node.kwargs.items():
        given |= {f"{key}[{i}]": item for i, item in enumerate(value)} if isinstance(value, list | tuple) else {}
    return {key: str(value.target) for key, value in given.items() if isinstance(value, fx.Node) and value.op == "get_attr"}


def _block_parameters(module: nn.Module, program: Program, blocks: Iterable[tuple[str, Region, fx.Node]]) -> dict[str, list[nn.Parameter]]:
    """Path of each block -> the parameters of a trained module that its output depends on, without those of blocks before it."""
    found: dict[str, list[nn.Parameter]] = {}
    seen: set[fx.Node | nn.Parameter] = set()
    for path, region, output in blocks:
        waiting, found[path] = [output], []
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += node.all_input_nodes
                found[path] += [one for one in _read(module, region, node) if isinstance(one, nn.Parameter) and one not in seen]
                seen.update(found[path])
    return found


def _read(module: nn.Module, region: Region, node: fx.Node) -> Iterable[Tensor]:
    """The tensors of a trained module that a node is, or calls."""
    name = region.qualified(str(node.target))
    if node.op == "get_attr":
        return [get_tensor(module, name)]
    return module.get_submodule(name).parameters() if node.op == "call_module" else ()


def _masked(module: nn.Module, program: Program) -> dict[str, Layer]:
    """Path of each masked layer -> its weight and mask in the trained module; of a weight that is computed (of an adapter, say) what it is by now."""
    found = ((region, node, mask_product(region, node)) for region, node in program.nodes())
    return {_path_of(node): (partial(_now, module, region, parts[0]), get_tensor(module, region.qualified(parts[1])))
            for region, node, parts in found if parts is not None}


def _now(module: nn.Module, region: Region, node: fx.Node) -> Tensor:
    """The value of a constant node of a region's graph, of the trained module's tensors."""
    if node.op == "get_attr":
        return get_tensor(module, region.qualified(str(node.target)))
    given = {source: _now(module, region, source) for source in node.all_input_nodes}
    assert callable(node.target)
    value: Tensor = node.target(*fx.map_arg(node.args, given.__getitem__), **fx.map_arg(node.kwargs, given.__getitem__))
    return value


def _path_of(node: fx.Node) -> str:
    return str(node.meta.get("site") or node.meta.get("path") or node.name)
