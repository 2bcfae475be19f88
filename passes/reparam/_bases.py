"""Which basis each value of a residual stream is to have, and what must be rotated for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.fold import evaluate, is_constant, leaves, masks, put
from sparsify_compiler.normal_form_edit import aten, insert, is_call, rank
from sparsify_compiler.passes.reparam._stream import Stream
from sparsify_compiler.passes.reparam._weights import tied
from sparsify_compiler.passes_api import Miss
from sparsify_compiler.pattern import op_name
from sparsify_compiler.program import Region

Basis = int | None  # a number, or None for the basis that the model has


@dataclass
class Bases:
    """The plan for one stream.

    of      value -> its basis
    norms   basis -> the norms that read values in it, in the order of execution
    """

    region: Region
    stream: Stream
    of: dict[fx.Node, Basis] = field(default_factory=dict)
    norms: dict[int, list[fx.Node]] = field(default_factory=dict)


def plan_bases(region: Region, stream: Stream, share: int, untie: bool) -> Bases | Miss:
    """A basis for every `share` values in turn that a norm reads (0: one for all); other values have that of the sum that they go into.

    What a tied weight writes keeps the basis that it has.
    """
    for node, dim in stream.writers.items():
        why = _no_writer(region, node, dim)
        if why is not None:
            return why
    for user, leaf, dim in stream.leaves:
        if dim != (rank(leaf) or 0) - 1:
            return Miss(f"the features of {leaf.name} do not lie in its last dimension", user.name)
    plan = Bases(region, stream)
    order = [node for node in region.graph.nodes if node in stream.seen]
    kept = {node for node in stream.writers if not untie and _is_tied(region, node)}
    read = [node for node in order if any(norm in node.users for norm in stream.norms)]
    number = 0
    for node in read:
        if node in kept:
            continue
        basis = number // share if share else 0
        number += 1
        plan.of[node] = basis
        plan.norms.setdefault(basis, []).extend(norm for norm in stream.norms if norm in node.users)
    for node in reversed(order):
        if node not in plan.of:
            into = next((user for user in node.users if user in stream.seen), None)
            plan.of[node] = None if node in kept or into is None else plan.of[into]
    return plan if plan.norms else Miss("every norm reads what a tied weight writes", stream.norms[0].name)


def _no_writer(region: Region, node: fx.Node, dim: int) -> Miss | None:
    name = f"{op_name(node)} ({node.name})" if node.op == "call_function" else f"the input {node.name}"
    if not is_call(node, aten.linear.default, aten.embedding.default):
        return Miss(f"{name} writes to the residual stream, and has no weight to rotate", node.name)
    if dim != (rank(node) or 0) - 1:
        return Miss(f"{name} gives its features in another dimension", node.name)
    weights = [node.kwargs[name] for name in ("weight", "bias") if isinstance(node.kwargs.get(name), fx.Node)]
    if not all(is_constant(weight) for weight in weights):
        return Miss(f"the weight of {name} is no parameter", node.name)
    return Miss(f"would dissolve a mask of {name}", node.name) if any(masks(region, weight) for weight in weights) else None


def _is_tied(region: Region, node: fx.Node) -> bool:
    return tied(region, node.kwargs["weight"], [node]) is not None  # type: ignore[arg-type]


@dataclass
class Rotation:
    """Carries out a plan. `bases` holds an orthogonal matrix [features, features] a basis, float64; the new coordinates of x are x Q."""

    plan: Bases
    bases: Mapping[int, Tensor]
    by: str

    def run(self) -> None:
        """Rotate what is written, insert what leads from one basis to the next, and rotate what reads."""
        stream = self.plan.stream
        inside = [node for node in self.plan.region.graph.nodes if node in stream.seen and node not in stream.writers]
        for node in stream.writers:
            self._rotate_writer(node)
        for user, leaf, _ in stream.leaves:
            basis = self.plan.of[user]
            if basis is not None:
                user.replace_input_with(leaf, self._stored(user, self._value(leaf) @ self.bases[basis], "rotated", leaf))
        for node in inside:
            for source in node.all_input_nodes:
                if source in stream.seen and self.plan.of[source] != self.plan.of[node]:
                    node.replace_input_with(source, self._linear(node, source, self._matrix(node).T @ self._matrix(source)))
        for norm in stream.norms:
            basis = self.plan.of[norm.kwargs["input"]]  # type: ignore[index]
            if basis is not None:
                self._rotate_readers(norm, self.bases[basis])

    def _matrix(self, node: fx.Node) -> Tensor:
        basis = self.plan.of[node]
        return torch.eye(next(iter(self.bases.values())).shape[0], dtype=torch.float64) if basis is None else self.bases[basis]

    def _value(self, node: Any) -> Tensor:
        return evaluate(self.plan.region, node).double()

    def _stored(self, before: fx.Node, value: Tensor, argument: str, made_of: Any, place: Mapping[str, Any] | None = None) -> fx.Node:
        dtype = made_of.meta["val"].dtype
        return put(self.plan.region, before, value.to(dtype), argument, leaves(made_of), before.meta if place is None else place, self.by)

    def _set(self, node: Any, name: str, value: Tensor) -> None:
        node.kwargs = {**node.kwargs, name: self._stored(node, value, name, node.kwargs[name])}
        node.meta["by"] = self.by

    def _rotate_writer(self, node: Any) -> None:
        basis = self.plan.of[node]
        if basis is None:
            return
        q, weight = self.bases[basis], self._value(node.kwargs["weight"])
        self._set(node, "weight", weight @ q if is_call(node, aten.embedding.default) else q.T @ weight)
        if isinstance(node.kwargs.get("bias"), fx.Node):
            self._set(node, "bias", self._value(node.kwargs["bias"]) @ q)

    def _linear(self, before: fx.Node, source: fx.Node, weight: Tensor) -> fx.Node:
        """A linear of its own, at a path of its own."""
        like = next(w for node in self.plan.stream.writers if isinstance(w := node.kwargs["weight"], fx.Node))
        stored = self._stored(before, weight, "rotation", like)
        new = insert(before, aten.linear.default, input=source, weight=stored)
        new.meta |= {"by": self.by, "path": self.plan.region.qualified(str(stored.target)), "module": "Linear"}
        return new

    def _rotate_readers(self, norm: Any, q: Tensor) -> None:
        """W Q for the linears that read a norm; where it has a scale, or others read it, a linear behind it that leads back."""
        region, scale = self.plan.region, norm.kwargs.get("weight")
        if scale is None and all(self._can_rotate(user, norm) for user in norm.users):
            for user in list(norm.users):
                self._set(user, "weight", self._value(user.kwargs["weight"]) @ q)
            return
        users = list(norm.users)
        back = self._linear(norm, norm, q if scale is None else self._value(scale)[:, None] * q)
        norm.append(back)
        for user in users:
            user.replace_input_with(norm, back)
        norm.kwargs = {name: value for name, value in norm.kwargs.items() if name != "weight"}
        norm.meta["by"] = self.by
        back.meta["val"] = norm.meta["val"]
        region.graph.lint()

    def _can_rotate(self, user: Any, norm: fx.Node) -> bool:
        region = self.plan.region
        if not is_call(user, aten.linear.default) or user.kwargs["input"] is not norm or not is_constant(user.kwargs["weight"]):
            return False
        return not masks(region, user.kwargs["weight"]) and tied(region, user.kwargs["weight"], [user]) is None
