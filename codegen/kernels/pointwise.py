"""What oneDNN computes on the results of a linear or convolution before it writes them, and how torch's operators spell it.

A NaN that meets a fused relu, relu6, hardtanh or hardsigmoid comes out as one of their bounds, here as under torch.compile: oneDNN takes the
maximum the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Spelled = tuple[str, list[float], str]  # oneDNN's name, numbers, variant
NONE: Spelled = ("none", [], "")
PLAIN: Mapping[str, Spelled] = {"relu": ("relu", [], ""), "relu6": ("hardtanh", [0.0, 6.0], ""), "silu": ("swish", [], ""),
                                **{name: (name, [], "") for name in ("hardswish", "sigmoid", "tanh", "hardsigmoid")}}


def spell(attributes: Mapping[str, Any]) -> Spelled | None:
    """The attributes' activation as oneDNN spells it; NONE without one, None for one that it does not have."""
    name, arguments = attributes.get("activation"), attributes.get("arguments", {})
    if name is None or name in PLAIN:
        return NONE if name is None else PLAIN[name]
    if name == "hardtanh":
        low, high = arguments["min_val"], arguments["max_val"]
        return ("hardtanh", [low, high], "") if low <= high else None
    if name == "leaky_relu":
        return ("leaky_relu", [arguments["negative_slope"]], "")
    return ("gelu", [], arguments["approximate"]) if name == "gelu" else None
