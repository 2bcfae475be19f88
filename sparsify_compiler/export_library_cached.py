"""A language model with its key-value cache as arguments: what a whole graph decodes with, where no library keeps a cache for it.

The graph of a whole forward pass, in which positions and the causal mask are made from numbers of tokens, becomes one that takes how many tokens came
before and every layer's cache: positions begin there, new keys and values are written into the caches in place, and attention reads those of all
tokens so far. Nothing is taken on trust: the mask is compared with causality, and the rewritten graph, fed in pieces, with the whole one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from .errors import ModelError
from .executor import flat_function, part_function
from .export_library_attentions import Attention, attention_of, plain_attentions
from .export_library_blocks import ALWAYS, LONGEST, places_read, within
from .indexer import Indexer
from .normal_form_edit import argument
from .ops import attend
from .ops.attend_blocks import EXTENT
from .program import Region, TensorSpec

aten = torch.ops.aten
PAST, CAPACITY = "past", "capacity"
SIZES = ((1, 1), (2, 5))    # (batch, tokens) at which masks are looked at
TOLERANCES = {torch.float32: 1e-4}
BLOCKS = 9      # arguments of attend_cached before the numbers of blocks
COARSE = 5e-2       # in fewer bits, which sums of other lengths round in another way
HINT = "export it without its cache, or compile it with input_ids alone, use_cache=False and dynamic tokens"


def attend_cached(query: Tensor, key: Tensor, value: Tensor, past: Tensor, key_cache: Tensor, value_cache: Tensor, scale: float | None,
                  table: Tensor | None = None, tiles: Tensor | None = None, *more: Any) -> Tensor:
    """Causal attention of new tokens over all so far; the caches get the new keys and values, in place.

    query [B, H, n, D], key [B, G, n, D], value [B, G, n, E], past [1] int64, key_cache [B, G, capacity, D], value_cache [B, G, capacity, E], float32
    table, tiles, more   of the blocks that are read, as in attend_blocked; all, without. Chosen by scores, those of the queries at hand count
    -> [B, H, n, E]
    """
    before, new = int(past[0]), query.shape[2]
    key_cache[:, :, before:before + new], value_cache[:, :, before:before + new] = key, value
    keys, values = (cache[:, :, : before + new] for cache in (key_cache, value_cache))
    if len(more) > EXTENT:
        return attend.by_indexer(within(str(more[-1]), more), query.float(), keys, values, is_causal=True, scale=scale).to(query.dtype)
    keys, values = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (keys, values))
    mask = torch.arange(before + new) <= torch.arange(before, before + new)[:, None]
    if table is not None and tiles is not None:
        mask = mask & places_read(new, before + new, table, tiles, more)
    return torch.nn.functional.scaled_dot_product_attention(query.float(), keys, values, attn_mask=mask, scale=scale).to(query.dtype)


@dataclass
class Cached:
    """The rewritten region: its inputs are those of before, then `past` and the caches.

    caches   name -> (groups, width) of each cache, in the order of the inputs
    longest  tokens of a text, where attention reads blocks by a table
    """

    region: Region
    caches: dict[str, tuple[int, int]] = field(default_factory=dict)
    longest: int | None = None


def with_cache(original: Region, longest: int = LONGEST) -> Cached:
    """A copy of the region with caches. Raises ModelError where it is no causal language model of one input that can be rewritten."""
    tensors = [leaf for leaf in original.spec.leaves if isinstance(leaf, TensorSpec)]
    if len(tensors) != 1 or len(tensors[0].shape) != 2 or tensors[0].dtype is not torch.int64 or isinstance(tensors[0].shape[1], int):
        raise ModelError("a cache is for models whose only input is token ids [batch, tokens], with tokens dynamic", hint=HINT)
    made = Cached(original.clone())
    made.longest = min(plain_attentions(made.region, longest).values(), default=None)
    region, graph = made.region, made.region.graph
    attentions = [(node, found) for node in graph.nodes if (found := attention_of(node))]
    if not attentions:
        raise ModelError("there is no attention whose keys could be kept", hint=HINT)
    place = next(node for node in reversed(graph.nodes) if node.op == "placeholder")
    with graph.inserting_after(place):
        past = place = _placeholder(graph, PAST, torch.empty(1, dtype=torch.int64, device="meta"))
    for number, (node, found) in enumerate(attentions):
        _check_causal(region, node, found)
        place = _replace(made, node, found, number, past, place)
    graph.eliminate_dead_code()
    _move_positions(graph, past)
    _keep_last_token(graph)
    graph.lint()
    _check_numbers(original, made)
    return made


def _placeholder(graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
    node = graph.placeholder(name)
    node.meta = {"val": value, "by": "with_cache"}
    return node


def _check_causal(region: Region, node: fx.Node, attention: Attention) -> None:
    """Is the mask causality and nothing else, whatever the tokens are?"""
    mask = attention.attn_mask
    if mask is None:
        if not attention.is_causal:
            raise ModelError("an attention reads tokens that are still to come", where=node.name, hint=HINT)
        return
    source = [one for one in region.graph.nodes if one.op == "placeholder" and one.name != PAST][:1]
    run = part_function(region, source, [mask])
    for batch, tokens in SIZES:
        for fill in (0, 1):
            found = run(torch.full((batch, tokens), fill, dtype=torch.int64))[0]
            allowed = found if found.dtype is torch.bool else found == 0
            causal = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(*allowed.shape[:2], tokens, tokens)
            if not torch.equal(allowed.expand_as(causal), causal):
                raise ModelError("the mask of an attention is not causality alone", where=node.name, hint=HINT)


def _replace(made: Cached, node: fx.Node, attention: Attention, number: int, past: fx.Node, place: fx.Node) -> fx.Node:
    """Put an attention with caches in the place of one without; the last placeholder."""
    graph = made.region.graph
    query, key, value = attention[:3]
    caches: list[fx.Node] = []
    for name, one in (("key", key), ("value", value)):
        _, groups, _, width = one.meta["val"].shape
        if not (isinstance(groups, int) and isinstance(width, int)):
            raise ModelError("heads or their widths vary", where=node.name, hint=HINT)
        with graph.inserting_after(place):
            place = _placeholder(graph, f"{name}_{number}", torch.empty((1, groups, 1, width), dtype=torch.float32, device="meta"))
        made.caches[place.name] = groups, width
        caches.append(place)
    with graph.inserting_before(node):
        new = graph.call_function(attend_cached, (query, key, value, past, *caches, attention.scale, *attention.blocks))
    new.meta = {key: given for key, given in node.meta.items() if key in ("val", "path", "module")} | {"by": "with_cache"}
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return place


def _move_positions(graph: fx.Graph, past: fx.Node) -> None:
    """What counts tokens from 0 on counts from `past` on."""
    for node in list(graph.nodes):
        if node.target is aten.arange.default and isinstance(node.kwargs.get("end"), fx.Node) and argument(node.kwargs["end"], "dim") == 1:
            with graph.inserting_after(node):
                moved = graph.call_function(aten.add.Tensor, (), {"self": node, "other": past})
            moved.meta = {"val": node.meta["val"], "by": "with_cache"}
            node.replace_all_uses_with(moved, delete_user_cb=lambda user, moved=moved: user is not moved)


def _keep_last_token(graph: fx.Graph) -> None:
    """The only output is what the last layer says of the last token, in float32: the layer computes nothing else."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    logits = output.args[0][0]
    if not isinstance(logits, fx.Node) or logits.target is not aten.linear.default or logits.meta["val"].dim() != 3:
        raise ModelError("the first output is not [batch, tokens, vocabulary] of a linear layer", where="output", hint=HINT)
    source: Any = logits.kwargs["input"]
    with graph.inserting_before(logits):
        last = graph.call_function(aten.select.int, (), {"self": source, "dim": 1, "index": -1})
    last.meta = {"val": source.meta["val"][:, -1], "by": "with_cache"}
    logits.kwargs = {**logits.kwargs, "input": last}
    logits.meta = {**logits.meta, "val": logits.meta["val"][:, -1]}
    logits.meta.pop("kernel", None)
    result = logits
    if logits.meta["val"].dtype is not torch.float32:
        with graph.inserting_after(logits):
            result = graph.call_function(aten.to.dtype, (), {"self": logits, "dtype": torch.float32})
        result.meta = {"val": logits.meta["val"].float(), "by": "with_cache"}
    output.args = ((result,),)


def empty_caches(caches: Mapping[str, tuple[int, int]], batch: int, capacity: int) -> list[Tensor]:
    """Caches of no token yet, float32."""
    return [torch.zeros(batch, groups, capacity, width, dtype=torch.float32) for groups, width in caches.values()]


def _check_numbers(original: Region, made: Cached) -> None:
    """Does the model, fed in pieces, say what it says of the whole? Raises ModelError."""
    tables = [node.kwargs["weight"].meta["val"].shape[0] for node in original.graph.nodes if node.target is aten.embedding.default]
    ids = torch.randint(0, min(tables, default=2), (1, 7), generator=torch.Generator().manual_seed(0))
    whole, cached = (flat_function(_without_scores(_without_kernels(one))) for one in (original, made.region))
    caches, past = empty_caches(made.caches, 1, 8), 0
    for size in (4, 1, 2):
        with torch.no_grad():
            found = cached(ids[:, past:past + size], torch.tensor([past]), *caches)[0]
            past += size
            expected = whole(ids[:, :past])[0][:, -1]
        tolerance, expected = TOLERANCES.get(expected.dtype, COARSE), expected.float()
        if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
            raise ModelError("its positions or its mask depend on more than the number of tokens", where=f"token {past}", hint=HINT)


def _without_scores(region: Region) -> Region:
    """The same with all keys where scores choose among them: what one token chooses is not what it chose among others. In place."""
    for node in region.graph.nodes:
        if node.target is attend_cached and len(node.args) > BLOCKS + EXTENT:
            node.args = (*node.args[: BLOCKS + 2], ALWAYS, ALWAYS, *node.args[BLOCKS + EXTENT :])
        elif node.target is attend.op and not (indexer := Indexer.parse(str(argument(node, "indexer")))).is_static:
            node.kwargs = {**node.kwargs, "indexer": str(replace(indexer, dense_below=ALWAYS, dense_below_decoding=ALWAYS))}
    return region


def _without_kernels(region: Region) -> Region:
    """The same graph by its portable operators."""
    plain = region.clone()
    for node in plain.graph.nodes:
        node.meta.pop("kernel", None)
    return plain
