"""Activations written by hand → the one operator of that meaning.

    x * sigmoid(x)                                              → silu(x)
    0.5 * x * (1 + tanh(sqrt(2/π) * (x + 0.044715 * x**3)))     → gelu(x, approximate="tanh")
    0.5 * x * (1 + erf(x / sqrt(2)))                            → gelu(x)
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from .normal_form_edit import argument, aten, insert, is_call, replace


def name_activation(node: fx.Node) -> bool:
    """Replace a by-hand activation whose last product is `node`. True when it changed."""
    if not is_call(node, aten.mul.Tensor):
        return False
    a, b = node.kwargs["self"], node.kwargs["other"]
    for x, y in ((a, b), (b, a)):
        if is_call(y, aten.sigmoid.default) and isinstance(x, fx.Node) and y.kwargs["self"] is x:
            return _use(node, aten.silu.default, self=x)
    number, factors = _factors(node)
    if not math.isclose(number, 0.5, rel_tol=1e-6) or len(factors) != 2:
        return False
    for x, one_plus in (factors, reversed(factors)):
        inner = _one_plus(one_plus)
        if is_call(inner, aten.tanh.default) and _is_cubic(inner.kwargs["self"], x):
            return _use(node, aten.gelu.default, self=x, approximate="tanh")
        if is_call(inner, aten.erf.default) and _is_scaled(inner.kwargs["self"], x, 1 / math.sqrt(2)):
            return _use(node, aten.gelu.default, self=x)
    return False


def _use(node: fx.Node, target: Any, **kwargs: Any) -> bool:
    replace(node, insert(node, target, node.meta.get("val"), **kwargs))
    return True


def _factors(node: Any) -> tuple[float, list[Any]]:
    """A product as (number, the other factors)."""
    if is_call(node, aten.div.Tensor) and _is_number(node.kwargs["other"]) and argument(node, "other"):
        number, factors = _factors(node.kwargs["self"])
        return number / node.kwargs["other"], factors
    if not is_call(node, aten.mul.Tensor):
        return (float(node), []) if _is_number(node) else (1.0, [node])
    (m, left), (n, right) = _factors(node.kwargs["self"]), _factors(node.kwargs["other"])
    return m * n, left + right


def _one_plus(node: Any) -> Any:
    """y of 1 + y."""
    if not is_call(node, aten.add.Tensor) or argument(node, "alpha") != 1:
        return None
    a, b = node.kwargs["self"], node.kwargs["other"]
    return a if b == 1 else b if a == 1 else None


def _is_scaled(node: Any, x: Any, by: float) -> bool:
    number, factors = _factors(node)
    return len(factors) == 1 and factors[0] is x and math.isclose(number, by, rel_tol=1e-4)


def _is_cubic(node: Any, x: Any) -> bool:
    """sqrt(2/π) * (x + 0.044715 * x**3)."""
    number, factors = _factors(node)
    if len(factors) != 1 or not math.isclose(number, math.sqrt(2 / math.pi), rel_tol=1e-4) or not is_call(factors[0], aten.add.Tensor):
        return False
    total = factors[0]
    rest = total.kwargs["other"] if total.kwargs["self"] is x else total.kwargs["self"] if total.kwargs["other"] is x else None
    by, cubes = _factors(rest)
    if not math.isclose(by, 0.044715, rel_tol=1e-4):
        return False
    if len(cubes) == 1 and is_call(cubes[0], aten.pow.Tensor_Scalar):
        return cubes[0].kwargs["self"] is x and cubes[0].kwargs["exponent"] == 3
    return len(cubes) == 3 and all(cube is x for cube in cubes)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
