"""The attentions that can choose their blocks, in graphs and in eager Python, and how they are given an indexer."""

from __future__ import annotations

from torch import fx

from sparsify_compiler.decision import Decision
from sparsify_compiler.indexer import Indexer
from sparsify_compiler.library_attention import find_library_attentions
from sparsify_compiler.normal_form_edit import argument, insert, replace
from sparsify_compiler.ops import attend
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline_text import print_value
from sparsify_compiler.program import Program, Site
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


def give_indexer(program: Program, site: Site, indexer: Indexer, by: str) -> None:
    """Let this attention choose its blocks so; `by` is the pass that says it."""
    if "eager" in site.facts:
        program.attentions[site.path] = str(indexer)
    else:
        _attend(program.regions[site.region].node(site.roles["attention"]), site, str(indexer), by)
    program.decisions[site.path] = Decision(site.path, "attention", structure=described(indexer), format="by block", kernel="attend_blocks",
                                            reason="not measured")


def described(indexer: Indexer) -> str:
    """What an indexer reads, for the report."""
    what = [print_value(pattern) for pattern in indexer.always] + ([f"{indexer.selector} of {indexer.scorer}"] if indexer.scorer else [])
    others = (f"{len(heads)} heads: {described(choice)}" for choice, heads in zip(indexer.choices, indexer.heads, strict=True))
    return "; ".join((" | ".join(what), *others))


def _attend(node: fx.Node, site: Site, indexer: str, name: str) -> None:
    given = {key: node.kwargs[key] for key in ("query", "key", "value", "attn_mask", "is_causal", "scale") if node.kwargs.get(key) is not None}
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
