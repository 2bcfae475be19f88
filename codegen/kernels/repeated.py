"""A grouped convolution of one input channel and several output channels a group, as a depthwise one over its input with every channel repeated.

oneDNN packs grouped weights in blocks of 16 × 16 channels: a group of 1 × 2 channels is padded to 128 times its bytes and multiplications, while
a depthwise weight is packed without any padding. FastViT's patch embeddings (arXiv:2303.14189, table 2) are such convolutions.

Bound by: the bytes of x, which is written once more, repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen.kernels import conv2d
from sparsify_compiler.codegen.kernels.linear import has_packed
from sparsify_compiler.errors import KernelError
from sparsify_compiler.target import Target

NAME, LABEL = "repeated", "dense packed, channels repeated"


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the form; none for any other convolution."""
    found = conv2d.offer(op, tensors, attributes, dtype, rows, target)
    return [(LABEL, options) for _, options in found if _fits(tensors["weight"], attributes)]


def _fits(weight: Tensor, attributes: Mapping[str, Any]) -> bool:
    """An image convolution of several groups, each from one channel to more than one."""
    groups = int(attributes["groups"])
    return weight.dim() == 4 and weight.shape[1] == 1 and weight.shape[0] > groups > 1


def bind(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
         files: Mapping[str, bytes], target: Target, shared: list[Any]) -> RepeatedConv:
    """The layer with its weight packed. Raises KernelError."""
    weight, size = tensors["weight"], [int(n) for n in options["input_size"]]
    if not has_packed(weight, target) or not _fits(weight, attributes) or not conv2d.takes(weight, attributes) or len(size) != 4 or min(size) < 1:
        raise KernelError("torch has no packed depthwise convolution for this layer on this machine", where=op, hint="compile the model again here")
    try:
        return RepeatedConv(weight, bias, attributes, size, options)
    except RuntimeError as error:  # oneDNN's own, for sizes that do not go together
        raise KernelError(f"the weight cannot be packed for an input of {size}: {error}", where=op, hint="compile the model again here") from error


class RepeatedConv(conv2d.PackedConv):
    """x [N, G, H, W], + other of y's shape where it adds -> y [N, O, ...], channels last; weight [O, 1, ...] in G groups."""

    name = LABEL

    def __init__(self, weight: Tensor, bias: Tensor | None, attributes: Mapping[str, Any], size: list[int],
                 options: Mapping[str, Any]) -> None:
        outputs = weight.shape[0]
        self._times = outputs // int(attributes["groups"])
        super().__init__(weight, bias, {**attributes, "groups": outputs}, [size[0], outputs, *size[2:]], options, [])

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        batch, channels, height, width = x.shape
        pixels = x.permute(0, 2, 3, 1).unsqueeze(4).expand(-1, -1, -1, -1, self._times)
        return super().__call__(pixels.reshape(batch, height, width, channels * self._times).permute(0, 3, 1, 2), other)
