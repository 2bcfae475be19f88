"""One token of a language model as one graph: what stands between its captured parts is captured with them, and keys are in the caches it is given.

The model is called without a cache on one token at a place of its own; every attention of it then becomes one over a cache, which gets the token's
key and value in place. That this is the model is not taken on trust: step.py compares the two on texts of several lengths, with and without padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from .branches import parse
from .call import NOTING, instantiate
from .capture import capture
from .errors import CaptureError, ModelError
from .export_library_cached import PAST
from .indexer import Indexer
from .library_attention import find_library_attentions, give_indexers
from .normal_form_edit import argument
from .ops import attend
from .program import Program, Region, prune_unused

IDS, PLACES, STARTS = "input_ids", "position_ids", "starts"
DTYPES = (torch.float32, torch.bfloat16)
EVER = 1 << 30  # more keys than any text has
DENSE = f"Indexer(always=(Everything(),), dense_below={EVER}, dense_below_decoding={EVER})"
BATCH = 2       # of the call that is captured: one would be taken for a fixed size
BY = "step"


@dataclass
class StepGraph:
    """A region whose inputs are input_ids [B, 1], position_ids [B, 1], past [1], starts [B] (int64), and two caches [B, G, capacity, D] a layer.

    caches  name -> (groups, width), keys before values, layer by layer
    Its output is [B, 1, vocabulary].
    """

    region: Region
    dtype: torch.dtype
    caches: dict[str, tuple[int, int]] = field(default_factory=dict)


def attend_step(query: Tensor, key: Tensor, value: Tensor, past: Tensor, starts: Tensor, key_cache: Tensor, value_cache: Tensor,
                scale: float | None) -> Tensor:
    """Attention of one token over a cache from `starts` on, which gets its key and value, in place.

    query [B, H, 1, D], key [B, G, 1, D], value [B, G, 1, E], past [1], starts [B] int64, caches [B, G, capacity, D or E] -> [B, H, 1, E]
    """
    before = int(past[0])
    key_cache[:, :, before:before + 1], value_cache[:, :, before:before + 1] = key, value
    keys, values = (cache[:, :, : before + 1].to(query.dtype) for cache in (key_cache, value_cache))
    mask = torch.arange(before + 1) >= starts[:, None, None, None]
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)


def step_graph(program: Program) -> StepGraph:
    """The graph of one token. Raises ModelError: why there is none."""
    model = _plain_model(program)
    try:
        tokens = {IDS: torch.ones(BATCH, 1, dtype=torch.int64), PLACES: torch.zeros(BATCH, 1, dtype=torch.int64)}
        captured = capture(model, {**tokens, "use_cache": False}, {IDS: {0: "batch"}, PLACES: {0: "batch"}})
    except CaptureError as error:
        raise ModelError(f"its step cannot be captured: {error.what}") from error
    if captured.skeleton is not None:
        raise ModelError(f"its step cannot be captured whole: {captured.left_out[0].reason}")
    return _with_caches(captured.regions[""], model)


def _plain_model(program: Program) -> nn.Module:
    """The model by its portable operators, whose attentions are all found as one op. Raises ModelError."""
    if program.skeleton is None:
        raise ModelError("it was captured whole, as a graph of whole texts")
    if not callable(getattr(program.skeleton, "generate", None)):
        raise ModelError("it has no generate()")
    if getattr(getattr(program.skeleton, "config", None), "is_encoder_decoder", False):
        raise ModelError("it writes one text while it reads another: a step of it needs both")
    if any(str(node.target) in NOTING for _, node in program.nodes()):
        raise ModelError("its parts remember something from one token to the next")
    for path, text in program.attentions.items():
        if not _is_dense(text):
            raise ModelError("it attends to some of the keys only, or in another way", where=path)
    plain = replace(program.clone(), attentions={}, learned={})
    model = instantiate(plain)
    attentions = find_library_attentions(model)
    refused = [f"{path}: {why}" for path, why in attentions.items() if why]
    if not attentions or refused:
        raise ModelError(refused[0] if refused else "no attention of it asks the registry of the library")
    give_indexers(model, dict.fromkeys(attentions, DENSE), {})
    return model


def _is_dense(text: str) -> bool:
    indexer = parse(text)
    return isinstance(indexer, Indexer) and indexer.is_dense(1, EVER - 1)


def _with_caches(region: Region, model: nn.Module) -> StepGraph:
    graph, output = region.graph, next(node for node in reversed(region.graph.nodes) if node.op == "output")
    logits: Any = output.args[0]
    if len(logits) != 1 or logits[0].meta["val"].dim() != 3:
        raise ModelError("its output is not one tensor [batch, tokens, vocabulary]")
    made = StepGraph(region, logits[0].meta["val"].dtype)
    if made.dtype not in DTYPES:
        raise ModelError(f"its logits are {str(made.dtype).removeprefix('torch.')}, and caches of libraries are float32 or bfloat16")
    place = [node for node in graph.nodes if node.op == "placeholder"][-1]
    inputs: dict[str, fx.Node] = {}
    for name, shape in ((PAST, (1,)), (STARTS, (1,))):
        place = inputs[name] = _placeholder(graph, place, name, torch.empty(shape, dtype=torch.int64, device="meta"))
    found = sorted(((_layer(model, node), node) for node in graph.nodes if node.target is attend.op), key=lambda pair: pair[0])
    if [number for number, _ in found] != list(range(len(found))):
        raise ModelError("its attentions are not those of layers that are counted from 0 on")
    for number, node in found:
        place = _replace(made, node, number, inputs, place)
    graph.eliminate_dead_code()
    prune_unused(region)
    return made


def _layer(model: nn.Module, node: fx.Node) -> int:
    """The number under which a cache holds the keys of an attention."""
    number = getattr(model.get_submodule(str(node.meta.get("path", ""))), "layer_idx", None)
    if not isinstance(number, int):
        raise ModelError("an attention has no number of its layer", where=str(node.meta.get("path", "")))
    return number


def _replace(made: StepGraph, node: fx.Node, number: int, inputs: Mapping[str, fx.Node], place: fx.Node) -> fx.Node:
    """Put an attention over a cache in the place of one without; the last placeholder."""
    graph, given = made.region.graph, [argument(node, name) for name in ("query", "key", "value")]
    caches: list[fx.Node] = []
    for name, one in zip(("key", "value"), given[1:], strict=True):
        _, groups, tokens, width = one.meta["val"].shape
        if not (isinstance(groups, int) and isinstance(width, int) and tokens == 1) or one.meta["val"].dtype is not made.dtype:
            raise ModelError("heads or their widths vary, or keys are of another dtype than logits", where=node.name)
        place = _placeholder(graph, place, f"{name}_{number}", torch.empty((1, groups, 1, width), dtype=made.dtype, device="meta"))
        made.caches[place.name] = groups, width
        caches.append(place)
    with graph.inserting_before(node):
        new = graph.call_function(attend_step, (*given, inputs[PAST], inputs[STARTS], *caches, argument(node, "scale")))
    new.meta = {key: value for key, value in node.meta.items() if key in ("val", "path", "module")} | {"by": BY}
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return place


def _placeholder(graph: fx.Graph, place: fx.Node, name: str, value: Tensor) -> fx.Node:
    with graph.inserting_after(place):
        node: fx.Node = graph.placeholder(name)
    node.meta = {"val": value, "by": BY}
    return node
