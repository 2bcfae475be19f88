"""One spelling for every operation, of captured graphs and of patterns alike.

Afterwards every call is a functional aten overload with its arguments by name (SymInt arithmetic and getitem excepted), arguments equal to
the schema's default are dropped, and what can be said in several ways is said in one: see the normal_form_*.py file of each.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from .normal_form_activation import name_activation
from .normal_form_attention import name_attention
from .normal_form_common import merge_common
from .normal_form_inplace import functionalise
from .normal_form_names import name_arguments
from .normal_form_noops import drop_detached, drop_noop
from .normal_form_norm import name_norm
from .normal_form_spelling import respell
from .normal_form_torch import to_aten

Rewrite = Callable[[fx.Node], bool]  # looks at one node with named arguments and says whether it changed the graph

_SPELLING: tuple[Rewrite, ...] = (name_arguments, drop_noop, respell)
_NAMING: tuple[Rewrite, ...] = (name_norm, name_activation, name_attention)


def normalise(graph_module: fx.GraphModule, trains: bool = False) -> None:
    """Bring a graph into normal form, in place. Idempotent. Raises NotFunctionalError where it writes to a tensor that has other names.

    trains  gradients will pass through it: what detaches a value stays
    """
    spelling = _SPELLING if trains else (*_SPELLING, drop_detached)
    graph = graph_module.graph
    for node in list(graph.nodes):
        to_aten(node)
    functionalise(graph)
    _settle(graph, spelling)
    _settle(graph, spelling + _NAMING)  # formulas are recognised once nothing that says nothing stands between their parts
    graph.lint()
    graph_module.recompile()


def _settle(graph: fx.Graph, rewrites: tuple[Rewrite, ...]) -> None:
    """Apply rewrites until nothing changes."""
    changed = True
    while changed:
        changed = False
        for node in list(graph.nodes):
            changed |= any(rewrite(node) for rewrite in rewrites)
        changed |= merge_common(graph)
        graph.eliminate_dead_code()
