"""The attentions that can choose their blocks, in graphs and in eager Python, and how they are given an indexer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.branches import Branches
from sparsify_compiler.decision import Decision
from sparsify_compiler.fold import put
from sparsify_compiler.indexer import UNLEARNED, Indexer
from sparsify_compiler.library_attention import find_library_attentions, library_shape
from sparsify_compiler.normal_form_edit import argument, insert, replace
from sparsify_compiler.ops import attend
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline_text import print_value
from sparsify_compiler.program import Program, Region, Site
from sparsify_compiler.selectors import select
from sparsify_compiler.sites import find_sites

KIND = ("attention",)


def attention_sites(program: Program, ctx: Context, targets: tuple[str, ...], ignore: tuple[str, ...]) -> list[Site]:
    """The sites that `targets` names, that `ignore` does not, and that have no indexer yet; of those that cannot have one, ctx hears why.

    Attentions that stay eager Python are sites of region "" with the fact "eager".
    """
    eager = {} if program.skeleton is None else find_library_attentions(program.skeleton)
    every = [*find_sites(program, KIND), *(Site("attention", path, "", {}, {"eager": True}) for path in eager)]
    sites = select(every, targets, ignore, program) if every or targets != KIND else []
    if not sites:
        ctx.miss("the model has no attention that can choose its blocks")
    found = []
    for site in sites:
        why = eager[site.path] if "eager" in site.facts else _unfit(program.regions[site.region].node(site.roles["attention"]))
        if why is not None:
            ctx.miss(why, site.path)
        elif site.path not in program.attentions:
            found.append(site)
    return found


def give_indexer(program: Program, site: Site, indexer: Indexer | Branches, by: str, learned: Mapping[str, Tensor] = UNLEARNED) -> None:
    """Let this attention choose its blocks so, with the tensors of the indexer's `learned`; `by` is the pass that says it."""
    tensors = {name: learned[name] for name in indexer.learned}
    if "eager" in site.facts:
        program.attentions[site.path] = str(indexer)
        if tensors:
            program.learned[site.path] = tensors
    else:
        _attend(program.regions[site.region], site, str(indexer), tensors, by)
    program.decisions[site.path] = Decision(site.path, "attention", structure=described(indexer), format="by block", kernel="attend_blocks",
                                            reason="not measured")


def shape_of(program: Program, site: Site) -> tuple[int, int, int, int, torch.dtype]:
    """Heads, groups of them that share keys, width of a key and of a value, and dtype of an attention."""
    if "eager" in site.facts:
        assert program.skeleton is not None
        heads, groups, width = library_shape(program.skeleton.get_submodule(site.path))
        return heads, groups, width, width, dtype_of(program)
    node = program.regions[site.region].node(site.roles["attention"])
    query, key, value = (node.kwargs[name].meta["val"] for name in ("query", "key", "value"))  # type: ignore[union-attr]
    return int(query.shape[1]), int(key.shape[1]), int(key.shape[3]), int(value.shape[3]), query.dtype


def dtype_of(program: Program) -> torch.dtype:
    """Of a model's parameters."""
    return next((t.dtype for region in program.regions.values() for t in region.module.parameters() if t.is_floating_point()), torch.float32)


def described(indexer: Any) -> str:
    """What an indexer, or each of several branches, reads, for the report."""
    if isinstance(indexer, Branches):
        return " + ".join(described(part) for part in indexer.parts)
    if not isinstance(indexer, Indexer):
        return print_value(indexer)
    what = [print_value(pattern) for pattern in indexer.always] + ([f"{indexer.selector} of {indexer.scorer}"] if indexer.scorer else [])
    others = (f"{len(heads)} heads: {described(choice)}" for choice, heads in zip(indexer.choices, indexer.heads, strict=True))
    more = [f"in the order of {indexer.order}"] if indexer.order else []
    return "; ".join((" | ".join(what), *others, *more, *([f"{indexer.rest} for the rest"] if indexer.rest else [])))


def _attend(region: Region, site: Site, indexer: str, learned: Mapping[str, Tensor], name: str) -> None:
    node = region.node(site.roles["attention"])
    given: dict[str, Any] = {key: node.kwargs[key] for key in ("query", "key", "value", "attn_mask", "is_causal", "scale")
                             if node.kwargs.get(key) is not None}
    if learned:
        given["learned"] = [put(region, node, tensor, key, (), node.meta, name) for key, tensor in learned.items()]
    made = insert(node, attend.op, node.meta["val"], **given, indexer=indexer)
    made.meta.update({"by": name, "site": site.path, "causal": site.facts["mask"] == "causal"})  # by its mask, where not by is_causal
    replace(node, made)


def _unfit(node: fx.Node) -> str | None:
    query, key = (node.kwargs[name].meta["val"].shape for name in ("query", "key"))  # type: ignore[union-attr]
    if len(query) != 4:
        return f"its queries have {len(query)} dimensions, not batch, heads, tokens and width"
    if argument(node, "dropout_p"):
        return "it drops shares at random"
    if argument(node, "is_causal") and query[2] != key[2]:
        return "it is causal with queries and keys of different lengths, which torch aligns at the start"
    return None
