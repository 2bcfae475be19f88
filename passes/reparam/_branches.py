"""Linear branches of one value, and the rule that merges two of them: their kernels are added in the frame that holds the taps of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, Signature
from math import gcd
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn.functional import conv1d, conv2d, conv3d

from sparsify_compiler.fold import is_mask_product
from sparsify_compiler.passes.reparam._frames import Frame, Kernel, common, frame_of, placed, size_of, spelled
from sparsify_compiler.passes.reparam._lattice import Lattice
from sparsify_compiler.passes.reparam._norms import NORM, along, batch_statistics, norm, plus, scale_and_shift
from sparsify_compiler.passes_api import Miss
from sparsify_compiler.pattern import op_name
from sparsify_compiler.rule import Match, Rule

CONVS: Mapping[int, Callable[..., Any]] = {1: conv1d, 2: conv2d, 3: conv3d}
NORM_PARAMETERS = ("mean", "var", "g", "beta")
# names of a branch that must be parameters
PARAMETERS = ("w", "b", "scale", *NORM_PARAMETERS, *(f"{name}_before" for name in NORM_PARAMETERS))


class Branch:
    """A linear op on x and the conv that it is. `a` holds what its names stand for: patterns in write(), values in the rest."""

    names: tuple[str, ...] = ()

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def write(self, x: Any, a: Any) -> Any:
        """The op as a pattern."""
        raise NotImplementedError

    def refuse(self, x: Any, a: Any) -> Miss | None:
        """Why it is no conv."""
        return None

    def frame(self, a: Any) -> Frame:
        """Where its taps lie."""
        return (Lattice(),) * self.rank

    def kernel(self, x: Tensor, a: Any) -> Kernel:
        """The conv that it is, in float tensors."""
        raise NotImplementedError


class Conv(Branch):
    """A conv of any stride, padding, dilation and groups."""

    names: tuple[str, ...] = ("w", "b", "stride", "padding", "dilation", "groups")

    def write(self, x: Any, a: Any) -> Any:
        return CONVS[self.rank](x, a.w, a.b, a.stride, a.padding, a.dilation, a.groups)

    def frame(self, a: Any) -> Frame:
        return frame_of(a.w.shape[2:], a.stride, a.padding, a.dilation)

    def kernel(self, x: Tensor, a: Any) -> Kernel:
        return Kernel(a.w, a.b, self.frame(a), a.groups)


class Identity(Branch):
    """x itself: a depthwise 1x1 conv of ones."""

    def write(self, x: Any, a: Any) -> Any:
        return x

    def kernel(self, x: Tensor, a: Any) -> Kernel:
        channels = x.shape[-1 - self.rank]
        return Kernel(torch.ones([channels, 1, *[1] * self.rank], dtype=x.dtype, device=x.device), None, self.frame(a), channels)


class Normed(Branch):
    """A norm with stored statistics behind another branch; behind x itself it is a depthwise 1x1 conv."""

    def __init__(self, inner: Branch) -> None:
        super().__init__(inner.rank)
        self.inner, self.names = inner, (*inner.names, *NORM)

    def write(self, x: Any, a: Any) -> Any:
        return norm(self.inner.write(x, a), a.mean, a.var, a.g, a.beta, a.eps, a.training)

    def refuse(self, x: Any, a: Any) -> Miss | None:
        if x.ndim != self.rank + 2:
            return Miss(f"the norm's channels are not the conv's: the input has {x.ndim} dimensions, not {self.rank + 2}")
        return batch_statistics(a.mean, a.var, a.training) or self.inner.refuse(x, a)

    def frame(self, a: Any) -> Frame:
        return self.inner.frame(a)

    def kernel(self, x: Tensor, a: Any) -> Kernel:
        inner = self.inner.kernel(x, a)
        s, t = scale_and_shift(a.mean, a.var, a.g, a.beta, a.eps)
        return Kernel(inner.weight * along(s, inner.weight, 0), t if inner.bias is None else inner.bias * s + t, inner.frame, inner.groups)


class MergeBranches(Rule):
    """first + second, or first - second, of one x: one conv. Names of the first end in 1, those of the second in 2.

    A foreign addend between them, as in (first + y) + second, is added afterwards.
    """

    params: ClassVar[tuple[str, ...]] = tuple(f"{name}{i}" for name in PARAMETERS for i in (1, 2))
    only_if_cheaper: ClassVar[bool] = True

    def __init__(self, first: Branch, second: Branch, sign: int = 1) -> None:
        self.first, self.second, self.sign = first, second, sign
        names = ["x", *(f"{name}1" for name in first.names), *(f"{name}2" for name in second.names)]
        self.pattern = named(names, self._sum)
        self.rewrite = named([*names, "y"], self._merged)
        between = (named([*names, "y"], self._first_between), named([*names, "y"], self._second_between)) if sign == 1 else ()
        self._patterns = (self.pattern, *between)

    def patterns(self) -> tuple[Callable[..., Any], ...]:
        return self._patterns

    def check(self, m: Match) -> Miss | None:
        a, b = self._arguments(m.binding.variables, m)
        why = self.first.refuse(m.x, a) or self.second.refuse(m.x, b) or _shapes(m) or self._strides(a, b) or second_mask(m)
        return why or same_size(m, self.first.rank, *self._frame(a, b)) or self._order(a, b)

    def _strides(self, a: Any, b: Any) -> Miss | None:
        one, other = (tuple(line.stride for line in frame) for frame in (self.first.frame(a), self.second.frame(b)))
        return None if one == other else Miss(f"the branches have strides {one} and {other}")

    def _order(self, a: Any, b: Any) -> Miss | None:
        """Of two convs added, the larger is the first: the one that is left has its place in the model."""
        if self.sign == 1 and type(self.first) is type(self.second) is Conv and a.w[0, 0].numel() < b.w[0, 0].numel():
            return Miss(f"the {size_of(self.second.frame(b))} kernel takes in the {size_of(self.first.frame(a))} one, not the other way round")
        return None

    def _frame(self, a: Any, b: Any) -> tuple[Frame, Any]:
        return spelled(common(self.first.frame(a), self.second.frame(b)))

    def _merged(self, v: Mapping[str, Any]) -> Any:
        a, b = self._arguments(v)
        one, other = self.first.kernel(v["x"], a), self.second.kernel(v["x"], b)
        frame, padding = self._frame(a, b)
        groups = gcd(one.groups, other.groups)
        w = plus(placed(one, frame, groups), placed(other, frame, groups), self.sign)
        merged = conv(self.first.rank, v["x"], w, plus(one.bias, other.bias, self.sign), frame, padding, groups)
        return merged if v["y"] is None else merged + v["y"]

    def _sum(self, v: Mapping[str, Any]) -> Any:
        a, b = self._arguments(v)
        one, other = self.first.write(v["x"], a), self.second.write(v["x"], b)
        return one + other if self.sign == 1 else one - other

    def _first_between(self, v: Mapping[str, Any]) -> Any:
        a, b = self._arguments(v)
        return (self.first.write(v["x"], a) + v["y"]) + self.second.write(v["x"], b)

    def _second_between(self, v: Mapping[str, Any]) -> Any:
        a, b = self._arguments(v)
        return (self.second.write(v["x"], b) + v["y"]) + self.first.write(v["x"], a)

    def _arguments(self, v: Mapping[str, Any], m: Match | None = None) -> tuple[Any, Any]:
        """What the names of each branch stand for; of a match, tensors in place of nodes."""
        get = v.__getitem__ if m is None else m.__getattr__
        return (SimpleNamespace(**{name: get(f"{name}1") for name in self.first.names}),
                SimpleNamespace(**{name: get(f"{name}2") for name in self.second.names}))


def named(names: Iterable[str], function: Callable[[Mapping[str, Any]], Any]) -> Callable[..., Any]:
    """A function of arguments with these names, which hands them on as one mapping."""
    sign = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(sign.bind(*args, **kwargs).arguments)

    call.__signature__ = sign  # type: ignore[attr-defined]
    return call


def conv(rank: int, x: Tensor, w: Tensor | None, bias: Tensor | None, frame: Frame, padding: Any, groups: int) -> Tensor:
    """The conv whose taps lie in that frame."""
    made: Tensor = CONVS[rank](x, w, bias, [line.stride for line in frame], padding, [line.step for line in frame], groups)
    return made


def same_size(m: Match, rank: int, frame: Frame, padding: Any) -> Miss | None:
    """A Miss where the sizes of the one conv are not seen to be those of what it stands for: for other inputs they may differ."""
    output = m.output.meta["val"]
    w = m.x.new_empty([output.shape[-1 - rank], m.x.shape[-1 - rank], *(line.size for line in frame)])
    made = conv(rank, m.x, w, None, frame, padding, 1)
    expected, found = (", ".join(map(str, value.shape)) for value in (output, made))
    return None if expected == found else Miss(f"one conv would have the shape [{found}], which is not known to be [{expected}]")


def second_mask(m: Match) -> Miss | None:
    """Of several convs one stays; the mask of another would have no layer any more."""
    convs = [node for node in m.nodes if "weight" in node.kwargs and op_name(node).startswith("conv")]
    for node in convs:
        weight = node.kwargs["weight"]
        if node is not m.source(op_name(node)) and isinstance(weight, fx.Node) and is_mask_product(m.region, weight):
            mask = next(source for source in weight.all_input_nodes if source.meta["val"].dtype == torch.bool)
            return Miss(f"would dissolve the mask {mask.target}")
    return None


def _shapes(m: Match) -> Miss | None:
    """Branches of another shape than the sum are broadcast."""
    whole = m.output.meta["val"].shape
    foreign = m.node("y") if "y" in m.binding.variables else None
    for add in (node for node in m.nodes if op_name(node) in ("add", "sub")):
        for part in (add.kwargs["self"], add.kwargs["other"]):
            if part is not foreign and isinstance(part, fx.Node) and tuple(map(str, part.meta["val"].shape)) != tuple(map(str, whole)):
                return Miss(f"a branch of shape {_sizes(part.meta['val'])} is broadcast to {_sizes(m.output.meta['val'])}")
    return None


def _sizes(value: Tensor) -> str:
    return f"[{', '.join(map(str, value.shape))}]"

