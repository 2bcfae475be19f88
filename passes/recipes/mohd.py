"""MoHD."""

from __future__ import annotations

from sparsify_compiler.passes.moe.route_channels import RouteChannels
from sparsify_compiler.pipeline import Pipeline


def mohd(density: float | None = None, shared: float = 0.25, groups: int = 16, targets: tuple[str, ...] = ("linear",)) -> Pipeline:
    """For training: layers read the channels that all rows share and those groups that a router chooses; a row keeps its length.

    The paper mixes the channels of a group beforehand (group fusion), which is not in this recipe

    Paper      Mixture of Hidden-Dimensions: Not All Hidden-States' Dimensions are Needed in Transformer, Chen et al., arXiv:2412.05644
    """
    return Pipeline((RouteChannels(density, shared, groups, "random", "normalised", True, targets),))
