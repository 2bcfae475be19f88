"""What is legal at each stage, checked after every pass; `preserves.py` checks what a pass promised to keep."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from .errors import VerifyError
from .operands import CONVOLUTIONS
from .program import Program, Region, Stage, get_tensor

OWN = "sparsify"  # the namespace of our ops
# Those of them that a plain, trainable graph may hold.
TRAINABLE = frozenset({f"sparsify.{name}.default" for name in (
    "select", "attend", "noted", "take_rows", "put_rows", "held_ffn", "experts_ffn", "top_tokens", "open_texts", "take_part", "put_part",
    "changes")})
# What is neither aten nor ours: arithmetic on sizes, and picking one of several outputs.
PYTHON = frozenset({operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.neg,
                    operator.pow, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.and_, operator.or_,
                    min, max, torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_int, torch.sym_float, torch.sym_ite})


@dataclass(frozen=True)
class Legal:
    """A row of the table: which of our own ops and marks a stage allows. Masks are allowed everywhere: a model may come with its own."""

    packed: bool  # our inference ops over storage formats
    kernels: bool  # nodes bound to a kernel


TABLE: Mapping[Stage, Legal] = {
    Stage.TRACED: Legal(packed=False, kernels=False),
    Stage.SPARSE: Legal(packed=False, kernels=False),
    Stage.PACKED: Legal(packed=True, kernels=False),
    Stage.LOWERED: Legal(packed=True, kernels=True),
}

Signature = Mapping[str, tuple[tuple[Any, ...], ...]]


def verify(program: Program, signature: Signature | None = None) -> None:
    """Check every node against what the Program's stage allows, and the outputs against `signature`, where given.

    Raises VerifyError that names the node and what is wrong with it.
    """
    legal = TABLE[program.stage]
    for region in program.regions.values():
        for node in region.graph.nodes:
            for check in CHECKS:
                wrong = check(region, node, legal)
                if wrong is not None:
                    what = f"{wrong} (stage {program.stage})" if check in _BY_STAGE else wrong
                    raise VerifyError(what, where=f"node {region.qualified(node.name)}")
        try:
            region.graph.lint()
        except RuntimeError as error:
            raise VerifyError(f"the graph is broken: {error}", where=f"region {region.path or '(whole model)'}") from error
    if signature is not None:
        _check_signature(signature, signature_of(program))


def signature_of(program: Program) -> Signature:
    """Region path -> shape and dtype of each flat output (the value itself where it is no tensor)."""
    result: dict[str, tuple[tuple[Any, ...], ...]] = {}
    for region in program.regions.values():
        output = next(node for node in region.graph.nodes if node.op == "output")
        flat, _ = torch.utils._pytree.tree_flatten(output.args[0])
        values = [leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf for leaf in flat]
        result[region.path] = tuple((tuple(v.shape), v.dtype) if isinstance(v, Tensor) else ((), type(v)) for v in values)
    return result


def _check_signature(before: Signature, after: Signature) -> None:
    for path, outputs in before.items():
        where = f"region {path or '(whole model)'}"
        if path not in after or len(after[path]) != len(outputs):
            raise VerifyError(f"had {len(outputs)} outputs, now {len(after.get(path, ()))}", where=where)
        for index, ((shape, dtype), (new_shape, new_dtype)) in enumerate(zip(outputs, after[path], strict=True)):
            if dtype != new_dtype or not _same_shape(shape, new_shape):
                raise VerifyError(f"output {index} was {dtype} {_spell(shape)}, now {new_dtype} {_spell(new_shape)}", where=where)


def _same_shape(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy, which takes longer than all of our own modules

    return len(one) == len(other) and all(str(a) == str(b) or statically_known_true(a == b) for a, b in zip(one, other, strict=True))


def _spell(shape: tuple[Any, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _known_kind(region: Region, node: fx.Node, legal: Legal) -> str | None:
    if node.op in ("placeholder", "get_attr", "output", "call_function"):
        return None
    return f"{node.op} is not normal form: every call is a call_function"


def _functional_op(region: Region, node: fx.Node, legal: Legal) -> str | None:
    if node.op != "call_function":
        return None
    if not isinstance(node.target, OpOverload):
        return None if node.target in PYTHON else f"{node.target} is not an operator of torch.ops"
    if node.target._schema.is_mutable:
        return f"{node.target} changes its arguments in place"
    return None


def _by_name(region: Region, node: fx.Node, legal: Legal) -> str | None:
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return None
    if node.args:
        return f"{node.target} has arguments by position; normal form gives all by name"
    known = {argument.name: argument for argument in node.target._schema.arguments}
    for name in node.kwargs:
        if name not in known:
            return f"{node.target} has no argument {name!r}"
    missing = [name for name, argument in known.items() if not argument.has_default_value() and name not in node.kwargs]
    return f"{node.target} lacks its argument {missing[0]!r}" if missing else None


def _resolves(region: Region, node: fx.Node, legal: Legal) -> str | None:
    if node.op != "get_attr":
        return None
    try:
        tensor = get_tensor(region.module, str(node.target))
    except (AttributeError, KeyError):
        return f"there is no parameter or buffer {node.target!r}"
    value = node.meta.get("val")
    if isinstance(value, Tensor) and (value.dtype != tensor.dtype or tuple(value.shape) != tuple(tensor.shape)):
        return f"{node.target!r} is {tensor.dtype} {_spell(tuple(tensor.shape))}, the graph says {value.dtype} {_spell(tuple(value.shape))}"
    return None


def _has_value(region: Region, node: fx.Node, legal: Legal) -> str | None:
    return None if node.op == "output" or "val" in node.meta else 'has no "val" in its metadata: shape and dtype are unknown'


def _masks(region: Region, node: fx.Node, legal: Legal) -> str | None:
    """A mask that one of our passes made is bool and has its weight's shape; a model's own may be of any kind."""
    weight, mask = node.kwargs.get("self"), node.kwargs.get("other")
    if node.target is not torch.ops.aten.mul.Tensor or not (isinstance(weight, fx.Node) and isinstance(mask, fx.Node)):
        return None
    if weight.op != "get_attr" or mask.op != "get_attr" or not _is_our_mask(mask):
        return None
    values, kept = (get_tensor(region.module, str(n.target)) for n in (weight, mask))
    if kept.dtype != torch.bool:
        return f"a mask is bool, this one is {kept.dtype}"
    return None if values.shape == kept.shape else f"the mask is {_spell(tuple(kept.shape))}, its weight {_spell(tuple(values.shape))}"


def _is_our_mask(node: fx.Node) -> bool:
    return re.search(r"_mask\d*$", str(node.target)) is not None and node.meta.get("by") != "capture"


def _packed(region: Region, node: fx.Node, legal: Legal) -> str | None:
    own = getattr(node.target, "namespace", "") == OWN
    if own and not legal.packed and str(node.target) not in TRAINABLE:
        return f"{node.target} is a packed op, which this stage does not allow"
    if "kernel" in node.meta and not legal.kernels:
        return "is bound to a kernel, which this stage does not allow"
    dense = node.target in (torch.ops.aten.linear.default, *CONVOLUTIONS)  # whose kernel is their packed dense form
    return "only packed ops, linears and convolutions are bound to kernels" if "kernel" in node.meta and not (own or dense) else None


CHECKS: tuple[Callable[[Region, fx.Node, Legal], str | None], ...] = (_known_kind, _functional_op, _packed, _by_name, _resolves, _has_value, _masks)
_BY_STAGE = frozenset({_packed})
